"""The stages, one per file. Turns off the libraries' advice about optional packages before they are imported."""

import gc
import os
import signal
import sys

from dev2pro import signals

signals.stop_with_parent()  # before the imports, which take seconds: a rank whose torchrun dies meanwhile would wait for it for half an hour
if sys.argv[0] == "-m":  # a stage is starting: Ctrl-C ends it until the handlers are installed; a library could swallow the exception
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # nothing of what the imports make is garbage, and looking through it again and again takes a tenth of them; see frame.main
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
