"""A run that was stopped anywhere is finished by --resume, and a folder that cannot be gone on with is left
as it was."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from locus_fast import train
from locus_fast.run.resume import read_metrics
from tests.locus_fast.run_cases import SHORT, files_of, finished_run, rows_of, the_error

PICTURES = ("curve.png", "samples.png")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def without(run: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def killed_before_final(run: Path) -> None:
    without(run, "final", "summary.json", *PICTURES)


def killed_during_final(run: Path) -> None:
    (run / "final").rename(run / "final.partial")
    (run / "final.partial" / "model.safetensors").write_bytes(b"half")
    without(run, "summary.json", *PICTURES)


def killed_before_the_final_of_more_steps(run: Path) -> None:
    """An earlier part of the run had ended after two steps."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "steps": 2, "interrupted": True}))
    (run / "final" / "model.safetensors").write_bytes(
        (run / "checkpoints" / "step-000002" / "model.safetensors").read_bytes()
    )


def killed_while_answering(run: Path) -> None:
    without(run, "summary.json", *PICTURES)


def stopped_while_answering(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["eval"]["after"] = None
    (run / "summary.json").write_text(json.dumps({**summary, "interrupted": True}))
    without(run, "samples.png")


def killed_while_drawing(run: Path) -> None:
    without(run, "samples.png")


def killed_in_the_first_evaluation(run: Path) -> None:
    without(run, "final", "summary.json", *PICTURES, "checkpoints")
    (run / "metrics.jsonl").write_text("")


def killed_before_the_first_checkpoint(run: Path) -> None:
    killed_in_the_first_evaluation(run)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')


@pytest.mark.parametrize(
    "stopped",
    [
        killed_before_final,
        killed_during_final,
        killed_before_the_final_of_more_steps,
        killed_while_answering,
        stopped_while_answering,
        killed_while_drawing,
        killed_in_the_first_evaluation,
        killed_before_the_first_checkpoint,
    ],
)
def test_a_stopped_run_is_finished_by_resume(
    stopped: Callable[[Path], None], whole: Path, run: Path, capsys
) -> None:
    """It ends as the run that was never stopped: the same weights, metrics and figures."""
    stopped(run)
    assert train.main(["--resume", str(run)]) == 0
    assert "held-out mean IoU" in capsys.readouterr().out
    assert files_of(run / "final") == files_of(whole / "final")
    assert rows_of(run) == rows_of(whole)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    assert (ours["eval"], ours["steps"], ours["interrupted"]) == (theirs["eval"], 3, False)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_that_lacks_nothing_is_said_to_be_done(run: Path, capsys) -> None:
    before, summary = files_of(run), json.loads((run / "summary.json").read_text())
    assert train.main(["--resume", str(run)]) == 0
    printed = capsys.readouterr()
    assert "all of its 3 steps are done, and nothing is missing" in printed.err
    assert (
        f"{summary['eval']['before']['mean_iou']:.3f} -> {summary['eval']['after']['mean_iou']:.3f}"
        in printed.out
    )
    assert train.main(["--resume", str(run), "--eval-cues", "9"]) == 0
    assert "--eval-cues changes nothing: give more --steps" in capsys.readouterr().err
    assert files_of(run) == before


def test_a_missing_curve_is_drawn_without_the_model(run: Path, monkeypatch, capsys) -> None:
    without(run, "curve.png")
    monkeypatch.setattr(train, "set_up", None)
    assert train.main(["--resume", str(run)]) == 0
    assert "curve.png was missing and is drawn again" in capsys.readouterr().err
    assert (run / "curve.png").stat().st_size > 10_000


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(run: Path, capsys) -> None:
    without(run, "checkpoints")
    before = files_of(run)
    assert train.main(["--resume", str(run)]) == 2
    assert (
        f"there is no checkpoint in its folder `checkpoints`: start a new run with --model {run / 'final'}"
        in the_error(capsys.readouterr().err)
    )
    assert files_of(run) == before


def lines(run: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    file = run / "metrics.jsonl"
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "cannot be read (No such file"),
        (lambda run: lines(run, lambda rows: rows[:2]), "has 2 lines, and 3 steps are done"),
        (lambda run: lines(run, lambda rows: []), "has 0 lines, and 3 steps are done"),
        (
            lambda run: lines(run, lambda rows: [rows[0], b"\xff\xfe\n", rows[2]]),
            "line 2 is not the metrics of step 2",
        ),
        (
            lambda run: lines(run, lambda rows: [rows[0], b"{\n", rows[2]]),
            "line 2 is not the metrics of step 2",
        ),
        (
            lambda run: lines(run, lambda rows: [rows[0], b"[]\n", rows[2]]),
            "line 2 is not the metrics of step 2",
        ),
        (
            lambda run: lines(run, lambda rows: [rows[0], rows[1], rows[1], rows[2]]),
            "line 3 is not the metrics of step 3 (its step is 2)",
        ),
        (
            lambda run: lines(run, lambda rows: [*rows[:2], b'{"step": 3, "seconds": "long"}\n']),
            "its seconds is no number",
        ),
    ],
)
def test_metrics_that_are_not_those_of_the_steps(
    spoil: Callable[[Path], None], words: str, run: Path, capsys
) -> None:
    """One sentence before anything is changed."""
    spoil(run)
    before = files_of(run)
    assert train.main(["--resume", str(run), "--steps", "4"]) == 2
    error = the_error(capsys.readouterr().err)
    assert str(run / "metrics.jsonl") in error
    assert words in error
    assert files_of(run) == before


def test_a_torn_last_line_is_dropped_with_a_word(whole: Path, run: Path, capsys) -> None:
    """The step stays done; its figures are gone."""
    lines(run, lambda rows: [*rows[:2], b'{"step": 3, "rew'])
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0
    assert "its last line, of step 3, is torn and was dropped" in capsys.readouterr().err
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[:2] == rows_of(whole)[:2]
    assert rows[2] == {"step": 3}
    assert len(read_metrics(run / "metrics.jsonl", 4)) == 4  # so it can be resumed again


@pytest.mark.parametrize("torn", [b"{", b"\0\0\0\0", b'{"step": 2}\xc3', b'{"step": 2, "seconds": 1.5'])
def test_every_torn_last_line(torn: bytes, tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    assert read_metrics(tmp_path / "metrics.jsonl", 2) == ['{"step": 1}\n', '{"step": 2}\n']
    assert "its last line, of step 2, is torn and was dropped" in capsys.readouterr().err
    assert read_metrics(tmp_path / "metrics.jsonl", 1) == ['{"step": 1}\n']  # step 2 is done again
    assert not capsys.readouterr().err


def test_a_last_line_without_its_line_end_is_whole(run: Path, capsys) -> None:
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows.rstrip())
    assert "".join(read_metrics(run / "metrics.jsonl", 3)) == rows
    assert not capsys.readouterr().err


@pytest.mark.parametrize("step", ["-3", "NaN", "1e999", '"3"', "true", "4", "null", "[" * 100_000])
def test_a_step_that_cannot_be(step: str, run: Path, capsys) -> None:
    (run / "checkpoints" / "step-000003" / "optimizer" / "step.json").write_text(f'{{"step": {step}}}')
    before = files_of(run)
    assert train.main(["--resume", str(run), "--steps", "4"]) == 2
    error = the_error(capsys.readouterr().err)
    assert f"{run / 'checkpoints' / 'step-000003'} is not a whole checkpoint" in error
    assert "optimizer/step.json" in error
    assert "remove it to resume from step-000002" in error
    assert files_of(run) == before


@pytest.fixture
def read_only(whole: Path) -> Iterator[Path]:
    """A run folder that this process may read but not write. Root may write anywhere, so root is someone else
    meanwhile."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        run = Path(shutil.copytree(whole, Path(place) / "run"))
        run.chmod(0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            yield run
        finally:
            if root:
                os.seteuid(0)
            run.chmod(0o755)


def test_a_read_only_run_folder(read_only: Path, capsys) -> None:
    before = files_of(read_only)
    assert train.main(["--resume", str(read_only), "--steps", "4"]) == 2
    assert f"{read_only} cannot be written (Permission denied)" in the_error(capsys.readouterr().err)
    assert files_of(read_only) == before


def test_settings_that_are_no_text(run: Path, capsys) -> None:
    (run / "config.json").write_bytes(b"\xff\xfe\x00")
    before = files_of(run)
    assert train.main(["--resume", str(run)]) == 2
    assert f"{run / 'config.json'} cannot be read as the settings of a run" in the_error(
        capsys.readouterr().err
    )
    assert files_of(run) == before


def test_checkpoints_of_more_than_six_digits_are_found(run: Path, capsys) -> None:
    """A run of a million steps and more."""
    newest = run / "checkpoints" / "step-1000000"
    (run / "checkpoints" / "step-000003").rename(newest)
    (newest / "optimizer" / "step.json").write_text('{"step": 1000000}')
    assert train.main(["--resume", str(run), "--steps", "1000001"]) == 2
    assert "has 3 lines, and 1000000 steps are done" in the_error(capsys.readouterr().err)


def test_a_full_disk_under_the_metrics_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    """What was done before is saved all the same."""
    from locus_fast.run.report import Metrics

    write = Metrics.write

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    def full(self, numbers) -> None:
        if numbers["step"] == 2:
            self.file = Full(self.file)
        write(self, numbers)

    monkeypatch.setattr(Metrics, "write", full)
    out = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "3", "--out", str(out)]) == 2
    assert f"{out / 'metrics.jsonl'} could not be written: No space left on device" in the_error(
        capsys.readouterr().err
    )
    assert (out / "final" / "model.safetensors").is_file()
