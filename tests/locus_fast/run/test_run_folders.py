"""A run's folder from outside: its settings found from anywhere inside it, its paths whole, its name its
own."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from locus_fast import evaluate, train
from locus_fast.config import EVALUATION_OPTIONS, Config, parse
from locus_fast.config.folders import run_around
from locus_fast.errors import UserError
from locus_fast.files import save_tensors
from locus_fast.run.folder import make_folder
from locus_fast.weights.checkpoint import TINY_BASE

SHORT = [
    "--steps",
    "2",
    "--prompts",
    "2",
    "--group-size",
    "2",
    "--eval-cues",
    "3",
    "--save-every",
    "1",
    "--device",
    "cpu",
]


def scenes(folder: Path) -> None:
    """Three images with two boxes each, as JSON lines, in `pool/` beside them."""
    rng = np.random.default_rng(0)
    (folder / "pool").mkdir(parents=True)
    lines = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(
            folder / "pool" / f"{i}.png"
        )
        lines += [{"image": f"{i}.png", "bbox": [10 + 40 * k, 12, 40 + 40 * k, 40]} for k in range(2)]
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on files that was started with relative paths."""
    home = tmp_path_factory.mktemp("home")
    scenes(home / "data")
    here = os.getcwd()
    os.chdir(home)
    try:
        paths = [
            "--data",
            "data/boxes.jsonl",
            "--images",
            "data/pool",
            "--model",
            os.path.relpath(TINY_BASE),
            "--out",
            "runs/one",
        ]
        assert train.main([*SHORT, *paths]) == 0
    finally:
        os.chdir(here)
    return home / "runs" / "one"


INSIDE = ["final", "final/", "checkpoints/step-000001", "checkpoints/step-000002"]


@pytest.mark.parametrize("how", ["first", "option", "last", "joined", "relative", "link"])
@pytest.mark.parametrize("place", INSIDE)
def test_a_runs_settings_are_found_from_inside_it(
    place: str, how: str, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Its own data and question are asked, and said first; the same cues as the run's own evaluation had."""
    folder = f"{run}/{place}"
    if how == "link":
        (tmp_path / "link").symlink_to(folder)
        folder = str(tmp_path / "link")
    elif how == "relative":
        monkeypatch.chdir(run.parent)
        folder = f"one/{place}"
    arguments = {
        "option": ["--model", folder, "--device", "cpu"],
        "last": ["--device", "cpu", folder],
        "joined": ["--device", "cpu", f"--model={folder}"],
    }.get(how, [folder, "--device", "cpu"])
    assert evaluate.main(arguments) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    data = run.parent.parent / "data" / "boxes.jsonl"
    assert (
        lines[0]
        == f"asking {folder}: up to 3 held-out cues of {data}, prompt style direct, as in the run {run}"
    )
    assert "3 images, 6 boxes" in lines[1]
    if "step-000001" not in place:
        after = json.loads((run / "summary.json").read_text())["eval"]["after"]
        assert json.loads(out) == {**after, "skipped_images": 0}


@pytest.mark.parametrize("command", [evaluate.main, train.main])
def test_a_run_folder_is_answered_with_its_models(command, run: Path, capsys, monkeypatch) -> None:
    named = [] if command is evaluate.main else ["--data", str(run.parent.parent / "data" / "boxes.jsonl")]
    for given, home in ((str(run), run), (f"{run}/", run), (f"{run}/checkpoints", run)):
        assert command(["--model", given, *named]) == 2
        error = capsys.readouterr().err
        assert error.endswith(
            f"a folder of a run, not a model: use {home}/final or {home}/checkpoints/step-000002.\n"
        )
    monkeypatch.chdir(run)
    assert command(["--model", ".", *named]) == 2
    assert "use final or checkpoints/step-000002." in capsys.readouterr().err


def test_what_was_not_written_to_its_end_is_no_model(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "final").rename(tmp_path / "run" / "final.partial")
    assert evaluate.main([str(tmp_path / "run" / "final.partial")]) == 2
    assert f"not written to its end: use {tmp_path}/run/checkpoints/step-000002." in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert evaluate.main([str(tmp_path / "run")]) == 2
    assert "is of a run folder without a model yet" in capsys.readouterr().err


def test_other_models_have_no_run(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run / "final", tmp_path / "final")
    assert run_around(tmp_path / "final") is None
    assert run_around(tmp_path / "nowhere") is None
    assert evaluate.main([str(tmp_path / "final"), "--eval-cues", "2", "--device", "cpu"]) == 0
    said = f"asking {tmp_path / 'final'}: "
    said += "up to 2 held-out cues of drawn scenes, prompt style direct, preset tiny"
    assert capsys.readouterr().err.splitlines()[0] == said


def test_other_data_comes_with_its_own_folder_of_images(run: Path, tmp_path: Path) -> None:
    """The run's --images belong to the run's --data, when evaluating as when going on."""
    config, _ = evaluate.parse([str(run / "final"), "--data", str(tmp_path)])
    assert (config.data, config.images) == (str(tmp_path), "")
    kept, _ = evaluate.parse([str(run / "final"), "--eval-cues", "9"])
    assert kept.images.endswith("data/pool")
    assert parse(["--resume", str(run), "--data", str(tmp_path)]).images == ""


UNUSED = sorted(Config.__dataclass_fields__.keys() - set(EVALUATION_OPTIONS))


@pytest.mark.parametrize("name", UNUSED)
def test_options_without_a_meaning_are_refused(name: str, run: Path, capsys) -> None:
    option, default = f"--{name.replace('_', '-')}", Config.__dataclass_fields__[name].default
    values = [str(each) for each in default] if isinstance(default, tuple) else [str(default)]
    assert evaluate.main([str(run / "final"), option, *values]) == 2
    assert f"error: {option} has no meaning here" in capsys.readouterr().err


def test_options_with_a_meaning_are_those_that_are_read(run: Path, monkeypatch) -> None:
    """Every setting that an evaluation looks at can be given to it, and the help shows no other."""
    read: set[str] = set()
    look = Config.__getattribute__

    def seen(config: Config, name: str):
        caller = Path(sys._getframe(1).f_code.co_filename)
        # those check and copy every field
        if caller.parent.name != "config" and caller.name != "dataclasses.py":
            read.add(name)
        return look(config, name)

    config, _ = evaluate.parse([str(run / "final"), "--device", "cpu"])
    monkeypatch.setattr(Config, "__getattribute__", seen)
    setup = evaluate.set_up(config)
    setup.evaluate("", lambda: False)
    # looked at, and always as they are by default
    trained = {"quantize", "lora", "lr_scale", "checkpointing", "rollout_tokens", "merge", "export_limits"}
    # stored for a reward, which is not asked for
    trained |= {
        "group_size",
        "reward",
        "format_weight",
        "normalize_std",
    }
    assert (read & Config.__dataclass_fields__.keys()) - trained <= set(EVALUATION_OPTIONS)


def test_the_help_shows_the_options_with_a_meaning(capsys) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert (f"--{name.replace('_', '-')} " in shown) == (name in EVALUATION_OPTIONS), name


def test_two_models_are_one_too_many(run: Path, capsys) -> None:
    assert evaluate.main([str(run / "final"), "--model", str(TINY_BASE)]) == 2
    assert "two models are named" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- whole
# paths
def test_a_run_keeps_whole_paths(run: Path) -> None:
    kept = json.loads((run / "config.json").read_text())
    home = run.parent.parent
    assert kept["data"] == str(home / "data" / "boxes.jsonl")
    assert kept["images"] == str(home / "data" / "pool")
    assert Path(kept["model"]).is_absolute()
    assert Path(kept["model"]).samefile(TINY_BASE)
    assert kept["out"] == str(run)


def test_a_run_is_resumed_from_any_folder(run: Path, tmp_path: Path, monkeypatch) -> None:
    """To the same weights as in one go."""
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000002")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "again"]) == 0
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "again", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_messages_name_paths_as_they_were_given(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "nowhere.jsonl"]) == 2
    assert "error: --data nowhere.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["final", "checkpoints/step-000001"])
def test_the_run_itself_is_resumed_and_not_a_part_of_it(place: str, run: Path, capsys) -> None:
    assert train.main(["--resume", str(run / place)]) == 2
    assert f"give the run folder itself, --resume {run}." in capsys.readouterr().err
    assert train.main(["--resume", str(TINY_BASE)]) == 2
    assert "holds a model and no run" in capsys.readouterr().err


def test_what_is_fixed_may_be_repeated(run: Path, monkeypatch) -> None:
    """--resume with the value that the run has already is no change."""
    monkeypatch.chdir(run.parent)
    words = [
        "--resume",
        "one",
        "--out",
        "one",
        "--prompts",
        "2",
        "--seed",
        "0",
        "--preset",
        "tiny",
        "--steps",
        "9",
    ]
    assert parse(words).steps == 9
    assert parse([*words, "--model", os.path.relpath(TINY_BASE)]).prompts == 2
    for other in (["--out", "two"], ["--prompts", "3"], ["--seed", "1"], ["--model", ""], ["--lora", "4"]):
        with pytest.raises(UserError, match=f"{other[0]} cannot be changed with --resume"):
            parse(["--resume", "one", *other])


def test_runs_without_a_name_take_names_of_their_own(tmp_path: Path, monkeypatch) -> None:
    """However many start in one second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    names = [make_folder(Config(preset="tiny")).name for _ in range(4)]
    assert names == ["tiny-20260101-000000", *(f"tiny-20260101-000000-{n}" for n in (2, 3, 4))]
    assert make_folder(Config(preset="tiny", out="named")) == Path("named")
    with pytest.raises(UserError, match="--out named exists already"):
        make_folder(Config(preset="tiny", out="named"))


EMPTY = [name for name, f in Config.__dataclass_fields__.items() if "empty:" in f.metadata["help"]]


@pytest.mark.parametrize("name", EMPTY)
def test_what_may_be_empty_is_as_if_it_were_not_given(name: str, run: Path) -> None:
    """Every option whose help says what empty means."""
    assert {"preset", "model", "data", "images", "out"} <= set(EMPTY)
    assert parse([f"--{name}", ""]) == parse([])
    assert (
        parse([f"--{name}", "", "--model", str(run / "final")] if name != "model" else ["--model", ""]).preset
        == "tiny"
    )
    if name in ("preset", "out"):
        assert parse(["--resume", str(run), f"--{name}", ""]) == parse(["--resume", str(run)])


# ------------------------------------------------------------------------------------------------------- file
# modes
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    """As a file that Python opens by itself."""
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors", {"format": "pt"})
        save_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "plain")}
    assert modes == {0o666 & ~umask}
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 0, 0]


def test_a_runs_files_are_all_as_readable(run: Path) -> None:
    modes = {stat.S_IMODE(file.stat().st_mode) for file in run.rglob("*") if file.is_file()}
    assert (run / "checkpoints" / "step-000002" / "optimizer" / "state.safetensors").is_file()
    assert len(modes) == 1
