"""The memory ledger against what is measured: the whole step's peak within 15%, the decoder's buffers to the byte."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from locus_fast import cost
from locus_fast.cost.memory import decoder_bytes
from locus_fast.cost.shapes import PUBLISHED, Group, ModelShape
from locus_fast.errors import UserError
from locus_fast.packing import PromptBatch, Replies
from locus_fast.policy import checkpoint_activations, prefill, reply_logprob
from locus_fast.rollout import Decoder, Sampling, Vocabulary
from locus_fast.types import Prompt
from tests.locus_fast.cost_cases import ENDLESS, FAMILIES, group_like, work
from tests.small_models import small_model, small_prompt


def measured_peak(run) -> int:
    """The most bytes that run() holds at a time beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def engine_step(model, reference, prompts: list[Prompt], groups: list[Group]) -> None:
    """One microbatch as the trainer runs it: sampling, replies, reference, backward. Its replies have room for their tokens and end at once."""
    batch = PromptBatch.of(prompts, model.config, "cpu")
    prefix, decoder = prefill(model, batch), Decoder(model, Vocabulary(ENDLESS.allowed, torch.arange(3)))
    longest = max(max(group.replies) for group in groups)
    played = decoder.generate(prefix, Sampling(len(groups[0].replies), longest, 1.0, 1.0), seed=0, groups=range(len(groups)))
    replies = Replies.of(batch, played, [list(group.replies) for group in groups], range(len(groups)))
    logprob, _ = reply_logprob(model, prefix, replies, 1.0)
    if reference is not None:
        with torch.no_grad():
            reply_logprob(reference, prefill(reference, batch), replies, 1.0)
    logprob.sum().backward()


@pytest.mark.parametrize(("checkpointing", "kl"), [(0, False), (0, True), (1, True), (2, True)])
@pytest.mark.parametrize(
    ("grids", "words", "replies"), [([(16, 24), (8, 8)], 60, [32] * 8), ([(24, 32), (4, 4)], 9, [4] * 2), ([(4, 4)] * 2, 20, [48] * 8)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_peak_memory_is_within_15_percent_of_the_measured(family: str, checkpointing: int, kl: bool, grids, words: int, replies: list[int]) -> None:
    model = small_model(family)
    reference = copy.deepcopy(model).requires_grad_(False) if kl else None
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    prompts = [small_prompt(model, grids, words, seed) for seed in range(2)]
    groups = [group_like(prompt, replies) for prompt in prompts]
    engine_step(model, reference, prompts, groups)  # so that the gradients are there, as from the second microbatch on
    measured = measured_peak(lambda: engine_step(model, reference, prompts, groups))
    shape = ModelShape.of(model.config)
    tile = 3 * 4 * sum(map(sum, (group.replies for group in groups))) * shape.text.vocabulary  # the CPU's head: logits, gradient and their sum's
    ways = {"weight_bytes": 4, "gradient_bytes": 4, "state_bytes": 0, "width": 4, "static": False, "reference": "copy" if kl else "none"}
    parts = cost.peak_memory(shape, groups, checkpointing=checkpointing, tile=tile, **ways)
    static = parts["weights"] + parts["gradients"] + parts["reference"]
    assert sum(parts.values()) == pytest.approx(measured + static, rel=0.15)


def test_the_decoders_buffers_are_counted_as_they_are() -> None:
    model, batch, groups = work("qwen3_vl")
    with torch.no_grad():
        prefix = prefill(model, batch)
    for static in (False, True):
        decoder = Decoder(model, ENDLESS, static=static)
        decoder.load(prefix, Sampling(3, 20, 1.0, 1.0), 0, torch.arange(6))
        slots = decoder.slots
        assert slots is not None
        held = [t for pairs in (*slots.own.values(), *decoder.prompt_kv.values()) for t in pairs] + [slots.ids[1:], slots.logprob[1:]]
        expected = decoder_bytes(ModelShape.of(model.config), groups, 20, 4, static)
        assert sum(t.numel() * t.element_size() for t in held) == expected
        decoder.release()
        assert decoder.slots is None


def test_7b_with_its_reference_fits_one_card() -> None:
    shape = PUBLISHED["qwen2.5-vl-7b"]
    group = Group(((34, 46), (4, 4)), 523, (100,) * 8)
    parts = cost.peak_memory(shape, [group] * 8, checkpointing=1, reference="copy")
    assert parts["weights"] == parts["gradients"] == parts["reference"] == 2 * shape.parameters
    assert 62 * 2**30 < sum(parts.values()) < 78 * 2**30
    held = [sum(cost.peak_memory(shape, [group], checkpointing=1, reference=kind).values()) for kind in ("copy", "int8", "nf4", "host", "none")]
    assert held == sorted(held, reverse=True)
    with pytest.raises(UserError, match="--reference must be one of"):
        cost.peak_memory(shape, [group], checkpointing=1, reference="fp8")
