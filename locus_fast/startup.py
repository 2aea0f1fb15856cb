"""What a command does before its imports, which take seconds: libraries' remarks silenced, Ctrl-C without a traceback.

Nothing here happens when `locus_fast` is imported by others.
"""

from __future__ import annotations

import os
import signal

from locus_fast.libraries import silence_remarks


def start() -> None:
    """Until the command takes over, Ctrl-C ends it at once, with exit code 130."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    silence_remarks()
