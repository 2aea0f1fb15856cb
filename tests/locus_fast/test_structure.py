"""How the code is laid out, read from its source without importing it: sizes, imports, packages, registries.

Floors: a room is a package of locus_fast (`model`, `step`), or a module that is in none (`errors`, `train`).
What imports nothing of locus_fast is on floor 0, every other room one above the highest that it imports.
"""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"locus_fast": ROOT / "locus_fast", "locus_kernels": ROOT / "kernels" / "locus_kernels"}
MOST_LINES, MOST_SIBLINGS = 300, 12


def files() -> dict[str, Path]:
    """Module name -> its file, of both packages; a package's own is that of its __init__.py."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


FILES = files()
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name: str) -> dict[str, int]:
    """The modules of locus_fast that one imports, wherever in it -> the first line that does."""
    found: dict[str, int] = {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [whole if whole in FILES else node.module or "" for whole in wholes]
        else:
            continue
        for target in targets:
            if target in FILES and target.startswith("locus_fast.") and target != name:
                found.setdefault(target, node.lineno)
    return found


def room(name: str) -> str:
    """A command that lies in a package (`python -m locus_fast.cost`) is a room of its own."""
    return name if name.endswith("__main__") else name.split(".")[1]


OURS = [name for name in FILES if name.startswith("locus_fast.")]


def floors() -> dict[str, int]:
    """Room -> floor. Raises CycleError where rooms import each other."""
    graph: dict[str, set[str]] = {room(name): set() for name in OURS}
    for name in OURS:
        graph[room(name)] |= {room(target) for target in imports(name)} - {room(name)}
    found: dict[str, int] = {}
    for each in TopologicalSorter(graph).static_order():
        found[each] = 1 + max((found[below] for below in graph[each]), default=-1)
    return found


@pytest.mark.parametrize("name", FILES)
def test_no_module_is_long(name: str) -> None:
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= MOST_LINES


@pytest.mark.parametrize("name", OURS)
def test_no_module_knows_many_others(name: str) -> None:
    siblings = imports(name)
    assert len(siblings) <= MOST_SIBLINGS, ", ".join(siblings)


def test_rooms_import_downwards_alone() -> None:
    """No room imports, even in a function, one that imports it by whatever way."""
    try:
        found = floors()
    except CycleError as error:
        cycle = error.args[1][::-1]  # each imports the next
        lines = [
            f"{name}:{line} imports {target}"
            for upper, lower in pairwise(cycle)
            for name in OURS
            for target, line in imports(name).items()
            if (room(name), room(target)) == (upper, lower)
        ]
        pytest.fail("\n".join([" -> ".join(cycle), *lines]))
    for floor in range(max(found.values()), -1, -1):
        print(floor, *sorted(each for each, where in found.items() if where == floor))  # seen with -s
    for lowest in ("errors", "files"):
        assert found[lowest] <= 1, found
    for highest in ("train", "evaluate"):
        assert found[highest] > found["run"] > found["step"] > found["model"] > found["config"], found


def test_kernels_know_nothing_of_the_trainer() -> None:
    assert {name: imports(name) for name in FILES if name.startswith("locus_kernels") and imports(name)} == {}


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted(name for name, path in FILES.items() if path.name == "__init__.py")


@pytest.mark.parametrize("name", FILES)
def test_no_registry_names_a_thing_twice(name: str) -> None:
    """Keys of every dict that is written out, and names in the tuples that a module has at its top."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            assert len(keys) == len(set(keys)), f"line {node.lineno}: {keys}"
    for node in TREES[name].body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            names = [entry.value for entry in node.value.elts if isinstance(entry, ast.Constant)]
            words = [entry for entry in names if isinstance(entry, str)]
            assert len(words) == len(set(words)), f"line {node.lineno}: {words}"
