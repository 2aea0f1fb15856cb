"""Every setting of a run, its default, its meaning, and the presets: the only place with defaults."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locus_kernels.box_reward import REWARD_SHAPES
from locus_kernels.shared_prefix_attention import BACKENDS

from locus_fast.data.box_format import BOX_FORMAT_HELP, BOX_FORMATS
from locus_fast.errors import UserError, short
from locus_fast.files import read_object, refuse_endless, refuse_endless_in
from locus_fast.grpo import MEANS
from locus_fast.images import MAX_PIXELS
from locus_fast.optim import OPTIMIZERS, SCHEDULES
from locus_fast.options import Parser, add_options, described, fits, given, option_of
from locus_fast.prompts import QUESTIONS
from locus_fast.reference import REFERENCES
from locus_fast.runs import run_around

DESCRIPTION = "Teach a vision-language model to find small things: cue search with GRPO."


def option(default: Any, help: str, choices: typing.Iterable[str] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the LOCUS recipe (arXiv 2606.16586); a preset changes what its model needs."""

    preset: str = option("", "start from this preset; empty: tiny for the embedded base and what was trained from it, else paper")
    model: str = option("", "folder of the base model in Hugging Face layout; empty: the embedded tiny base")
    data: str = option("", "COCO instances*.json, JSONL of {image, bbox}, or a folder of images; empty: drawn scenes")
    images: str = option("", "folder that the image names in --data are relative to; empty: the data file's folder")
    box_format: str = option("auto", f"the four numbers of a box in --data; {BOX_FORMAT_HELP}", BOX_FORMATS)
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
    normalize_std: bool = option(True, "divide advantages by the group's deviation; false: only their mean is subtracted")
    mean: str = option("token", "what the loss averages over", MEANS)
    clip_low: float = option(0.2, "how far the ratio may fall below 1")
    clip_high: float = option(0.3, "how far the ratio may rise above 1")
    kl: float = option(0.01, "coefficient of the KL to the base; 0 loads no reference")
    log_ratio_clamp: float = option(20.0, "most nats between two log-probs that a ratio is made of; a token past it has no gradient; 0: no clamp")
    kl_clamp: float = option(10.0, "most nats of a token's KL; a token past it has no gradient; 0: no clamp")
    skip_zero_variance: bool = option(
        False, "leave groups whose rewards are all equal out of the update: cheaper, but their tokens' KL is not held then; without KL always so"
    )
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

Rule = tuple[typing.Callable[[Any], bool], str]


def between(least: int | float, most: int | float, why: str, words: str = "") -> Rule:
    """The rule that holds from `least` to `most`. words: of the lower end, where it is not "at least"."""
    return lambda v: least <= v <= most, f"{words or f'at least {least:,}'} and at most {most:,}, {why}"


def pixels(v: tuple[int, int]) -> bool:
    return 0 < v[0] <= v[1] <= MAX_PIXELS


HOST = "as a step holds all of them in the host's memory"
LIFETIME = "more than any run does"
BUDGET = between(0, 2**31 - 1, "as packed rows are counted in 32 bits", "0 or more")
PIXELS = (pixels, f"two values, above 0, the smaller first and at most {MAX_PIXELS:,}, the largest image that is read")
RULES: dict[str, Rule] = {  # what a value must satisfy: a test, and the words that complete "--name must be ..."
    "steps": between(1, 100_000_000, LIFETIME),
    "save_every": between(0, 100_000_000, LIFETIME, "0 or more"),
    "prompts": between(1, 65_536, HOST),
    "replies": between(2, 512, "as an advantage compares the replies of a group, which one block of the GPU ranks"),
    "max_tokens": between(1, 65_536, "as the decoder has room for the longest reply from the start"),
    "updates": between(1, 1_000, "as each goes over all of a step's rollouts"),
    "eval_cues": between(1, 1_000_000, "as all of them are answered before and after"),
    "workers": between(1, 256, "as each is a thread"),
    "min_side": between(1, math.isqrt(MAX_PIXELS), "as no image that is read has a longer short side"),
    "tokens": BUDGET,
    "rollout_tokens": BUDGET,
    "lora": between(0, 65_536, "and no more than the model is wide", "0 or more"),
    "checkpointing": between(-1, 1_000, "as no model has more layers", "-1, 0 or more"),
    "seed": (lambda v: 0 <= v < 2**63, "0 or more and below 2**63"),
    "image_pixels": PIXELS,
    "cue_pixels": PIXELS,
    **{name: (lambda v: v >= 0, "0 or more") for name in ("clip_low", "clip_high", "log_ratio_clamp", "kl_clamp")},
    **{name: (lambda v: v > 0, "above 0") for name in ("lr", "grad_clip")},
    **{name: (lambda v: 0 <= v <= 1, "between 0 and 1") for name in ("format_weight", "warmup")},
    "kl": between(0, 1_000, "as its gradient drowns every reward before", "0 or more"),
    "weight_decay": between(0, 1_000, "as --lr times it is taken from each weight", "0 or more"),
    "lora_alpha": (lambda v: 0 < v <= 1e6, "above 0 and at most 1,000,000"),
    "temperature": (lambda v: 0.01 <= v <= 100, "above 0, from 0.01 to 100, as float32 logits are divided by it"),
    "scale": (lambda v: 0 < v[0] <= v[1] <= 16, "two values, above 0, the smaller first and at most 16, as the cue grows to so many times its side"),
    "padding": (lambda v: 0 <= v[0] <= v[1] <= 100, "two values, 0 or more, the smaller first and at most 100, beyond which there is no ground"),
    "rates": (lambda v: min(v) >= 0 and 0 < max(v) <= 1_000, "three shares of 0 or more that are not all 0, and at most 1,000"),
    "mix": (lambda v: min(v) >= 0 and sum(v) > 0, "three shares of 0 or more that are not all 0"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "device": (lambda v: v in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
}


ASKED = (  # what has a meaning where nothing is trained and replies are greedy
    *("preset", "model", "data", "images", "box_format", "seed", "question", "mix", "min_side", "padding", "scale"),
    *("image_pixels", "cue_pixels", "max_tokens", "answer_prefix", "dtype", "attention", "tokens", "device", "workers"),
    "eval_cues",
)
FIXED = ("out", "preset", "model", "seed", "prompts", "lora", "lora_alpha", "merge", "quantize")  # what a resumed run keeps
CHOSEN = ("preset", "out", "resume")  # what is empty is as if it were not given
OF_DATA = ("images", "box_format")  # what was said of a run's data, and does not hold for other data
PATHS = ("model", "data", "images", "out")


def parse(arguments: list[str], prog: str = "python -m locus_fast.train") -> Config:
    """The configuration of a training run's command line. Raises UserError for an unknown option or a value that cannot
    be, or that a resumed run does not take."""
    parser = Parser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    add_options(parser, Config, shown)
    words = given(parser, arguments)
    if not words.get("resume"):
        return resolve(words)
    refuse_endless(Path(words["resume"]), "--resume")
    refuse_endless_in(Path(words["resume"]), deep=True)
    settings = of_run(Path(words["resume"]))
    for name in FIXED:
        if name in words and (words[name] or name not in CHOSEN) and not _same(name, words[name], settings.get(name)):
            raise UserError(f"{option_of(name)} cannot be changed with --resume: a resumed run goes on as it began.")
    return resolve(words, settings)


def resolve(words: dict[str, Any], settings: dict[str, Any] | None = None) -> Config:
    """The configuration of what was given, over the settings of a run or else over a preset. Raises UserError for a
    value that cannot be."""
    words = {name: value for name, value in words.items() if value or name not in CHOSEN}
    if settings is None:
        preset = words.get("preset") or default_preset(words.get("model", ""))
        if preset not in PRESETS:
            raise UserError(f"--preset must be one of {', '.join(PRESETS)}, not '{short(preset)}'.")
        settings = {"preset": preset, **PRESETS[preset]}
    elif "data" in words and not _same("data", words["data"], settings.get("data")):
        settings = {name: value for name, value in settings.items() if name not in OF_DATA}
    everything = {**settings, **words}
    config = check(Config(**{"preset": default_preset(str(everything.get("model", ""))), **everything}))
    if not config.data and (unused := sorted(words.keys() & {"box_format", "mix", "min_side", "padding", "scale"})):
        raise UserError(f"{option_of(unused[0])} needs --data: drawn scenes have a recipe of their own.")
    return config


def _same(name: str, asked: Any, kept: Any) -> bool:
    """Whether a value that is given for a setting is the one that the run has."""
    kept = Config.__dataclass_fields__[name].default if kept is None else kept
    paths = name in PATHS and asked and kept and isinstance(kept, str)
    return bool(asked == kept or (paths and Path(asked).resolve() == Path(kept).resolve()))


def stored(config: Config) -> dict[str, Any]:
    """The settings as a run folder keeps them: with whole paths, so that they hold in every working folder."""
    settings = dataclasses.asdict(dataclasses.replace(config, resume=""))
    for name in PATHS:
        is_hub_id = name == "model" and not Path(settings[name]).is_dir()
        if settings[name] and not is_hub_id:
            path = Path(settings[name])
            settings[name] = str(path.resolve() if ".." in path.parts else path.absolute())
    return settings


def default_preset(model: str) -> str:
    """The preset of a model, or of adapters, that is named without one; a hub id, or a folder that loading will complain
    about, has the paper's."""
    if model and may_hold_adapters(model):
        model = str(read_object(Path(model) / "adapter_config.json").get("base_model_name_or_path") or model)
    return "tiny" if not model or "coordinate_extent" in read_object(Path(model) / "config.json") else "paper"


def of_run(folder: Path) -> dict[str, Any]:
    """The settings of a run folder. Raises UserError if it is none, or has settings of another version."""
    file = folder / "config.json"
    if (run := run_around(folder)) and run != folder.resolve():
        raise UserError(f"--resume {folder} lies in a run folder: give the run folder itself, --resume {run}.")
    try:
        settings = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as the settings of a run ({error}).") from None
    if "model_type" in settings:
        raise UserError(f"{folder} holds a model and no run: give it as --model, and a run folder with --resume.")
    if unknown := settings.keys() - Config.__dataclass_fields__.keys():
        raise UserError(f"{file} has settings that this version does not know: {', '.join(sorted(unknown))}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def shown(f: dataclasses.Field) -> str:
    """The default, and the tiny preset's where it differs."""
    text = str(f.default if f.default != "" else "empty")
    return f"{text}; tiny: {PRESETS['tiny'][f.name]}" if f.name in PRESETS["tiny"] else text


def check(config: Config, settled: bool = False) -> Config:
    """The configuration itself, if every value can be, and with the others. settled: `lora` is known to be the rank of what is trained, those of
    the adapters that --model holds included."""
    for f in dataclasses.fields(Config):
        check_value(f.name, getattr(config, f.name))
    return check_together(config, settled)


def check_value(field: str, value: Any) -> None:
    """Raises UserError unless a field may have this value."""
    f, name, hint = Config.__dataclass_fields__[field], option_of(field), typing.get_type_hints(Config)[field]
    if not fits(value, hint):
        raise UserError(f"{name} cannot be {short(repr(value))}: it takes {described(hint)}.")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UserError(f"{name} must be one of {', '.join(f.metadata['choices'])}, not {short(repr(value))}.")
    holds, words = RULES.get(field, (lambda _: True, ""))
    if not holds(value):
        raise UserError(f"{name} must be {words}; {short(value)} was given.")


def check_together(config: Config, settled: bool) -> Config:
    """The configuration itself, if its values go together."""
    for name in PATHS:
        if (value := getattr(config, name)) and not (name == "out" and config.resume):  # a resumed run may have been moved
            refuse_endless(Path(value), option_of(name))
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
    return bool(model) and not os.path.isfile(Path(model) / "config.json")  # not Path.is_file(), which raises for a name that is too long
