"""Whether disk and device have room, said before a weight is read."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from locus_fast import train
from locus_fast.run import disk, plan
from locus_fast.run import model as runtime
from tests.locus_fast.source_cases import DATA, RECIPE, SIZES
from tests.published import write_checkpoint

Usage = namedtuple("Usage", "free")


def test_a_disk_without_room(tmp_path: Path, monkeypatch, capsys) -> None:
    """Said before loading; what is asked for is what the run then writes, within the headers."""
    folder = write_checkpoint(tmp_path / "model", "qwen2.5-vl")
    run, asked = tmp_path / "run", []
    arguments = [
        "--model",
        str(folder),
        "--data",
        DATA,
        "--out",
        str(run),
        *RECIPE,
        *SIZES,
        "--steps",
        "2",
        "--optimizer",
        "adamw-master",
    ]

    def usage(path: Path) -> Usage:
        assert path == run
        return Usage(0)

    with monkeypatch.context() as patched:
        patched.setattr(disk.shutil, "disk_usage", usage)
        patched.setattr(disk, "GIB", 1)
        patched.setattr(runtime, "load_source", None)
        for more in (
            ["--save-every", "1"],
            ["--save-every", "0"],
            ["--save-every", "0", "--optimizer", "adamw8bit"],
            ["--lora", "4"],
        ):
            assert train.main([*arguments, *more]) == 2
            sentence = capsys.readouterr().err
            assert f"{run}: the run writes" in sentence
            assert not run.exists()
            asked.append(float(sentence.split("the run writes ")[1].split()[0]))
    assert asked == sorted(asked, reverse=True)
    assert asked[3] == pytest.approx(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    assert train.main([*arguments, "--save-every", "1"]) == 0
    written = sum(
        file.stat().st_size
        for part in ("checkpoints", "final")
        for file in (run / part).rglob("*.safetensors")
    )
    assert written == pytest.approx(asked[0], rel=0.05)


def test_a_card_too_small(tmp_path: Path, monkeypatch, capsys) -> None:
    """Said before loading, with settings that the card does hold: with them the run gets as far as
    loading."""
    folder = write_checkpoint(tmp_path / "model", "qwen3-vl")
    monkeypatch.setattr(runtime, "load_source", None)
    recipe = [*RECIPE, "--steps", "1", "--prompts", "2", "--group-size", "8", "--max-new-tokens", "64"]
    arguments = ["--model", str(folder), "--data", DATA, *recipe]
    advised = set()
    for memory in range(2**20, 12 * 2**20, 2**20):
        monkeypatch.setattr(plan, "free_memory", lambda device, memory=memory: memory)
        try:
            assert train.main([*arguments, "--out", str(tmp_path / f"a{memory}")]) == 2
        except TypeError:  # it fits
            break
        sentence = capsys.readouterr().err
        assert "free on the device" in sentence
        assert sentence.count(".\n") == 1
        if "; this fits: " not in sentence:
            assert (
                "take a larger device, a smaller --model, a smaller --group-size or smaller --image-pixels"
                in sentence
            )
            continue
        advice = sentence.split("; this fits: ")[1].removesuffix(".\n").split()
        advised.add(advice[0])
        with pytest.raises(TypeError, match="not callable"):
            train.main([*arguments, *advice, "--out", str(tmp_path / f"b{memory}")])
    assert advised
