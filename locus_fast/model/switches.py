"""Which settings of a model's config.json are computed exactly: one table a part, refusal for the rest.

`transformers` builds the modules; attention, packed rows, positions and the decoding step are ours. A setting
that only the modules read holds for any value. One that attention or layouts would have to know holds for the
values given here. What `transformers` itself does not read is passed over, but for settings that other models
compute by (FOREIGN).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from locus_fast.errors import UserError
from locus_fast.model.families import Architecture, family_of


@dataclass(frozen=True)
class Values:
    """Those that a setting is computed exactly for."""

    hold: Callable[[Any, Any], bool]  # (value, the part's config)
    words: str  # complete "must be ..."


ANY = Values(lambda value, part: True, "anything")
UNSET = Values(lambda value, part: not value, "left away: it is not computed here")
TRUE = Values(lambda value, part: value in (None, True), "true")
COUNT = Values(lambda value, part: isinstance(value, int) and value > 0, "a whole number above 0")
WIDEST = 16384  # side of an attention window, pixels: transformers makes an index as large as the window
# kinds whose frequencies do not hang on the longest row
STATIC_ROTARY = (
    "default",
    "linear",
    "yarn",
    "llama3",
)


def _head_dim(part: Any) -> int:
    return getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads


def _divides(value: Any, part: Any) -> bool:
    return isinstance(value, int) and value > 0 and part.num_attention_heads % value == 0


def _only_full(value: Any, part: Any) -> bool:
    return value is None or set(value) == {"full_attention"}


def _no_window(value: Any, part: Any) -> bool:
    return not value or _only_full(getattr(part, "layer_types", None), part)


def _window(value: Any, part: Any) -> bool:
    return value is None or (
        isinstance(value, int) and part.patch_size * part.spatial_merge_size <= value <= WIDEST
    )


def _whole_heads(value: Any, part: Any) -> bool:
    """Whole heads of a dimension that two axes' sines and cosines share."""
    return (
        isinstance(value, int)
        and value > 0
        and part.hidden_size % value == 0
        and part.hidden_size // value % 4 == 0
    )


WINDOW = "false, or max_window_layers no less than num_hidden_layers: sliding windows are not computed"
TEXT: dict[str, Values] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), COUNT
    ),
    **dict.fromkeys(
        ("hidden_act", "rms_norm_eps", "attention_bias", "max_position_embeddings", "initializer_range"), ANY
    ),
    **dict.fromkeys(
        ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"), ANY
    ),
    # they count through use_sliding_window and layer_types
    **dict.fromkeys(("sliding_window", "max_window_layers"), ANY),
    "num_key_value_heads": Values(_divides, "a divisor of num_attention_heads"),
    "head_dim": Values(lambda value, part: value is None or COUNT.hold(value, part), COUNT.words),
    "use_sliding_window": Values(_no_window, WINDOW),
    "layer_types": Values(
        _only_full, '"full_attention" for every layer: windows and other kinds are not computed'
    ),
    "attention_dropout": Values(
        lambda value, part: not value, "0: the sampler is the policy, so training has no dropout"
    ),
    "is_causal": Values(TRUE.hold, "true: every token attends to what is before it alone"),
    "return_dict": TRUE,
    "rope_parameters": ANY,  # judged key by key, see ROTARY
}
ROTARY: dict[str, Values] = {  # of the text config's rope_parameters, in config.json also called rope_scaling
    "rope_type": Values(
        lambda value, part: value in STATIC_ROTARY,
        f"one of {', '.join(STATIC_ROTARY)}: others make a row's log-probs hang on what is packed beside it",
    ),
    "partial_rotary_factor": Values(
        lambda value, part: value in (None, 1), "1: every dimension of a head is rotated"
    ),
}
VISION: dict[str, Values] = {
    **dict.fromkeys(
        (
            "depth",
            "hidden_size",
            "intermediate_size",
            "patch_size",
            "spatial_merge_size",
            "temporal_patch_size",
        ),
        COUNT,
    ),
    **dict.fromkeys(("hidden_act", "initializer_range", "rope_parameters", "tokens_per_second"), ANY),
    # indices of no block count nowhere
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), ANY),
    "num_position_embeddings": COUNT,
    "out_hidden_size": COUNT,  # and that of the language model: see check_switches
    "num_heads": Values(_whole_heads, "a divisor of hidden_size that leaves each head a multiple of 4"),
    "in_channels": Values(lambda value, part: value == 3, "3: images are read as RGB"),
    "window_size": Values(
        _window,
        f"at least patch_size * spatial_merge_size, the side of a language token, and at most {WIDEST}",
    ),
    "head_dim": UNSET,
    "is_causal": UNSET,
    "return_dict": TRUE,
}
# refused if set, in any part
FOREIGN = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_chunk_size",
)
GENERAL = (
    {field.name for field in dataclasses.fields(PretrainedConfig)}
    if dataclasses.is_dataclass(PretrainedConfig)
    else set()
)


def check_switches(file: Path, config: Any) -> None:
    """Raises UserError, with file, key and value, for the first setting of a model's config that is not
    computed exactly.

    config: as `transformers` read it from the file.
    """
    text, vision, kind = config.get_text_config(), config.vision_config, family_of(config).architecture
    for part, table in ((text, TEXT), (vision, VISION)):
        for key, values in table.items():
            if hasattr(part, key):
                _check(file, part, key, getattr(part, key), values)
        for key in FOREIGN:
            _check(file, part, key, getattr(part, key, None) or getattr(config, key, None), UNSET)
        _check_unknown(file, part, table)
    _check_rotary(file, text, kind)
    width, heads = text.hidden_size, text.hidden_size // text.num_attention_heads
    _check(
        file,
        vision,
        "out_hidden_size",
        vision.out_hidden_size,
        _only(width, "hidden_size of the language model"),
    )
    if not kind.free_head_dim:  # its attention takes no other, though its rotary embedding would
        _check(file, text, "head_dim", _head_dim(text), _only(heads, "hidden_size / num_attention_heads"))


def _only(only: Any, why: str) -> Values:
    return Values(lambda value, part: value == only, f"{_shown(only)}, {why}")


def _check(file: Path, part: Any, key: str, value: Any, values: Values) -> None:
    if not values.hold(value, part):
        raise UserError(f"{file}: {key} is {_shown(value)}, and must be {values.words}.")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_unknown(file: Path, part: Any, table: Mapping[str, Values]) -> None:
    """Raises UserError for a setting of the part's class that the table does not know and that is not at its
    default: what a newer `transformers` may compute by."""
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        if field.name not in table and field.name not in GENERAL and field.default is not dataclasses.MISSING:
            _check(
                file,
                part,
                field.name,
                getattr(part, field.name),
                _only(field.default, "no other value is known here"),
            )


def _check_rotary(file: Path, text: Any, kind: Architecture) -> None:
    """Raises UserError unless the rotary frequencies are of a known kind and shared out among the three axes:
    no tensor's shape would show it."""
    rotary, half = text.rope_parameters or {}, _head_dim(text) // 2
    for key, values in ROTARY.items():
        _check(file, text, key, rotary.get(key), values)
    if rotary.get("mrope_interleaved") is not None:
        _check(
            file,
            text,
            "mrope_interleaved",
            rotary["mrope_interleaved"],
            _only(kind.interleaved_rotary, f"as {kind.name} is computed"),
        )
    sections = rotary.get("mrope_section", kind.rotary_sections)
    if not isinstance(sections, list | tuple) or len(sections) != 3 or sum(sections) != half:
        words = f"three numbers that add up to {half}, half a head's dimension"
        raise UserError(f"{file}: mrope_section {sections} must be {words}.")
