"""Reward from token ids against decoding the replies and reading them with a regular expression."""

from __future__ import annotations

import re

import pytest
import torch
from locus_kernels.box_reward import box_reward, build_token_table, iou

from locus_fast.tiny.tokenizer import VOCABULARY, build_tokenizer

GROUPS, GROUP = 64, 8
BOX = re.compile(r"\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]\s*")


@pytest.fixture(scope="module")
def task():
    tokenizer = build_tokenizer()
    numbers = torch.randint(0, 100, (GROUPS * GROUP, 4), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([tokenizer.encode(f"[{a:02d}, {b:02d}, {c:02d}, {d:02d}]") for a, b, c, d in numbers])
    lengths = torch.full((len(ids),), ids.shape[1])
    target = torch.tensor([10.0, 20.0, 60.0, 70.0]).expand(len(ids), 4).contiguous()
    return tokenizer, build_token_table(tokenizer, VOCABULARY), ids, lengths, target


def from_ids(tokenizer, table, ids, lengths, target) -> torch.Tensor:
    return box_reward(ids, lengths, table, target, GROUP, which="first", grammar="direct").reward


def from_text(tokenizer, table, ids, lengths, target) -> torch.Tensor:
    rewards = []
    for text, true in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), target, strict=True):
        match = BOX.fullmatch(text)
        box = torch.tensor([float(v) for v in match.groups()] if match else [0.0] * 4)
        rewards.append(0.9 * iou(box, true) + 0.1 * (match is not None))
    return torch.stack(rewards)


@pytest.mark.parametrize("way", [from_text, from_ids])
def test_reward(benchmark, task, way) -> None:
    torch.testing.assert_close(way(*task), from_text(*task))
    benchmark.group = f"box reward, {GROUPS * GROUP} replies of {task[2].shape[1]} tokens"
    benchmark(way, *task)
