"""Cue search on held-out data: `python -m locus_fast.evaluate MODEL --data ...`. A table, and one line of
JSON."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from locus_fast.startup import answer_help, start

    start()
    from locus_fast.config.evaluation import parse

    answer_help(parse)

import json
import sys
from pathlib import Path

from locus_fast.config import Config
from locus_fast.config.evaluation import parse
from locus_fast.errors import UserError
from locus_fast.run.interrupt import Interrupt
from locus_fast.run.setup import set_up


def table_of(summary: dict) -> str:
    """The summary as lines of text."""
    rows = [("all", summary), *summary["by_size"].items()]
    lines = [f"{'cues':<6} {'n':>5} {'mean IoU':>9} {'Acc@0.5':>8} {'Acc@0.75':>9} {'valid':>6}"]
    for name, r in rows:
        figures = f"{r['mean_iou']:>9.3f} {r['acc50']:>8.3f} {r['acc75']:>9.3f} {r['valid']:>6.3f}"
        lines.append(f"{name:<6} {r['n']:>5} {figures}")
    return "\n".join(lines)


def asked(config: Config, run: Path | None) -> str:
    """What is asked of which model, in one line."""
    cues = f"up to {config.eval_cues:,} held-out cues of {config.data or 'drawn scenes'}"
    whose = f"as in the run {run}" if run else f"preset {config.preset}"
    return (
        f"asking {config.model or 'the embedded tiny base'}: {cues}, prompt style {config.prompt_style}, "
        f"{whose}"
    )


def main(arguments: list[str]) -> int:
    """The command: a table on standard error, the summary as one JSON line on standard output. Returns the
    exit code: 0, 2 for a mistake in the input, 130 after Ctrl-C."""
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
