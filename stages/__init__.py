"""The stages, one per file. Turns off the libraries' advice about optional packages before they are imported."""

import gc
import os
import signal
import sys

from dev2pro import signals

signals.stop_with_parent()  # before the imports, which take seconds: a rank whose torchrun dies meanwhile would wait for it for half an hour
if sys.argv[0] == "-m":  # a stage is starting: Ctrl-C ends it until the handlers are installed; a library could swallow the exception
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # imports make no garbage, and collecting takes a tenth of their time; frame.main enables it again
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
