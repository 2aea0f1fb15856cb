"""The examples run as they stand, and what they print is what follows from elsewhere."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from locus_fast.weights.checkpoint import TINY_BASE
from tests.docs.readable_pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    """Runs an example as a script; the lines that it prints."""

    def lines(name: str) -> list[str]:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return lines


def names_of(name: str) -> dict[str, Any]:
    """What an example defines."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_under_60_lines_and_tested(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60
    assert f'printed("{file.stem}")' in Path(__file__).read_text()


@pytest.mark.long
def test_kernels_in_another_loop(printed) -> None:
    """Rewards are IoUs by hand: the box itself, its left half, a box apart, and no box. On policy every ratio
    is 1, so the loss is minus the mean of the tokens' advantages, which have the unbiased deviation."""
    rewards, first, second = printed("kernels_in_another_loop")
    assert rewards == "rewards 1.0000 0.5000 0.0000 0.0000"
    replies = ["[10, 10, 50, 50]", "[10, 10, 30, 50]", "[60, 60, 90, 90]", "no box"]
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    lengths = torch.tensor([len(tokenizer.encode(text)) for text in replies]).double()
    earned = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    advantage = (earned - earned.mean()) / (earned.std() + 1e-6)
    losses, best = zip(
        *(map(float, re.findall(r"-?\d+\.\d+", line)) for line in (first, second)), strict=True
    )
    assert losses[0] == pytest.approx(-float((advantage * lengths).sum() / lengths.sum()), abs=1e-4)
    assert losses[1] < losses[0]
    assert best[1] > best[0]


@pytest.mark.long
def test_custom_reward(printed) -> None:
    """Three updates on the same prompts raise what is rewarded."""
    rows = [
        re.fullmatch(r"step (\d): centre reward (\d\.\d+), IoU (\d\.\d+)", line)
        for line in printed("custom_reward")
    ]
    assert [row and row[1] for row in rows] == ["1", "2", "3"]
    assert float(rows[2][2]) > float(rows[0][2]) + 0.1  # type: ignore[index]


def test_custom_reward_by_hand() -> None:
    """A target of 30 x 40 pixels has a diagonal of 50."""
    reward = names_of("custom_reward")["centre_reward"]
    assert reward("[10, 20, 40, 60]", [10.0, 20.0, 40.0, 60.0]) == 1.0
    # 15 and 20 away: 25 pixels
    assert reward("at [25, 40, 55, 80].", [10.0, 20.0, 40.0, 60.0]) == pytest.approx(0.5)
    assert reward("[90, 90, 99, 99]", [10.0, 20.0, 40.0, 60.0]) == 0.0
    assert reward("nothing", [10.0, 20.0, 40.0, 60.0]) == 0.0


@pytest.mark.long
def test_shared_prefix_generate(printed) -> None:
    """The greedy reply is the one of `transformers`' own generate on an untouched model."""
    greedy, *sampled = printed("shared_prefix_generate")
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    model = AutoModelForImageTextToText.from_pretrained(TINY_BASE).eval()
    prompt = names_of("shared_prefix_generate")["scene_prompt"](model.config, tokenizer)
    ids = prompt.ids[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
    images = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grids}
    with torch.no_grad():
        whole = model.generate(**inputs, **images, max_new_tokens=16, do_sample=False)
    expected = whole[0, ids.shape[1] :].tolist()
    assert greedy.removeprefix("greedy ").split() == [str(token) for token in expected]
    assert len(sampled) == 4
    assert all(re.fullmatch(r"sampled \[\d+, \d+, \d+, \d+\]", line) for line in sampled)
