"""A file of cases that runs in a process of its own is reported case by case."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import interpreter
from tests.kernels.interpreter import ROOT, Outcome, environment_of_cases, run_cases

CASES = """
import os
import pytest

def test_the_interpreter_is_as_asked_for():
    assert os.environ.get("TRITON_INTERPRET") == "1"

@pytest.mark.parametrize("n", [1, 2])
def test_numbers(n):
    assert n == 1

def test_left_out():
    pytest.skip("not today")
"""


class Recorder:
    """Takes the place of pytest's fixture: notes each subtest's end."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}

    @contextlib.contextmanager
    def test(self, name: str) -> Iterator[None]:
        self.ends[name] = "passed"
        try:
            yield
        except (pytest.fail.Exception, pytest.skip.Exception) as end:
            self.ends[name] = f"{type(end).__name__}: {end}"


def test_every_inner_case_is_a_subtest_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "interpret.py"
    file.write_text(CASES)
    recorder = Recorder()
    run_cases(file, interpret=True, subtests=recorder)  # type: ignore[arg-type]
    assert list(recorder.ends) == [
        "test_the_interpreter_is_as_asked_for", "test_numbers[1]", "test_numbers[2]", "test_left_out",
    ]  # fmt: skip
    asked_for, first, second, skipped = recorder.ends.values()
    assert asked_for == first == "passed"
    assert second.startswith("Failed: ")
    assert "assert 2 == 1" in second
    assert skipped == "Skipped: not today"


def test_without_subtests_one_failure_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [Outcome("one", "it broke", ""), Outcome("two", "", ""), Outcome("three", "so did it", "")]
    monkeypatch.setattr(interpreter, "_outcomes", lambda path, interpret: ends)
    with pytest.raises(AssertionError, match=r"^one, three\nit broke\nso did it"):
        run_cases("interpret.py", interpret=True)
    ends[:] = [Outcome("two", "", "")]
    run_cases("interpret.py", interpret=True)


def test_a_file_without_cases_is_no_success(tmp_path: Path) -> None:
    empty = tmp_path / "interpret.py"
    empty.write_text("")
    with pytest.raises(AssertionError, match="no tests ran"):
        run_cases(empty, interpret=True)


def test_the_paths_of_the_caller_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/a", "/b"]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environment = environment_of_cases()
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "kernels"), "/a", "/b"]
    assert "TRITON_INTERPRET" not in environment
