"""Cases of the decoding kernels; test_shared_prefix_decode.py runs them under the interpreter and on the
GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.shared_prefix_decode.triton import choose_splits, shared_prefix_decode
from torch import Tensor

from tests.kernels.interpreter import device, poisoned_empty
from tests.kernels.shared_prefix_decode.cases import Case, check, make

DEVICE = device()


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_empty(monkeypatch)


def run(case: Case, processors: int = 12) -> Tensor:
    """The kernel's output, checked against the truth."""
    out = shared_prefix_decode(case.tensors(), case.scale, case.bounds(), processors=processors)
    check(case, out)
    return out


HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SHAPES = [
    (16, 1, FULL),
    (40, 4, FULL),
    (64, 7, FULL),
    (128, 1, FULL),
    (256, 4, FULL),
    (64, 8, BRAIN),
    (80, 8, BRAIN),
    (128, 7, BRAIN),
]
SHAPES += [(256, 1, BRAIN), (40, 3, HALF), (80, 1, HALF), (128, 4, HALF), (200, 7, HALF)]


@pytest.mark.parametrize(("dimension", "share", "dtype"), SHAPES)
def test_dimensions_shares_and_dtypes(dimension: int, share: int, dtype: torch.dtype) -> None:
    """Ragged groups and prompts, an empty group, an empty prompt, rows without own tokens, rows of no
    group."""
    run(
        make(
            [70, 3, 0, 40],
            [2, 0, 2, 1],
            [1, 33, 0, 2, 5],
            2 * share,
            2,
            dimension,
            dtype,
            padding=1,
            slack=3,
            seed=share,
            device=DEVICE,
        )
    )


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lengths(data: st.DataObject) -> None:
    groups = data.draw(st.integers(0, 3))
    prompts = data.draw(st.lists(st.integers(0, 70), min_size=groups, max_size=groups))
    rows = data.draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups))
    own = data.draw(st.lists(st.integers(0, 35), min_size=sum(rows), max_size=sum(rows)))
    choices: dict[str, Any] = {
        "padding": data.draw(st.integers(0, 2)),
        "slack": data.draw(st.sampled_from([0, 1, 150])),
        "capacity": 36,
    }
    run(
        make(prompts, rows, own, 4, 2, 16, HALF, seed=len(own), device=DEVICE, **choices),
        data.draw(st.sampled_from([1, 5, 132])),
    )


def test_groups_wider_than_a_tile() -> None:
    run(make([40, 20], [9, 1], [2] * 10, 4, 1, 16, device=DEVICE))
    # more heads of a key head than a tile of the merging kernel
    run(make([40], [1], [20], 40, 1, 16, device=DEVICE))


def test_splits() -> None:
    """About one program a multiprocessor, and none so short that its output costs more than its keys."""
    assert [
        choose_splits(*a)
        for a in ((16, 132, 4096), (16, 132, 300), (200, 132, 4096), (1, 132, 1), (4, 132, 10**6))
    ] == [9, 3, 1, 1, 33]
    case = make([600, 130], [2, 1], [5, 6, 7], 4, 2, 16, HALF, device=DEVICE)
    for processors in (1, 8, 132):
        run(case, processors)


def test_strides() -> None:
    """Prompts stored [N, K, D] or [K, N, D], and every other row of wider buffers, give the same bits."""
    case = make([90, 35], [2, 1], [5, 6, 7], 4, 2, 64, HALF, device=DEVICE)
    plain = run(case)
    inner = {name: getattr(case, name).contiguous() for name in ("q", "prompt_k", "prompt_v")}
    wide = {name: torch.stack([getattr(case, name)] * 2, 1).flatten(0, 1)[::2] for name in ("own_k", "own_v")}
    assert torch.equal(run(dataclasses.replace(case, **inner, **wide)), plain)


def test_scores_that_overflow_an_exponential() -> None:
    case = make([50], [2], [4, 5], 2, 1, 32, device=DEVICE)
    for scale in (60.0, -60.0, 0.0):
        run(dataclasses.replace(case, scale=scale))


def bytes_loaded(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes that the interpreted kernels load from prompt_k and from prompt_v."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain, found = InterpreterBuilder.create_masked_load, [0, 0]

    def counted(self, pointers, mask, *rest):
        addresses = pointers.data[mask.data.astype(bool)]
        for n, tensor in enumerate((case.prompt_k, case.prompt_v)):
            begin = tensor.untyped_storage().data_ptr()
            inside = (addresses >= begin) & (addresses < begin + tensor.untyped_storage().nbytes())
            found[n] += int(inside.sum()) * tensor.element_size()
        return plain(self, pointers, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted)
        shared_prefix_decode(case.tensors(), case.scale, case.bounds(), processors=12)
    return found[0], found[1]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's loads")
def test_a_prompt_is_read_once_a_group_and_not_once_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [200, 70]
    once = sum(prompts) * 32 * 2  # tokens of one key head, dimension, bytes of float16
    # 16 replies of 8 heads fill the tile of 128 queries
    for replies, times in (
        (1, 1),
        (5, 1),
        (16, 1),
        (17, 2),
    ):
        case = make(prompts, [replies] * 2, [2] * (2 * replies), 8, 1, 32, HALF, device=DEVICE)
        assert bytes_loaded(case, monkeypatch) == (times * once, times * once)
