"""What `python -m locus_fast.cost` prints: FLOPs, bytes, launches, syncs and peak memory of a step, and
whether the trainer would take it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from locus_fast.config import Config
from locus_fast.cost.flops import COLUMNS, group_cost, model_flops, repeated_flops, step_flops, total
from locus_fast.cost.memory import QUANTISED, MemorySettings
from locus_fast.cost.plan import AUTO_CHECKPOINTING, AUTO_TOKENS, FREE, GIB, Plan, Room
from locus_fast.cost.shapes import Group, ModelShape
from locus_fast.cost.traffic import step_bytes, step_launches, step_syncs
from locus_fast.errors import UserError
from locus_fast.run.plan import memory_settings, planned, remedy
from locus_fast.step.optimizers import default_optimizer


@dataclass(frozen=True)
class Case:
    """What is asked about: a run, and the prompts that its step is taken to have."""

    config: Config
    shape: ModelShape
    kind: torch.dtype  # of the weights
    group: Group
    images: tuple[tuple[int, int], tuple[int, int]]  # (width, height) in pixels of image and cue
    memory: int  # GiB

    @property
    def how(self) -> MemorySettings:
        """The arguments of `peak_memory`, as the trainer has them with liger-kernel."""
        return memory_settings(self.config, self.kind, fused=True)

    @property
    def room(self) -> Room:
        return Room(self.shape, self.memory * GIB, self.config.prompts, self.config.rollout_tokens, self.how)

    def width(self, tokens: int) -> int:
        """Groups in a microbatch of so many tokens: it is packed before the replies are known, as if each
        were the longest allowed."""
        longest = replace(self.group, replies=(self.config.max_new_tokens,) * self.config.group_size)
        return self.room.width(longest, tokens)

    def holds(self, plan: Plan) -> bool:
        """Whether the device holds this case's microbatches by a plan."""
        return self.room.holds(self.group, self.width(plan.tokens), plan.checkpointing)

    def planned(self) -> Plan:
        """The trainer's plan; UserError if there is none."""
        return planned(self.config, self.shape, self.kind, self.memory * GIB, fused=True)


@dataclass(frozen=True)
class Choice:
    """plan: the trainer's, or one group a microbatch where it has none; proposal: what fits instead, empty
    if this does."""

    plan: Plan
    proposal: str


def chosen(case: Case) -> Choice:
    """The trainer's plan for a case, and what it proposes where the case does not fit."""
    config = case.config
    try:
        made = case.planned()
    except UserError as error:
        checkpointing = 1 if config.checkpointing == AUTO_CHECKPOINTING else config.checkpointing
        return Choice(Plan(config.microbatch_tokens or 1, checkpointing, str(error)), instead(case))
    return Choice(made, "" if case.holds(made) else smaller(case))


def instead(case: Case) -> str:
    """Words that name settings with which the case fits."""
    return remedy(case.config, lambda config: fits(case, config), max(case.group.replies))


def fits(case: Case, config: Config) -> bool:
    """Whether a case does with these settings, its replies cut to the longest that they allow."""
    replies = tuple(min(count, config.max_new_tokens) for count in case.group.replies)
    case = replace(case, config=config, group=replace(case.group, replies=replies))
    try:
        return case.holds(case.planned())
    except UserError:
        return False


def smaller(case: Case) -> str:
    """Words that name the budget that fits, where the one that was given or chosen does not."""
    chooses = replace(case, config=replace(case.config, microbatch_tokens=AUTO_TOKENS))
    try:
        made = chooses.planned()
    except UserError:
        return instead(case)
    tokens = min(made.tokens, case.room.budget([case.group], made.checkpointing))
    if not tokens or not case.holds(replace(made, tokens=tokens)):
        return instead(case)
    other = (
        f" --checkpointing {made.checkpointing}" if case.config.checkpointing == AUTO_CHECKPOINTING else ""
    )
    return f"this fits: --microbatch-tokens {tokens}{other}"


def report(case: Case, choice: Choice) -> Iterator[str]:
    """The printed lines."""
    shape, group, config, made = case.shape, case.group, case.config, choice.plan
    width = case.width(made.tokens)
    microbatches = [[group] * min(width, config.prompts - done) for done in range(0, config.prompts, width)]
    vision, text, trained = shape.vision, shape.text, case.how.trained
    yield (
        f"{config.model or config.preset}: {shape.parameters:,} parameters (vision {vision.parameters:,}, "
        f"language {text.parameters:,}); {training(case)}"
    )
    cells = [
        f"{w}x{h} pixels -> {columns}x{rows} patches"
        for (w, h), (rows, columns) in zip(case.images, group.grids, strict=True)
    ]
    yield f"image {cells[0]}; cue {cells[1]}"
    replies = f"{len(group.replies)} replies of {group.replies[0]}"
    yield f"a prompt of {group.prompt} tokens, {replies}; {config.prompts} prompts a step"
    yield f"in {len(microbatches)} microbatches of up to {width} groups: {made.reason}"
    yield ""
    ways: dict[str, Any] = {
        "checkpointing": made.checkpointing,
        "reference": case.how.reference != "none",
    }
    yield from flop_lines(shape, group, {**ways, "trained": trained})
    yield ""
    yield from byte_lines(case, microbatches, ways)
    yield ""
    launches, syncs = step_launches(shape, microbatches, **ways, fused=True), step_syncs(microbatches)
    eager = sum(step_launches(shape, microbatches, **ways, fused=False).values())
    parts = ", ".join(f"{part} {n:,}" for part, n in launches.items())
    whose = "" if trained.language and trained.tower else " with all weights trained"
    yield (
        f"kernel launches of a step{whose}, without graphs: {parts}; "
        f"sum {sum(launches.values()):,} (without liger-kernel {eager:,})"
    )
    yield (
        "host syncs of a step: "
        + ", ".join(f"{cause} {n:,}" for cause, n in syncs.items())
        + f"; sum {sum(syncs.values()):,}"
    )
    yield ""
    yield from memory_lines(case, choice, width)


def training(case: Case) -> str:
    """What is trained and how, in words."""
    config, kind = case.config, str(case.kind).removeprefix("torch.")
    optimizer = default_optimizer(config.optimizer, torch.float32 if config.lora else case.kind)
    if config.lora:
        base = "4-bit" if config.quantize != "off" else kind
        return f"adapters of rank {config.lora} on {base} weights, {optimizer}"
    frozen = [
        part
        for part, rate in zip(("vision tower", "projector", "language model"), config.lr_scale, strict=True)
        if rate == 0
    ]
    return (
        f"{' and '.join(frozen) + ' frozen' if frozen else 'full fine-tuning'}, {kind} weights and "
        f"gradients, {optimizer}"
    )


def flop_lines(shape: ModelShape, group: Group, ways: dict[str, Any]) -> Iterator[str]:
    """The table of FLOPs, and its ratios."""
    ours, floor = (step_flops(shape, [group], **ways, executed=executed) for executed in (True, False))
    repeated = repeated_flops(shape, [group], **ways)
    sums = total(ours), total(floor), total(repeated)
    unit, name = (1e12, "TFLOP") if sums[1] > 1e12 else (1e9, "GFLOP")
    yield f"FLOPs of one prompt and its replies, {name}:"
    rows = [
        [
            part,
            *(scaled(passes.get(c, 0), unit) for c in COLUMNS),
            *(scaled(total({part: t[part]}), unit) for t in (ours, floor, repeated)),
        ]
        for part, passes in ours.items()
    ]
    rows.append(
        ["sum", *(scaled(total(ours, [c]), unit) for c in COLUMNS), *(scaled(value, unit) for value in sums)]
    )
    yield from table_lines(["part", *COLUMNS, "sum", "floor", "repeat"], rows)
    yield (
        f"  over the floor: {sums[0] / sums[1]:.3f} x; "
        f"a trainer that repeats the prompt: {sums[2] / sums[0]:.2f} x ours"
    )
    useful = model_flops(shape, [group], reference=ways["reference"], trained=ways["trained"])
    packed = group_cost(shape, group.grids, group.prompt, sum(group.replies))
    yield (
        f"  model FLOPs (no recomputation): {scaled(useful, unit)} {name}; "
        f"the group packs as {packed:,.0f} tokens"
    )
    unused = total(step_flops(shape, [replace(group, active=False)], **ways, executed=True))
    if ways["reference"]:
        yield (
            "  if its rewards are all equal it costs the same, for its KL; with --skip-zero-variance "
            f"{scaled(unused, unit)} {name}, {unused / sums[0]:.2f} of that"
        )
    else:
        yield (
            f"  if its rewards are all equal it has no gradient without a KL, "
            f"and costs {scaled(unused, unit)} {name}"
        )


def byte_lines(case: Case, microbatches: list[list[Group]], ways: dict[str, Any]) -> Iterator[str]:
    """The table of bytes that are read and written."""
    more: dict[str, Any] = {
        "trained": case.how.trained,
        "matrix_bytes": QUANTISED["nf4"] if case.how.quantised else 2,
        "gradient_bytes": case.how.gradient_bytes,
        "state_bytes": case.how.state_bytes,
    }
    mine, theirs = (
        step_bytes(case.shape, microbatches, **ways, **more, repeat=repeat) for repeat in (False, True)
    )
    unit, name = (1e9, "GB") if sum(mine.values()) > 1e10 else (1e6, "MB")
    yield f"bytes of a step, {name} (activations left out; weights that are not quantised in bfloat16):"
    rows = [[part, scaled(value, unit, 1), scaled(theirs[part], unit, 1)] for part, value in mine.items()]
    rows.append(["sum", scaled(sum(mine.values()), unit, 1), scaled(sum(theirs.values()), unit, 1)])
    yield from table_lines(["part", "ours", "repeat"], rows)


def memory_lines(case: Case, choice: Choice, width: int) -> Iterator[str]:
    """The table of peak memory, and the verdict."""
    memory = case.room.parts(case.group, width, choice.plan.checkpointing)
    used = sum(memory.values())
    unit, name = (GIB, "GiB") if used > GIB else (2**20, "MiB")
    yield f"peak memory, {name}: {training(case)}, {width} groups a microbatch:"
    yield from table_lines(
        ["part", name], [[part, scaled(value, unit)] for part, value in [*memory.items(), ("sum", used)]]
    )
    verdict, instead = ("DOES NOT FIT", f"; {choice.proposal}") if choice.proposal else ("fits", "")
    yield f"  {verdict} in {case.memory} GiB with {FREE:.0%} of it left free{instead}"


def table_lines(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        yield "  " + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )


def scaled(value: float, unit: float, digits: int = 2) -> str:
    return f"{value / unit:,.{digits}f}" if value else "-"
