"""The memory ledger against what is measured: the whole step's peak within 15%, the decoder's buffers to the
byte."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from locus_fast import cost
from locus_fast.cost.memory import MemorySettings, decoder_bytes, reference_bytes
from locus_fast.cost.shapes import EVERYTHING, PUBLISHED, Group, Trained
from locus_fast.errors import UserError
from locus_fast.model.adapters import add_adapters
from locus_fast.model.families import shape_of
from locus_fast.model.fused import fuse
from locus_fast.model.packing import PromptBatch, Replies
from locus_fast.model.policy import checkpoint_activations, detach_prefix, prefill, reply_logprob
from locus_fast.model.prompts import Prompt
from locus_fast.model.quantize import quantize
from locus_fast.model.reference import Reference, make_reference
from locus_fast.step.optim import parameter_groups
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from tests.locus_fast.adapter_cases import needs_peft
from tests.locus_fast.cost_cases import ENDLESS, FAMILIES, group_like, work
from tests.locus_fast.liger_cases import leave_kernels_out
from tests.small_models import small_model, small_prompt


def measured_peak(run) -> int:
    """The most bytes that run() holds at a time beyond what was there."""
    gc.collect()  # or an earlier test's model goes while this one is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def engine_step(
    model, reference: Reference | None, prompts: list[Prompt], groups: list[Group], whole: bool = False
) -> None:
    """One microbatch as the trainer runs it: sampling, replies, reference, backward. Its replies have room
    for their tokens and end at once. whole: in one backward, which the trainer does not."""
    batch = PromptBatch.of(prompts, model.config, "cpu")
    prefix, decoder = (
        prefill(model, batch),
        Decoder(model, Vocabulary(torch.arange(model.lm_head.out_features) < 3, torch.arange(3))),
    )
    longest = max(max(group.replies) for group in groups)
    played = decoder.generate(
        prefix, Sampling(len(groups[0].replies), longest, 1.0, 1.0), seed=0, groups=range(len(groups))
    )
    replies = Replies.of(batch, played.ids, [list(group.replies) for group in groups], range(len(groups)))
    prefix, backward_prefix = (prefix, lambda: None) if whole else detach_prefix(prefix)
    logprob, _ = reply_logprob(model, prefix, replies, 1.0)
    del prefix
    if reference is not None:
        with torch.no_grad(), reference.model() as base:
            reply_logprob(base, prefill(base, batch), replies, 1.0)
    logprob.sum().backward()
    backward_prefix()


def predicted_over_measured(
    model,
    trained: Trained,
    grids,
    words: int,
    replies: list[int],
    checkpointing: int,
    kl: bool,
    quantised=False,
    fused=False,
) -> float:
    """Of the peak of a step of two prompts, weights and gradients included."""
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    reference = make_reference(model) if kl else None
    prompts = [small_prompt(model, grids, words, seed) for seed in range(2)]
    groups = [group_like(prompt, replies) for prompt in prompts]
    # so that the gradients are there, as from the second microbatch on
    engine_step(model, reference, prompts, groups)
    measured = measured_peak(lambda: engine_step(model, reference, prompts, groups))
    # NumPy's memory, held through the step: the profiler does not see it
    measured += sum(prompt.patches.nbytes for prompt in prompts)
    shape = shape_of(model.config)
    logits = 4 * sum(map(sum, (group.replies for group in groups))) * shape.text.vocabulary
    tile = (2 + trained.language) * logits  # the CPU's head: logits, gradient and their sum's
    how = MemorySettings(
        weight_bytes=4,
        gradient_bytes=4,
        state_bytes=0,
        width=4,
        static=False,
        reference="copy" if kl else "none",
        tile=tile,
        trained=trained,
        quantised=quantised,
        fused=fused,
    )
    parts = cost.peak_memory(shape, groups, checkpointing, how)
    static = parts["weights"] + parts["gradients"] + parts["reference"]
    return sum(parts.values()) / (measured + static)


@pytest.mark.parametrize(("checkpointing", "kl"), [(0, False), (0, True), (1, True), (2, True)])
@pytest.mark.parametrize(
    ("grids", "words", "replies"),
    [([(16, 24), (8, 8)], 60, [32] * 8), ([(24, 32), (4, 4)], 9, [4] * 2), ([(4, 4)] * 2, 20, [48] * 8)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_peak_memory_is_within_15_percent_of_the_measured(
    family: str, checkpointing: int, kl: bool, grids, words: int, replies: list[int]
) -> None:
    model = small_model(family)
    assert predicted_over_measured(
        model, EVERYTHING, grids, words, replies, checkpointing, kl
    ) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "trained", [EVERYTHING, pytest.param(Trained.adapters(8), marks=needs_peft)], ids=["all", "adapters"]
)
@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("replies", [[32] * 8, [4] * 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_modules_keep_less(
    family: str, replies: list[int], checkpointing: int, trained: Trained, monkeypatch
) -> None:
    """With liger-kernel's operators, whose kernels are left out: they do not allocate."""
    leave_kernels_out(monkeypatch, with_values=True)
    model = small_model(family)
    fuse(model)
    if trained.rank:
        add_adapters(model, trained.rank, 8.0)
    ratio = predicted_over_measured(
        model, trained, [(16, 24), (8, 8)], 60, replies, checkpointing, kl=True, fused=True
    )
    assert ratio == pytest.approx(1, abs=0.15)


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "vocab_size": 1500,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_where_weights_outweigh_activations(family: str) -> None:
    model = small_model(family, **WIDE)
    assert predicted_over_measured(
        model, EVERYTHING, [(16, 24), (8, 8)], 9, [16] * 4, 1, False
    ) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("checkpointing", [0, 1, 3])
@pytest.mark.parametrize(
    ("trained", "quantised"),
    [
        (Trained(vision=False), False),
        (Trained(vision=False, projector=False), False),
        (Trained(vision=False, language=False), False),
        (Trained(language=False), False),
        pytest.param(Trained.adapters(8), False, marks=needs_peft),
        pytest.param(Trained.adapters(8), True, marks=needs_peft),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_keeps_less(
    family: str, trained: Trained, quantised: bool, checkpointing: int
) -> None:
    model = small_model(family, num_hidden_layers=4)
    if quantised:
        pytest.importorskip("bitsandbytes")
        quantize(model, "nf4", torch.device("cpu"))
    if trained.rank:
        add_adapters(model, trained.rank, 8.0)
    else:
        parameter_groups(
            model, {"vision": trained.vision, "projector": trained.projector, "language": trained.language}
        )
    ratio = predicted_over_measured(
        model, trained, [(24, 32), (4, 4)], 30, [16] * 4, checkpointing, family == "qwen3_vl", quantised
    )
    assert ratio == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("replies", [[7] * 3, [1] * 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_in_two_is_backward(family: str, replies: list[int], checkpointing: int) -> None:
    """The same gradients, replies of a single token included, and the layers' gradients are not held a second
    time."""
    one, two = (small_model(family, **WIDE) for _ in range(2))
    prompts = [small_prompt(one, [(4, 8), (4, 4)], 9, seed) for seed in range(2)]
    groups = [group_like(prompt, replies) for prompt in prompts]
    if checkpointing:
        checkpoint_activations(one), checkpoint_activations(two)
    for _ in range(2):
        whole, halves = (
            measured_peak(lambda: engine_step(one, None, prompts, groups, True)),
            measured_peak(lambda: engine_step(two, None, prompts, groups)),
        )
    if max(replies) > 1:
        assert whole - halves > 0.5 * 4 * shape_of(one.config).text.layer_parameters * 6
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize(
    "trained",
    [EVERYTHING, Trained(vision=False, projector=False), Trained(language=False), Trained(vision=False)],
)
@pytest.mark.parametrize("kind", ["copy", "int8", "nf4", "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_takes_what_is_said(family: str, kind: str, trained: Trained) -> None:
    """On the device: what is not shared with the policy; of one that is paged, what is there for the whole
    pass and two layers."""
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    model = small_model(family, **WIDE)
    parameter_groups(
        model, {"vision": trained.vision, "projector": trained.projector, "language": trained.language}
    )
    shared = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    reference = make_reference(model, kind)
    core = reference.held.model
    layers = [] if kind != "host" else [*core.language_model.layers[2:], *core.visual.blocks]
    paged = {p.data_ptr() for layer in layers for p in layer.parameters()}
    own = {
        t.data_ptr(): t.nbytes
        for t in (*reference.held.parameters(), *reference.held.buffers())
        if t.data_ptr() not in shared | paged
    }
    scales = [
        p.quant_state for p in reference.held.parameters() if getattr(p, "quant_state", None) is not None
    ]
    held = sum(own.values()) + sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in scales)
    assert reference_bytes(shape_of(model.config), kind, 4, trained) == pytest.approx(held, rel=0.05)


def test_the_decoders_buffers_are_counted_as_they_are() -> None:
    model, batch, groups = work("qwen3_vl")
    with torch.no_grad():
        prefix = prefill(model, batch)
    for static in (False, True):
        decoder = Decoder(model, ENDLESS, static=static)
        decoder._load(prefix, Sampling(3, 20, 1.0, 1.0), 0, torch.arange(6))
        slots = decoder.slots
        assert slots is not None
        held = [t for pairs in (*slots.own.values(), *decoder.prompt_kv.values()) for t in pairs] + [
            slots.ids[1:],
            slots.logprob[1:],
        ]
        expected = decoder_bytes(shape_of(model.config), groups, 20, 4, static)
        assert sum(t.numel() * t.element_size() for t in held) == expected
        decoder.release()
        assert decoder.slots is None


def test_7b_with_its_reference_fits_one_card() -> None:
    shape = PUBLISHED["qwen2.5-vl-7b"]
    group = Group(((34, 46), (4, 4)), 523, (100,) * 8)
    parts = cost.peak_memory(shape, [group] * 8, 1, MemorySettings(reference="copy"))
    assert parts["weights"] == parts["gradients"] == parts["reference"] == 2 * shape.parameters
    assert 62 * 2**30 < sum(parts.values()) < 78 * 2**30
    held = [
        sum(cost.peak_memory(shape, [group], 1, MemorySettings(reference=kind)).values())
        for kind in ("copy", "int8", "nf4", "host", "none")
    ]
    assert held == sorted(held, reverse=True)
    with pytest.raises(UserError, match="--reference must be one of"):
        cost.peak_memory(shape, [group], 1, MemorySettings(reference="fp8"))
