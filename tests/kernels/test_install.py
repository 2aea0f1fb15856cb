"""`pip install ./kernels` alone, into an environment of torch, triton and what they depend on: every operator
runs from another folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.kernels.interpreter import ROOT

CHECKS = """
import importlib.metadata, importlib.util, runpy, sys
runpy.run_path(sys.argv[1])
import locus_kernels
assert locus_kernels.__path__[0].startswith(sys.prefix), locus_kernels.__path__
assert not any(importlib.util.find_spec(name) for name in ("locus_fast", "transformers", "numpy"))
"""


def installed(names: list[str]) -> set[str]:
    """These distributions and all that they depend on, as far as they are installed here."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        try:
            requirements = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.long
def test_every_operator_runs_where_only_the_kernels_are_installed(tmp_path: Path) -> None:
    for tool in ("pip", "setuptools", "torch", "triton"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python3*")) / "site-packages"
    for name in installed(["torch", "triton"]):
        distribution = importlib.metadata.distribution(name)
        tops = {
            file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")
        }
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    shutil.copytree(
        ROOT / "kernels",
        tmp_path / "kernels",
        ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"),
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(tmp_path / "kernels")], check=True, capture_output=True, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(ROOT / "tests" / "kernels" / "install_script.py", elsewhere / "script.py")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "TRITON_INTERPRET"
    }
    command = [str(home / "bin" / "python"), "-W", "ignore", "-c", CHECKS, "script.py"]
    done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all operators ran" in done.stdout
    declared = importlib.metadata.Distribution.at(next(site.glob("locus_kernels-*.dist-info"))).requires
    assert sorted(Requirement(line).name for line in declared or []) == ["torch", "triton"]
