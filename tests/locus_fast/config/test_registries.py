"""The choices that `--help` lists are those of the code that they name; and asking for them loads no PyTorch.

`config.settings` writes the names down once more, as the registries are beside code that imports PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from locus_kernels import box_reward, shared_prefix_attention

from locus_fast.config import PRESETS, RULES, Config, parse
from locus_fast.config import settings as choices
from locus_fast.config.presets import LOSS_SETTINGS, RENAMED, RENAMED_VALUES
from locus_fast.cost.memory import REFERENCES as PLANNED_REFERENCES
from locus_fast.data.box_format import MEANING, to_xyxy
from locus_fast.errors import UserError
from locus_fast.model import prompts, reference
from locus_fast.step import losses
from locus_fast.step.optim import rate_factor
from locus_fast.step.optimizers import make_optimizer

# setting -> (choices, what the code has by name)
REGISTRIES: dict[str, tuple[tuple[str, ...], Iterable[str]]] = {
    "reward": (choices.REWARD_SHAPES, box_reward.REWARD_SHAPES),
    "loss": (choices.LOSSES, losses.LOSSES),
    "loss_agg": (choices.LOSS_AGGREGATIONS, losses.AGGREGATIONS),
    "kl_estimator": (choices.KL_ESTIMATORS, losses.KL_ESTIMATORS),
    "reference": (choices.REFERENCES, reference.REFERENCES),
    "attention": (choices.ATTENTION_BACKENDS, ["auto", *shared_prefix_attention.BACKENDS]),
    "prompt_style": (choices.PROMPT_STYLES, prompts.PROMPT_STYLES),
    "box_format": (choices.BOX_FORMATS, ["auto", *MEANING]),
}


@pytest.mark.parametrize("setting", REGISTRIES)
def test_choices_are_the_registrys(setting: str) -> None:
    written, registry = REGISTRIES[setting]
    assert Config.__dataclass_fields__[setting].metadata["choices"] == written
    assert sorted(written) == sorted(registry)


def test_every_optimizer_is_made() -> None:
    """Each name in the choices makes one, or names the library it lacks; another name makes none."""
    for name in choices.OPTIMIZERS:
        weight = torch.nn.Parameter(torch.zeros(4, 256))
        groups = [{"params": [weight], "rate": 1e-3}]
        if name.startswith("bnb-") and not importlib.util.find_spec("bitsandbytes"):
            with pytest.raises(UserError, match="bitsandbytes"):
                make_optimizer(name, groups, 0.0)
        else:
            assert make_optimizer(name, groups, 0.0).param_groups[0]["params"][0] is weight, name
    with pytest.raises(UserError, match="must be one of"):
        make_optimizer("sgd", [{"params": [torch.nn.Parameter(torch.zeros(2))], "rate": 1e-3}], 0.0)


def test_every_schedule_is_another() -> None:
    """The rate in the last of 10 steps without warm-up: 1, and half a cosine of 10 parts in 11."""
    last = {name: rate_factor(9, 10, 0.0, name) for name in choices.LR_SCHEDULES}
    assert last == pytest.approx({"constant": 1.0, "cosine": 0.5 * (1 + np.cos(np.pi * 9 / 10))})


def test_every_box_format_is_read() -> None:
    sides, expected = np.array([[200.0, 100.0]]), [20.0, 10.0, 60.0, 50.0]
    written = {
        "xyxy": [20, 10, 60, 50],
        "xywh": [20, 10, 40, 40],
        "normalized": [0.1, 0.1, 0.3, 0.5],
        "thousand": [100, 100, 300, 500],
    }
    assert {"auto", *written} == {*choices.BOX_FORMATS}
    for name, numbers in written.items():
        assert to_xyxy(np.array([numbers], dtype=float), sides, name)[0].tolist() == pytest.approx(expected)


def test_the_plan_knows_every_reference() -> None:
    assert {"auto", *PLANNED_REFERENCES} - {"none"} == {*choices.REFERENCES}


def test_tables_of_settings_name_settings() -> None:
    """Rules, presets, what a loss brings, and what earlier names are called now."""
    fields = Config.__dataclass_fields__
    tables = [RULES, RENAMED.values(), RENAMED_VALUES, *PRESETS.values(), *LOSS_SETTINGS.values()]
    assert {name for table in tables for name in table} <= fields.keys()
    assert not RENAMED.keys() & fields.keys()
    assert LOSS_SETTINGS.keys() <= {*choices.LOSSES}
    assert {f.metadata["group"] for f in fields.values()} == {*choices.GROUPS}
    for values in RENAMED_VALUES["loss_agg"].values():
        assert values in choices.LOSS_AGGREGATIONS
    for name in PRESETS:
        assert parse(["--preset", name]).preset == name


LOADED = """
import importlib, resource, runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    if sys.argv[1:]:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        importlib.import_module(module)
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in ("torch", "transformers") if name in sys.modules]
print(used.ru_utime + used.ru_stime, *loaded, file=sys.stderr)
"""


def child(folder: Path, *arguments: str) -> tuple[str, float, list[str]]:
    """(standard output, CPU seconds, which of torch and transformers are loaded) of a fresh interpreter that
    runs a module with arguments, or imports it without any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADED, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, *loaded = done.stderr.splitlines()[-1].split()
    return done.stdout, float(seconds), loaded


def test_the_settings_load_at_once(tmp_path: Path) -> None:
    """Without PyTorch, in less than a second of CPU time with the interpreter's start; the best of three."""
    took = []
    for _ in range(3):
        _, seconds, loaded = child(tmp_path, "locus_fast.config")
        assert loaded == []
        took.append(seconds)
    assert min(took) < 1


@pytest.mark.parametrize("command", ["train", "evaluate", "cost"])
def test_help_loads_no_pytorch(command: str, tmp_path: Path) -> None:
    said, _, loaded = child(tmp_path, f"locus_fast.{command}", "--help")
    assert said.startswith(f"usage: python -m locus_fast.{command}")
    assert "--prompts PROMPTS" in said or "--model MODEL" in said
    assert loaded == []
