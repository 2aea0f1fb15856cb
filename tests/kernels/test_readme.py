"""The examples of `kernels/README.md` run as printed, one after another; the one that needs TRL is
grpo_loss/test_peers.py's."""

from __future__ import annotations

import re

import torch

from locus_fast.tiny.tokenizer import build_tokenizer
from tests.kernels.readme import examples

OPERATORS = (
    "box_reward",
    "linear_logprob",
    "grpo_loss",
    "sample",
    "patchify_images",
    "shared_prefix_attention",
    "shared_prefix_decode",
)


def test_every_operator_has_an_example() -> None:
    for name in OPERATORS:
        assert any(
            re.search(rf"from locus_kernels\.\w+ import (\([^)]*|.*)\b{name}\b", code) for code in examples()
        ), name


def test_the_examples_run() -> None:
    torch.manual_seed(0)
    names: dict = {"tokenizer": build_tokenizer()}
    for code in examples():
        if "import GRPOTrainer" not in code:
            exec(code, names)
    assert names["scored"].zero_variance.shape == (16,)
    assert names["patches"].shape[0] == int(names["grid_thw"].prod(1).sum())
    assert names["weight"].grad is not None
    assert names["token"].shape == (64,)
    assert names["box_iou"]([[5, 6, 7], [8]], target=[[1.0, 2.0, 3.0, 4.0]] * 2) == [0.0, 0.0]
