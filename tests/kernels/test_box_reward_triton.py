"""The box-reward kernel against the reference, and its operator under torch.compile. The kernel's cases are
in interpret_box_reward.py."""

from __future__ import annotations

import random

import pytest
import torch
from locus_kernels.box_reward import box_reward, build_token_table, op, read_boxes, reference

from tests.kernels.box_reward_cases import byte_level
from tests.kernels.interpreter import run_cases


def test_kernel_under_the_interpreter() -> None:
    run_cases("interpret_box_reward.py", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_the_gpu() -> None:
    run_cases("interpret_box_reward.py", interpret=False)


def test_the_kernel_knows_the_reward_shapes_of_the_reference() -> None:
    """A name that only one side knew would train on the CPU and fail on CUDA, or the other way round."""
    triton = pytest.importorskip("locus_kernels.box_reward.triton")
    assert list(triton.SHAPES) == list(reference.REWARD_SHAPES)


def small_task(device: str = "cpu"):
    rows = [
        byte_level().spell(text, random.Random(0)) for text in ("[1,2,30,40]", "[1,2,30,41]", "[1,2]", "no")
    ]
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    table = build_token_table(byte_level().tokenizer, byte_level().vocab_size)
    lengths = torch.tensor([len(row) for row in rows])
    return (
        ids.to(device),
        lengths.to(device),
        table.to(device),
        torch.tensor([[1.0, 2, 30, 44]] * 4, device=device),
    )


def whole(ids, lengths, table, target):
    return box_reward(ids, lengths, table, target, 2, which="first", grammar="direct")


def test_operator_survives_compilation_whole() -> None:
    arguments = small_task()
    expected = reference.box_reward(*arguments, 2, which="first", grammar="direct")
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)(*arguments)
    reading = torch.compile(read_boxes, backend="aot_eager", fullgraph=True)(
        *arguments[:3], which="first", grammar="direct"
    )
    for got in (whole(*arguments), compiled):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reading, expected[:3], strict=True))


@pytest.mark.parametrize("with_target", [True, False])
def test_operator_is_registered_soundly(with_target: bool) -> None:
    ids, lengths, table, target = small_task()
    parts = (table.offsets, table.classes, table.transitions, table.final, table.width)
    choices = (2, "first", "direct", "iou", 0.1, True, 0.0)
    torch.library.opcheck(op._operator, (ids, lengths, *parts, target if with_target else None, *choices))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
