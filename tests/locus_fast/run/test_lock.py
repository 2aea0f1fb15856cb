"""A run folder is trained into by one process at a time, and by whoever comes next when that one is gone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from locus_fast import evaluate, train
from locus_fast.errors import UserError
from locus_fast.run.lock import holder_of, locked
from tests.locus_fast.run_cases import SHORT, Child, files_of, finished_run, rows_of, the_error


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    with Child([*SHORT, "--steps", "500", "--save-every", "1", "--out", str(out)]) as first:
        first.wait_for_steps(out, 2)
        holder = f"{out} is in use: process {first.process.pid} on {socket.gethostname()}, since 20"
        assert train.main(["--resume", str(out), "--steps", "9"]) == 2
        assert holder in the_error(capsys.readouterr().err)
        assert train.main([*SHORT, "--steps", "1", "--out", str(out)]) == 2
        error = the_error(capsys.readouterr().err)
        assert holder in error
        assert "remove" not in error
        first.wait_for_steps(out, 3)  # it was not disturbed
        assert (
            evaluate.main([str(out / "checkpoints" / "step-000001"), "--eval-cues", "4", "--device", "cpu"])
            == 0
        )
        first.process.kill()
        first.process.wait()
    done = max(int(path.name[5:]) for path in (out / "checkpoints").iterdir() if path.name[5:].isdigit())
    assert train.main(["--resume", str(out), "--steps", str(done + 1)]) == 0  # the lock died with its process
    assert [row["step"] for row in rows_of(out)] == list(range(1, done + 2))
    assert not (out / "lock").exists()


def test_a_folder_is_locked_as_long_as_the_block_lasts(tmp_path: Path) -> None:
    assert holder_of(tmp_path) is None
    with locked(tmp_path):
        assert "process" in str(holder_of(tmp_path))
        with pytest.raises(UserError, match="is in use"), locked(tmp_path):
            pass
        (tmp_path / "lock").write_text("")  # as it is before its holder has written his name
        with pytest.raises(UserError, match="is in use: another process"), locked(tmp_path):
            pass
    assert holder_of(tmp_path) is None
    # of a process that was killed
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2020"}))
    assert holder_of(tmp_path) is None
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_the_lock_is_no_part_of_a_run_that_has_ended(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    assert "lock" not in files_of(run)
