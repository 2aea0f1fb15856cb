"""Ctrl-C, pressed once, twice and three times at each stage of a run: what is said, and what there is
afterwards. Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from locus_fast import train
from locus_fast.run.interrupt import Interrupt
from tests.locus_fast.run_cases import SHORT, Child, rows_of

ENDLESS = [*SHORT, "--steps", "100000", "--save-every", "0"]
# what is called in the midst of a checkpoint, when its weights are there
WRITING = (
    "checkpoint",
    "state_tensors",
)


def held(owner: str, name: str, go: Path, skipped: int = 0) -> str:
    """Code that has a function, after its first few calls, print HELD and wait before its work until the file
    `go` is there."""
    return f"""
work, calls = {owner}.{name}, []
def waiting(*arguments, **options):
    calls.append(1)
    if len(calls) > {skipped}:
        print("HELD", file=sys.stderr, flush=True)
        while not os.path.exists({str(go)!r}):
            time.sleep(0.02)
    return work(*arguments, **options)
{owner}.{name} = waiting
"""


@pytest.fixture
def go(tmp_path: Path) -> Path:
    """The file that lets a held process go on."""
    return tmp_path / "go"


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_first_says_at_once_what_will_be_saved_and_when(tmp_path: Path, go: Path) -> None:
    out = tmp_path / "run"
    with Child([*ENDLESS, "--out", str(out)], held("Step", "__call__", go, skipped=2)) as child:
        child.wait_for("HELD")
        child.press()
        child.wait_for(
            r"Ctrl-C: it ends after the microbatch at hand; "
            r"the steps that are done then, 2 or 3, are saved in checkpoints/ and final/"
        )
        assert not (out / "checkpoints" / "step-000002").exists()  # it was said before it was done
        go.touch()
        assert child.end() == 130
    assert "Traceback" not in child.printed
    done = len(rows_of(out))
    assert done in (2, 3)
    assert checkpoints(out) == [f"step-{done:06d}"]
    assert (
        f"interrupted after {done} steps; {out} holds checkpoints/step-{done:06d} and final/; go on with "
        "--resume" in child.printed
    )
    assert json.loads((out / "summary.json").read_text())["interrupted"]
    assert (out / "final" / "model.safetensors").is_file()


def test_a_second_lets_a_save_finish(tmp_path: Path, go: Path) -> None:
    out = tmp_path / "run"
    with Child([*SHORT, "--steps", "2", "--out", str(out)], held(*WRITING, go)) as child:
        child.wait_for("HELD")
        child.press()
        child.wait_for(
            r"Ctrl-C: checkpoints/step-000002 is being saved and is finished first; "
            r"then final/ is saved, and it ends"
        )
        child.press()
        child.wait_for(
            r"Ctrl-C again: checkpoints/step-000002 is being saved and is finished first; "
            r".*\. A third one ends it at once"
        )
        go.touch()
        assert child.end() == 130
    assert "Traceback" not in child.printed
    assert checkpoints(out) == ["step-000002"]
    assert {path.name for path in out.iterdir()} >= {"final", "summary.json", "config.json", "metrics.jsonl"}
    assert not list(out.rglob("*.partial"))
    assert train.main(["--resume", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["eval"]["after"]["n"] == 8


def test_a_third_ends_at_once_and_says_what_there_is(tmp_path: Path, go: Path) -> None:
    """During the save of step 2; that of step 1 is whole."""
    out = tmp_path / "run"
    with Child(
        [*SHORT, "--steps", "3", "--save-every", "1", "--out", str(out)], held(*WRITING, go, skipped=1)
    ) as child:
        child.wait_for("HELD")
        for pressed, words in enumerate(["Ctrl-C: ", "Ctrl-C again: ", "stopped at once"]):
            child.press()
            if pressed < 2:
                child.wait_for(words)
        assert child.end() == 130
    assert "Traceback" not in child.printed
    assert f"stopped at once; {out} holds checkpoints/step-000001" in child.printed
    assert checkpoints(out) == ["step-000001"]
    assert not (out / "final").exists()
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    assert [row["step"] for row in rows_of(out)] == [1, 2]


def test_a_third_during_a_step_saves_nothing_more(tmp_path: Path, go: Path) -> None:
    out = tmp_path / "run"
    with Child([*ENDLESS, "--out", str(out)], held("Step", "__call__", go, skipped=1)) as child:
        child.wait_for("HELD")
        child.press()
        child.wait_for("Ctrl-C: it ends after the microbatch at hand")
        child.press()
        child.wait_for(
            "Ctrl-C again: it is ending as said. A third one ends it at once, and what is not saved is lost"
        )
        child.press()
        assert child.end() == 130
    assert "Traceback" not in child.printed
    assert f"stopped at once; no checkpoint was saved in {out}" in child.printed
    assert checkpoints(out) == []
    assert train.main(["--resume", str(out), "--steps", "1"]) == 0
    assert [row["step"] for row in rows_of(out)] == [1]


def test_during_final_it_is_finished(tmp_path: Path, go: Path) -> None:
    out = tmp_path / "run"
    hook = held("checkpoint", "write_model", go, skipped=1)  # the first is the checkpoint's
    with Child([*SHORT, "--steps", "1", "--out", str(out)], hook) as child:
        child.wait_for("HELD")
        child.press()
        child.wait_for("Ctrl-C: final/ is being saved and is finished first; then it ends")
        go.touch()
        assert child.end() == 130
    assert load_file(out / "final" / "model.safetensors")
    assert json.loads((out / "summary.json").read_text())["interrupted"]


def test_while_the_held_out_cues_are_answered_again(tmp_path: Path, go: Path) -> None:
    """All is saved by then; --resume asks them again."""
    out = tmp_path / "run"
    with Child(
        [*SHORT, "--steps", "1", "--out", str(out)], held("evaluation", "answer", go, skipped=1)
    ) as child:
        child.wait_for("HELD")
        child.press()
        child.wait_for(
            "Ctrl-C: checkpoints/step-000001 and final/ are saved already; it ends after the microbatch at "
            "hand"
        )
        go.touch()
        assert child.end() == 130
    weights = (out / "final" / "model.safetensors").read_bytes()
    assert json.loads((out / "summary.json").read_text())["eval"]["after"] is None
    assert train.main(["--resume", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["eval"]["after"]["n"] == 8
    assert (out / "final" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("owner", "name"), [("train", "set_up"), ("evaluation", "answer")])
def test_before_the_first_step_there_is_nothing_to_save(
    owner: str, name: str, tmp_path: Path, go: Path
) -> None:
    """While it starts, and while the base answers. The folder can be gone on with."""
    out = tmp_path / "run"
    with Child([*SHORT, "--steps", "1", "--out", str(out)], held(owner, name, go)) as child:
        child.wait_for("HELD")
        child.press()
        child.wait_for("Ctrl-C: nothing new is done yet, so there is nothing to save; it ends")
        go.touch()
        assert child.end() == 130
    assert "Traceback" not in child.printed
    assert checkpoints(out) == []
    assert not (out / "final").exists()
    assert train.main(["--resume", str(out)]) == 0
    assert [row["step"] for row in rows_of(out)] == [1]


def test_a_run_killed_while_it_starts_is_begun_again_by_resume(tmp_path: Path, go: Path) -> None:
    """Loading a large model takes minutes, and may be what the memory does not hold."""
    out = tmp_path / "run"
    with Child([*SHORT, "--steps", "1", "--out", str(out)], held("train", "set_up", go)) as child:
        child.wait_for("HELD")
        child.process.kill()
        child.process.wait()
    assert train.main(["--resume", str(out)]) == 0
    assert [row["step"] for row in rows_of(out)] == [1]


def test_the_count_of_signals(capfd) -> None:
    """Two are requests; from the third on each one raises, since one may be lost in a callback of a
    library."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupt("it ends soon") as interrupt:
        assert not interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        with interrupt.saving("the file"):
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert lines == [
        "Ctrl-C: it ends soon.",
        "Ctrl-C again: the file is being saved and is finished first; then it ends. A third one ends it at "
        "once, and what is not saved is lost.",
    ]
