"""The cost ledger against what is counted: FLOPs exactly, parameters exactly, launches and syncs by count,
memory within 15% of the measured peak."""

from __future__ import annotations

import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from locus_kernels.shared_prefix_attention import backends, layout
from torch.utils._python_dispatch import TorchDispatchMode

from locus_fast import cost
from locus_fast.config import Config
from locus_fast.cost.__main__ import main, model_of
from locus_fast.cost.plan import TEXT_TOKENS
from locus_fast.cost.shapes import PUBLISHED, Group, group_of
from locus_fast.cost.traffic import step_launches
from locus_fast.model import attention, packing
from locus_fast.model.families import shape_of
from locus_fast.model.fused import fuse
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import checkpoint_activations, prefill, reply_hidden
from locus_fast.step import rollout
from locus_fast.step.rollout import Decoder, Sampling
from locus_fast.step.vocabulary import Vocabulary
from locus_fast.weights.checkpoint import TINY_BASE
from tests.locus_fast.cost_cases import (
    ENDLESS,
    FAMILIES,
    GRIDS,
    REPLIES,
    answers,
    counted,
    group_like,
    spent,
    work,
)
from tests.locus_fast.liger_cases import leave_kernels_out
from tests.small_models import CLASSES, small_model, small_prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_flops_are_the_counted_ones(family: str) -> None:
    model, *_ = work(family)
    prompt = small_prompt(model, GRIDS[0], words=5, seed=0)
    with torch.no_grad():
        prefix = prefill(model, PromptBatch.of([prompt], model.config, "cpu"))
    decoder = Decoder(model, ENDLESS)
    flops, _ = counted(lambda: decoder.generate(prefix, Sampling(3, 6, 1.0, 1.0), seed=0, groups=[0]))
    shape = shape_of(model.config)
    table = cost.step_flops(shape, [group_like(prompt, [6] * 3)], checkpointing=0, reference=False)
    # the first step's product with a single own value is an outer one
    uncounted = 2 * 3 * shape.text.queries * shape.text.layers
    assert spent(table, ("decode", "decode attention", "decode head"), "rollout") == flops + uncounted


def test_rows_that_have_ended_are_moved_out() -> None:
    """While 9 to 16 of 16 run, 16 rows are fed; then 8, and 2."""
    shape = PUBLISHED["qwen3-vl-4b"]
    group = Group((), 10, (5,) * 8 + (9,) * 6 + (11,) * 2)
    floor, spent_ = (
        cost.step_flops(shape, [group], checkpointing=0, reference=False, executed=e)["decode"]["rollout"]
        for e in (False, True)
    )
    per_row = 2 * shape.text.matrices * shape.text.layers
    assert floor == per_row * (8 * 4 + 6 * 8 + 2 * 10)
    assert spent_ == per_row * (16 * 4 + 8 * 4 + 2 * 2)


def test_causal_attention_is_half_the_square_and_the_diagonal() -> None:
    model, _, groups = work("qwen3_vl")
    shape = shape_of(model.config)
    exact, square = (
        cost.step_flops(shape, groups, checkpointing=1, reference=True, causal=c) for c in ("exact", "square")
    )
    a_pair = 4 * shape.text.queries * shape.text.layers
    assert exact["prompt attention"]["forward"] == a_pair * sum(
        n * (n + 1) / 2 for n in (group.prompt for group in groups)
    )
    assert square["prompt attention"]["forward"] == a_pair * sum(group.prompt**2 for group in groups)
    own = sum(n * (n - 1) / 2 for replies in REPLIES for n in replies)  # n - 1 tokens are fed
    assert exact["reply attention"]["forward"] == a_pair * (
        own + sum(g.prompt * (n - 1) for g in groups for n in g.replies)
    )


def test_flat_groups_stop_after_decoding() -> None:
    """At the floor; what is spent takes their prompts along through the packed backward of the others'."""
    model, _, groups = work("qwen2_5_vl")
    shape, ways = shape_of(model.config), {"checkpointing": 1, "reference": True}
    mixed, through = [groups[0], replace(groups[1], active=False)], ("vision", "prompt", "prompt attention")
    both = cost.step_flops(shape, mixed, **ways, executed=False)
    alone, flat = (
        cost.step_flops(shape, chosen, **ways, executed=False) for chosen in (groups[:1], groups[1:])
    )
    assert both["prompt"]["forward"] == alone["prompt"]["forward"] + flat["prompt"]["forward"]
    for column in ("recompute", "backward", "reference"):
        assert cost.total(both, [column]) == cost.total(alone, [column])
    assert cost.total(both, ["rollout"]) == cost.total(alone, ["rollout"]) + cost.total(flat, ["rollout"])
    spent, all_live = (
        cost.step_flops(shape, mixed, **ways, executed=True),
        cost.step_flops(shape, groups, **ways, executed=True),
    )
    for part in through:
        assert spent[part]["backward"] == all_live[part]["backward"]
    assert (
        spent["replies"]["backward"]
        == cost.step_flops(shape, groups[:1], **ways, executed=True)["replies"]["backward"]
    )
    none = [replace(group, active=False) for group in groups]
    assert (
        cost.total(
            cost.step_flops(shape, none, **ways, executed=True), ["backward", "recompute", "reference"]
        )
        == 0
    )


def test_repeating_the_prompt() -> None:
    shape, ways = PUBLISHED["qwen2.5-vl-7b"], {"checkpointing": 1, "reference": True}
    one = Group(((34, 46), (4, 4)), 523, (100,))
    floor, repeated = cost.step_flops(shape, [one], **ways), cost.repeated_flops(shape, [one], **ways)
    prefill = sum(
        floor[part]["forward"] for part in ("vision", "vision attention", "prompt", "prompt attention")
    )
    # a single reply is repeated by nobody, but prefilled by another engine
    assert cost.total(repeated) == cost.total(floor) + prefill
    eight = replace(one, replies=(100,) * 8)
    assert cost.total(cost.repeated_flops(shape, [eight], **ways)) == 8 * cost.total(repeated)
    ours = cost.step_flops(shape, [eight], **ways, executed=True)
    assert 1 < cost.total(ours) / cost.total(cost.step_flops(shape, [eight], **ways)) < 1.1
    assert cost.model_flops(shape, [eight], reference=True) == cost.total(
        cost.step_flops(shape, [eight], checkpointing=0, reference=True)
    )


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("qwen2.5-vl-7b", 8_292_166_656), ("qwen3-vl-4b", 4_437_815_808), ("mimo-vl-7b", 8_306_217_216)],
)
def test_parameters_of_the_published_shapes(preset: str, parameters: int) -> None:
    shape = PUBLISHED[preset]
    vision, text = shape.vision, shape.text
    config_class, model_class = CLASSES[shape.architecture]
    tower = {
        "depth": vision.depth,
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_heads": vision.heads,
    }
    tower |= {"out_hidden_size": vision.out, "patch_size": vision.patch}
    tower |= (
        {"deepstack_visual_indexes": list(vision.deepstack)}
        if vision.deepstack
        else {"fullatt_block_indexes": list(vision.full)}
    )
    language = {
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "vocab_size": text.vocabulary,
    }
    language |= {
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    language["rope_parameters"] = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = config_class(text_config=language, vision_config=tower, tie_word_embeddings=text.tied)
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    assert shape_of(config) == shape
    assert sum(p.numel() for p in model.parameters()) == shape.parameters == parameters
    assert sum(p.numel() for p in model.model.visual.parameters()) == vision.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_small_models(family: str) -> None:
    model = small_model(family)
    assert shape_of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_images_take_their_familys_grid() -> None:
    group = group_of(
        PUBLISHED["qwen2.5-vl-7b"],
        [(640, 480), (64, 64)],
        [(262144, 1048576), (3136, 262144)],
        text_tokens=9,
        replies=2,
        reply_tokens=5,
    )
    assert group == Group(((34, 46), (4, 4)), 34 * 46 // 4 + 4 + 9, (5, 5))
    assert (group.fed, group.patches) == ([4, 4], 34 * 46 + 16)


def test_group_cost_in_language_tokens() -> None:
    shape = PUBLISHED["qwen3-vl-4b"]
    assert cost.group_cost(shape, [], 0, 0) == 0
    assert 1000 < cost.group_cost(shape, [], 600, 400) < 1050  # attention is a small share at this length
    with_image = cost.group_cost(shape, [(30, 40)], 600, 400)
    ways = {"checkpointing": 0, "reference": False}
    table = cost.step_flops(shape, [Group(((30, 40),), 600, (401,))], **ways)
    parts = sum(table[part]["forward"] for part in table if "head" not in part and "decode" not in part)
    assert with_image == pytest.approx(parts / (2 * shape.text.matrices * shape.text.layers), rel=0.01)


def test_mfu_only_where_the_peak_is_known() -> None:
    assert cost.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert cost.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert cost.peak_flops("cpu") is None
    assert cost.rates(2e12, 4.0, "cpu") == {"model_flops_per_s": 5e11}
    assert cost.rates(989e12, 2.0, "NVIDIA H200") == {"model_flops_per_s": 494.5e12, "mfu": 0.5}


VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "split",
        "split_with_sizes",
    ),
    *(
        "unbind",
        "detach",
        "alias",
        "as_strided",
        "_reshape_alias",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    ),
}


class Operators(TorchDispatchMode):
    """Counts dispatched operators that compute, and kernels that are counted elsewhere."""

    def __init__(self, kernels: Counter[str]) -> None:
        super().__init__()
        self.kernels, self.launches = kernels, 0

    def __enter__(self) -> Operators:
        self.launches -= self.kernels.total()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.launches += self.kernels.total()
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.launches += function.name().split("::")[1].split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_launches_of_a_step(
    family: str, checkpointing: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the path that CUDA takes, with tensors that hold no values."""
    kernels = leave_kernels_out(monkeypatch) if fused else Counter()
    for module in (layout, packing, rollout):
        monkeypatch.setattr(module, "send", lambda tensor, device: tensor.to(device))
    model = small_model(family)
    prompts = [small_prompt(model, grids, words=5, seed=0) for grids in GRIDS]
    model = model.to("meta", torch.bfloat16)
    monkeypatch.setattr(attention, "_chosen", lambda *_: backends._torch_cuda())
    if fused:
        fuse(model)
    batch, groups = (
        PromptBatch.of(prompts, model.config, "meta"),
        [group_like(p, r) for p, r in zip(prompts, REPLIES, strict=True)],
    )
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    scored = answers(batch, groups)
    with Operators(kernels) as forward:
        hidden = reply_hidden(model, prefill(model, batch), scored)
    with Operators(kernels) as backward:
        hidden.sum().backward()
    table = step_launches(
        shape_of(model.config), [groups], checkpointing=checkpointing, reference=False, fused=fused
    )
    assert forward.launches == pytest.approx(table["forward"], rel=0.05)
    assert backward.launches == pytest.approx(table["backward"] + table["recompute"], rel=0.05)

    monkeypatch.setattr(
        rollout,
        "Count",
        lambda lag, on_cuda: types.SimpleNamespace(known=lambda most: 6, ask=lambda running: None),
    )
    monkeypatch.setattr(rollout, "Graph", lambda function, other: function)
    words = Vocabulary(*(t.to("meta") for t in (ENDLESS.allowed, ENDLESS.stops)))
    with torch.no_grad():
        prefix = prefill(model.eval(), batch)
        few, more = (decoding(model, words, prefix, tokens, kernels) for tokens in (2, 7))
    a_step = [replace(group, replies=(6,) * 3) for group in groups]
    table = step_launches(shape_of(model.config), [a_step], checkpointing=0, reference=False, fused=fused)
    assert more - few == pytest.approx(table["decode"], rel=0.05)


def decoding(model, words: Vocabulary, prefix, tokens: int, kernels: Counter[str]) -> int:
    with Operators(kernels) as steps:
        Decoder(model, words, static=True).generate(
            prefix, Sampling(3, tokens, 1.0, 1.0), seed=0, groups=[0, 1]
        )
    return steps.launches


def test_syncs_of_a_step() -> None:
    """That nothing else waits is tested in test_no_waiting.py."""
    assert sum(cost.step_syncs([[Group((), 10, (3,))]] * 5).values()) == 5 + 1


@pytest.mark.parametrize("preset", ["tiny", *PUBLISHED])
def test_the_command_prints_every_part(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", preset, "--image", "640x480", "--group-size", "8", "--reply-tokens", "100"]) == 0
    printed = capsys.readouterr().out
    flops = (
        "vision",
        "vision attention",
        "prompt",
        "replies",
        "reply attention",
        "head",
        "decode",
        "over the floor",
        "repeats the prompt",
    )
    rest = (
        "decode: prompt keys",
        "kernel launches",
        "host syncs",
        "gradients",
        "optimizer states",
        "reference",
        "kept keys and values",
        "workspace",
    )
    for words in (*flops, *rest, "activations", "fits in 78 GiB"):
        assert words in printed, words
    assert "DOES NOT" not in printed


def test_the_command_needs_no_transformers() -> None:
    """Which takes most of the time where it is imported."""
    code = (
        "import sys; from locus_fast.cost.__main__ import main; assert main([]) == 0; assert 'transformers' "
        "not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "qwen2.5-vl-7b: 8,292,166,656 parameters" in done.stdout


def test_the_tiny_preset_is_the_embedded_base() -> None:
    assert model_of("tiny", "") == model_of("", str(TINY_BASE))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "640"], "expected WIDTHxHEIGHT in pixels, such as 640x480, not '640'"),
        (["--cue", "0x10"], "expected WIDTHxHEIGHT"),
        (["--group-size", "0"], "expected a whole number of at least 1, not '0'"),
        (["--reply-tokens", "many"], "expected a whole number"),
        (["--group-size", "1000000000"], "expected a whole number of at most 4096, not '1000000000'"),
        (["--image=-640x480"], "expected WIDTHxHEIGHT"),
        (["--preset", "gpt"], "--preset must be one of tiny, qwen2.5-vl-7b"),
        (["--model", "nowhere/at/all"], "there is no such folder"),
        (["--reference", "fp8"], "invalid choice: 'fp8'"),
        (["--images", "1x1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_get_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "it costs the same, for its KL; with --skip-zero-variance"),
        (["--kl-coef", "0"], "no gradient without a KL"),
    ],
)
def test_what_a_group_of_equal_rewards_costs(more: list[str], sentence: str, capsys) -> None:
    """The ledger says it: everything with a KL; its prefill and its decoding where it is left out."""
    assert main(["--preset", "qwen2.5-vl-7b", *more]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "rewards are all equal" in line]
    assert sentence in line
    shape, preset = PUBLISHED["qwen2.5-vl-7b"], Config()
    bounds = (preset.image_pixels, preset.cue_pixels)
    group = group_of(
        shape, ((640, 480), (64, 64)), bounds, text_tokens=TEXT_TOKENS, replies=8, reply_tokens=100
    )
    spent = cost.total(
        cost.step_flops(
            shape, [replace(group, active=False)], checkpointing=1, reference=not more, executed=True
        )
    )
    assert f"{spent / 1e12:,.2f} TFLOP" in line
