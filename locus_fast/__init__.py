"""Teach a vision-language model to find small things: cue search with GRPO and one prefill a group."""

import os
import signal
import sys

from locus_fast.run.libraries import silence_remarks

# `python -m locus_fast...`, before its heavy imports: Ctrl-C until the command takes over ends without a traceback
if sys.argv[:1] == ["-m"] and any(word.startswith("locus_fast.") for word in sys.orig_argv):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

silence_remarks()
