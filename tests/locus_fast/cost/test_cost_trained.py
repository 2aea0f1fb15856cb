"""What is trained decides what backward costs: FLOPs of frozen parts, adapters and 4-bit bases against the
counted ones, in the trainer too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from locus_kernels.linear_logprob import linear_logprob
from torch.utils.flop_counter import FlopCounterMode

from locus_fast import cost
from locus_fast.config import parse
from locus_fast.cost.shapes import EVERYTHING, PUBLISHED, Trained
from locus_fast.model.adapters import add_adapters
from locus_fast.model.families import PARTS, shape_of
from locus_fast.model.policy import checkpoint_activations, encode_images, prefill, reply_hidden
from locus_fast.model.quantize import quantize
from locus_fast.model.reference import make_reference
from locus_fast.run.plan import trained_by
from locus_fast.run.setup import set_up
from locus_fast.step import metrics
from locus_fast.step.optim import parameter_groups
from locus_fast.step.optimizers import make_optimizer
from locus_fast.step.step import Step
from tests.locus_fast.adapter_cases import needs_peft
from tests.locus_fast.cost_cases import FAMILIES, FORMULAS, answers, counted, spent, work

ADAPTERS = pytest.param(Trained.adapters(7), marks=needs_peft)
KINDS = [
    EVERYTHING,
    Trained(vision=False),
    Trained(projector=False),
    Trained(vision=False, projector=False),
    Trained(language=False),
    Trained(vision=False, language=False),
    Trained(projector=False, language=False),
    ADAPTERS,
]


def rates(trained: Trained) -> dict[str, float]:
    return dict(zip(PARTS, map(float, (trained.vision, trained.projector, trained.language)), strict=True))


def check_flops(model, batch, groups, checkpointing: int, trained: Trained) -> None:
    """Every pass of a microbatch against the counter, exactly."""
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    ways = {
        "checkpointing": checkpointing,
        "reference": True,
        "trained": trained,
        "executed": True,
        "causal": "square",
    }
    table = cost.step_flops(shape_of(model.config), groups, **ways)
    scored = answers(batch, groups)

    vision, features = counted(lambda: encode_images(model, batch.patches, batch.grids, batch.vision))
    prompt, prefix = counted(lambda: prefill(model, batch, features))
    replies, hidden = counted(lambda: reply_hidden(model, prefix, scored))
    head, logprob = counted(lambda: linear_logprob(hidden, model.lm_head.weight, scored.ids, 1.0)[0])
    backward, _ = counted(lambda: logprob.sum().backward())

    for parts, flops in {
        ("vision", "vision attention"): vision,
        ("prompt", "prompt attention"): prompt,
    }.items():
        assert spent(table, parts, "forward") == flops
    assert spent(table, ("vision", "vision attention"), "reference") == (vision if trained.tower else 0)
    assert spent(table, ("replies", "reply attention"), "forward") == replies
    assert spent(table, ("head",), "forward") == head
    assert spent(table, tuple(table), "backward", "recompute") == backward


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("trained", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_the_counted_ones(family: str, trained: Trained, checkpointing: int) -> None:
    model, batch, groups = work(family)
    if trained.rank:
        add_adapters(model, trained.rank, 8.0)
    else:
        parameter_groups(model, rates(trained))
    check_flops(model, batch, groups, checkpointing, trained)


@needs_peft
def test_flops_over_a_4_bit_base(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    product = torch.ops.bitsandbytes.gemm_4bit
    monkeypatch.setitem(
        FORMULAS,
        product,
        lambda x, _, shape, *__, out_shape=None, **___: 2 * torch.Size(x).numel() * shape[0],
    )
    model, batch, groups = work("qwen2_5_vl")
    quantize(model, "nf4", torch.device("cpu"))
    add_adapters(model, 4, 8.0)
    check_flops(model, batch, groups, 1, Trained.adapters(4))


@needs_peft
def test_the_reference_has_no_adapters() -> None:
    shape, group = PUBLISHED["qwen2.5-vl-7b"], cost.Group(((34, 46), (4, 4)), 523, (100,) * 8)
    whole, adapted = (
        cost.step_flops(shape, [group], checkpointing=0, reference=True, trained=t)
        for t in (EVERYTHING, Trained.adapters(16))
    )
    for part in ("prompt", "replies", "head"):
        assert adapted[part]["reference"] == whole[part]["reference"]
        assert part == "head" or adapted[part]["forward"] > whole[part]["forward"]
    assert cost.total(adapted, ["backward"]) < 0.6 * cost.total(whole, ["backward"])
    assert adapted["decode"]["rollout"] > whole["decode"]["rollout"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lr-scale", "0", "0", "1", "--checkpointing", "1"],
        ["--lr-scale", "1", "1", "0", "--updates-per-batch", "2"],
        ["--lr-scale", "0", "1", "0", "--rollout-tokens", "9000"],
        pytest.param(["--lora", "4", "--updates-per-batch", "2"], marks=needs_peft),
        pytest.param(["--lora", "4", "--checkpointing", "2", "--kl-coef", "0"], marks=needs_peft),
    ],
)
def test_the_trainers_metric_is_what_is_counted(
    options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exactly, over a whole step but for the sampling, which the counter does not see whole; zero-variance
    groups included."""

    def square(*arguments, **ways):
        table = cost.step_flops(*arguments, **ways, causal="square")
        return {
            part: {column: n for column, n in passes.items() if column != "rollout"}
            for part, passes in table.items()
        }

    monkeypatch.setattr(metrics, "step_flops", square)
    config = parse(
        [
            "--prompts",
            "5",
            "--group-size",
            "2",
            "--eval-cues",
            "1",
            "--microbatch-tokens",
            "1500",
            "--device",
            "cpu",
            *options,
        ]
    )
    setup = set_up(config)
    model, sampling = setup.engine.model, []
    if config.checkpointing:
        checkpoint_activations(model, config.checkpointing)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, dict(zip(PARTS, config.lr_scale, strict=True))), 0.0
    )
    reference = make_reference(model) if config.kl_coef else None
    generate = setup.engine.decoder.generate

    def sampled(*arguments, **ways):
        flops, rollout = counted(lambda: generate(*arguments, **ways))
        sampling.append(flops)
        return rollout

    setup.engine.decoder.generate = sampled
    prompts = [setup.inputs.prompter(setup.inputs.cues.train(i)) for i in range(5)]
    step = Step(setup.config, setup.engine, setup.scoring, reference, optimizer)
    model.train()
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        numbers = step(prompts, 0, 0.0, lambda: False)
    assert trained_by(config).rank == config.lora
    assert 0 < numbers["flops"] == counter.get_total_flops() - sum(sampling)
