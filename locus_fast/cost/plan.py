"""The microbatch budget and the checkpointing of a run, chosen from the ledger before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from locus_fast.cost.flops import group_cost, step_flops, total
from locus_fast.cost.memory import MemorySettings, peak_memory
from locus_fast.cost.shapes import Group, ModelShape
from locus_fast.cost.traffic import step_bytes
from locus_fast.errors import UserError

AUTO_TOKENS, AUTO_CHECKPOINTING = 0, -1  # what asks for a choice
TOKENS = 32768  # the budget where no memory is known, as on a CPU, and for answering alone
FREE = 0.05  # of the memory, left to the allocator's fragments
RIDGE = 300  # FLOPs in the time of one byte: 989e12 / 3.35e12 on an H100, by its data sheet
# of a prompt: the question with thinking, the chat template and the marks around two images, rounded up
TEXT_TOKENS = 128
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """tokens: budget of a microbatch, language-token equivalents; checkpointing: 0, or every how many-th
    layer is recomputed; reason: one line."""

    tokens: int
    checkpointing: int
    reason: str


@dataclass(frozen=True)
class Room:
    """What a step's groups have to fit into, held as `how` says."""

    shape: ModelShape
    memory_bytes: float
    prompts: int  # of a step
    rollout_tokens: int
    how: MemorySettings

    def cost(self, group: Group) -> float:
        return group_cost(self.shape, group.grids, group.prompt, group.scored)

    def width(self, group: Group, budget: float) -> int:
        """Groups like this in a microbatch of that budget."""
        return max(1, min(self.prompts, int(budget // self.cost(group))))

    def parts(self, group: Group, count: int, checkpointing: int) -> dict[str, float]:
        """Peak bytes by part with `count` groups like this in a microbatch."""
        rollout = [group] * max(count, self.width(group, self.rollout_tokens))
        return peak_memory(self.shape, [group] * count, checkpointing, self.how, rollout)

    def holds(self, group: Group, count: int, checkpointing: int) -> bool:
        return sum(self.parts(group, count, checkpointing).values()) <= (1 - FREE) * self.memory_bytes

    def most(self, group: Group, checkpointing: int) -> int:
        """The most groups like this that a microbatch can have; 0 if not even one fits."""
        fits, beyond = 0, self.prompts + 1
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            fits, beyond = (middle, beyond) if self.holds(group, middle, checkpointing) else (fits, middle)
        return fits

    def budget(self, groups: Sequence[Group], checkpointing: int) -> int:
        """The largest budget that holds whichever of these groups fill it; 0 if one of them does not fit
        alone. All of a step's groups in one microbatch are no limit."""
        widths = [self.most(group, checkpointing) for group in groups]
        if not all(widths):
            return 0
        budgets = [math.ceil(width * self.cost(group)) for width, group in zip(widths, groups, strict=True)]
        limits = [budget for budget, width in zip(budgets, widths, strict=True) if width < self.prompts]
        return max(min(limits, default=max(budgets)), *(math.ceil(self.cost(group)) for group in groups))

    def time(self, group: Group, budget: int, checkpointing: int) -> float:
        """FLOPs of a step and its bytes in FLOPs: smaller is faster. Narrow microbatches decode more often,
        and a decoding step reads the weights whatever the number of its replies."""
        passes: dict[str, Any] = {
            "checkpointing": checkpointing,
            "reference": self.how.reference != "none",
        }
        width = self.width(group, budget)
        microbatches = [[group] * min(width, self.prompts - done) for done in range(0, self.prompts, width)]
        table = step_flops(self.shape, [group], executed=True, trained=self.how.trained, **passes)
        flops = self.prompts * total(table)
        return flops + RIDGE * sum(step_bytes(self.shape, microbatches, **passes).values())


def plan(
    shape: ModelShape,
    groups: Sequence[Group],
    *,
    memory_bytes: float,
    prompts: int,
    tokens: int = AUTO_TOKENS,
    checkpointing: int = AUTO_CHECKPOINTING,
    rollout_tokens: int = 0,
    how: MemorySettings,
) -> Plan:
    """The budget and checkpointing of a run, where they are to be chosen; what is given is kept.

    groups: what a prompt and its replies may be, the largest first and the longest replies in each (a budget
    is in FLOPs, and groups of other proportions fill the memory otherwise: it has to hold for each);
    memory_bytes: free on the device; prompts: of a step; how: see `MemorySettings`. Raises
    UserError if the model does not fit, or with --microbatch-tokens to be chosen not one group, with the
    parts of the memory.
    """
    room = Room(shape, memory_bytes, prompts, rollout_tokens, how)
    choices = (0, 1) if checkpointing == AUTO_CHECKPOINTING else (checkpointing,)
    found = {each: tokens or room.budget(groups, each) for each in choices}
    fitting = {
        each: budget
        for each, budget in found.items()
        if budget and all(room.holds(group, room.width(group, budget), each) for group in groups)
    }
    if not (fits := bool(fitting)):
        check_room(room, groups, choices[-1], chosen=not tokens)
        fitting = {choices[-1]: tokens}
    best = min(fitting, key=lambda each: room.time(groups[0], fitting[each], each))
    budget, width = fitting[best], room.width(groups[0], fitting[best])
    used = max(sum(room.parts(group, room.width(group, budget), best).values()) for group in groups)
    why = (
        f"up to {used / GIB:.1f} of {memory_bytes / GIB:.1f} GiB with the longest replies, {width} of the "
        f"largest prompts ({groups[0].prompt} tokens)"
    )
    if not fits:
        why += "; with so long replies it does not fit"
    elif len(choices) > 1:
        why += (
            "; by FLOPs and bytes faster than the other way"
            if len(fitting) > 1
            else "; the other way does not fit"
        )
    return Plan(budget, best, f"{described(budget, best)}: {why}")


def unplanned(tokens: int, checkpointing: int) -> Plan:
    """Where no memory is known, as on a CPU: what is given, and else microbatches of TOKENS with every layer
    recomputed."""
    tokens, checkpointing = tokens or TOKENS, 1 if checkpointing == AUTO_CHECKPOINTING else checkpointing
    return Plan(
        tokens,
        checkpointing,
        f"{described(tokens, checkpointing)}: not chosen by memory, there is no device to ask",
    )


def described(tokens: int, checkpointing: int) -> str:
    words = {0: "no layer recomputed", 1: "every layer recomputed"}
    return (
        f"microbatches of {tokens:,} tokens, "
        f"{words.get(checkpointing, f'one layer in {checkpointing} recomputed')}"
    )


def check_room(room: Room, groups: Sequence[Group], checkpointing: int, chosen: bool) -> None:
    """Raises UserError if what is there all the time does not fit, or with a budget to be chosen one
    group."""
    group = max(groups, key=lambda group: sum(room.parts(group, 1, checkpointing).values()))
    parts = room.parts(group, 1, checkpointing)
    least = sum(parts[name] for name in ("weights", "gradients", "optimizer states", "reference"))
    if not chosen and least <= (1 - FREE) * room.memory_bytes:
        return
    named = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value)
    raise UserError(
        f"one prompt and its replies take {sum(parts.values()) / GIB:.1f} GiB ({named}), more than the "
        f"{room.memory_bytes / GIB:.1f} GiB that are free on the device less {FREE:.0%}"
    )
