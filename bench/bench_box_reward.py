"""Reward from token ids: parsing the decoded text on the host, the reference in eager PyTorch, torch.compile
of it, and ours.

On CPU ours is the reference. The floor is one read of the ids; what is left is latency.
"""

from __future__ import annotations

import re

import pytest
import torch
from locus_kernels.box_reward import box_reward, build_token_table, group_advantage, iou, reference
from locus_kernels.box_reward.records import Scoring

from bench.roofline import DEVICE, timed
from locus_fast.tiny.tokenizer import VOCABULARY, build_tokenizer

# on CUDA all ids together fill more than a cache
GROUPS, GROUP, TOKENS, SETS = (128, 8, 256, 32) if DEVICE == "cuda" else (64, 8, 24, 4)
BOX = re.compile(r"\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]\s*")
READING = {"which": "first", "grammar": "direct"}
SCORING = Scoring(GROUP, "iou", format_weight=0.1, normalize_std=True, progress=0.0)


@pytest.fixture(scope="module")
def tasks():
    tokenizer = build_tokenizer()
    table = build_token_table(tokenizer, VOCABULARY).to(DEVICE)
    special = tokenizer.eos_token_id
    made = []
    for n in range(SETS):
        numbers = torch.randint(
            0, 100, (GROUPS * GROUP, 4), generator=torch.Generator().manual_seed(n)
        ).tolist()
        ids = torch.tensor(
            [tokenizer.encode(f"[{a:02d}, {b:02d}, {c:02d}, {d:02d}]") for a, b, c, d in numbers]
        )
        ids = torch.nn.functional.pad(ids, (TOKENS - ids.shape[1], 0), value=special).to(DEVICE)
        lengths = torch.full((len(ids),), TOKENS, device=DEVICE)
        target = torch.tensor([10.0, 20.0, 60.0, 70.0], device=DEVICE).expand(len(ids), 4).contiguous()
        made.append((tokenizer, table, ids, lengths, target))
    return made


def host_parsing(tokenizer, table, ids, lengths, target):
    boxes, formed = [], []
    for text in tokenizer.batch_decode(ids.cpu(), skip_special_tokens=True):
        match = BOX.fullmatch(text)
        boxes.append([float(v) for v in match.groups()] if match else [0.0] * 4)
        formed.append(match is not None)
    reward = 0.9 * iou(torch.tensor(boxes), target.cpu()) + 0.1 * torch.tensor(formed)
    return reward.to(ids.device), group_advantage(reward, GROUP)[0].to(ids.device)


def eager(tokenizer, table, ids, lengths, target):
    earned = reference.box_reward(ids, lengths, table, target, SCORING, **READING)
    return earned.reward, earned.advantage


def ours(tokenizer, table, ids, lengths, target):
    earned = box_reward(ids, lengths, table, target, GROUP, **READING)
    return earned.reward, earned.advantage


def arithmetic(target, box, valid, format_ok):
    """What follows the reading; the automaton's loop itself has no form that torch.compile could fuse."""
    reward = 0.9 * torch.where(valid, iou(box, target), 0.0) + 0.1 * format_ok.float()
    return reward, group_advantage(reward, GROUP)[0]


compiled_arithmetic = torch.compile(arithmetic, dynamic=False)


def compiled(tokenizer, table, ids, lengths, target):
    return compiled_arithmetic(target, *reference.read_boxes(ids, lengths, table, **READING))


WAYS = {"host parsing": host_parsing, "eager": eager, "torch.compile": compiled, "ours": ours}


@pytest.mark.parametrize("way", WAYS)
def test_reward(benchmark, tasks, way: str) -> None:
    for task in tasks:
        for got, expected in zip(WAYS[way](*task), host_parsing(*task), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    benchmark.group = f"box reward, {GROUPS * GROUP} replies of {TOKENS} tokens"
    timed(benchmark, WAYS[way], tasks, moved=tasks[0][2].numel() * 8, rounds=30 if DEVICE == "cuda" else 5)
