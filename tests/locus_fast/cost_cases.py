"""Small models and their work, for the tests of the cost ledger."""

from __future__ import annotations

import locus_kernels.grpo_loss  # noqa: F401  it and what it imports register the operators counted here
import torch
from torch.utils.flop_counter import FlopCounterMode

from locus_fast import cost
from locus_fast.cost.shapes import Group
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.prompts import Prompt
from locus_fast.step.vocabulary import Vocabulary
from tests.small_models import CLASSES, VOCABULARY, small_model, small_prompt

FAMILIES = sorted(CLASSES)
GRIDS = [[(8, 12), (4, 4)], [(10, 6), (4, 8)]]  # whole windows, and ragged ones
REPLIES = [[5, 1, 9], [3, 7, 2]]
# the id that would end a reply is never drawn
ENDLESS = Vocabulary(torch.arange(VOCABULARY) < 3, torch.tensor([5]))


def work(family: str):
    """(model, batch of prompts, groups)."""
    model = small_model(family)
    prompts = [small_prompt(model, grids, words=5 + 3 * i, seed=i) for i, grids in enumerate(GRIDS)]
    groups = [group_like(prompt, replies) for prompt, replies in zip(prompts, REPLIES, strict=True)]
    return model, PromptBatch.of(prompts, model.config, "cpu"), groups


def group_like(prompt: Prompt, replies: list[int]) -> Group:
    return Group(tuple((h, w) for _, h, w in prompt.grids.tolist()), len(prompt.ids), tuple(replies))


def answers(batch: PromptBatch, groups: list[Group]) -> Replies:
    """Replies of the groups' lengths; what the tokens are does not matter here."""
    lengths = [list(group.replies) for group in groups]
    ids = torch.arange(max(map(max, lengths)), device=batch.ids.device).expand(sum(map(len, lengths)), -1)
    return Replies.of(batch, ids, lengths, range(len(groups)))


def attention_forward(q, k, v, *_, out_shape=None, **__) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def attention_backward(_, q, k, v, *__, out_shape=None, **___) -> int:
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]  # two products' two gradients, and the scores again


def batched_product(a, b, *_, out_shape=None, **__) -> int:
    """Without outer products: that is how older versions of `transformers` multiply positions by
    frequencies."""
    return 2 * a[0] * a[1] * a[2] * b[2] * (a[2] > 1)


def head_forward(hidden, weight, *_, out_shape=None, **__) -> int:
    return 2 * hidden[0] * weight[0] * weight[1]


def head_backward(_, __, hidden, weight, *rest, out_shape=None, **___) -> int:
    """The logits again, and each gradient that is wanted."""
    return 2 * hidden[0] * weight[0] * weight[1] * (1 + sum(rest[-2:]))


# The CPU's attention and our operators, by the rules of the CUDA ones that torch.utils.flop_counter knows
FORMULAS = {
    torch.ops.aten.bmm: batched_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    torch.ops.locus_kernels.linear_logprob: head_forward,
    torch.ops.locus_kernels.grpo_loss: head_forward,
    torch.ops.locus_kernels.linear_logprob_backward: head_backward,
}


def counted(run):
    """(FLOPs, result) of run()."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        result = run()
    return counter.get_total_flops(), result


def spent(table: cost.flops.Table, parts: tuple[str, ...], *columns: str) -> float:
    return sum(table[part].get(column, 0) for part in parts for column in columns)
