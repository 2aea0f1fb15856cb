"""The how-to pages are followed to the letter in a copy of the repository: edits are made, commands run, and
what a page says they print is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.readable_pages import ROOT, copy_repository, follow, steps_of

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page: Path, tmp_path: Path) -> None:
    follow(page.read_text(), copy_repository(tmp_path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_runs_something(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 150
    assert any(step.kind == "run" for step in steps_of(text))


def test_an_instruction_that_no_longer_fits_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(AssertionError, match=r"a\.py has 0 times what the page looks for: y = 1"):
        follow("In `a.py`, replace `y = 1` by `y = 2`.\n", tmp_path)
    with pytest.raises(AssertionError, match="no sentence before this block"):
        follow("Look:\n\n```python\nx = 2\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="failed with 3"):
        follow("```bash\nexit 3\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="was not: two"):
        follow("```bash\necho one\n```\n\nIt prints:\n\n```text\none\ntwo\n```\n", tmp_path)
    follow(
        "In `a.py`, after `x = 1`, add:\n\n```python\ny = 2\n```\n\n```bash\ngrep -n y a.py\n```\n", tmp_path
    )
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 2\n"
