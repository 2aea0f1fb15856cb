"""LoRA and QLoRA: no effect at first, the base with the adapters off, training of the adapters alone,
resuming, and both exports."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from locus_fast import evaluate, train
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
    SHORT,
    last_logits,
    logits_by_transformers,
    logprobs,
    needs_peft,
    peft,
    rows,
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


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    assert train.main([*SHORT, "--out", str(out), "--save-every", "2"]) == 0
    return out


@needs_peft
def test_a_run(run: Path) -> None:
    """The first step's policy is its reference; then it moves. What was not adapted is the base's, to the
    bit."""
    metrics = rows(run)
    assert len(metrics) == 3
    assert metrics[0]["kl"] == 0 < metrics[-1]["kl"]
    assert not any(row["dropped_step"] for row in metrics)
    assert {file.name for file in (run / "checkpoints" / "step-000002").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer",
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY_BASE, run / "final"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")
    }


@needs_peft
def test_resuming_gives_the_same_run(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    assert train.main(["--resume", str(out)]) == 0
    assert rows(out) == rows(run)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (out, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train.main(["--resume", str(out), "--lora", "4"]) == 2
    assert "--lora cannot be changed with --resume" in capsys.readouterr().err


@needs_peft
@pytest.mark.parametrize(
    "more", [["--export", "adapter"], ["--quantize", "nf4", "--optimizer", "bnb-adamw8bit"]]
)
def test_variants_run_and_are_evaluated(more: list[str], run: Path, tmp_path: Path, capsys) -> None:
    """`evaluate` on `final`, adapters or merged, gives what the run ended with."""
    if "nf4" in more:
        pytest.importorskip("bitsandbytes")
    assert train.main([*SHORT, "--out", str(tmp_path / "run"), "--checkpointing", "1", *more]) == 0
    metrics = rows(tmp_path / "run")
    assert metrics[0]["kl"] == 0 < metrics[-1]["kl"]
    if "nf4" not in more:
        assert metrics[0]["reward"] == rows(run)[0]["reward"]
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run" / "final"), "--device", "cpu"]) == 0
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["after"]
    assert json.loads(capsys.readouterr().out) == {**expected, "skipped_images": 0}


@needs_peft
def test_a_checkpoint_of_another_rank(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "lora": 4, "steps": 4}))
    assert train.main(["--resume", str(out)]) == 2
    assert (
        "step-000003 was trained with --lora 8, whose tensors are not those of --lora 4: set lora to 8 in "
        "its config.json" in capsys.readouterr().err
    )
    note = out / "checkpoints" / "step-000003" / "optimizer" / "step.json"
    note.write_text('{"step": 3}')  # as one that does not say what it was trained with
    assert train.main(["--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert "is not a whole checkpoint" in error
    assert "has shape" in error


@needs_peft
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantized", [[], ["--quantize", "nf4"]])
def test_a_run_on_cuda(quantized: list[str], tmp_path: Path) -> None:
    """With the decoder's graphs, bfloat16 weights, and 4-bit layers by bitsandbytes' CUDA kernels."""
    if quantized:
        pytest.importorskip("bitsandbytes")
    arguments = [
        *SHORT,
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        *quantized,
    ]
    assert train.main(arguments) == 0
    metrics = rows(tmp_path / "run")
    assert not any(row["dropped_step"] for row in metrics)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4)
