"""Checkpoints in the published layout: loaded in their own dtype, trained, written back as they came, and
read by plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from locus_kernels.box_reward import box_reward, group_advantage
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.model.families import PARTS, interleave
from locus_fast.model.packing import PromptBatch
from locus_fast.model.policy import prefill
from locus_fast.model.preprocess import PatchSpec
from locus_fast.model.prompts import Prompt
from locus_fast.step import scoring
from locus_fast.step.optim import parameter_groups
from locus_fast.step.optimizers import make_optimizer
from locus_fast.weights import shards
from locus_fast.weights.checkpoint import load_checkpoint, load_model, save_checkpoint, save_model
from tests.locus_fast.weights.folder_cases import CPU, files_of, tensors_of
from tests.published import PHOTOGRAPHS, write_checkpoint, write_shards

RATES = dict.fromkeys(PARTS, 1e-3)


def test_what_is_not_trained_is_written_back_byte_for_byte(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_model(model, source, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_one_changed_tensor_changes_one_tensor(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source, CPU)
    changed = model.model.language_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        changed.mul_(2)
    save_model(model, source, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [
        name.endswith("layers.1.mlp.down_proj.weight")
        for name in before
        if not torch.equal(before[name], after[name])
    ] == [True]


def test_training_and_export(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Three steps on photographs through the command; the folder it leaves is one for plain transformers."""
    rewards = torch.Generator().manual_seed(0)

    def scattered(*arguments, **options):  # a random model earns nothing, so it would not be trained
        scored = box_reward(*arguments, **options)
        advantage, zero_variance = group_advantage(
            torch.rand(len(scored.reward), generator=rewards), options["group_size"], True
        )
        return scored._replace(advantage=advantage, zero_variance=zero_variance)

    monkeypatch.setattr(scoring, "box_reward", scattered)
    frozen = source.name == "mimo-vl"  # its vision tower
    recipe = [
        "--mix",
        "1",
        "1",
        "1",
        "--image-pixels",
        "4096",
        "12544",
        "--cue-pixels",
        "1024",
        "3136",
        "--eval-cues",
        "2",
        "--device",
        "cpu",
    ]
    sizes = [
        "--steps",
        "3",
        "--prompts",
        "2",
        "--group-size",
        "3",
        "--max-new-tokens",
        "5",
        "--microbatch-tokens",
        "4000",
        "--warmup-ratio",
        "0",
        "--lr",
        "1e-2",
    ]
    rates = ["--lr-scale", "0" if frozen else "1", "1", "1"]
    data = ["--data", str(PHOTOGRAPHS / "instances.json")]
    assert (
        train.main(["--model", str(source), *data, "--out", str(tmp_path / "run"), *recipe, *sizes, *rates])
        == 0
    )
    assert not any(
        json.loads(line)["dropped_step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    final = tmp_path / "run" / "final"
    before, after = files_of(source), files_of(final)
    assert before.keys() == after.keys()
    assert sum(name.endswith(".safetensors") for name in after) == 3
    assert all(before[name] == after[name] for name in before if not name.endswith(".safetensors"))
    for name in (name for name in before if name.endswith(".safetensors")):
        old, new = shards.read_header(source / name), shards.read_header(final / name)
        assert old == new
    old, new = tensors_of(source), tensors_of(final)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    trained = {name for name in old if not frozen or not name.startswith("visual.") or "merger" in name}
    assert moved <= trained
    assert len(moved) > 0.9 * len(trained)  # a key's bias has next to no gradient, for one
    assert all(tensor.isfinite().all() for tensor in new.values())
    plain, found = AutoModelForImageTextToText.from_pretrained(
        final, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    AutoTokenizer.from_pretrained(final)
    compare_logits(plain, load_model(final, CPU, torch.float32)[0])


def compare_logits(plain, ours) -> None:
    """Of a prompt with two images, through plain transformers and through our packed forward."""
    generator = torch.Generator().manual_seed(1)
    vision, image = ours.config.vision_config, ours.config.image_token_id
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
    pixels = torch.randint(0, 256, (32 * 3 * vision.patch_size**2,), generator=generator, dtype=torch.uint8)
    spec = PatchSpec(vision.patch_size, 2, 2, (0.5,) * 3, (0.3,) * 3)
    ids, position = interleave([[5, 6, 7], [8], [9, 10, 11]], [(2, 3), (1, 2)], image)
    prompt = Prompt(ids, position, pixels, grids, spec, torch.zeros(4), torch.ones(4), "small", "random")
    with torch.no_grad():
        mine = ours.lm_head(prefill(ours, PromptBatch.of([prompt], ours.config, "cpu")).last_hidden)[0]
        inputs = {"input_ids": ids[None], "pixel_values": prompt.patches, "image_grid_thw": grids}
        theirs = plain(**inputs, mm_token_type_ids=(ids[None] == image).int()).logits[0, -1]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_run_resumes_from_the_bits_it_left(source: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = load_model(source, CPU, dtype)
        optimizer = make_optimizer("adamw-master", parameter_groups(model, RATES), weight_decay=0.0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        save_checkpoint(tmp_path, model, source, optimizer, 1)
        folder = tmp_path / "checkpoints" / "step-000001"
        other, _ = load_model(source, CPU, dtype)
        load_checkpoint(
            folder, other, make_optimizer("adamw-master", parameter_groups(other, RATES), weight_decay=0.0)
        )
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert AutoConfig.from_pretrained(folder).get_text_config().dtype == dtype
    tensors = load_file(folder / "model-00002-of-00003.safetensors")
    save_file(
        {name: t[..., :1].contiguous() for name, t in tensors.items()},
        folder / "model-00002-of-00003.safetensors",
    )
    with pytest.raises(UserError, match=r"not a whole checkpoint .*has shape"):
        load_checkpoint(folder, other, optimizer)
    save_file(dict(list(tensors.items())[1:]), folder / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match=r"not a whole checkpoint .*1 of the model's tensors are missing"):
        load_checkpoint(folder, other, optimizer)


def test_tied_and_unknown_tensors(tmp_path: Path) -> None:
    """A source that stores the tied head gets the tied value back, and what the model does not hold is
    carried along."""
    source = write_checkpoint(tmp_path / "source", "qwen3-vl")
    tensors = tensors_of(source)
    embedding = "model.language_model.embed_tokens.weight"
    write_shards(
        source,
        {**tensors, "lm_head.weight": tensors[embedding].clone(), "rotary.inv_freq": torch.arange(3.0)},
        4,
    )
    for stale in source.glob("*-of-00003.safetensors"):
        stale.unlink()
    model, _ = load_model(source, CPU)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_model(model, source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after[embedding])
    assert torch.equal(after[embedding], tensors[embedding] + 1)
    assert torch.equal(after["rotary.inv_freq"], torch.arange(3.0))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4


def test_other_weights_in_the_folder_stay_there(tmp_path: Path) -> None:
    """They are the base's, and would be taken for the trained model's."""
    source = write_checkpoint(tmp_path / "source", "qwen2.5-vl")
    listed = {file.name for file in source.iterdir()}
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (source / name).write_bytes(b"base")
    (source / "optimizer").mkdir()
    model, _ = load_model(source, CPU)
    save_model(model, source, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == listed


def test_a_failed_write_leaves_what_was_there(source: Path, tmp_path: Path, monkeypatch) -> None:
    model, _ = load_model(source, CPU)
    save_model(model, source, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        save_model(model, source, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
