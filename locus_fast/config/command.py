"""From a command line, a preset and a run's own settings to a `Config`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from locus_fast.config.folders import run_around
from locus_fast.config.options import Parser, add_options, given, option_of
from locus_fast.config.presets import LOSS_SETTINGS, PRESETS, default_preset, with_new_names
from locus_fast.config.rules import PATHS, check
from locus_fast.config.settings import Config
from locus_fast.errors import UserError, short
from locus_fast.files import refuse_endless, refuse_endless_in

DESCRIPTION = "Teach a vision-language model to find small things: cue search with GRPO."
EVALUATION_OPTIONS = (  # what has a meaning where nothing is trained and replies are greedy
    *(
        "preset",
        "model",
        "data",
        "images",
        "box_format",
        "seed",
        "prompt_style",
        "mix",
        "min_side",
        "padding",
        "scale",
    ),
    *(
        "image_pixels",
        "cue_pixels",
        "max_new_tokens",
        "answer_prefix",
        "dtype",
        "attention",
        "microbatch_tokens",
    ),
    *("device", "workers", "eval_cues"),
)
# on resume
FIXED = ("out", "preset", "model", "seed", "prompts", "loss", "lora", "lora_alpha", "merge", "quantize")
EMPTY_IS_NOT_GIVEN = ("preset", "out", "resume")
OF_DATA = ("images", "box_format")  # what was said of a run's data, and does not hold for other data
OF_FILES = ("box_format", "mix", "min_side", "padding", "scale")  # drawn scenes have a recipe of their own


def parse(arguments: list[str], prog: str = "python -m locus_fast.train") -> Config:
    """The configuration of a training run's command line. Raises UserError for an unknown option, or for a
    value that cannot be or that a resumed run does not take."""
    parser = Parser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    add_options(parser, Config)
    words = given(parser, arguments)
    if not words.get("resume"):
        return resolve(words)
    refuse_endless(Path(words["resume"]), "--resume")
    refuse_endless_in(Path(words["resume"]), deep=True)
    settings = of_run(Path(words["resume"]))
    for name in FIXED:
        empty = name in EMPTY_IS_NOT_GIVEN and not words.get(name)
        if name in words and not empty and not _same(name, words[name], settings.get(name)):
            raise UserError(
                f"{option_of(name)} cannot be changed with --resume: a resumed run goes on as it began."
            )
    return resolve(words, settings)


def resolve(words: dict[str, Any], settings: dict[str, Any] | None = None) -> Config:
    """The configuration of what was given, over the settings of a run or else over a preset. Raises UserError
    for a value that cannot be."""
    words = {name: value for name, value in words.items() if value or name not in EMPTY_IS_NOT_GIVEN}
    if settings is None:
        preset = words.get("preset") or default_preset(words.get("model", ""))
        if preset not in PRESETS:
            raise UserError(f"--preset must be one of {', '.join(PRESETS)}, not '{short(preset)}'.")
        settings = {"preset": preset, **PRESETS[preset], **LOSS_SETTINGS.get(words.get("loss", ""), {})}
    elif "data" in words and not _same("data", words["data"], settings.get("data")):
        settings = {name: value for name, value in settings.items() if name not in OF_DATA}
    everything = {**settings, **words}
    config = check(Config(**{"preset": default_preset(str(everything.get("model", ""))), **everything}))
    if not config.data and (unused := sorted(words.keys() & {*OF_FILES})):
        raise UserError(f"{option_of(unused[0])} needs --data: drawn scenes have a recipe of their own.")
    return config


def _same(name: str, asked: Any, kept: Any) -> bool:
    """Whether a value that is given for a setting is the one that the run has."""
    kept = Config.__dataclass_fields__[name].default if kept is None else kept
    paths = name in PATHS and asked and kept and isinstance(kept, str)
    return bool(asked == kept or (paths and Path(asked).resolve() == Path(kept).resolve()))


def stored(config: Config) -> dict[str, Any]:
    """The settings as a run folder keeps them: with whole paths, so that they hold in every working
    folder."""
    settings = dataclasses.asdict(dataclasses.replace(config, resume=""))
    for name in PATHS:
        is_hub_id = name == "model" and not Path(settings[name]).is_dir()
        if settings[name] and not is_hub_id:
            path = Path(settings[name])
            settings[name] = str(path.resolve() if ".." in path.parts else path.absolute())
    return settings


def of_run(folder: Path) -> dict[str, Any]:
    """The settings of a run folder, those of earlier versions under today's names. Raises UserError if it is
    none, or has settings that no version knew."""
    file = folder / "config.json"
    if (run := run_around(folder)) and run != folder.resolve():
        raise UserError(
            f"--resume {folder} lies in a run folder: give the run folder itself, --resume {run}."
        )
    try:
        settings = with_new_names(dict(json.loads(file.read_text())))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as the settings of a run ({error}).") from None
    if "model_type" in settings:
        raise UserError(
            f"{folder} holds a model and no run: give it as --model, and a run folder with --resume."
        )
    if unknown := settings.keys() - Config.__dataclass_fields__.keys():
        raise UserError(f"{file} has settings that this version does not know: {', '.join(sorted(unknown))}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
