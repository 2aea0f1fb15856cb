"""How many kernels each operator launches, what else it asks of the device, and the largest tensor it
allocates, at full size.

Nothing is computed: launches are only counted, and tensors have shapes alone where their values do not matter
to the launcher.
"""

from __future__ import annotations

import random

import pytest
import torch
from locus_kernels.adamw8bit import new_state
from locus_kernels.box_reward import build_token_table
from locus_kernels.grpo_loss import reference as grpo_reference
from locus_kernels.linear_logprob import reference as head_reference
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.box_reward_cases import byte_level
from tests.kernels.head_cases import Allocations

triton = pytest.importorskip("triton")
from locus_kernels.adamw8bit.triton import adamw8bit_triton  # noqa: E402
from locus_kernels.box_reward.triton import box_reward_triton, read_boxes_triton  # noqa: E402
from locus_kernels.grpo_loss import triton as grpo  # noqa: E402
from locus_kernels.linear_logprob import triton as head  # noqa: E402
from locus_kernels.patchify.triton import patchify_images_triton  # noqa: E402
from locus_kernels.sample.triton import sample_triton  # noqa: E402

T, D, V = 2048, 2048, 151_936
NUMBERS = grpo_reference.Numbers(0.2, 0.2, 0.1, 20.0, 10.0)
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique",
    "_unique2",
)  # operations that need values on the host


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; none runs."""
    names: list[str] = []
    kernel = triton.runtime.jit.KernelInterface
    monkeypatch.setattr(
        kernel, "__getitem__", lambda self, grid: lambda *a, **k: names.append(self.fn.__name__)
    )
    monkeypatch.setattr(head, "INTERPRETED", True)  # no CUDA device is asked for
    monkeypatch.setattr(head, "_bulk_readable", lambda matrix: False)
    monkeypatch.setattr(head, "_aligned", lambda matrix: True)
    return names


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_box_reward(launches) -> None:
    table = build_token_table(byte_level().tokenizer, byte_level().vocab_size)
    row = byte_level().spell("[1,2,30,40]", random.Random(0))
    ids = torch.tensor(row)[torch.arange(256) % len(row)].repeat(1024, 1)
    lengths, target = torch.full((1024,), 256), torch.zeros(1024, 4)
    choices = {"which": "answer", "grammar": "think_answer"}
    with Operations() as done, Allocations() as seen:
        box_reward_triton(
            ids,
            lengths,
            table,
            target,
            8,
            **choices,
            shape="iou",
            format_weight=0.1,
            normalize_std=True,
            progress=0.0,
        )
    assert launches == ["box_reward_kernel"]
    assert set(done.names) <= {
        "empty",
        "view",
        "detach",
    }  # nothing else runs on the device, and nothing is read back
    assert seen.largest == 1024 * 4
    read_boxes_triton(ids, lengths, table, **choices)
    assert launches == ["box_reward_kernel"] * 2


def head_inputs() -> tuple[torch.Tensor, ...]:
    """(hidden, weight, ids, a vector [T], log-sum-exp [T]) without values."""
    hidden, weight = (torch.empty(n, D, device="meta", dtype=torch.bfloat16) for n in (T, V))
    vector = torch.empty(T, device="meta")
    return hidden, weight, torch.empty(T, dtype=torch.int64, device="meta"), vector, vector.double()


def test_linear_logprob(launches) -> None:
    hidden, weight, ids, vector, lse = head_inputs()
    with Operations() as done, Allocations(spared=(V, D)) as seen:
        head.forward(hidden, weight, ids, 1.0, None)
        assert launches == ["partial_kernel", "finish_kernel"]
        launches.clear()
        head.backward(vector, vector, hidden, weight, ids, lse, vector, 1.0, None, True, True)
    chunks = triton.cdiv(V, head.chunk_columns(T, V, 128))
    assert launches == ["logit_gradient_kernel"] * chunks
    assert chunks <= 19
    assert 0 < seen.largest < T * V // 8
    assert not set(done.names) & set(WAITING)


def test_frozen_weight_costs_one_product_a_chunk(launches) -> None:
    hidden, weight, ids, vector, lse = head_inputs()
    counts = []
    for wanted in ((True, True), (True, False)):
        with Operations() as done, Allocations() as seen:
            head.backward(vector, None, hidden, weight, ids, lse, vector, 1.0, None, *wanted)
        counts.append(sum(name in ("mm", "bmm", "addmm") for name in done.names))
    assert counts[0] == 2 * counts[1] > 0
    assert seen.largest < T * V // 8  # [V, D] is not among the tensors


def test_grpo_loss(launches) -> None:
    hidden, weight, ids, vector, lse = head_inputs()
    with Operations() as done, Allocations(spared=(V, D)) as seen:
        grpo.forward(hidden, weight, ids, vector, vector, vector, vector, NUMBERS, 1.0, None)
        assert launches == ["partial_kernel", "objective_kernel", "sum_kernel"]
        head.backward(vector, None, hidden, weight, ids, lse, vector, 1.0, None, True, True)
    assert 0 < seen.largest < T * V // 8
    assert not set(done.names) & set(WAITING)


def test_grpo_loss_on_the_cpu_path() -> None:
    hidden, weight, ids, vector, lse = head_inputs()
    with Allocations(spared=(V, D)) as seen:
        grpo_reference.forward(hidden, weight, ids, vector, vector, vector, vector, NUMBERS, 1.0, None)
        head_reference.backward(vector, None, hidden, weight, ids, lse, vector, 1.0, None, True, True)
    assert 0 < seen.largest < T * V // 8


@pytest.mark.parametrize(
    ("choices", "expected"),
    [({}, 2), ({"temperature": 0.0}, 2), ({"top_k": 50}, 3), ({"top_k": 50, "top_p": 0.9}, 3)],
)
def test_sample(launches, choices: dict, expected: int) -> None:
    rows = 256
    logits = torch.empty(rows, V, device="meta", dtype=torch.bfloat16)
    row = torch.empty(rows, device="meta", dtype=torch.int64)
    arguments = {
        "seed": 0,
        "row": row,
        "position": row,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "allowed": torch.empty(V, device="meta").bool(),
    }
    with Operations() as done, Allocations() as seen:
        sample_triton(logits, **arguments | choices)
    assert len(launches) == expected
    assert not set(done.names) & set(WAITING)
    assert 0 < seen.largest < rows * V // 200


def test_patchify(launches) -> None:
    images = [torch.zeros(270, 360, 3, dtype=torch.uint8), torch.zeros(97, 131, 3, dtype=torch.uint8)]
    sizes, boxes = [(196, 252), (56, 84), (28, 28)], [(0, 0, 360, 270), (0, 0, 131, 97), (10, 20, 70, 90)]
    constants = {
        "patch": 14,
        "frames": 2,
        "merge": 2,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "dtype": torch.float32,
    }
    with Allocations() as seen:
        patches = patchify_images_triton([*images, images[0]], sizes, boxes, **constants)
    assert launches == ["first_kernel", "second_kernel"]
    assert seen.largest == patches.numel()  # the bytes between the passes and the plan are smaller


def test_adamw8bit(launches) -> None:
    """Any number of parameters: a launch for those in blocks, and one for those that are not."""
    weights = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((64, 128), (33,), (16, 256)) * 40]
    states, rate = [new_state(weight) for weight in weights], torch.tensor(1e-3)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "words": [(1, 2)] * 120}
    where = {"lr": [rate] * 120, "gradient_scale": torch.ones(()), "corrections": torch.ones(120, 2)}
    with Operations() as operations:
        adamw8bit_triton(weights, weights, states, **where, **settings)
    assert launches == ["adamw8bit_kernel"] * 2
    assert not set(operations.names) & set(WAITING)
