"""LoRA and QLoRA: no effect at first, the base with the adapters off, training of the adapters alone,
resuming, and both exports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from locus_fast import train
from locus_fast.config import parse
from locus_fast.errors import UserError
from locus_fast.model.adapters import (
    adapter_tensors,
    adapters_off,
    add_adapters,
    merge_adapters,
    merged_state,
)
from locus_fast.model.policy import checkpoint_activations
from locus_fast.model.quantize import quantize
from locus_fast.step.optim import PARTS, parameter_groups
from locus_fast.step.optimizers import make_optimizer
from locus_fast.weights.adapter_reader import read_adapters
from locus_fast.weights.checkpoint import TINY_BASE, load_model, save_adapters, save_model
from locus_fast.weights.source import read_source
from tests.locus_fast.adapter_cases import (
    CPU,
    last_logits,
    logits_by_transformers,
    logprobs,
    needs_peft,
    peft,
    scatter,
    tiny,
)
from tests.published import FAMILIES, write_checkpoint


@needs_peft
def test_new_adapters_change_nothing() -> None:
    model = tiny()
    before = logprobs(model)
    add_adapters(model, 8, 16.0)
    assert torch.equal(logprobs(model), before)
    assert len(adapter_tensors(model)) == 4 * 7 * 2
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in adapter_tensors(model).values()
    }


@needs_peft
def test_without_its_adapters_the_policy_is_the_base() -> None:
    """To 1e-6 is asked; the passes are the same, so it is to the bit."""
    model = tiny()
    with torch.no_grad():
        base = logprobs(model)
        add_adapters(model, 8, 16.0)
        scatter(model)
        assert (logprobs(model) - base).abs().max() > 0.1
        with adapters_off(model) as reference:
            assert torch.equal(logprobs(reference), base)
        assert (logprobs(model) - base).abs().max() > 0.1
    assert all(p.requires_grad for p in adapter_tensors(model).values())


@needs_peft
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter_though_the_reference_ran_between(checkpointing: bool) -> None:
    model, plain = tiny(), tiny()
    for m in (model, plain):
        add_adapters(m, 4, 8.0)
        scatter(m)
    if checkpointing:
        checkpoint_activations(model)
    own = logprobs(model)
    with torch.no_grad(), adapters_off(model) as reference:
        logprobs(reference)
    own.sum().backward()
    logprobs(plain).sum().backward()
    for (name, p), q in zip(adapter_tensors(model).items(), adapter_tensors(plain).values(), strict=True):
        assert q.grad is not None
        assert q.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@needs_peft
@pytest.mark.parametrize("optimizer", ["auto", "bnb-adamw8bit"])
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_train_and_the_base_stays(optimizer: str, quantized: bool) -> None:
    if quantized or "bnb" in optimizer:
        pytest.importorskip("bitsandbytes")
    model = tiny()
    if quantized:
        quantize(model, "nf4", CPU)
    add_adapters(model, 8, 16.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimise = make_optimizer(optimizer, parameter_groups(model, dict.fromkeys(PARTS, 1e-2)), 0.0)
    first = logprobs(model).mean()
    for _ in range(3):
        optimise.zero_grad()
        (-logprobs(model).mean()).backward()
        optimise.step()
    assert logprobs(model).mean() > first + 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name


@needs_peft
@pytest.mark.parametrize("quantized", [False, True])
def test_merged_export(quantized: bool, tmp_path: Path) -> None:
    """Names and files of the source, read by plain transformers, with the logits of the policy to 1e-4."""
    model = tiny()
    if quantized:
        pytest.importorskip("bitsandbytes")
        quantize(model, "nf4", CPU)
    add_adapters(model, 8, 16.0)
    scatter(model)
    save_model(model, TINY_BASE, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in TINY_BASE.iterdir()}
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY_BASE, tmp_path / "out"))
    assert before.keys() == after.keys() == set(merged_state(model)) & before.keys()
    assert len(merged_state(model)) == len(list(merged_state(model))) == len(tiny().state_dict())
    adapted = {name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapted
    with torch.no_grad():
        assert (logprobs(load_model(tmp_path / "out", CPU)[0]) - logprobs(model)).abs().max() <= 1e-4
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (logits_by_transformers(stock)[-1] - last_logits(model)).abs().max() <= 1e-4


@needs_peft
def test_adapter_export_is_pefts(tmp_path: Path) -> None:
    """peft puts it on the base and computes the same; and so does `--model` with the adapter's folder,
    without peft."""
    model = tiny()
    add_adapters(model, 8, 16.0)
    scatter(model)
    save_adapters(model, str(TINY_BASE), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    stock = AutoModelForImageTextToText.from_pretrained(TINY_BASE, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(stock, str(tmp_path / "out")).eval()
    assert (logits_by_transformers(wrapped)[-1] - last_logits(model)).abs().max() <= 1e-4
    opened = train.set_up(parse(["--preset", "tiny", "--model", str(tmp_path / "out"), "--device", "cpu"]))
    assert opened.origin.source.folder == TINY_BASE
    assert (last_logits(opened.engine.model) - last_logits(model)).abs().max() <= 1e-4


@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_published_layouts(family: str, tmp_path: Path) -> None:
    """Shards, biases and bfloat16: what was not adapted is the source's to the byte, and both exports compute
    what the policy does."""
    source = write_checkpoint(tmp_path / "source", family)
    model, _ = load_model(source, CPU)
    add_adapters(model, 4, 8.0)
    scatter(model)
    save_model(model, source, tmp_path / "bfloat16")
    assert {file.name for file in (tmp_path / "bfloat16").iterdir()} == {
        file.name for file in source.iterdir()
    }
    before, after = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (source, tmp_path / "bfloat16")
    )
    adapted = {name for name in before if "visual" not in name and name.endswith("_proj.weight")}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapted
    assert all(after[name].dtype == before[name].dtype for name in before)

    model, _ = load_model(source, CPU, torch.float32)
    add_adapters(model, 4, 8.0)
    scatter(model)
    save_model(model, source, tmp_path / "merged", torch.float32)
    save_adapters(model, str(source), tmp_path / "adapter")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits_by_transformers(stock)[-1] - last_logits(model)).abs().max() <= 1e-4
    opened, _ = load_model(source, CPU, torch.float32)
    merge_adapters(read_adapters(tmp_path / "adapter", read_source(source).linears), opened)
    assert (last_logits(opened) - last_logits(model)).abs().max() <= 1e-4


@needs_peft
def test_qlora_in_bfloat16_with_biases(tmp_path: Path) -> None:
    """The 4-bit layers keep their biases, gradients reach every adapter through them, and the merged weights
    are theirs plus the product."""
    pytest.importorskip("bitsandbytes")
    source = write_checkpoint(tmp_path / "source", "qwen2.5-vl")
    model, _ = load_model(source, CPU)
    quantize(model, "nf4", CPU)
    add_adapters(model, 4, 8.0)
    scatter(model)
    checkpoint_activations(model)
    logprobs(model).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_tensors(model).values())
    model.eval()
    save_model(model, source, tmp_path / "merged", torch.float32)
    merged, _ = load_model(tmp_path / "merged", CPU, torch.float32)
    layer, plain = (m.model.language_model.layers[1].self_attn.q_proj for m in (model, merged))
    assert torch.equal(plain.bias, layer.base_layer.bias.float())
    x = torch.randn(5, plain.in_features)
    torch.testing.assert_close(layer(x.bfloat16()).float(), plain(x.bfloat16().float()), rtol=2e-2, atol=2e-2)
    assert (logprobs(model) - logprobs(merged)).abs().mean() < 0.05


def spoiled(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ({}, {}, "does not say which model it adapts"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, {}, "/nowhere/at/all: there is no such folder"),
        ({"base_model_name_or_path": str(TINY_BASE), "r": 2}, {}, "does not hold whole adapters"),
        (
            {"base_model_name_or_path": str(TINY_BASE), "r": 2, "lora_alpha": 4, "use_dora": True},
            {},
            "a variant of LoRA",
        ),
        (
            {"base_model_name_or_path": str(TINY_BASE), "r": 2, "lora_alpha": 4},
            {"a.lora_A.weight": torch.ones(1)},
            "the first a.lora_A.weight",
        ),
    ],
)
def test_adapter_folders_that_cannot_be_used(
    config: dict, tensors: dict, sentence: str, tmp_path: Path, capsys
) -> None:
    folder = spoiled(tmp_path / "adapter", config, tensors)
    assert (
        train.main(
            ["--preset", "tiny", "--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "run")]
        )
        == 2
    )
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lora", "-1"], "--lora must be 0 or more"),
        (["--quantize", "nf4"], "--quantize nf4 needs --lora"),
        (["--export", "adapter"], "--export adapter needs --lora"),
        (["--lora", "8", "--reference", "int8"], "the reference is the policy without its adapters"),
        (["--lora", "8", "--lora-alpha", "0"], "--lora-alpha must be above 0"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(arguments)


@pytest.mark.parametrize(
    ("library", "arguments"),
    [("peft", ["--lora", "4"]), ("bitsandbytes", ["--lora", "4", "--quantize", "nf4"])],
)
def test_a_missing_library_is_named_with_the_extra(
    library: str, arguments: list[str], monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert train.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"needs {library}, which is missing or too old: pip install -U 'locus-fast[lora]'" in error
    assert not (tmp_path / "run").exists()
