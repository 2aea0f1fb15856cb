"""Every setting of a run, its default, its meaning, and the presets: the only place with defaults."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from locus_kernels.box_reward import REWARD_SHAPES
from locus_kernels.shared_prefix_attention import BACKENDS

from locus_fast.errors import UserError
from locus_fast.grpo import MEANS
from locus_fast.optim import OPTIMIZERS, SCHEDULES
from locus_fast.prompts import QUESTIONS
from locus_fast.reference import REFERENCES


def option(default: Any, help: str, choices: typing.Iterable[str] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the LOCUS recipe (arXiv 2606.16586); a preset changes what its model needs."""

    preset: str = option("", "start from this preset; empty: tiny for the embedded base and what was trained from it, else paper")
    model: str = option("", "folder of the base model in Hugging Face layout; empty: the embedded tiny base")
    data: str = option("", "COCO instances*.json, JSONL of {image, bbox}, or a folder of images; empty: drawn scenes")
    images: str = option("", "folder that the image names in --data are relative to; empty: the data file's folder")
    out: str = option("", "run folder, must not exist; empty: runs/PRESET-DATE-TIME")
    resume: str = option("", "go on with this run folder from its last checkpoint; its settings hold unless given anew")
    seed: int = option(0, "seed of examples, sampling and order")
    steps: int = option(400, "optimizer batches: rollout, reward, update")

    question: str = option("think", "what is asked: with thinking, or for the box alone", QUESTIONS)
    mix: tuple[float, float, float] = option((0.7, 0.3, 0.0), "shares of tiny, small and large cues")
    min_side: int = option(16, "shortest side of a cue's region, pixels")
    padding: tuple[float, float] = option((0.0, 0.1), "range of the ground around a tiny cue, as a share of its side")
    scale: tuple[float, float] = option((0.8, 2.0), "range by which a tiny cue is rescaled")
    image_pixels: tuple[int, int] = option((262144, 1048576), "fewest and most pixels of the resized image")
    cue_pixels: tuple[int, int] = option((3136, 262144), "fewest and most pixels of the resized cue")

    prompts: int = option(128, "prompts a step")
    replies: int = option(8, "replies a prompt (the group)")
    max_tokens: int = option(512, "longest reply, tokens")
    temperature: float = option(1.0, "sampling temperature in training")
    top_p: float = option(1.0, "nucleus of sampling in training")
    answer_prefix: str = option("", "text that every reply begins with, such as [ ; it is given, so it is not trained on")

    reward: str = option("iou", "shape of the location reward", REWARD_SHAPES)
    format_weight: float = option(0.1, "share of the format reward")
    normalize_std: bool = option(True, "divide advantages by the group's deviation (false: Dr. GRPO)")
    mean: str = option("token", "what the loss averages over", MEANS)
    clip_low: float = option(0.2, "how far the ratio may fall below 1")
    clip_high: float = option(0.3, "how far the ratio may rise above 1")
    kl: float = option(0.01, "coefficient of the KL to the base; 0 loads no reference")
    updates: int = option(1, "optimizer updates a batch of rollouts")
    reference: str = option("auto", "how the KL's base is held; auto: copy, or with --lora the policy without its adapters", REFERENCES)

    lora: int = option(0, "rank of the adapters that are trained in the language model's stead; 0: none, all weights are trained")
    lora_alpha: float = option(32.0, "the adapters' product counts alpha / rank times")
    quantize: str = option("off", "nf4: the language model's linear layers in 4 bits under the adapters (QLoRA)", ("off", "nf4"))
    export: str = option("merged", "what final/ holds: the model with the adapters merged, or the adapters in peft's layout", ("merged", "adapter"))
    merge: bool = option(
        False, "true: the adapters that --model holds are merged and all weights trained; false: trained further, or kept under those of --lora"
    )
    export_limits: bool = option(False, "write the fewest and most of --image-pixels into the image processor's config in final/")

    optimizer: str = option("auto", "auto: adamw8bit for bfloat16 weights, adamw for float32", OPTIMIZERS)
    lr: float = option(1e-6, "learning rate after warm-up")
    rates: tuple[float, float, float] = option((1.0, 1.0, 1.0), "shares of --lr for vision tower, projector and language model; 0 freezes the part")
    schedule: str = option("constant", "the learning rate after warm-up", SCHEDULES)
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.01, "AdamW weight decay")
    grad_clip: float = option(1.0, "largest gradient norm")

    dtype: str = option("auto", "of the weights; auto: the checkpoint's own", ("auto", "float32", "bfloat16"))
    attention: str = option("auto", "who computes attention: " + ", ".join(["auto", *BACKENDS]), ["auto", *BACKENDS])
    tokens: int = option(
        0, "budget of a microbatch, its FLOPs in those of language tokens: images, prompts, longest replies; 0: what the memory holds"
    )
    rollout_tokens: int = option(0, "budget of a rollout where it is wider than a microbatch: its prompts are then prefilled again to train on")
    checkpointing: int = option(-1, "recompute every how many-th layer in backward; 0: none, -1: the faster of 0 and 1 that the memory holds")
    device: str = option("auto", "auto, cpu or cuda")
    workers: int = option(2, "threads that read and prepare examples")
    eval_cues: int = option(500, "held-out cues evaluated before and after")
    save_every: int = option(100, "steps between checkpoints; 0: only at the end")
    tensorboard: bool = option(False, "also write TensorBoard events")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "steps": 60,
        "question": "direct",
        "mix": (0.5, 0.5, 0.0),
        "image_pixels": (96 * 96, 160 * 160),
        "cue_pixels": (32 * 32, 48 * 48),
        "prompts": 24,
        "max_tokens": 16,
        "lr": 1e-4,
        "tokens": 12288,
        "checkpointing": 0,
        "workers": 1,
        "eval_cues": 384,
    },
    "paper": {},
    "qwen2.5-vl-7b": {"model": "Qwen/Qwen2.5-VL-7B-Instruct"},
    "qwen3-vl-4b": {"model": "Qwen/Qwen3-VL-4B-Thinking"},
    "mimo-vl-7b": {"model": "XiaomiMiMo/MiMo-VL-7B-RL"},
}

# What a value must satisfy: a test and the words that complete "--name must be ...".
RULES: dict[str, tuple[typing.Callable[[Any], bool], str]] = {
    **{name: (lambda v: v >= 1, "at least 1") for name in ("steps", "prompts", "max_tokens", "updates", "min_side", "workers", "eval_cues")},
    **{
        name: (lambda v: v >= 0, "0 or more")
        for name in ("kl", "weight_decay", "clip_low", "clip_high", "save_every", "tokens", "rollout_tokens", "lora")
    },
    **{name: (lambda v: v > 0, "above 0") for name in ("lr", "grad_clip", "temperature", "lora_alpha")},
    **{name: (lambda v: 0 <= v <= 1, "between 0 and 1") for name in ("format_weight", "warmup")},
    **{name: (lambda v: 0 < v[0] <= v[1], "two values, above 0 and the smaller first") for name in ("scale", "image_pixels", "cue_pixels")},
    "checkpointing": (lambda v: v >= -1, "-1, 0 or more"),
    "seed": (lambda v: 0 <= v < 2**63, "0 or more and below 2**63"),
    "padding": (lambda v: 0 <= v[0] <= v[1], "two values, 0 or more and the smaller first"),
    "rates": (lambda v: min(v) >= 0 and max(v) > 0, "three shares of 0 or more that are not all 0"),
    "mix": (lambda v: min(v) >= 0 and sum(v) > 0, "three shares of 0 or more that are not all 0"),
    "replies": (lambda v: v >= 2, "at least 2: an advantage compares the replies of a group"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "device": (lambda v: v in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. Run with --help for the options.")


def parse(arguments: list[str], prog: str = "python -m locus_fast.train", settings: dict[str, Any] | None = None) -> Config:
    """The configuration of a command line, over a preset, or over `settings`. Raises UserError for an unknown option or a value that cannot be."""
    parser = _Parser(prog=prog, description="Teach a vision-language model to find small things: cue search with GRPO.", allow_abbrev=False)
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        parser.add_argument(f"--{f.name.replace('_', '-')}", **_argument(f, hints[f.name]))
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(arguments)).items()}
    if given.get("resume"):
        if fixed := given.keys() & {"out", "preset", "model", "seed", "prompts", "lora", "lora_alpha", "merge", "quantize"}:
            raise UserError(f"--{sorted(fixed)[0]} cannot be changed with --resume: a resumed run goes on as it began.")
        settings = of_run(Path(given["resume"]))
    preset = given.get("preset") or default_preset(given.get("model", ""))
    if preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, not '{preset}'.")
    config = check(Config(**{"preset": preset, **(PRESETS[preset] if settings is None else settings), **given}))
    if not config.data and (unused := sorted(given.keys() & {"mix", "min_side", "padding", "scale"})):
        raise UserError(f"--{unused[0].replace('_', '-')} needs --data: drawn scenes have a recipe of their own.")
    return config


def default_preset(model: str) -> str:
    """The preset of a model, or of adapters, that is named without one."""
    if not model:
        return "tiny"
    try:
        if may_hold_adapters(model):
            model = json.loads((Path(model) / "adapter_config.json").read_text())["base_model_name_or_path"]
        return "tiny" if "coordinate_extent" in json.loads((Path(model) / "config.json").read_text()) else "paper"
    except (OSError, ValueError, TypeError, KeyError):  # a hub id, or a folder that loading will complain about
        return "paper"


def of_run(folder: Path) -> dict[str, Any]:
    """The settings of a run folder."""
    try:
        settings = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read as the settings of a run ({error}).") from None
    if unknown := settings.keys() - Config.__dataclass_fields__.keys():
        raise UserError(f"{folder / 'config.json'} has settings that this version does not know: {', '.join(sorted(unknown))}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _argument(f: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """argparse keywords of a field."""
    settings: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {_shown(f)})", "default": argparse.SUPPRESS}
    parts = typing.get_args(hint)
    kind = parts[0] if parts else hint
    settings["type"] = _boolean if kind is bool else kind
    settings["metavar"] = kind.__name__.upper() if kind is not str else f.name.upper()
    if parts:
        settings["nargs"] = len(parts)
    if f.metadata["choices"]:
        settings |= {"choices": f.metadata["choices"], "metavar": None}
    return settings


def _shown(f: dataclasses.Field) -> str:
    """The default, and the tiny preset's where it differs; argparse reads % as a format."""
    text = str(f.default if f.default != "" else "empty")
    if f.name in PRESETS["tiny"]:
        text += f"; tiny: {PRESETS['tiny'][f.name]}"
    return text.replace("%", "%%")


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")


def check(config: Config, settled: bool = False) -> Config:
    """The configuration itself, if every value can be. settled: `lora` is known to be the rank of what is trained, those of
    the adapters that --model holds included."""
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        value, option_name = getattr(config, f.name), f"--{f.name.replace('_', '-')}"
        if not _fits(value, hints[f.name]):
            raise UserError(f"{option_name} cannot be {value!r}: it takes {_described(hints[f.name])}.")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise UserError(f"{option_name} must be one of {', '.join(f.metadata['choices'])}, not {value!r}.")
        holds, words = RULES.get(f.name, (lambda _: True, ""))
        if not holds(value):
            raise UserError(f"{option_name} must be {words}; {value} was given.")
    needy = [name for name in ("quantize", "export") if getattr(config, name) != Config.__dataclass_fields__[name].default]
    adapters = config.lora or (not settled and may_hold_adapters(config.model))
    if needy and not adapters:
        raise UserError(f"--{needy[0]} {getattr(config, needy[0])} needs --lora: give the rank of the adapters, such as 16.")
    if config.lora and config.reference != "auto":
        raise UserError(f"--reference {config.reference}: with --lora the reference is the policy without its adapters, at no cost; leave it away.")
    if config.export_limits and config.export == "adapter":
        raise UserError("--export-limits writes into an image processor's config, and with --export adapter final/ has none: give one of the two.")
    return config


def may_hold_adapters(model: str) -> bool:
    """Whether a model may turn out to be adapters: what is known to be none is the embedded base, and a folder with a model's
    config."""
    return bool(model) and not (Path(model) / "config.json").is_file()


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; numbers must be finite."""
    if parts := typing.get_args(hint):
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


def _described(hint: Any) -> str:
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    parts = typing.get_args(hint)
    return f"{len(parts)} values, each {words[parts[0]]}" if parts else words[hint]
