"""Libraries that are not always there, and the remarks of libraries on parts of them that are not used here.

A command silences the remarks before its imports (`startup`), whichever library imports them: transformers
imports torchao with every model class. Other warnings, and all errors, are shown.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from locus_fast.errors import UserError, reason

# Logger -> beginnings of its remarks: native code built for another Python or card, a deprecation in torchao.
REMARKS = {
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass",),
}


class Silence(logging.Filter):
    """Drops a logger's records that begin in one of these ways, errors excepted."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not str(record.msg).startswith(self.beginnings)


def silence_remarks() -> None:
    """Drops the REMARKS; called before the libraries are imported."""
    for name, beginnings in REMARKS.items():
        logging.getLogger(name).addFilter(Silence(beginnings))


def quiet_transformers() -> None:
    """Called before a model is loaded: no bar for a load that takes no time, and no table of missing tensors,
    which are named in a sentence of ours."""
    from transformers.utils import logging as transformers_logging  # takes seconds

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def optional(name: str, option: str, install: str = "-U 'locus-fast[lora]'") -> Any:
    """The library, or a module of it, that `option` needs. Raises UserError, with what pip is to install,
    if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = f"{option} needs {name.partition('.')[0]}, which is missing or too old"
        raise UserError(f"{missing}: pip install {install} ({reason(error)}).") from None
