"""The box-reward operators: the kernel against the reference, torch.compile, launches. Its cases are in
interpret.py."""

from __future__ import annotations

import random

import pytest
import torch
from locus_kernels.box_reward import box_reward, op, read_boxes, reference
from locus_kernels.box_reward.records import Scoring
from locus_kernels.box_reward.shapes import REWARD_SHAPES

from tests.kernels.box_reward.cases import byte_level, table_of
from tests.kernels.interpreter import WAYS, on_the_gpu, run_cases
from tests.kernels.probes import Allocations, Operations

CHOICES = {"which": "first", "grammar": "direct"}


@pytest.mark.parametrize("interpret", WAYS)
def test_kernel(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("box_reward/interpret.py", interpret, subtests=subtests)


def test_every_reward_shape_has_its_function_on_both_sides() -> None:
    """A name that only one side knew would train on the CPU and fail on CUDA, or the other way round."""
    shapes = pytest.importorskip("locus_kernels.box_reward.triton_shapes")
    assert list(shapes.SHAPES) == list(REWARD_SHAPES)
    written = [function for name, function in vars(shapes).items() if name.startswith("shape_")]
    assert list(shapes.SHAPES.values()) == written


def small_task(device: str = "cpu"):
    texts = ("[1,2,30,40]", "[1,2,30,41]", "[1,2]", "no")
    rows = [byte_level().spell(text, random.Random(0)) for text in texts]
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    targets = torch.tensor([[1.0, 2, 30, 44]] * 4, device=device)
    return ids.to(device), lengths.to(device), table_of(byte_level(), device), targets


def whole(ids, lengths, table, target):
    return box_reward(ids, lengths, table, target, 2, **CHOICES)


def test_operators_survive_compilation_whole() -> None:
    arguments = small_task()
    expected = reference.box_reward(*arguments, Scoring(2, "iou", 0.1, True, 0.0), **CHOICES)
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)(*arguments)
    read = torch.compile(read_boxes, backend="aot_eager", fullgraph=True)
    for got in (whole(*arguments), compiled):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    reading = read(*arguments[:3], **CHOICES)
    assert all(torch.equal(a, b) for a, b in zip(reading, expected[:3], strict=True))


def test_operators_are_registered_soundly() -> None:
    ids, lengths, table, target = small_task()
    parts = (ids, lengths, *table.parts())
    torch.library.opcheck(op._read_operator, (*parts, "first", "direct"))
    torch.library.opcheck(op._reward_operator, (*parts, target, 2, "iou", 0.1, True, 0.0, "first", "direct"))


def test_one_launch_at_full_size(launches: list[str]) -> None:
    kernels = pytest.importorskip("locus_kernels.box_reward.triton")
    row = byte_level().spell("[1,2,30,40]", random.Random(0))
    ids = torch.tensor(row)[torch.arange(256) % len(row)].repeat(1024, 1)
    inputs = (ids, torch.full((1024,), 256), table_of(byte_level()))
    choices = {"which": "answer", "grammar": "think_answer"}
    targets = torch.zeros(1024, 4)
    with Operations() as done, Allocations() as seen:
        kernels.box_reward(*inputs, targets, Scoring(8, "iou", 0.1, True, 0.0), **choices)
    assert launches == ["box_reward_kernel"]
    # nothing else runs on the device, and nothing is read back
    assert set(done.names) <= {"empty", "view", "detach"}
    assert seen.largest == 1024 * 4
    kernels.read_boxes(*inputs, **choices)
    assert launches == ["box_reward_kernel"] * 2


@on_the_gpu
def test_one_launch_without_waiting_in_a_cuda_graph() -> None:
    arguments = small_task("cuda")
    expected = whole(*small_task())
    whole(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        earned = whole(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(earned, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        whole(*arguments)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]
