"""The stages' stories, one per file; before any of them imports a library, its advice about optional packages is turned off."""

import os
import signal
import sys

from dev2pro import signals

signals.stop_with_parent()  # before the imports, which take seconds: a rank whose torchrun died meanwhile would wait for it for half an hour
if sys.argv[0] == "-m":  # a stage is being started: until it listens Ctrl-C ends it, as an exception some library would swallow it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
