"""`python -m locus_fast.cost`: what a step costs for any published shape, without weights, beside a trainer that repeats the prompt."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from locus_fast.config import PRESETS, Config
from locus_fast.cost.flops import COLUMNS, group_cost, model_flops, repeated_flops, step_flops, total
from locus_fast.cost.memory import REFERENCES
from locus_fast.cost.plan import AUTO_CHECKPOINTING, AUTO_TOKENS, FREE, GIB, TEXT_TOKENS, Plan, Room, plan
from locus_fast.cost.shapes import PUBLISHED, Group, ModelShape, group_of
from locus_fast.cost.traffic import step_bytes, step_launches, step_syncs
from locus_fast.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Run with --help for the options.")


def size(text: str) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT."""
    if not (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)) or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, such as 640x480, not '{text}'")
    return int(match[1]), int(match[2])


def at_least(least: int, most: int = 1_000_000):
    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, not '{text}'")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {most}, not '{text}'")
        return int(text)

    return number


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for an unknown option or a value that cannot be."""
    d = Config()
    parser = _Parser(prog="python -m locus_fast.cost", description="What a training step costs, counted from shapes.", allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="qwen2.5-vl-7b", help="a preset's model: tiny, " + ", ".join(PUBLISHED) + " (default: %(default)s)")
    add("--model", default="", help="a folder with a config.json, instead of the preset's model")
    add("--image", type=size, default=(640, 480), help="the image's WIDTHxHEIGHT in pixels (default: 640x480)")
    add("--cue", type=size, default=(64, 64), help="the cue's WIDTHxHEIGHT in pixels (default: 64x64)")
    add("--text-tokens", type=at_least(1), default=TEXT_TOKENS, help="a prompt's tokens besides its images' (default: %(default)s)")
    add("--prompts", type=at_least(1, 4096), default=d.prompts, help="prompts a step (default: %(default)s)")
    add("--replies", type=at_least(1, 4096), default=d.replies, help="replies a prompt (default: %(default)s)")
    add("--reply-tokens", type=at_least(1), default=100, help="tokens of a reply (default: %(default)s)")
    add("--max-tokens", type=at_least(1), default=d.max_tokens, help="longest reply that the decoder has room for (default: %(default)s)")
    add("--tokens", type=at_least(0), default=AUTO_TOKENS, help="budget of a microbatch in tokens; 0: what fits (default: %(default)s)")
    every = "recompute every how many-th layer in backward; 0: none, -1: the faster of 0 and 1 that fits (default: %(default)s)"
    add("--checkpointing", type=at_least(-1), default=AUTO_CHECKPOINTING, help=every)
    add("--reference", choices=REFERENCES, default="copy", help="how the KL's reference is held; none: no KL (default: %(default)s)")
    add("--memory", type=at_least(1), default=78, help="device memory in GiB that the step has to fit (default: %(default)s)")
    return parser.parse_args(arguments)


def shape_of(preset: str, model: str) -> ModelShape:
    """The shape of a model folder, or of a preset's model. Raises UserError if there is none."""
    if not model and preset in PUBLISHED:
        return PUBLISHED[preset]
    if not model and preset != "tiny":
        raise UserError(f"--preset must be one of tiny, {', '.join(PUBLISHED)}, not '{preset}'; another model's folder can be given as --model.")
    from transformers import AutoConfig  # takes seconds, and the published shapes do not need it

    from locus_fast.checkpoint import model_folder

    folder = model_folder(model)
    try:
        return ModelShape.of(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: its config.json cannot be read ({str(error).splitlines()[0]}).") from None


def table_lines(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        yield "  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))


def scaled(value: float, unit: float, digits: int = 2) -> str:
    return f"{value / unit:,.{digits}f}" if value else "-"


def flop_lines(shape: ModelShape, group: Group, ways: dict[str, Any]) -> Iterator[str]:
    """The table of FLOPs, and its ratios."""
    ours, floor = (step_flops(shape, [group], **ways, executed=executed) for executed in (True, False))
    repeated = repeated_flops(shape, [group], **ways)
    sums = total(ours), total(floor), total(repeated)
    unit, name = (1e12, "TFLOP") if sums[1] > 1e12 else (1e9, "GFLOP")
    yield f"FLOPs of one prompt and its replies, {name}:"
    rows = [
        [part, *(scaled(passes.get(c, 0), unit) for c in COLUMNS), *(scaled(total({part: t[part]}), unit) for t in (ours, floor, repeated))]
        for part, passes in ours.items()
    ]
    rows.append(["sum", *(scaled(total(ours, [c]), unit) for c in COLUMNS), *(scaled(value, unit) for value in sums)])
    yield from table_lines(["part", *COLUMNS, "sum", "floor", "repeat"], rows)
    yield f"  over the floor: {sums[0] / sums[1]:.3f} x; a trainer that repeats the prompt: {sums[2] / sums[0]:.2f} x ours"
    useful = model_flops(shape, [group], reference=ways["reference"])
    packed = group_cost(shape, group.grids, group.prompt, sum(group.replies))
    yield f"  model FLOPs (no recomputation): {scaled(useful, unit)} {name}; the group packs as {packed:,.0f} tokens"


def chosen(shape: ModelShape, group: Group, options: argparse.Namespace) -> tuple[Plan, int, dict[str, float]]:
    """(the plan, groups a microbatch, peak bytes by part). Where not even one group fits, one with every layer recomputed."""
    ways: dict[str, Any] = {"reference": options.reference, "max_tokens": max(options.max_tokens, options.reply_tokens), "fused": True}
    room = Room(shape, options.memory * GIB, options.prompts, 0, ways)
    wanted = {"tokens": options.tokens, "checkpointing": options.checkpointing}
    try:
        made = plan(shape, [group], memory_bytes=room.memory_bytes, prompts=options.prompts, **wanted, **ways)
    except UserError as error:
        made = Plan(options.tokens or 1, 1 if options.checkpointing == AUTO_CHECKPOINTING else options.checkpointing, str(error))
    width = room.width(group, made.tokens)
    return made, width, room.parts(group, width, made.checkpointing)


def report(shape: ModelShape, group: Group, options: argparse.Namespace) -> Iterator[str]:
    """The printed lines."""
    made, width, memory = chosen(shape, group, options)
    microbatches = [[group] * min(width, options.prompts - done) for done in range(0, options.prompts, width)]
    vision, text = shape.vision, shape.text
    yield f"{options.model or options.preset}: {shape.parameters:,} parameters (vision {vision.parameters:,}, language {text.parameters:,})"
    cells = [f"{w}x{h} pixels -> {columns}x{rows} patches" for (w, h), (rows, columns) in zip((options.image, options.cue), group.grids, strict=True)]
    yield f"image {cells[0]}; cue {cells[1]}"
    yield f"a prompt of {group.prompt} tokens, {len(group.replies)} replies of {group.replies[0]}; {options.prompts} prompts a step"
    yield f"in {len(microbatches)} microbatches of up to {width} groups: {made.reason}"
    yield ""
    ways: dict[str, Any] = {"checkpointing": made.checkpointing, "reference": options.reference != "none"}
    yield from flop_lines(shape, group, ways)
    yield ""
    mine, theirs = step_bytes(shape, microbatches, **ways), step_bytes(shape, microbatches, **ways, repeat=True)
    unit, name = (1e9, "GB") if sum(mine.values()) > 1e10 else (1e6, "MB")
    yield f"bytes of a step, {name} (activations left out):"
    rows = [[part, scaled(value, unit, 1), scaled(theirs[part], unit, 1)] for part, value in mine.items()]
    rows.append(["sum", scaled(sum(mine.values()), unit, 1), scaled(sum(theirs.values()), unit, 1)])
    yield from table_lines(["part", "ours", "repeat"], rows)
    yield ""
    launches, syncs = step_launches(shape, microbatches, **ways, fused=True), step_syncs(microbatches)
    eager = sum(step_launches(shape, microbatches, **ways, fused=False).values())
    parts = ", ".join(f"{part} {n:,}" for part, n in launches.items())
    yield f"kernel launches of a step, without graphs: {parts}; sum {sum(launches.values()):,} (without liger-kernel {eager:,})"
    yield "host syncs of a step: " + ", ".join(f"{cause} {n:,}" for cause, n in syncs.items()) + f"; sum {sum(syncs.values()):,}"
    yield ""
    used = sum(memory.values())
    unit, name = (GIB, "GiB") if used > GIB else (2**20, "MiB")
    yield f"peak memory, {name}: full fine-tuning, bfloat16 weights and gradients, 8-bit AdamW, {width} groups a microbatch:"
    yield from table_lines(["part", name], [[part, scaled(value, unit)] for part, value in [*memory.items(), ("sum", used)]])
    verdict = "fits" if used <= (1 - FREE) * options.memory * GIB else "DOES NOT FIT"
    yield f"  {verdict} in {options.memory} GiB with {FREE:.0%} of it left free"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code: 0, or 2 for a mistake in the input."""
    try:
        options = parse(arguments)
        shape = shape_of(options.preset, options.model)
        preset = Config(**PRESETS.get(options.preset, {}))
        group = group_of(
            shape,
            (options.image, options.cue),
            (preset.image_pixels, preset.cue_pixels),
            text_tokens=options.text_tokens,
            replies=options.replies,
            reply_tokens=options.reply_tokens,
        )
        for line in report(shape, group, options):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
