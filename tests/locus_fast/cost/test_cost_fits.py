"""The cost command knows what the trainer's plan knows, and answers as the trainer does where a step does not
fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from locus_fast.config import parse
from locus_fast.cost.__main__ import case_of, main, settings_of
from locus_fast.cost.__main__ import parse as parse_cost
from locus_fast.cost.plan import GIB
from locus_fast.cost.shapes import PUBLISHED, Trained
from locus_fast.cost.traffic import step_bytes
from locus_fast.errors import UserError
from locus_fast.run import plan
from locus_fast.run.plan import plan_for
from locus_fast.weights.checkpoint import TINY_BASE

SHAPE = PUBLISHED["qwen2.5-vl-7b"]


def cost(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().out


def trainers(arguments: list[str], gib: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the trainer says of the 7B model on a card with so many GiB free: its plan, or its refusal."""
    monkeypatch.setattr(plan, "free_memory", lambda device: gib * GIB)
    monkeypatch.setattr("locus_fast.model.fused.can_fuse", lambda device: True)
    config = parse(["--preset", "qwen2.5-vl-7b", *arguments])
    try:
        return plan_for(config, SHAPE, torch.bfloat16, torch.device("cuda")).reason
    except UserError as error:
        return str(error)


CARDS = [
    (78, []),
    (66, []),
    (60, ["--lr-scale", "0", "0", "1"]),
    (52, []),
    (40, ["--reference", "host", "--optimizer", "adamw-master"]),
    (40, ["--lora", "16"]),
    (24, []),
    (17, ["--lora", "16"]),
    (11, ["--lora", "64", "--quantize", "nf4"]),
    (70, ["--kl-coef", "0", "--group-size", "16"]),
    (2, []),
]


@pytest.mark.parametrize(("gib", "arguments"), CARDS)
def test_it_answers_as_the_trainer_does(gib: int, arguments: list[str], capsys, monkeypatch) -> None:
    """The same plan and exit code 0, or the same proposal and exit code 1."""
    said = trainers(arguments, gib, monkeypatch)
    code, printed = cost(["--memory", str(gib), *arguments], capsys)
    verdict = printed.splitlines()[-1]
    if said.startswith("microbatches of "):
        assert code == 0
        assert said in printed
        assert verdict == f"  fits in {gib} GiB with 5% of it left free"
    else:
        assert code == 1
        proposal = re.search(r"less 5%; (.*)\.$", said)
        assert proposal
        assert verdict == f"  DOES NOT FIT in {gib} GiB with 5% of it left free; {proposal[1]}"


PROPOSALS = [
    *((66, []), (52, []), (40, []), (24, []), (17, []), (11, ["--lora", "16"])),
    # replies that are asked about are longer than those that fit
    (40, ["--lora", "64", "--dtype", "float32", "--reply-tokens", "2000"]),
    (78, ["--max-new-tokens", "1000000", "--reply-tokens", "20000"]),
    # adapters are proposed, and have a reference and an optimizer of their own
    (40, ["--reference", "host"]),
    (40, ["--reference", "none", "--optimizer", "adamw-master"]),
    # budgets that were given are no longer those that fit
    (48, ["--microbatch-tokens", "100000"]),
    (78, ["--rollout-tokens", "1000000"]),
    # prompts are longer than those that the trainer plans for
    (26, ["--lora", "16", "--text-tokens", "20000"]),
]


@pytest.mark.parametrize(("gib", "arguments"), PROPOSALS)
def test_what_it_proposes_fits(gib: int, arguments: list[str], capsys) -> None:
    """The options can be given to the command itself as they are printed, after those that do not fit."""
    code, printed = cost(["--memory", str(gib), *arguments], capsys)
    assert code == 1
    proposed = printed.splitlines()[-1].split("this fits: ")[1].split(" ")
    code, printed = cost(["--memory", str(gib), *arguments, *proposed], capsys)
    assert code == 0, printed


def test_a_budget_that_is_too_large_is_answered_with_one_that_fits(capsys) -> None:
    code, printed = cost(["--memory", "78", "--microbatch-tokens", "900000"], capsys)
    assert code == 1
    proposed = printed.splitlines()[-1].split("this fits: ")[1].split(" ")
    assert proposed[0] == "--microbatch-tokens"
    assert cost(["--memory", "78", *proposed], capsys)[0] == 0


def test_it_says_what_is_trained_and_counts_that_alone(capsys) -> None:
    """Figures by hand: a rank of 16 beside the 7 matrices of 28 layers of the 7B model."""
    adapters = 28 * 16 * (7 * 3584 + 2 * 3584 + 2 * 512 + 3 * 18944)
    code, printed = cost(["--lora", "16", "--quantize", "nf4"], capsys)
    assert code == 0
    assert "adapters of rank 16 on 4-bit weights, adamw" in printed
    memory = dict(
        re.findall(
            r"^  (gradients|optimizer states|reference) +([\d.,-]+)$", printed.split("peak memory")[1], re.M
        )
    )
    assert float(memory["gradients"]) == pytest.approx(4 * adapters / GIB, abs=0.006)
    assert float(memory["optimizer states"]) == pytest.approx(8 * adapters / GIB, abs=0.006)
    assert memory["reference"] == "-"
    code, printed = cost(["--lr-scale", "0", "1", "0"], capsys)
    assert "vision tower and language model frozen, bfloat16 weights and gradients, adamw8bit" in printed


def test_bytes_of_what_is_trained() -> None:
    """Gradients are written once, and read once more from the second microbatch on; frozen parts have
    none."""
    group = case_of(parse_cost([])).group
    ways = {"checkpointing": 1, "reference": True}
    whole, language = (
        step_bytes(SHAPE, [[group]] * 2, **ways, trained=trained)
        for trained in (Trained(), Trained(False, False))
    )
    assert whole == step_bytes(SHAPE, [[group]] * 2, **ways)
    assert whole["gradients"] == 3 * 2 * SHAPE.parameters
    assert language["gradients"] == 3 * 2 * SHAPE.text.parameters
    adapters = step_bytes(
        SHAPE,
        [[group]] * 2,
        **ways,
        trained=Trained.adapters(16),
        matrix_bytes=0.5,
        gradient_bytes=4,
        state_bytes=8,
    )
    count = 28 * SHAPE.text.adapters(16)
    assert adapters["gradients"] == 3 * 4 * count
    assert adapters["optimizer"] == count * (2 * 4 + 4 + 2 * 8)
    assert adapters["passes: weights"] < whole["passes: weights"]


def test_it_takes_the_trainers_words(capsys) -> None:
    config = settings_of(
        parse_cost(
            ["--lora", "8", "--quantize", "nf4", "--image-pixels", "3136", "65536", "--dtype", "float32"]
        )
    )
    assert (config.lora, config.quantize, config.image_pixels, config.dtype) == (
        8,
        "nf4",
        (3136, 65536),
        "float32",
    )
    assert settings_of(parse_cost(["--reference", "none"])).kl_coef == 0
    assert settings_of(parse_cost(["--preset", ""])) == settings_of(parse_cost([]))
    assert case_of(parse_cost(["--dtype", "float32"])).kind == torch.float32
    assert case_of(parse_cost(["--preset", "tiny"])).kind == torch.float32  # as its checkpoint has it
    for arguments, sentence in (
        (["--quantize", "nf4"], "--quantize nf4 needs --lora"),
        (["--lora", "8", "--reference", "copy"], "the reference is the policy without its adapters"),
        (["--lora", "3585"], "--lora 3585: the language model is 3,584 wide"),
        (["--lora", "1" + "0" * 30], "--lora must be 0 or more and at most 65,536"),
        (["--lr-scale", "0", "0", "0"], "--lr-scale must be three shares"),
        (["--preset", "paper"], "--preset must be one of tiny, qwen2.5-vl-7b"),
        (["--image", "2010x10"], "200 times as long as wide"),
        (["--image", "20000x20000"], "at most 178,956,970 pixels"),
        (["--group-size", "9" * 5000], "expected a whole number of at"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
        assert len(error) < 500


def test_replies_are_packed_as_if_they_were_the_longest(capsys) -> None:
    """As the trainer packs them, who does not know their lengths before: shorter ones make no wider
    microbatch."""
    groups = [
        re.search(r"microbatches of up to (\d+) groups", cost(["--reply-tokens", n], capsys)[1])[1]
        for n in ("20", "100", "512")
    ]
    assert len(set(groups)) == 1


def test_adapters_cost_what_their_base_does(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY_BASE)}))
    assert (
        case_of(parse_cost(["--model", str(tmp_path)])).shape
        == case_of(parse_cost(["--preset", "tiny"])).shape
    )
