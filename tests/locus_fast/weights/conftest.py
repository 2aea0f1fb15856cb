"""A checkpoint of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.published import FAMILIES, write_checkpoint


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published") / request.param, request.param)
