"""From the command line of `python -m locus_fast.evaluate` to a `Config`."""

from __future__ import annotations

import argparse
from pathlib import Path

from locus_fast.config.command import EVALUATION_OPTIONS, of_run, resolve
from locus_fast.config.folders import refuse_run, run_around
from locus_fast.config.options import Parser, add_options, given, option_of
from locus_fast.config.settings import Config
from locus_fast.errors import UserError

DESCRIPTION = "Ask a model for held-out cues, greedily: a table, and one line of JSON."


def parse(arguments: list[str]) -> tuple[Config, Path | None]:
    """(the configuration, the run folder whose settings it has) of a command line.

    A model that lies in a run folder has that run's settings, with what is given besides. Raises UserError as
    `config.parse` does, and for an option that has no meaning here.
    """
    parser = Parser(prog="python -m locus_fast.evaluate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "folder", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="the same as --model"
    )
    unused = Config.__dataclass_fields__.keys() - set(EVALUATION_OPTIONS)
    add_options(parser, Config, hidden=unused)
    words = given(parser, arguments)
    folder = words.pop("folder", None)
    if folder is not None and words.setdefault("model", folder) != folder:
        raise UserError(f"two models are named, {folder} and --model {words['model']}: give one.")
    if named := [name for name in words if name in unused]:
        why = "has no meaning here, where nothing is trained and replies are greedy"
        raise UserError(f"{option_of(named[0])} {why}: leave it away.")
    model = Path(words.get("model", ""))
    run = run_around(model) if words.get("model") and model.is_dir() else None
    if run is None:
        return resolve(words), None
    refuse_run(model)
    return resolve(
        words, {name: value for name, value in of_run(run).items() if name in EVALUATION_OPTIONS}
    ), run
