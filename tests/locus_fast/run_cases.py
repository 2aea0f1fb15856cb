"""Short runs for tests of what becomes of a run: their options, their folders byte for byte, and processes
that are stopped by signals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from locus_fast import train

SMALL = ["--steps", "3", "--prompts", "6", "--eval-cues", "12", "--device", "cpu"]
SMALL += ["--microbatch-tokens", "1500"]
SHORT = [
    "--prompts",
    "4",
    "--eval-cues",
    "8",
    "--microbatch-tokens",
    "1500",
    "--device",
    "cpu",
    "--workers",
    "1",
]
PATIENCE = 240.0  # seconds that a line of a child process is waited for: the machine may be busy


def finished_run(out: Path, *more: str) -> Path:
    """Three steps with checkpoints after the second and the third."""
    assert train.main([*SHORT, "--steps", "3", "--save-every", "2", "--out", str(out), *more]) == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, however deep, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The metrics that do not depend on time; anything but plain JSON fails."""

    def refuse(name: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {name}, which is no JSON")

    rows = [
        json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "_per_s"))} for row in rows]


def the_error(printed: str) -> str:
    """The one sentence of a command that failed."""
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    return lines[0]


class Child:
    """A training command in a process of its own, with code that is run before it."""

    def __init__(self, arguments: list[str], before: str = ""):
        modules = "from locus_fast import train\nfrom locus_fast.run import evaluation\n"
        modules += "from locus_fast.step.step import Step\nfrom locus_fast.weights import checkpoint\n"
        script = f"import os, sys, time\n{modules}{before}\nsys.exit(train.main(sys.argv[1:]))"
        command = [sys.executable, "-u", "-c", script, *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.printed = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        while data := self.process.stderr.read1(4096):
            self.printed += data.decode(errors="replace")

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Until the pattern was printed so often."""
        end = time.monotonic() + PATIENCE
        while len(re.findall(pattern, self.printed)) < count:
            assert self.process.poll() is None, f"ended before it printed {pattern}:\n{self.printed}"
            assert time.monotonic() < end, f"never printed {pattern}:\n{self.printed}"
            time.sleep(0.02)

    def wait_for_steps(self, out: Path, count: int) -> None:
        """Until the run has written the metrics of so many steps."""
        end, file = time.monotonic() + PATIENCE, out / "metrics.jsonl"
        while not file.exists() or file.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < end, self.printed
            time.sleep(0.02)

    def press(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Waits for it to end; its exit code."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
