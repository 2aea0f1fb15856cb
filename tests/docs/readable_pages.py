"""How-to pages as instructions: what a reader does by hand, done in a copy of the repository.

A page holds these instructions, each a paragraph followed by a fenced block, or alone where it says so:

    Create `file`:                                   the block is the file
    In `file`, after `text`, add:                    the block goes under the one line that holds the text
    In `file`, before `text`, add:                   the block goes above it
    In `file`, replace `text` by `other`.            no block
    ```bash                                          is run from the repository's root and must succeed
    It prints:                                       each line of the block was printed last, in this order
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("locus_fast", "kernels", "examples", "tests", "pyproject.toml")
NAME = r"`([^`\n]+)`"
STEPS = {  # kind -> the sentence, at the end of a paragraph
    "create": re.compile(rf"Create {NAME}:\s*\Z"),
    "after": re.compile(rf"In {NAME}, after {NAME}, add:\s*\Z"),
    "before": re.compile(rf"In {NAME}, before {NAME}, add:\s*\Z"),
    "prints": re.compile(r"It prints:\s*\Z"),
}
REPLACE = re.compile(rf"In {NAME}, replace {NAME} by {NAME}\.")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One instruction of a page."""

    kind: str  # of STEPS, or "replace" or "run"
    words: tuple[str, ...]  # the file and the texts that the sentence names
    block: str


def steps_of(page: str) -> list[Step]:
    """The instructions of a page in their order. AssertionError for a block that no sentence explains."""
    steps: list[Step] = []
    end = 0
    for match in BLOCK.finditer(page):
        prose = page[end : match.start()]
        end = match.end()
        steps += [Step("replace", found.groups(), "") for found in REPLACE.finditer(prose)]
        if match[1] == "bash":
            steps.append(Step("run", (), match[2]))
            continue
        told = [(kind, found) for kind, sentence in STEPS.items() if (found := sentence.search(prose))]
        assert told, f"no sentence before this block says what to do with it:\n{match[2]}"
        steps.append(Step(told[0][0], told[0][1].groups(), match[2]))
    return steps + [Step("replace", found.groups(), "") for found in REPLACE.finditer(page[end:])]


def copy_repository(folder: Path) -> Path:
    """The packages, the tests and pyproject.toml in the folder, as a fresh clone has them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in COPIED:
        whole = ROOT / name
        if whole.is_dir():
            shutil.copytree(whole, folder / name, ignore=ignored)
        else:
            shutil.copy(whole, folder / name)
    return folder


def follow(page: str, folder: Path) -> str:
    """Does what a page says in a copy of the repository; returns all that its commands print. AssertionError
    names the instruction that could not be followed."""
    printed, everything = "", ""
    for step in steps_of(page):
        if step.kind == "run":
            printed = run(step.block, folder)
            everything += printed
        elif step.kind == "prints":
            at = 0
            for line in filter(None, map(str.strip, step.block.splitlines())):
                at = printed.find(line, at)
                assert at >= 0, f"the page says that this is printed, and it was not: {line}\n{printed}"
        else:
            edit(step, folder)
    return everything


def run(command: str, folder: Path) -> str:
    """A bash block's output, both streams; AssertionError if it fails."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'kernels'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(
        shell, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"failed with {done.returncode}: {command}\n{done.stdout[-4000:]}"
    return done.stdout


def edit(step: Step, folder: Path) -> None:
    """Creates or changes the file that the instruction names."""
    file = folder / step.words[0]
    if step.kind == "create":
        assert not file.exists(), f"the page creates {step.words[0]}, which is there already"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(step.block)
        return
    text, anchor = file.read_text(), step.words[1]
    assert text.count(anchor) == 1, (
        f"{step.words[0]} has {text.count(anchor)} times what the page looks for: {anchor}"
    )
    if step.kind == "replace":
        file.write_text(text.replace(anchor, step.words[2]))
        return
    lines = text.splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if anchor in line) + (step.kind == "after")
    file.write_text("".join([*lines[:at], step.block, *lines[at:]]))
