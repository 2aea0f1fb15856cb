"""The decoding step: the reference against float64 truth, what it reads, errors, compilation. The kernels'
cases are in interpret.py."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locus_kernels.shared_prefix_decode import op, reference, shared_prefix_decode
from torch import Tensor

from tests.kernels.interpreter import ROOT, WAYS, on_the_gpu, run_cases
from tests.kernels.probes import BytesRead
from tests.kernels.shared_prefix_decode.cases import Case, check, make, offsets


@pytest.mark.parametrize("interpret", WAYS)
def test_kernels(interpret: bool, subtests: pytest.Subtests) -> None:
    run_cases("shared_prefix_decode/interpret.py", interpret, subtests=subtests)


def run(case: Case) -> Tensor:
    out = shared_prefix_decode(*case.tensors(), **case.options())
    assert out.dtype == case.q.dtype
    check(case, out)
    return out


@on_the_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_graph_follows_its_offsets_and_lengths(dtype: torch.dtype) -> None:
    case = make([300, 17, 1000], [4, 4, 4], [9] * 12, 14, 2, 128, dtype, padding=4, device="cuda")
    case.own_k.nan_to_num_()
    case.own_v.nan_to_num_()
    run(case)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = shared_prefix_decode(*case.tensors(), **case.options())
    generator = torch.Generator().manual_seed(5)
    for rows in ([4, 4, 4], [1, 0, 3], [0, 0, 0], [2, 4, 0]):
        case.cu_rows.copy_(offsets(rows))
        case.own_lengths.copy_(torch.randint(0, 10, (16,), generator=generator))
        case.q.copy_(torch.randn(case.q.shape, generator=generator))
        out.fill_(float("nan"))
        graph.replay()
        check(case, out)


GROUPS = {
    "equal": ([50] * 3, [4] * 3, [6] * 12),
    "equal, other lengths": ([50] * 3, [4] * 3, [*range(12)]),
    "ragged rows": ([50] * 4, [4, 0, 3, 1], [6] * 8),
    "ragged prompts": ([50, 1, 7, 90], [4, 0, 3, 1], [6, 1, 0, 9, 3, 4, 2, 5]),
    "long ragged prompts": ([530, 1, 40], [2, 0, 1], [3, 1, 2]),
    "empty prompts": ([0, 0], [2, 1], [3, 0, 1]),
    "one empty prompt": ([0, 9], [2, 1], [3, 0, 0]),
    "nothing but prompts": ([5, 5], [1, 1], [0, 0]),
    "no rows": ([5, 6], [0, 0], []),
    "no prompts": ([], [], []),
}


@pytest.mark.parametrize("storage", ["KND", "NKD"])
@pytest.mark.parametrize("groups", GROUPS)
def test_reference(groups: str, storage: str) -> None:
    for heads, key_heads, dimension in ((4, 2, 64), (7, 1, 40), (3, 3, 16)):
        for padding in (0, 3):
            run(make(*GROUPS[groups], heads, key_heads, dimension, storage=storage, padding=padding, slack=2))


@pytest.mark.parametrize(("dimension", "share"), [(64, 1), (80, 4), (128, 7), (256, 8), (40, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dimensions_and_dtypes(dimension: int, share: int, dtype: torch.dtype) -> None:
    run(make([33, 20], [3, 2], [1, 2, 3, 4, 0], 2 * share, 2, dimension, dtype, padding=1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lengths(data: st.DataObject) -> None:
    groups = data.draw(st.integers(0, 4))
    prompts = data.draw(st.lists(st.integers(0, 20), min_size=groups, max_size=groups))
    rows = data.draw(st.lists(st.integers(0, 4), min_size=groups, max_size=groups))
    own = data.draw(st.lists(st.integers(0, 6), min_size=sum(rows), max_size=sum(rows)))
    run(
        make(
            prompts,
            rows,
            own,
            4,
            2,
            16,
            padding=data.draw(st.integers(0, 2)),
            capacity=7,
            storage=data.draw(st.sampled_from(["KND", "NKD"])),
        )
    )


@pytest.mark.parametrize("storage", ["KND", "NKD"])
@pytest.mark.parametrize("prompts", [[40, 40], [40, 25], [1100, 30]])
def test_a_prompt_is_read_once_a_group_and_not_once_a_reply(prompts: list[int], storage: str) -> None:
    for rows in ([1, 1], [8, 8], [8, 3], [64, 1]):
        case = make(prompts, rows, [3] * sum(rows), 4, 2, 16, storage=storage)
        for tensor in (case.prompt_k, case.prompt_v):
            with BytesRead(tensor) as read:
                reference.shared_prefix_decode(case.tensors(), case.scale, case.bounds())
            assert read.bytes == tensor.numel() * tensor.element_size()


def test_the_example_of_the_readme_runs() -> None:
    text = (ROOT / "kernels" / "README.md").read_text()
    code = re.search(r"## shared_prefix_decode\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert code
    names: dict = {}
    exec(code.group(1), names)
    assert names["out"].shape == (6, 8, 64)
    assert (names["out"][5] == 0).all()
    assert (names["out"][:5] != 0).all()


def test_takes_no_gradient() -> None:
    case = make([5, 6], [2, 2], [1, 2, 3, 4], 4, 2, 16)
    assert not shared_prefix_decode(
        case.q.clone().requires_grad_(), *case.tensors()[1:], **case.options()
    ).requires_grad


def test_longest_own_defaults_to_the_capacity() -> None:
    case = make([5, 6], [2, 2], [1, 2, 3, 4], 4, 2, 16, capacity=9)
    options = {**case.options(), "longest_own": None}
    assert torch.equal(shared_prefix_decode(*case.tensors(), **options), run(case))


def test_operator_is_registered_soundly_and_survives_compilation_whole() -> None:
    case = make([5, 6], [2, 2], [1, 2, 3, 4], 4, 2, 16, padding=1)
    torch.library.opcheck(op._operator, (*case.tensors(), *case.options().values()))
    compiled = torch.compile(
        lambda *a: shared_prefix_decode(*a, **case.options()), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(*case.tensors()), run(case))


GOOD = make([5, 6], [2, 2], [1, 2, 3, 4], 4, 2, 16, capacity=8)
INT64 = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(4, 64)},
            r"q: expected float32, bfloat16 or float16 \[rows, heads >= 1, 16 to 256\], "
            r"got torch.float32 \[4, 64\]",
        ),
        ({"q": torch.zeros(4, 4, 8)}, r"16 to 256\], got torch.float32 \[4, 4, 8\]"),
        ({"q": torch.zeros(4, 4, 257)}, r"16 to 256\], got torch.float32 \[4, 4, 257\]"),
        ({"q": torch.zeros(4, 4, 16, dtype=torch.int32)}, "got torch.int32"),
        ({"q": torch.zeros(4, 0, 16)}, r"heads >= 1, .*got torch.float32 \[4, 0, 16\]"),
        (
            {"q": torch.zeros(4, 3, 16)},
            r"prompt_k: expected \[tokens, key heads that divide 3, 16\], got \[11, 2, 16\]",
        ),
        ({"q": torch.zeros(5, 4, 16)}, r"own_k: expected \[5, 2, capacity, 16\], got \[4, 2, 8, 16\]"),
        (
            {"q": torch.zeros(4, 16, 4).transpose(1, 2)},
            r"q: expected a contiguous last dimension, got stride 4",
        ),
        ({"prompt_k": torch.zeros(11, 2, 32)}, r"prompt_k: expected .*, 16\], got \[11, 2, 32\]"),
        (
            {"prompt_v": torch.zeros(10, 2, 16)},
            r"prompt_v: expected the shape of prompt_k, \[11, 2, 16\], got \[10, 2, 16\]",
        ),
        (
            {"prompt_v": torch.zeros(11, 2, 16, dtype=torch.float16)},
            "prompt_v: expected the dtype of q, torch.float32, got torch.float16",
        ),
        (
            {"own_v": torch.zeros(4, 2, 7, 16)},
            r"own_v: expected the shape of own_k, \[4, 2, 8, 16\], got \[4, 2, 7, 16\]",
        ),
        (
            {"own_k": torch.zeros(4, 2, 8, 16, device="meta")},
            "own_k: expected the device of q, cpu, got meta",
        ),
        ({"cu_prompts": INT64}, r"cu_prompts: expected int32 \[prompts \+ 1\], got torch.int64 \[3\]"),
        (
            {"cu_prompts": torch.zeros(0, dtype=torch.int32)},
            r"cu_prompts: expected int32 \[prompts \+ 1\], got torch.int32 \[0\]",
        ),
        ({"cu_rows": INT64.int()[:2]}, r"cu_rows: expected int32 \[3\], got torch.int32 \[2\]"),
        ({"own_lengths": INT64.int()}, r"own_lengths: expected int32 \[4\], got torch.int32 \[3\]"),
        ({"own_lengths": torch.ones(8, dtype=torch.int32)[::2]}, "own_lengths: expected a contiguous tensor"),
        ({"cu_rows": INT64.int().to("meta")}, "cu_rows: expected the device of q, cpu, got meta"),
        ({"longest_own": 9}, r"0 <= longest_own <= 8, got 6, 2 and 9"),
        ({"longest_prompt": -1}, "0 <= longest_prompt"),
        (
            {"cu_rows": offsets([1, 3])},
            r"cu_rows: expected ascending offsets within 0 to 4 in steps of at most 2, got \[0, 1, 4\]",
        ),
        ({"cu_rows": torch.tensor([1, 2, 4], dtype=torch.int32)}, "cu_rows: expected 0 first, got 1"),
        ({"cu_rows": torch.tensor([0, 2, 1], dtype=torch.int32)}, "cu_rows: expected ascending"),
        (
            {"cu_prompts": offsets([6, 6])},
            "cu_prompts: expected ascending offsets within 0 to 11 in steps of at most 6",
        ),
        ({"cu_prompts": offsets([4, 7])}, "in steps of at most 6"),
        ({"own_lengths": offsets([1, 1, 3])}, "own_lengths: expected 0 to longest_own = 4, got 0 to 5"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change: dict, message: str) -> None:
    case = dataclasses.replace(GOOD, **change)
    with pytest.raises(ValueError, match=message):
        shared_prefix_decode(*case.tensors(), **case.options())
