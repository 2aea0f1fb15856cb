"""The folder `kernels/` and Hugging Face's package of that name live together."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_models_import_from_the_repository_root_beside_the_package_kernels() -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    script = (
        "import kernels; assert kernels.__file__; import locus_fast.model.policy; "
        "from transformers import Qwen2_5_VLForConditionalGeneration"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "locus_kernels" / "__init__.py").exists()


def test_the_kernels_know_no_model_and_no_trainer() -> None:
    for file in (ROOT / "kernels" / "locus_kernels").rglob("*.py"):
        text = file.read_text()
        assert "import transformers" not in text
        assert "from transformers" not in text
        assert "locus_fast" not in text, file
    for file in (ROOT / "locus_fast").rglob("*.py"):
        assert "import triton" not in file.read_text(), file
