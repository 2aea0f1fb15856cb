"""What a command does before its imports, which take seconds: libraries' remarks silenced, Ctrl-C without a
traceback, help.

Nothing here happens when `locus_fast` is imported by others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from locus_fast.errors import UserError
from locus_fast.libraries import silence_remarks


def start() -> None:
    """Until the command takes over, Ctrl-C ends it at once, with exit code 130."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    silence_remarks()


def answer_help(parse: Callable[[list[str]], Any]) -> None:
    """Prints the help and ends the command if its line asks for that. parse: reads such a line without
    PyTorch; a line that it refuses is left to the command itself."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        with contextlib.suppress(UserError):
            parse(sys.argv[1:])
