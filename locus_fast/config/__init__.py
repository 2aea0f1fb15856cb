"""The settings of a run: `Config`, its presets and rules, and how a command line becomes one. Needs no
PyTorch."""

from locus_fast.config.command import EVALUATION_OPTIONS, of_run, parse, resolve, stored
from locus_fast.config.folders import refuse_run, run_around
from locus_fast.config.presets import PRESETS, default_preset, may_hold_adapters
from locus_fast.config.rules import RULES, check, check_together, check_value
from locus_fast.config.settings import Config

__all__ = [
    "EVALUATION_OPTIONS",
    "PRESETS",
    "RULES",
    "Config",
    "check",
    "check_together",
    "check_value",
    "default_preset",
    "may_hold_adapters",
    "of_run",
    "parse",
    "refuse_run",
    "resolve",
    "run_around",
    "stored",
]
