"""A model loaded: its dtype, its memory, where replies stop, and what a hub id fetches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from locus_fast.errors import UserError
from locus_fast.step.vocabulary import Vocabulary
from locus_fast.weights import checkpoint
from locus_fast.weights.checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from tests.locus_fast.weights.folder_cases import CPU, files_of, tensors_of
from tests.published import write_checkpoint, write_shards

INDEX = "model.safetensors.index.json"


def test_another_dtype(source: Path, tmp_path: Path) -> None:
    """In float32 the model is written as its source unless float32 is asked for; then the config and the
    index say so."""
    model, _ = load_model(source, CPU, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_model(model, source, tmp_path / "same")
    assert files_of(tmp_path / "same") == files_of(source)
    with torch.no_grad():
        model.lm_head.weight.add_(1e-6)  # lost in bfloat16
    save_model(model, source, tmp_path / "wide", torch.float32)
    before, after = tensors_of(source), tensors_of(tmp_path / "wide")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert {t.dtype for t in after.values()} == {torch.float32}
    index, base = (json.loads((folder / INDEX).read_text()) for folder in (tmp_path / "wide", source))
    assert index == {
        "metadata": {"total_size": 2 * base["metadata"]["total_size"]},
        "weight_map": base["weight_map"],
    }
    save_model(model, source, tmp_path / "half", torch.float16)
    assert load_model(tmp_path / "half", CPU)[0].dtype == torch.float16
    again, _ = load_model(tmp_path / "wide", CPU)
    assert again.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_mixed_dtypes(tmp_path: Path) -> None:
    """What is loaded in fewer bits than it is stored in, and not trained, is written back as it was
    stored."""
    source = write_checkpoint(tmp_path / "source", "qwen2.5-vl")
    tensors = tensors_of(source)
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(sorted(tensors)):
        wide = (torch.float32, torch.float16, torch.bfloat16, torch.float64)[number % 4]
        tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(wide)
    write_shards(source, tensors, 3)
    model, _ = load_model(source, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    changed = model.model.language_model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        changed.mul_(2)
    save_model(model, source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in tensors.items()}
    assert [name for name in tensors if not torch.equal(tensors[name], after[name])] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert torch.equal(after["model.layers.0.self_attn.q_proj.weight"].bfloat16(), changed)


def test_replies_stop_where_turns_end(tmp_path: Path) -> None:
    """Also where generation_config.json names another token only; the file itself is not touched."""
    source = write_checkpoint(tmp_path / "source", "mimo-vl")
    model, tokenizer = load_model(source, CPU)
    turn, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert Vocabulary.of(model, tokenizer).stops.tolist() == [turn, text]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": text}))
    model, tokenizer = load_model(source, CPU)
    assert Vocabulary.of(model, tokenizer).stops.tolist() == [text, turn]
    save_model(model, source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": text}


def anonymous_bytes() -> int:
    """Of this process: memory that is not the mapping of a file."""
    return 1024 * next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of memory")
def test_loading_makes_no_copy_in_host_memory(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "qwen2.5-vl")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 400_000}))
    tensors = tensors_of(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(400_000, 64, dtype=torch.bfloat16)
    size = sum(t.nbytes for t in tensors.values())
    write_shards(source, tensors, 3)
    del tensors
    load_model(source, CPU)  # what the libraries allocate once
    before = anonymous_bytes()
    model, _ = load_model(source, CPU)
    assert not model.lm_head.weight.any()
    assert size > 10**8
    assert anonymous_bytes() - before < 0.2 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_the_device_and_back(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source, torch.device("cuda"))
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("cuda", torch.bfloat16)}
    assert {t.device.type for t in model.buffers()} == {"cuda"}
    save_checkpoint(tmp_path, model, source, torch.optim.AdamW(model.parameters()), 1)
    kept = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_checkpoint(tmp_path / "checkpoints" / "step-000001", model, torch.optim.AdamW(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    save_model(model, source, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)


def test_a_hub_id_becomes_a_folder_and_its_weights_come_last(
    source: Path, tmp_path: Path, monkeypatch
) -> None:
    asked: list[tuple[str, bool]] = []
    held = [source]

    def fetched(name: str, allow_patterns: list[str]) -> str:
        assert {"*.json", "*.txt", "*.jinja"} <= set(allow_patterns)
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(held[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert checkpoint.model_folder("Qwen/Qwen2.5-VL-7B-Instruct") == source
    assert asked == [("Qwen/Qwen2.5-VL-7B-Instruct", False), ("Qwen/Qwen2.5-VL-7B-Instruct", True)]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    held[0] = tmp_path
    with pytest.raises(UserError, match="llama"):
        checkpoint.model_folder("someone/llama")
    assert asked[2:] == [("someone/llama", False)]
