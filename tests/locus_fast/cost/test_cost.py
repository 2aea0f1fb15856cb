"""The cost ledger against what is counted: FLOPs exactly, parameters exactly, launches and syncs by count,
memory within 15% of the measured peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from locus_fast import cost
from locus_fast.cost.shapes import PUBLISHED, Group, group_of
from locus_fast.model.families import shape_of
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import prefill
from locus_fast.step.rollout import Decoder, Sampling
from tests.locus_fast.cost_cases import (
    ENDLESS,
    FAMILIES,
    GRIDS,
    REPLIES,
    counted,
    group_like,
    spent,
    work,
)
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
