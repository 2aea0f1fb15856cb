"""Folders that are no model, or not a whole one: each is refused with one sentence that names file and mend,
before weights are read or anything is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.run import model as runtime
from locus_fast.weights import checkpoint
from locus_fast.weights.checkpoint import load_model
from locus_fast.weights.source import read_source
from tests.locus_fast.source_cases import (
    DATA,
    FIRST,
    INDEX,
    RECIPE,
    SECOND,
    SIZES,
    Spoil,
    absent,
    entry,
    fewer_rows,
    fields,
    of_another_family,
    pickled,
    template,
    tensors,
    text,
)
from tests.published import write_checkpoint

BAD: dict[str, tuple[Spoil, str]] = {
    "missing shard": (absent(SECOND), f"names the shard {SECOND}, which is not in the folder: fetch"),
    "shard outside the folder": (
        text(INDEX, json.dumps({"metadata": {}, "weight_map": {"a": "../x.safetensors"}})),
        "names the shard ../x.safetensors",
    ),
    "truncated shard": (
        lambda folder: os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 3),
        f"{SECOND} is no whole safetensors file",
    ),
    "empty shard": (
        text(SECOND, b""),
        f"{SECOND} is no whole safetensors file; it is cut short or damaged: fetch it again.",
    ),
    "header longer than the file": (
        text(SECOND, (2**33).to_bytes(8, "little") + b"{}"),
        f"{SECOND} is no whole safetensors file",
    ),
    "header that is no object": (
        text(SECOND, (3).to_bytes(8, "little") + b"[1]"),
        f"{SECOND} is no whole safetensors file",
    ),
    "pointer of Git LFS": (
        text(SECOND, "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        f"{SECOND} is a pointer of Git LFS",
    ),
    "dtype missing": (entry(dtype=None), f"{FIRST} is no whole safetensors file"),
    "dtype unhashable": (entry(dtype=[]), f"{FIRST} is no whole safetensors file"),
    "dtype quantised": (
        entry(dtype="F8_E4M3"),
        f"{FIRST}: lm_head.weight is stored as F8_E4M3; give the model's unquantised checkpoint",
    ),
    "shape missing": (entry(shape=None), f"{FIRST} is no whole safetensors file"),
    "overlapping tensors": (entry(data_offsets=[0, 64]), f"{FIRST} is no whole safetensors file"),
    "half an offset": (entry(data_offsets=[0]), f"{FIRST} is no whole safetensors file"),
    "transposed tensor": (
        entry(shape=[64, 419]),
        f"{FIRST}: lm_head.weight has shape [64, 419], and should have [419, 64] by config.json",
    ),
    "no index": (absent(INDEX), f"has neither model.safetensors nor {INDEX} (there is {FIRST})"),
    "index that is no object": (
        text(INDEX, "[]"),
        f"{INDEX} cannot be read as the index of a model's shards",
    ),
    "index without metadata": (
        fields(INDEX, metadata=None),
        f"{INDEX} cannot be read as the index of a model's shards (KeyError: 'metadata')",
    ),
    "index without tensors": (
        text(INDEX, '{"metadata": {}, "weight_map": {}}'),
        "its weight files hold no tensors",
    ),
    "tensor missing": (
        tensors(lambda stored: stored.pop("model.norm.weight")),
        "the first model.language_model.norm.weight: fetch the model again.",
    ),
    "weights of another family": (of_another_family, "one of the two is another model's"),
    "pickle": (
        pickled,
        "has its weights in pickle format (pytorch_model.bin), which is never loaded as it may run code; "
        "convert them with: python -c",
    ),
    "other formats": (
        lambda folder: (absent("*.safetensors*")(folder), text("a.gguf", b"GGUF")(folder)),
        "(there is a.gguf)",
    ),
    "another family": (
        fields("config.json", model_type="llama"),
        "config.json: model type 'llama' is not one of the families",
    ),
    "adapters in the same folder": (
        text("adapter_config.json", '{"peft_type": "LORA"}'),
        "holds a model and adapters (adapter_config.json): move one of the two to a folder of its own.",
    ),
    "custom code": (
        fields("config.json", model_type="x", auto_map={"AutoConfig": "x.X"}),
        "config.json: model type 'x' is not",
    ),
    "model type that is no text": (
        fields("config.json", model_type=["a"]),
        "config.json: model type '['a']' is not",
    ),
    "quantised": (
        fields("config.json", quantization_config={"quant_method": "awq"}),
        "config.json has a quantization_config",
    ),
    "no vision tower": (fields("config.json", vision_config=None), "config.json has no vision_config"),
    "larger sizes": (
        fields("config.json", hidden_size=8192),
        "lm_head.weight has shape [419, 64], and should have [419, 8192] by config.json",
    ),
    "rotary sections": (
        fields("config.json", rope_scaling={"mrope_section": [16, 24, 24], "type": "mrope"}),
        "must be three numbers that add up to 8",
    ),
    "unknown dtype": (
        fields("config.json", torch_dtype="float7"),
        "config.json does not describe a model (AttributeError",
    ),
    "config cut short": (text("config.json", "{"), "config.json cannot be read as JSON"),
    "config that is no object": (text("config.json", "5"), "config.json holds no JSON object"),
    "float16": (
        fields("config.json", torch_dtype="float16"),
        "its weights are float16, in which small updates are lost: give --dtype bfloat16",
    ),
    "no tokenizer": (
        absent("tokenizer.json"),
        "has no tokenizer.json: copy the tokenizer's files of the base model there.",
    ),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "its tokenizer could not be loaded (Exception, "),
    "tokenizer too large": (
        fewer_rows,
        "its tokenizer has ids up to 412, and the model's embedding has 400 rows: copy the tokenizer's files",
    ),
    "tokenizer of other ids": (
        fields("config.json", image_token_id=300),
        "image_token_id 300, which is no special token of its tokenizer: copy",
    ),
    "no template": (
        lambda f: (absent("chat_template.json")(f), fields("tokenizer_config.json", chat_template=None)(f)),
        "images (there is none): copy",
    ),
    "template without images": (
        template("{{ messages[0].role }}"),
        "gives 0 image placeholders (token 409) for 2 images, and must give one each: copy",
    ),
    "template with a slip": (
        template("{% for m in %}"),
        "cannot be used for 2 images (TemplateSyntaxError, ",
    ),
    "template that refuses": (
        template("{{ raise_exception('text only') }}"),
        "cannot be used for 2 images (TemplateError, text only)",
    ),
    "template that refuses without a word": (
        template("{{ raise_exception('') }}"),
        "cannot be used for 2 images (TemplateError): copy",
    ),
    "template of text": (
        template("{{ 'user: ' + messages[0].content }}"),
        "cannot be used for 2 images (TypeError, ",
    ),
    "template that is no text": (
        text("chat_template.json", '{"chat_template": 3}'),
        "chat_template.json has no text chat_template",
    ),
    "no preprocessor": (
        absent("preprocessor_config.json"),
        "preprocessor_config.json must be readable JSON with image_mean and image_std",
    ),
    "one mean": (
        fields("preprocessor_config.json", image_mean=[0.5]),
        "preprocessor_config.json must give image_mean and image_std as three",
    ),
    "no deviation": (
        fields("preprocessor_config.json", image_std=[0, 0, 0]),
        "preprocessor_config.json must give image_mean and image_std as three",
    ),
    "stop id that is none": (
        text("generation_config.json", '{"eos_token_id": 9999}'),
        "generation_config.json: eos_token_id 9999 is no id of the model",
    ),
    "damaged generation config": (
        text("generation_config.json", "{"),
        "generation_config.json cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_trained(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    spoil, sentence = BAD[name]
    folder = write_checkpoint(tmp_path / "model", "qwen2.5-vl")
    spoil(folder)
    for module, loader in ((runtime, "load_source"), (checkpoint, "load_source")):
        monkeypatch.setattr(module, loader, None)
    assert (
        train.main(["--model", str(folder), "--data", DATA, "--out", str(tmp_path / "run"), *RECIPE, *SIZES])
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert str(folder) in lines[0]
    assert sentence in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_command_that_converts_a_pickle(tmp_path: Path, capsys) -> None:
    """As the sentence gives it, in a folder whose name wants quoting."""
    folder = write_checkpoint(tmp_path / "my model", "qwen2.5-vl")
    before = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    pickled(folder)
    assert (
        train.main(
            ["--model", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "run"), *RECIPE, *SIZES]
        )
        == 2
    )
    command = capsys.readouterr().err.split("convert them with: ")[1].strip()
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
    model, _ = load_model(folder, torch.device("cpu"))
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert load_file(folder / "model.safetensors").keys() == before.keys()


def test_a_shard_that_may_not_be_read(tmp_path: Path, monkeypatch) -> None:
    folder, opened = write_checkpoint(tmp_path / "model", "qwen2.5-vl"), Path.open

    def refused(file: Path, *arguments: Any, **options: Any) -> Any:
        if file.name == SECOND:
            raise PermissionError(13, "Permission denied")
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(
        UserError, match=rf"{SECOND} cannot be read \(Permission denied\): correct its permissions"
    ):
        read_source(folder)


def test_what_is_read_before_the_weights_leaves_the_config_alone(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        folder = write_checkpoint(tmp_path / dtype, "qwen2.5-vl")
        fields("config.json", torch_dtype=dtype)(folder)
        assert read_source(folder).config.dtype == getattr(torch, dtype)


def test_an_image_processor_within_the_processors_config(tmp_path: Path) -> None:
    """As `transformers` 5 saves it; it goes before a file of its own."""
    folder = write_checkpoint(tmp_path / "model", "qwen3-vl")
    expected = read_source(folder).spec
    own = folder / "preprocessor_config.json"
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    assert read_source(folder).spec == expected
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads(own.read_text())})
    )
    fields(own.name, image_mean=[0.1, 0.2, 0.3])(folder)
    assert read_source(folder).spec == expected
    own.unlink()
    assert read_source(folder).spec == expected
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"processor_config\.json must be readable JSON"):
        read_source(folder)
