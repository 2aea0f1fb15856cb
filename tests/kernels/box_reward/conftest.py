"""What the tests of the box reward ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.box_reward.cases import VOCABULARIES, Vocabulary


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return VOCABULARIES[request.param]()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
