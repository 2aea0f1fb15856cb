"""The pixel limits of training and those of the model's own image processor: said where they differ, and
exported when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from locus_fast import train
from locus_fast.data.resize import resize
from locus_fast.errors import UserError
from locus_fast.model.preprocess import describe_limits
from locus_fast.model.processor import own_limits, write_limits
from locus_fast.run import model as runtime
from locus_fast.weights.source import read_source
from tests.locus_fast.source_cases import DATA, RECIPE, SIZES, fields
from tests.published import write_checkpoint

SIZE = dict(Qwen2VLImageProcessorPil.size)
PICTURES = ((4000, 3000), (300, 200), (40, 30), (1000, 90))  # width and height


def grid_by_transformers(folder: Path, width: int, height: int) -> tuple[int, int]:
    """(width, height) in pixels of what the folder's own processor makes of an image, as transformers loads
    it."""
    Qwen2VLImageProcessorPil.size = dict(SIZE)  # transformers 5.17 writes a folder's limits into it
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    _, rows, columns = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0]
    return int(columns) * processor.patch_size, int(rows) * processor.patch_size


def trained_size(folder: Path, limits: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) of the same image in training."""
    factor = read_source(folder).spec.factor
    image = resize(
        np.zeros((height, width, 3), np.uint8), factor=factor, min_pixels=limits[0], max_pixels=limits[1]
    )
    return image.shape[1], image.shape[0]


STATED: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "names": ({"min_pixels": 3136, "max_pixels": 65536}, (3136, 65536)),
    "edges": ({"size": {"shortest_edge": 4096, "longest_edge": 65536}}, (4096, 65536)),
    "both": (
        {"min_pixels": 3136, "max_pixels": 65536, "size": {"shortest_edge": 9, "longest_edge": 10**6}},
        (3136, 65536),
    ),
    "one of each": ({"min_pixels": 3136, "size": {"shortest_edge": 9, "longest_edge": 65536}}, (3136, 65536)),
    "null names": (
        {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 4096, "longest_edge": 65536}},
        (4096, 65536),
    ),
    "neither": ({}, (3136, 1003520)),
}


def with_limits(folder: Path, stated: dict[str, Any], within: bool) -> None:
    """An image processor's config that states limits so; within: as a part of the processor's."""
    file = folder / "preprocessor_config.json"
    content = {
        key: value
        for key, value in json.loads(file.read_text()).items()
        if key not in ("min_pixels", "max_pixels", "size")
    }
    if within:
        (folder / "processor_config.json").write_text(
            json.dumps({"processor_class": "P", "image_processor": {**content, **stated}})
        )
    file.write_text(
        json.dumps({**content, **({"min_pixels": 28 * 28, "max_pixels": 28 * 56} if within else stated)})
    )


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", STATED)
def test_limits_are_read_and_written_as_transformers_does(name: str, within: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2.5-vl")
    stated, limits = STATED[name]
    with_limits(folder, stated, within)
    assert own_limits(folder) == limits
    assert [grid_by_transformers(folder, *size) for size in PICTURES] == [
        trained_size(folder, limits, *size) for size in PICTURES
    ]
    new = (12544, 200704)
    before = {file.name: json.loads(file.read_text()) for file in folder.glob("*processor_config.json")}
    write_limits(folder, new)
    assert own_limits(folder) == new
    assert [grid_by_transformers(folder, *size) for size in PICTURES] == [
        trained_size(folder, new, *size) for size in PICTURES
    ]
    after = {file.name: json.loads(file.read_text()) for file in folder.glob("*processor_config.json")}
    for file, content in before.items():
        for was, now in (
            (content, after[file]),
            *(
                [(content["image_processor"], after[file]["image_processor"])]
                if "image_processor" in content
                else []
            ),
        ):
            assert list(was) == [key for key in now if key in was]
            assert {
                key: was[key] for key in was.keys() - {"min_pixels", "max_pixels", "size", "image_processor"}
            }.items() <= now.items()
    if within:  # the file of its own goes before for an older transformers, so it gets them too
        own = after["preprocessor_config.json"]
        assert (own["min_pixels"], own["max_pixels"]) == new


@pytest.mark.parametrize("value", ["many", 0, -1, True, [1]])
def test_limits_that_are_no_numbers(value: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2.5-vl")
    fields("preprocessor_config.json", max_pixels=value)(folder)
    with pytest.raises(
        UserError,
        match=r"preprocessor_config\.json: max_pixels is .*, and must be a number of pixels above 0",
    ):
        read_source(folder)


def test_the_sizes_of_training_and_of_use_are_said() -> None:
    """Of a photograph and a small picture, by the limits that Qwen2.5-VL-7B-Instruct is published with."""
    line = describe_limits((262144, 1048576), (3136, 12845056), 28, exported=False)
    assert (
        "262,144 to 1,048,576 pixels here, and 3,136 to 12,845,056 pixels by the model's own processor"
        in line
    )
    assert "4000x3000 is 1176x868 here and 4004x2996 there" in line
    assert "300x200 is 644x420 here and 308x196 there" in line
    assert "\n" not in line
    assert describe_limits((3136, 65536), (3136, 65536), 28, exported=False) == ""
    assert "300x200" not in describe_limits((3136, 65536), (3136, 12845056), 28, exported=False)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])  # whose configs spell limits apart
def test_a_run_says_that_sizes_differ_and_exports_those_of_training_when_asked(
    family: str, tmp_path: Path, capsys
) -> None:
    folder = write_checkpoint(tmp_path / "model", family)
    arguments = ["--model", str(folder), "--data", DATA, *RECIPE, *SIZES]
    assert train.main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "by the model's own processor" in line]
    assert len(said) == 1
    assert "4,096 to 12,544 pixels here" in said[0]
    limits = (4096, 12544)
    assert train.main([*arguments, "--out", str(tmp_path / "run"), "--export-limits", "true"]) == 0
    assert (
        sum(
            "the image processor in final/ gets 4,096 to 12,544 pixels" in line
            for line in capsys.readouterr().err.splitlines()
        )
        == 1
    )
    for size in PICTURES:
        trained = trained_size(folder, limits, *size)
        assert grid_by_transformers(tmp_path / "run" / "final", *size) == trained
        if size == (4000, 3000):
            assert (
                grid_by_transformers(tmp_path / "plain" / "final", *size)
                == grid_by_transformers(folder, *size)
                != trained
            )
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (file.read_bytes() == (tmp_path / "run" / "final" / file.name).read_bytes()) != (
                file.name == "preprocessor_config.json"
            ), file.name
            assert file.read_bytes() == (tmp_path / "plain" / "final" / file.name).read_bytes()


def test_nothing_is_said_where_sizes_are_the_same(tmp_path: Path, capsys) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2.5-vl")
    write_limits(folder, (4096, 12544))
    assert (
        train.main(["--model", str(folder), "--data", DATA, *RECIPE, *SIZES, "--out", str(tmp_path / "run")])
        == 0
    )
    assert "own processor" not in capsys.readouterr().err


def test_adapters_have_no_processor_to_write_limits_into(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "load_source", None)
    assert (
        train.main(
            ["--lora", "4", "--export", "adapter", "--export-limits", "true", "--out", str(tmp_path / "run")]
        )
        == 2
    )
    assert "--export-limits writes into an image processor's config" in capsys.readouterr().err
