"""Makes the embedded base checkpoint: `python -m locus_fast.tiny.base` (under an hour on two cores), written
to `locus_fast/tiny/base/`.

The model learns cue search on drawn scenes by cross-entropy, in two phases. *Find*: exact boxes, from scenes
of one or two objects to the full 5 to 12. *Loosen*: a short phase on boxes enlarged by a random factor, so
that the base finds the object and draws its box badly, as a real base model does: what GRPO then has to
improve is what an IoU reward speaks of.

Two auxiliary losses make so small a model learn in minutes: attention mass of two heads in two layers on the
box and on the edge that is being spoken of, and a linear read-out of the coordinate from the third layer.
Neither is in the checkpoint or in the trainer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from locus_fast.model.attention import use_attention, use_plain_attention
from locus_fast.model.packing import VisionLayout
from locus_fast.model.policy import encode_images
from locus_fast.tiny.branches import DIGITS, REPLY_LENGTH, SPEC, Branches, Task, draw_branches
from locus_fast.tiny.model import EXTENT, build_model
from locus_fast.tiny.scenes import OBJECTS
from locus_fast.tiny.tokenizer import SPECIAL, build_tokenizer

SCENES, CUES = 12, 6  # scenes a step, cues a scene
# until this share of the find phase, scenes of so many objects
CURRICULUM = (
    (0.08, (1, 2)),
    (0.25, (2, 4)),
    (1.0, OBJECTS),
)
LOOSEN = 2.2  # the most that a loosened box grows
# learning rates; the loosen phase runs at a share of them
MUON_RATE, ADAM_RATE, LOOSEN_SHARE = (
    0.02,
    2e-3,
    0.15,
)
# where the auxiliary losses look, and at how many heads
BOX_LAYER, EDGE_LAYER, READ_LAYER, HEADS = (
    1,
    2,
    2,
    2,
)
ATTENTION_WEIGHT, READ_WEIGHT = 0.25, 4.0
TOKEN_WEIGHT = torch.full((REPLY_LENGTH,), 0.1)  # of a reply token's cross-entropy
TOKEN_WEIGHT[DIGITS[::2]], TOKEN_WEIGHT[DIGITS[1::2]] = 1.1, 0.6


def recording_attention(module, q, k, v, attention_mask=None, scaling=None, dropout=0.0, record=None, **_):
    """Attention that keeps the first heads' probabilities of the auxiliary layers in the dict `record`."""
    if module.layer_idx not in (BOX_LAYER, EDGE_LAYER):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    else:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        weights = (q @ k.transpose(2, 3) * scaling + attention_mask).softmax(-1)
        record[module.layer_idx] = weights[:, :HEADS]
        out = weights @ v
    return out.transpose(1, 2).contiguous(), None


def forward(model: Any, batch: Branches, record: dict) -> Tensor:
    """Logits of the reply tokens, [S, K * REPLY_LENGTH, vocabulary]; attention probabilities and the third
    layer's states go into `record`."""
    core = model.model
    features = encode_images(
        model, batch.patches, batch.grids, VisionLayout.of(batch.grids, model.config.vision_config, "cpu")
    )
    embeds = core.language_model.embed_tokens(batch.ids).masked_scatter(
        batch.is_image[..., None], features.image
    )
    hook = core.language_model.layers[READ_LAYER].register_forward_hook(
        lambda _module, _inputs, out: record.__setitem__("read", out)
    )
    hidden = core.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=batch.position,
        visual_pos_masks=batch.is_image,
        deepstack_visual_embeds=features.deep,
        use_cache=False,
        record=record,
    ).last_hidden_state
    hook.remove()
    return model.lm_head(hidden[:, batch.predicting])


def token_loss(logits: Tensor, batch: Branches) -> Tensor:
    """Weighted cross-entropy of the reply tokens, nats."""
    loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none").view(
        -1, REPLY_LENGTH
    )
    return (loss * TOKEN_WEIGHT).sum(1).mean() / TOKEN_WEIGHT.sum()


def attention_loss(record: dict, batch: Branches) -> Tensor:
    """-log of the attention mass that predicting positions put on the box (first auxiliary layer) and on the
    edge they speak of (second)."""
    on_box = batch.cells_of_box[:, :, None].expand(-1, -1, REPLY_LENGTH, -1)
    on_edge = on_box.clone()
    on_edge[:, :, DIGITS] = batch.cells_of_edge.repeat_interleave(2, 2)
    loss = torch.zeros(())
    for layer, wanted in ((BOX_LAYER, on_box), (EDGE_LAYER, on_edge)):
        on_image = record[layer][:, :, batch.predicting, slice(*batch.image_span)]
        mass = (on_image.unflatten(2, (batch.cues, REPLY_LENGTH)) * wanted[:, None]).sum(-1)
        loss = loss - torch.log(mass[..., :-1] + 1e-4).mean() / 2
    return loss


def coordinates(tokens: Tensor, zero: int) -> Tensor:
    """The numbers of replies, float32 [..., 4] from reply tokens [..., REPLY_LENGTH]; zero: the id of the
    digit 0."""
    return (tokens[..., DIGITS] - zero).unflatten(-1, (4, 2)).float() @ torch.tensor([10.0, 1.0])


def read_loss(read: nn.Linear, record: dict, batch: Branches, zero: int) -> Tensor:
    """Mean absolute error of the linear read-out, as a share of the image's side."""
    state = record["read"][:, batch.predicting].unflatten(1, (batch.cues, REPLY_LENGTH))[:, :, DIGITS]
    said = torch.sigmoid(read(F.rms_norm(state, state.shape[-1:]))[..., 0])
    truth = coordinates(batch.target.unflatten(1, (batch.cues, REPLY_LENGTH)), zero) / EXTENT
    return (said - truth.repeat_interleave(2, -1)).abs().mean()


def optimizers(model: nn.Module, read: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, AdamW for the rest (embeddings, head, vectors)."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    inside = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *read.parameters()] if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_phase(model: Any, task: Task, steps: int, loosen: float) -> None:
    """One phase, in place: the find phase where `loosen` is 1, else the loosen phase."""
    zero = task.tokenizer.convert_tokens_to_ids("0")
    read = nn.Linear(model.config.text_config.hidden_size, 1)
    schedule = optimizers(model, read)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in schedule]
    started, figures = time.perf_counter(), []
    for step in range(steps):
        done = step / steps
        objects = next(count for until, count in CURRICULUM if done < until) if loosen == 1 else OBJECTS
        share = (
            min(1.0, (step + 1) / 50)
            * min(1.0, max(0.05, (1 - done) / 0.5))
            * (1.0 if loosen == 1 else LOOSEN_SHARE)
        )
        for optimizer, rate in zip(schedule, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
        batch = draw_branches(
            np.random.default_rng([3, int(loosen != 1), step]), task, SCENES, CUES, objects, loosen
        )
        record: dict = {}
        logits = forward(model, batch, record)
        losses = (
            token_loss(logits, batch),
            attention_loss(record, batch),
            read_loss(read, record, batch, zero),
        )
        (
            losses[0] + ATTENTION_WEIGHT * losses[1] + (READ_WEIGHT * losses[2] if loosen == 1 else 0.0)
        ).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in schedule:
            optimizer.step()
        figures.append([loss.item() for loss in losses])
        if (step + 1) % 50 == 0:
            token, attention, coordinate = np.mean(figures[-50:], 0)
            spent = time.perf_counter() - started
            print(
                f"{step + 1} {spent:.0f}s objects {objects} token {token:.3f} attention {attention:.3f} "
                f"coordinate {coordinate:.4f}",
                flush=True,
            )


def write_base(model: Any, task: Task, folder: Path) -> None:
    """The checkpoint in Hugging Face layout."""
    use_plain_attention(model, "sdpa")
    model.generation_config.eos_token_id = task.stop
    model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    stated = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": SPEC.patch,
        "temporal_patch_size": SPEC.frames,
        "merge_size": SPEC.merge,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**stated, "image_mean": SPEC.mean, "image_std": SPEC.std}, indent=2)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--find-steps", type=int, default=2400, help="steps of the find phase")
    parser.add_argument("--loosen-steps", type=int, default=250, help="steps of the loosen phase")
    parser.add_argument(
        "--found", type=Path, help="safetensors file of the find phase: written, or read if it is there"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "base", help="folder of the checkpoint"
    )
    chosen = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    task = Task.of(tokenizer)
    model = build_model({token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL})
    ALL_ATTENTION_FUNCTIONS.register("recording", recording_attention)
    use_attention(model)  # the vision tower's; the language model records its own, and takes masks
    del model.model.language_model._deepstack_process
    model.model.language_model.config._attn_implementation = "recording"
    if chosen.found and chosen.found.exists():
        model.load_state_dict(load_file(chosen.found))
    else:
        train_phase(model, task, chosen.find_steps, loosen=1.0)
        if chosen.found:
            save_file(model.state_dict(), chosen.found)
    train_phase(model, task, chosen.loosen_steps, loosen=LOOSEN)
    write_base(model, task, chosen.out)


if __name__ == "__main__":
    main()
