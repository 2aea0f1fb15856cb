"""Checkpoints that were damaged, or that do not fit what is asked for: found out before anything is changed,
and told apart."""

from __future__ import annotations

import json
import shutil
import stat
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from locus_fast import train
from locus_fast.weights.shards import write_tensors
from tests.locus_fast.run_cases import files_of, finished_run, rows_of, the_error

LAST = Path("checkpoints", "step-000003")
STATE = Path("optimizer", "state.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def forget_all_but_the_step(checkpoint: Path) -> None:
    """As checkpoints were before they had checksums and options."""
    (checkpoint / "optimizer" / "step.json").write_text('{"step": 3}')


def refused(run: Path, capsys, *options: str) -> str:
    """The sentence; nothing of the folder is touched."""
    before = files_of(run)
    assert train.main(["--resume", str(run), "--steps", "4", *options]) == 2
    assert files_of(run) == before
    return the_error(capsys.readouterr().err)


@pytest.mark.parametrize("with_options", [True, False])
@pytest.mark.parametrize(
    ("options", "was", "asked"),
    [
        (["--optimizer", "adamw-master"], "--optimizer adamw", "--optimizer adamw-master"),
        (["--lr-scale", "0", "1", "1"], "--lr-scale 1.0 1.0 1.0", "--lr-scale 0.0 1.0 1.0"),
    ],
)
def test_another_optimizer_is_named_with_what_can_be_done(
    options: list[str], was: str, asked: str, with_options: bool, run: Path, capsys
) -> None:
    """The checkpoint is good: nobody is told to remove it."""
    if not with_options:
        forget_all_but_the_step(run / LAST)
    error = refused(run, capsys, *options)
    assert f"step-000003 was trained with {was}, whose tensors are not those of {asked}" in error
    assert f"resume with {was}, or start a new run with --model {run / 'final'}" in error
    assert "remove" not in error


def test_another_dtype_is_named(run: Path, capsys) -> None:
    pytest.importorskip("torchao")
    assert "was trained with --dtype float32, whose tensors are not those of --dtype bfloat16" in refused(
        run, capsys, "--dtype", "bfloat16"
    )


def test_a_state_that_does_not_say_whose_it_is(run: Path, capsys) -> None:
    """Nor does the run, whose settings an earlier version had written over."""
    forget_all_but_the_step(run / LAST)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "optimizer": "adamw-master"}))
    error = refused(run, capsys)
    assert "the optimizer's state is of another optimizer or other parameters" in error
    assert (
        "resume with the --optimizer, --lr-scale and --dtype that it was trained with, or start a new run "
        f"with --model {run / LAST}" in error
    )
    assert "remove" not in error


def test_rates_that_freeze_the_same_parts_are_no_other_layout(run: Path) -> None:
    assert train.main(["--resume", str(run), "--steps", "4", "--lr-scale", "0.5", "1", "2"]) == 0


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer/state.safetensors", "tokenizer.json", "config.json"]
)
def test_a_flipped_bit_is_found(name: str, run: Path, capsys) -> None:
    file = run / LAST / name
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1 << 2
    file.write_bytes(content)
    error = refused(run, capsys)
    assert (
        f"{run / LAST} is not a whole checkpoint ({name} is not what was written, by its checksum)" in error
    )
    assert "remove it to resume from step-000002" in error


def test_a_file_that_is_gone(run: Path, capsys) -> None:
    (run / LAST / "tokenizer.json").unlink()
    error = refused(run, capsys)
    assert "tokenizer.json: FileNotFoundError" in error
    shutil.rmtree(run / LAST)
    assert train.main(["--resume", str(run)]) == 0  # as the sentence says
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]


def test_the_only_checkpoint_is_not_to_be_removed(run: Path, capsys) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / LAST / STATE).write_bytes(b"")
    assert "there is no earlier one, so start a new run" in refused(run, capsys)


@pytest.mark.parametrize(
    ("file", "suffix", "value"),
    [
        ("model.safetensors", "layers.1.mlp.down_proj.weight", float("nan")),
        ("model.safetensors", "visual.patch_embed.proj.weight", float("-inf")),
        (str(STATE), ".exp_avg_sq", float("inf")),
    ],
)
def test_what_is_not_finite_is_named(file: str, suffix: str, value: float, run: Path, capsys) -> None:
    """In a checkpoint without checksums, such as an earlier version wrote of a run that had gone wrong."""
    tensors = load_file(run / LAST / file)
    name = next(name for name in tensors if name.endswith(suffix))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, run / LAST / file, metadata={"format": "pt"})
    forget_all_but_the_step(run / LAST)
    error = refused(run, capsys)
    assert f"{name} holds values that are not finite" in error
    assert str(run / LAST) in error


def test_weights_that_are_finite_and_answer_nothing(run: Path, capsys) -> None:
    file = run / LAST / "model.safetensors"
    save_file(
        {name: tensor * 1e30 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    forget_all_but_the_step(run / LAST)
    assert "the model answers with" in refused(run, capsys)


def test_a_checkpoint_without_checksums_is_read(whole: Path, run: Path) -> None:
    forget_all_but_the_step(run / LAST)
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0
    assert rows_of(run)[:3] == rows_of(whole)


def test_the_checksums_are_those_of_the_files(whole: Path) -> None:
    for checkpoint in (whole / "checkpoints").iterdir():
        listed = json.loads((checkpoint / "optimizer" / "step.json").read_text())["crc32"]
        files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "step.json"]
        assert listed == {
            str(path.relative_to(checkpoint)): f"{zlib.crc32(path.read_bytes()):08x}" for path in files
        }


def test_written_tensors_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randint(0, 256, (3,), generator=generator, dtype=torch.uint8),
        "wide": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "strided": torch.randn(4, 6, generator=generator).T,
        "half": torch.randn(11, generator=generator).bfloat16(),
        "number": torch.tensor(3.0),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    crc = write_tensors(tmp_path / "file.safetensors", tensors)
    assert crc == zlib.crc32((tmp_path / "file.safetensors").read_bytes())
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.get_slice("strided").get_shape() == [6, 4]
    (tmp_path / "other").write_text("")
    assert stat.S_IMODE((tmp_path / "file.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "other").stat().st_mode
    )
