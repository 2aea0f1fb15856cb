"""What the documents name is there: options, modules, fields of the metrics, linked pages."""

from __future__ import annotations

import argparse
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from locus_fast.config import Config
from locus_fast.config.options import add_options
from locus_fast.config.presets import RENAMED
from locus_fast.cost.__main__ import main as cost
from tests.docs.readable_pages import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = "cost|config|data|model|run|step|tiny|weights"
OTHERS = {  # of the tools that commands in the documents call
    *("--memory", "--image", "--cue", "--reply-tokens", "--text-tokens"),  # locus_fast.cost alone
    *("--dist", "--benchmark-only", "--local-dir", "--force-exclude", "--check", "--help"),
}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def options_of(settings: type) -> set[str]:
    """The options of the training command."""
    parser = argparse.ArgumentParser()
    add_options(parser, settings)
    return {name for action in parser._actions for name in action.option_strings}


@by_page
def test_options_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text()))
    assert named - options_of(Config) - OTHERS == set()


@by_page
def test_names_of_earlier_versions_are_absent(page: Path) -> None:
    old = {"--" + name.replace("_", "-") for name in RENAMED}
    assert old & set(re.findall(r"--[a-z][a-z0-9-]*", page.read_text())) == set()


def test_the_changelog_has_every_name_of_earlier_versions() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for old, new in RENAMED.items():
        row = rf"\| `--{old.replace('_', '-')}`.*\| `--{new.replace('_', '-')}`"
        assert re.search(row, text), old


@by_page
def test_files_exist(page: Path) -> None:
    """Paths in backquotes from the root, or from `locus_fast/`, and relative links."""
    text = page.read_text()
    tops = "locus_fast|kernels|docs|tests|bench|examples"
    made = set(re.findall(r"Create `([^`]+)`:", text))
    for path in set(re.findall(rf"`((?:{tops}|{ROOMS})/[\w/.-]+)`", text)) - made:
        assert (ROOT / path).exists() or (ROOT / "locus_fast" / path).exists(), path
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / link).exists(), link


def test_modules_that_are_run_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"python -m (locus_fast[\w.]*)", page.read_text()):
            assert importlib.util.find_spec(name), (page, name)


def test_the_recipe_names_fields_of_the_metrics() -> None:
    """Those of the table of what to watch, in what a step writes."""
    source = (ROOT / "locus_fast" / "step" / "metrics.py").read_text()
    table = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE)
    # it is `cost.flops.rates`'
    fields = {field for cell in table for field in re.findall(r"`(\w+)`", cell)} - {"mfu"}
    assert len(fields) > 10
    assert {field for field in fields if f'"{field}"' not in source} == set()


def test_the_recipe_quotes_what_the_cost_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that asks whether it fits says yes, and the line below it is one that it prints."""
    text = (ROOT / "docs" / "recipe.md").read_text()
    asked = re.findall(r"^python -m locus_fast\.cost (.*)\n```\n[^`]*```text\n(.*)\n```", text, re.MULTILINE)
    assert len(asked) == 2
    for arguments, quoted in asked:
        assert cost(arguments.split()) == 0
        assert quoted in capsys.readouterr().out


def test_every_package_is_in_pyproject() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    homes = {"locus_fast": ROOT, "locus_kernels": ROOT / "kernels"}
    for name, home in homes.items():
        folders = [file.parent.relative_to(home) for file in (home / name).rglob("__init__.py")]
        assert {".".join(folder.parts) for folder in folders} - listed == set()
