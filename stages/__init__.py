"""The stages' stories, one per file; before any of them imports a library, its advice about optional packages is turned off."""

import os

from dev2pro import stop

stop.follow()  # before the imports, which take seconds: a rank whose torchrun died meanwhile would wait for it for half an hour
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
