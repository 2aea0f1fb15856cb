"""Cue search on held-out data: `python -m locus_fast.evaluate MODEL --data ...`. A table, and one line of JSON."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from locus_fast.startup import start

    start()

import argparse
import json
import sys
from pathlib import Path

from locus_fast.config import EVALUATION_OPTIONS, Config, of_run, refuse_run, resolve, run_around
from locus_fast.config.options import Parser, add_options, given, option_of
from locus_fast.errors import UserError
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.setup import set_up

DESCRIPTION = "Ask a model for held-out cues, greedily: a table, and one line of JSON."


def table_of(summary: dict) -> str:
    """The summary as lines of text."""
    rows = [("all", summary), *summary["by_size"].items()]
    lines = [f"{'cues':<6} {'n':>5} {'mean IoU':>9} {'Acc@0.5':>8} {'Acc@0.75':>9} {'valid':>6}"]
    for name, r in rows:
        figures = f"{r['mean_iou']:>9.3f} {r['acc50']:>8.3f} {r['acc75']:>9.3f} {r['valid']:>6.3f}"
        lines.append(f"{name:<6} {r['n']:>5} {figures}")
    return "\n".join(lines)


def parse(arguments: list[str]) -> tuple[Config, Path | None]:
    """(the configuration, the run folder whose settings it has) of a command line: that of the model's own run if it
    lies in one, with what is given besides. Raises UserError as `config.parse` does, and for an option that has no
    meaning here."""
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


def asked(config: Config, run: Path | None) -> str:
    """What is asked of which model, in one line."""
    cues = f"up to {config.eval_cues:,} held-out cues of {config.data or 'drawn scenes'}"
    whose = f"as in the run {run}" if run else f"preset {config.preset}"
    return f"asking {config.model or 'the embedded tiny base'}: {cues}, prompt style {config.prompt_style}, {whose}"


def main(arguments: list[str]) -> int:
    """The command: a table on standard error, the summary as one JSON line on standard output. Returns the exit code:
    0, 2 for a mistake in the input, 130 after Ctrl-C."""
    try:
        config, run = parse(arguments)
        with Interrupt() as interrupt:
            print(asked(config, run), file=sys.stderr)
            setup = set_up(config)
            inputs = setup.inputs
            print(inputs.cues.describe(), file=sys.stderr)
            result = setup.evaluate("evaluate", interrupt)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if result is None:
        return 130
    print(table_of(result.summary()), file=sys.stderr)
    print(json.dumps({**result.summary(), "skipped_images": len(inputs.skipped.sentences)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
