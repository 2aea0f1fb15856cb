"""Files whose tests run the trainer whole, or take more than some ten seconds together, are marked `long`."""

from __future__ import annotations

import pytest

LONG = {
    "adapter_runs",
    "adapter_refusals",
    "train_failures",
    "train_variants",
    "room",
    "plan",
    "loading",
    "checkpoint",
    "switches_refused",
    "train",
    "budget",
    "cost_memory",
    "cost_trained",
    "interrupt",
    "not_finite",
    "resume",
    "lock",
    "run_folders",
    "objective",
    "adapters",
    "adapters_on_adapters",
    "adapter_files",
    "fused",
    "policy",
    "processor",
    "reference",
    "switches",
    "checkpoint_damage",
    "source",
    "bounds",
    "tiny",
    "libraries",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in LONG and "locus_fast" in item.path.parts:
            item.add_marker(pytest.mark.long)
