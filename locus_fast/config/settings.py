"""Every setting of a run: its default, its meaning and its choices. The only place with defaults.

Nothing here imports PyTorch, so that `--help` answers at once. The registries that a choice names live with
their code; a test holds the two lists equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# of an image that is read: Pillow's line between a large photograph and a decompression bomb
MAX_PIXELS = 178_956_970

BOX_FORMATS = ("auto", "xyxy", "xywh", "normalized", "thousand")
PROMPT_STYLES = ("think", "direct")
REWARD_SHAPES = (
    "iou",
    "iou_squared",
    "iou_over_half",
    "giou",
    "giou_plus_one",
    "threshold",
    "ramp",
    "rising",
)
LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo")
LOSS_AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3")
REFERENCES = ("auto", "copy", "int8", "nf4", "host")
OPTIMIZERS = ("auto", "adamw", "adamw8bit", "adamw-master", "bnb-adamw8bit", "bnb-paged-adamw8bit")
LR_SCHEDULES = ("constant", "cosine")
ATTENTION_BACKENDS = ("auto", "flash_attn_3", "flash_attn_2", "flash_attn_4", "torch", "plain")

GROUPS = {  # of the options in --help: title -> an example
    "data": "--data instances_train2014.json --images train2014/ --mix 0.7 0.3 0",
    "prompt": "--prompt-style think --image-pixels 262144 1048576",
    "rollout": "--group-size 8 --max-new-tokens 512 --temperature 1.0",
    "loss": "--loss gspo --kl-coef 0.01 --kl-estimator k3",
    "optimizer": "--optimizer adamw8bit --lr 1e-6 --lr-scale 0 1 1",
    "memory": "--dtype bfloat16 --reference int8 --checkpointing 1",
    "run": "--model Qwen/Qwen2.5-VL-7B-Instruct --out runs/first --steps 400",
}


def option(group: str, default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "choices": tuple(choices)})


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the LOCUS recipe (arXiv 2606.16586); a preset changes what its model
    needs."""

    preset: str = option(
        "run",
        "",
        "start from this preset; empty: tiny for the embedded base and what was trained from it, else paper",
    )
    model: str = option(
        "run", "", "folder or hub id of the model, or of adapters, to train; empty: the embedded tiny base"
    )
    out: str = option("run", "", "run folder, must not exist; empty: runs/PRESET-DATE-TIME")
    resume: str = option(
        "run", "", "go on with this run folder from its last checkpoint; its settings hold unless given anew"
    )
    seed: int = option("run", 0, "seed of examples, sampling and order")
    steps: int = option("run", 400, "steps: rollout, reward, update")
    device: str = option("run", "auto", "auto, cpu or cuda")
    workers: int = option("run", 2, "threads that read and prepare examples")
    eval_cues: int = option("run", 500, "held-out cues evaluated before and after")
    save_every: int = option("run", 100, "steps between checkpoints; 0: only at the end")
    tensorboard: bool = option("run", False, "also write TensorBoard events")
    export: str = option(
        "run",
        "merged",
        "what final/ holds: the model with the adapters merged, or the adapters in peft's layout",
        ("merged", "adapter"),
    )
    export_limits: bool = option(
        "run", False, "write the limits of --image-pixels into the image processor's config in final/"
    )

    data: str = option(
        "data", "", "COCO instances*.json, JSONL of {image, bbox}, or a folder of images; empty: drawn scenes"
    )
    images: str = option(
        "data", "", "folder that image names in --data are relative to; empty: the data file's folder"
    )
    box_format: str = option(
        "data",
        "auto",
        "the four numbers of a box in --data; auto: xywh in COCO and xyxy in JSONL, in pixels; xyxy: x1, "
        "y1, x2, y2 in pixels; xywh: x, y, width, height in pixels; normalized: x1, y1, x2, y2 from 0 to 1; "
        "thousand: x1, y1, x2, y2 from 0 to 1000",
        BOX_FORMATS,
    )
    mix: tuple[float, float, float] = option("data", (0.7, 0.3, 0.0), "shares of tiny, small and large cues")
    min_side: int = option("data", 16, "shortest side of a cue's region, pixels")
    padding: tuple[float, float] = option(
        "data", (0.0, 0.1), "range of the margin around a tiny cue, as a share of its side"
    )
    scale: tuple[float, float] = option("data", (0.8, 2.0), "range by which a tiny cue is rescaled")

    prompt_style: str = option(
        "prompt", "think", "what is asked: with thinking, or for the box alone", PROMPT_STYLES
    )
    image_pixels: tuple[int, int] = option(
        "prompt", (262144, 1048576), "fewest and most pixels of the resized image"
    )
    cue_pixels: tuple[int, int] = option(
        "prompt", (3136, 262144), "fewest and most pixels of the resized cue"
    )
    answer_prefix: str = option(
        "prompt", "", "text that every reply begins with, such as [ ; it is given, so it is not trained on"
    )

    prompts: int = option("rollout", 128, "prompts a step")
    group_size: int = option("rollout", 8, "replies to each prompt")
    max_new_tokens: int = option("rollout", 512, "longest reply, tokens")
    temperature: float = option("rollout", 1.0, "sampling temperature in training")
    top_p: float = option("rollout", 1.0, "nucleus of sampling in training")

    reward: str = option("loss", "iou", "shape of the location reward", REWARD_SHAPES)
    format_weight: float = option("loss", 0.1, "share of the format reward")
    normalize_std: bool = option(
        "loss", True, "divide advantages by the group's deviation; false: only their mean is subtracted"
    )
    loss: str = option(
        "loss",
        "grpo",
        "the objective; dr_grpo is grpo with --loss-agg seq-mean-token-sum-norm --normalize-std false, bnpo "
        "and dapo are grpo with --loss-agg token-mean; gspo has --loss-agg seq-mean-token-mean unless "
        "another is given",
        LOSSES,
    )
    loss_agg: str = option(
        "loss",
        "token-mean",
        "what a token's loss is weighed by: every token of the batch alike; every reply alike, as the mean "
        "of its tokens; every reply alike, as their sum over --max-new-tokens",
        LOSS_AGGREGATIONS,
    )
    clip_low: float = option("loss", 0.2, "how far the ratio may fall below 1; of no effect in cispo")
    clip_high: float = option("loss", 0.3, "how far the ratio may rise above 1")
    delta: float = option(
        "loss", 0.0, "largest ratio where an advantage is negative (two-sided clip); 0: no such bound"
    )
    mask_truncated: bool = option(
        "loss", False, "leave replies that were cut at --max-new-tokens out of the loss"
    )
    entropy_coef: float = option("loss", 0.0, "coefficient of the entropy, which the loss then rewards")
    kl_coef: float = option(
        "loss", 0.01, "coefficient of the KL to the reference policy; 0: no KL, and no reference is loaded"
    )
    kl_estimator: str = option("loss", "k3", "how a token's KL is estimated", KL_ESTIMATORS)
    log_ratio_clamp: float = option(
        "loss",
        20.0,
        "most nats between two log-probs that a ratio is made of; a token past it has no gradient; 0: no "
        "clamp",
    )
    kl_clamp: float = option(
        "loss", 10.0, "most nats of a token's KL; a token past it has no gradient; 0: no clamp"
    )
    skip_zero_variance: bool = option(
        "loss",
        False,
        "leave groups whose rewards are all equal out of the update: cheaper, but their tokens' KL is not "
        "held then; without KL and entropy terms always so",
    )
    updates_per_batch: int = option("loss", 1, "optimizer updates on each batch of rollouts")

    optimizer: str = option(
        "optimizer", "auto", "auto: adamw8bit for bfloat16 weights, adamw for float32", OPTIMIZERS
    )
    lr: float = option("optimizer", 1e-6, "learning rate after warm-up")
    lr_scale: tuple[float, float, float] = option(
        "optimizer",
        (1.0, 1.0, 1.0),
        "shares of --lr for vision tower, projector and language model; 0 freezes the part",
    )
    lr_schedule: str = option("optimizer", "constant", "the learning rate after warm-up", LR_SCHEDULES)
    warmup_ratio: float = option("optimizer", 0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = option("optimizer", 0.01, "AdamW weight decay")
    max_grad_norm: float = option("optimizer", 1.0, "gradients are clipped to this norm")

    lora: int = option(
        "memory", 0, "rank of the adapters that are trained instead of the weights; 0: all weights"
    )
    lora_alpha: float = option("memory", 32.0, "the adapters' product counts alpha / rank times")
    quantize: str = option(
        "memory",
        "off",
        "nf4: the language model's linear layers in 4 bits under the adapters (QLoRA)",
        ("off", "nf4"),
    )
    merge: bool = option(
        "memory",
        False,
        "true: the adapters that --model holds are merged and all weights trained; false: trained further, "
        "or kept under those of --lora",
    )
    reference: str = option(
        "memory",
        "auto",
        "how the reference policy is held; auto: copy, or with --lora the policy without its adapters",
        REFERENCES,
    )
    dtype: str = option(
        "memory", "auto", "of the weights; auto: the checkpoint's own", ("auto", "float32", "bfloat16")
    )
    attention: str = option("memory", "auto", "who computes attention", ATTENTION_BACKENDS)
    microbatch_tokens: int = option(
        "memory",
        0,
        "budget of a microbatch, its FLOPs in those of language tokens: images, prompts, longest replies; "
        "0: what the memory holds",
    )
    rollout_tokens: int = option(
        "memory",
        0,
        "budget of a rollout where it is wider than a microbatch: its prompts are then prefilled again to "
        "train on",
    )
    checkpointing: int = option(
        "memory",
        -1,
        "recompute every how many-th layer in backward; 0: none, -1: the faster of 0 and 1 that the memory "
        "holds",
    )
