"""Numbers of any size: refused in one sentence, or no more work than a small one. And files that never
end."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
from locus_kernels.box_reward import build_token_table, read_boxes, reference

from locus_fast import evaluate, train
from locus_fast.config import RULES, Config, parse
from locus_fast.config.settings import MAX_PIXELS
from locus_fast.cost.shapes import PUBLISHED
from locus_fast.data.images import ImageError, image_size, load_rgb
from locus_fast.errors import UserError
from locus_fast.run.disk import checkpoints_due
from locus_fast.run.plan import planned
from locus_fast.tiny.tokenizer import build_tokenizer
from locus_fast.weights.checkpoint import TINY_BASE

HINTS = typing.get_type_hints(Config)
PARTS = {f.name: typing.get_args(HINTS[f.name]) or (HINTS[f.name],) for f in dataclasses.fields(Config)}
NUMBERS = [name for name, parts in PARTS.items() if parts[0] in (int, float)]
LARGEST = {  # that a whole number may be
    **{
        "steps": 100_000_000,
        "save_every": 100_000_000,
        "prompts": 65_536,
        "group_size": 512,
        "max_new_tokens": 65_536,
        "updates_per_batch": 1_000,
    },
    **{
        "eval_cues": 1_000_000,
        "workers": 256,
        "min_side": 13_377,
        "microbatch_tokens": 2**31 - 1,
        "rollout_tokens": 2**31 - 1,
    },
    **{
        "lora": 65_536,
        "checkpointing": 1_000,
        "seed": 2**63 - 1,
        "image_pixels": MAX_PIXELS,
        "cue_pixels": MAX_PIXELS,
    },
}
ENDLESS_FLOATS = ["nan", "inf", "-inf", "1e308", "-1e308", "1e-308", "9" * 400]


def words(name: str, value: str) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    more = ["--data", "boxes.json"] if name in ("mix", "min_side", "padding", "scale") else []
    return (
        [f"{option}={value}", *more]
        if len(PARTS[name]) == 1
        else [option, *[value] * len(PARTS[name]), *more]
    )


def test_every_whole_number_has_a_largest() -> None:
    assert LARGEST.keys() == {name for name in NUMBERS if PARTS[name][0] is int}


@pytest.mark.parametrize("name", LARGEST)
def test_whole_numbers_are_bounded_with_the_reason(name: str) -> None:
    """Up to the largest they are taken; then the sentence names the option and the bound, whatever the
    digits."""
    most = LARGEST[name]
    parse(words(name, str(most)))
    for value in (most + 1, 10**12, 10**30, int("9" * 30)):
        if value > most:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be .*{value}") as raised:
                parse(words(name, str(value)))
            assert f"{most:,}" in str(raised.value) or name == "seed"
    for value in ("nan", "inf", "1e308", "9" * 5000):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}") as raised:
            parse(words(name, value))
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize("value", ENDLESS_FLOATS)
@pytest.mark.parametrize("name", [name for name in NUMBERS if PARTS[name][0] is float])
def test_numbers_that_float32_cannot_hold_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        parse(words(name, value))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_below_their_range_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be"):
        parse(words(name, "-2"))


@pytest.mark.parametrize("name", [name for name in NUMBERS if PARTS[name][0] is float])
def test_numbers_at_both_ends_of_their_range_train(name: str) -> None:
    """Each smallest and largest number that is taken is one that float32 still has."""
    taken = []
    for value in (1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30):
        try:
            parse(words(name, str(value)))
            taken.append(value)
        except UserError as error:
            assert "must be" in str(error)  # noqa: PT017, some of the values may be taken
    assert taken
    assert all(
        torch.tensor(value, dtype=torch.float32).isfinite() and torch.tensor(value) > 0 for value in taken
    )


def test_the_rules_name_fields() -> None:
    assert RULES.keys() <= Config.__dataclass_fields__.keys()


def test_checkpoints_still_due_are_counted_without_listing_them(tmp_path: Path) -> None:
    """As by a plain loop over all steps; and at once for more than any memory holds."""
    rng = random.Random(0)
    for _ in range(60):
        steps, every = rng.randint(1, 40), rng.randint(0, 12)
        run = tmp_path / f"{rng.random()}"
        there = {step for step in range(1, 45) if rng.random() < 0.3}
        for step in there:
            (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        due = [s for s in range(1, steps + 1) if s == steps or (every > 0 and s % every == 0)]
        assert checkpoints_due(Config(steps=steps, save_every=every), run) == len(
            [s for s in due if s not in there]
        )
    started = time.monotonic()
    assert checkpoints_due(Config(steps=10**15, save_every=7), tmp_path) == 10**15 // 7 + 1
    assert time.monotonic() - started < 1


def test_a_plan_does_not_list_every_reply() -> None:
    """A group's replies are added up once, not again for each of the groups that are tried in a
    microbatch."""
    made = planned(
        Config(prompts=8192, group_size=512, max_new_tokens=64),
        PUBLISHED["qwen2.5-vl-7b"],
        torch.bfloat16,
        10**15,
    )
    started = time.process_time()
    again = planned(
        Config(prompts=8192, group_size=2, max_new_tokens=64),
        PUBLISHED["qwen2.5-vl-7b"],
        torch.bfloat16,
        10**15,
    )
    few = time.process_time() - started
    started = time.process_time()
    assert made == planned(
        Config(prompts=8192, group_size=512, max_new_tokens=64),
        PUBLISHED["qwen2.5-vl-7b"],
        torch.bfloat16,
        10**15,
    )
    assert time.process_time() - started < 4 * few + 0.5
    assert again.tokens != made.tokens


def test_reading_short_replies_does_not_pay_for_a_long_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the reader goes over the longest reply, not over all the places there are; the readings are
    the same."""
    tokenizer = build_tokenizer()
    table = build_token_table(tokenizer, len(tokenizer))
    texts = ["[1, 2, 3, 4]", "", "no box", " [10,20,30,40] and [0, 0, 1, 1]"]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    wide = torch.tensor([row + tokenizer.encode("]") * (3000 - len(row)) for row in rows])
    seen, read = [], reference.read_boxes
    monkeypatch.setattr(
        reference,
        "read_boxes",
        lambda ids, *more, **ways: seen.append(ids.shape[1]) or read(ids, *more, **ways),
    )
    ours = read_boxes(wide, lengths, table, which="first", grammar="direct")
    assert seen == [int(lengths.max())]
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours, read(wide, lengths, table, which="first", grammar="direct"), strict=True)
    )
    assert read_boxes(wide, torch.full((4,), -1), table).valid.tolist() == [False] * 4
    assert read_boxes(wide, torch.full((4,), 9999), table).box.shape == (4, 4)


@pytest.mark.parametrize("rank", ["129", "65536"])
def test_adapters_are_no_wider_than_the_model(rank: str, tmp_path: Path, capsys) -> None:
    """The embedded base is 128 wide. Nothing is loaded before."""
    assert train.main(["--lora", rank, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert f"--lora {rank}: the language model is 128 wide" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ files that never
# end
def endless(folder: Path) -> dict[str, Path]:
    """A file of each kind by its name in a sentence, all with a name that ends in .json."""
    os.mkfifo(folder / "pipe.json")
    (folder / "device.json").symlink_to("/dev/zero")
    here = os.getcwd()
    os.chdir(folder)  # a socket's name may have no more than about 100 characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.json")
    os.chdir(here)
    return {f"a {kind}": folder / f"{kind}.json" for kind in ("pipe", "device", "socket")}


@pytest.mark.parametrize("option", ["--data", "--images", "--model", "--resume", "--out"])
def test_pipes_sockets_and_devices_are_refused(option: str, tmp_path: Path, capsys) -> None:
    data = [] if option == "--data" else ["--data", str(TINY_BASE / "config.json")]
    for kind, file in endless(tmp_path).items():
        assert train.main([option, str(file), *(data if option == "--images" else [])]) == 2
        assert f"error: {option} {file} is {kind}, not a file or a folder" in capsys.readouterr().err
        if option == "--model":
            assert evaluate.main([str(file)]) == 2
            assert f"--model {file} is {kind}" in capsys.readouterr().err


MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)


@pytest.mark.parametrize(
    "name", [*MODEL_FILES, "preprocessor_config.json", "chat_template.json", "model.safetensors.index.json"]
)
def test_a_pipe_in_a_models_folder_is_refused_at_once(name: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_BASE, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert train.main(["--model", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert f"{folder / name} is a pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "checkpoints/step-000001/model.safetensors"]
)
def test_a_pipe_in_a_run_folder_is_refused_at_once(name: str, tmp_path: Path, capsys) -> None:
    for file in ("config.json", "metrics.jsonl", "checkpoints/step-000001/optimizer/step.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert f"{tmp_path / name} is a pipe" in capsys.readouterr().err


@pytest.mark.parametrize("read", [load_rgb, image_size])
def test_a_pipe_among_the_images_is_no_image(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(ImageError, match=r"image\.png is not a file"):
        read(tmp_path / "image.png")


@pytest.mark.parametrize("option", ["--data", "--images", "--model", "--resume", "--out"])
def test_a_name_that_no_disk_takes_is_one_short_sentence(option: str, capsys) -> None:
    assert train.main([option, "x" * 5000]) == 2
    error = capsys.readouterr().err
    assert f"error: {option} xxx" in error
    assert "File name too long" in error
    assert len(error) < 400


def test_a_file_is_no_models_folder(tmp_path: Path, capsys, monkeypatch) -> None:
    """Nor is `folder/file` taken for a name on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    assert train.main(["--model", "folder/file", "--data", str(TINY_BASE / "config.json")]) == 2
    assert "--model folder/file is a file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "cost"])
def test_reading_a_pipe_is_refused_in_a_moment(command: str, tmp_path: Path) -> None:
    """The command as a user starts it does not wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, "-m", f"locus_fast.{command}", "--model", str(tmp_path / "pipe")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: --model {tmp_path / 'pipe'} is a pipe, not a file or a folder: replace it by a file.\n"
    )
