"""What other libraries say: nothing of parts of them that are not used, and everything else."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from locus_fast.errors import UserError
from locus_fast.libraries import REMARKS, Silence, optional


@pytest.mark.parametrize(
    "command", [["locus_fast.evaluate", "--eval-cues", "2", "--device", "cpu"], ["locus_fast.cost"]]
)
def test_a_command_prints_no_librarys_remarks(command: list[str], tmp_path: Path) -> None:
    """With torchao installed, whose native parts are of other cards: the first line is ours."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("asking the embedded tiny base: " if "evaluate" in command[0] else "")
    assert not any(name in done.stderr for name in ("torchao", "deprecated", "Failed to load"))


@pytest.mark.parametrize("library", ["torchao.optim", "bitsandbytes.optim", "peft"])
def test_optional_libraries_are_imported_in_silence(library: str) -> None:
    pytest.importorskip(library.partition(".")[0])
    code = "from locus_fast.libraries import optional, silence_remarks; silence_remarks()\n"
    code += f"optional('{library}', '--option')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("name", REMARKS)
def test_other_warnings_and_all_errors_are_shown(name: str, caplog: pytest.LogCaptureFixture) -> None:
    remark = f"{REMARKS[name][0]} something"
    logger = logging.getLogger(name)
    silence = Silence(REMARKS[name])
    logger.addFilter(silence)
    logger.addHandler(caplog.handler)  # torch's loggers do not hand their records on
    try:
        for say, message in (
            (logger.warning, remark),
            (logger.warning, "weights are lost"),
            (logger.error, remark),
        ):
            say(message, *["x"] * message.count("%s"))
    finally:
        logger.removeHandler(caplog.handler)
        logger.removeFilter(silence)
    shown = {(record.levelname, record.msg) for record in caplog.records}
    assert shown == {("WARNING", "weights are lost"), ("ERROR", remark)}


def test_a_library_that_does_not_import_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there and broken is not only called missing."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError,
        match=r"--lora needs peft, which is missing or too old: pip install -U 'locus-fast\[lora\]' \(.*peft",
    ):
        optional("peft", "--lora")
    with pytest.raises(
        UserError,
        match=r"--optimizer x needs no_such_thing, .*: "
        r"pip install 'locus-fast\[optim\]' \(ModuleNotFoundError, No module",
    ):
        optional("no_such_thing.optim", "--optimizer x", "'locus-fast[optim]'")
