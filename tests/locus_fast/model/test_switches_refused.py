"""Config switches that are refused, each with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from locus_fast import train
from locus_fast.errors import UserError
from locus_fast.model.switches import check_switches
from locus_fast.run import model as runtime
from locus_fast.weights.source import read_source
from tests.locus_fast.model.switch_cases import BOTH, NEW, OLD, Change, read_config, rotary, text, vision
from tests.locus_fast.source_cases import DATA, RECIPE, SIZES, fields
from tests.published import write_checkpoint

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
REFUSED: dict[str, tuple[tuple[str, ...], Change, str]] = {
    "sliding windows": (
        (OLD,),
        text(use_sliding_window=True, sliding_window=4, max_window_layers=0),
        "use_sliding_window is true, and must be false, or max_window_layers no less than num_hidden_layers",
    ),
    "a window on the last layer": (
        (OLD,),
        text(use_sliding_window=True, max_window_layers=1),
        "use_sliding_window is true, and must be false",
    ),
    "sliding layers": (
        (OLD,),
        text(layer_types=["full_attention", "sliding_attention"]),
        'layer_types is ["full_attention", "sliding_attention"], '
        'and must be "full_attention" for every layer',
    ),
    "linear layers": ((NEW,), text(layer_types=["linear_attention"] * 3), "layer_types is"),
    "dynamic rotary": (
        BOTH,
        rotary(rope_type="dynamic", factor=4.0),
        'rope_type is "dynamic", and must be one of default, linear, yarn, llama3',
    ),
    "long rotary": (BOTH, rotary(**LONG), 'rope_type is "longrope", and must be one of default'),
    "rotary of tomorrow": (BOTH, rotary(rope_type="foo"), 'rope_type is "foo", and must be one of default'),
    "partial rotary": (
        BOTH,
        rotary(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5, and must be 1",
    ),
    "interleaved": (
        (OLD,),
        rotary(mrope_interleaved=True),
        "mrope_interleaved is true, and must be false, as qwen2_5_vl is computed",
    ),
    "not interleaved": (
        (NEW,),
        rotary(mrope_interleaved=False),
        "mrope_interleaved is false, and must be true, as qwen3_vl is computed",
    ),
    "two sections": (
        BOTH,
        rotary(mrope_section=[4, 4]),
        "mrope_section [4, 4] must be three numbers that add up to 8",
    ),
    "sections that are not said": (
        BOTH,
        rotary(mrope_section=None),
        "must be three numbers that add up to 8",
    ),
    "dropout": (
        BOTH,
        text(attention_dropout=0.1),
        "attention_dropout is 0.1, and must be 0: the sampler is the policy",
    ),
    "soft cap of attention": (
        (NEW,),
        text(attn_logit_softcapping=50.0),
        "attn_logit_softcapping is 50.0, and must be left away",
    ),
    "soft cap of attention, flat": (
        (OLD,),
        text(attn_logit_softcapping=50.0),
        "attn_logit_softcapping is 50.0, and must be left away",
    ),
    "soft cap of the head": (
        BOTH,
        text(final_logit_softcapping=30.0),
        "final_logit_softcapping is 30.0, and must be left away",
    ),
    "chunks": (BOTH, text(attention_chunk_size=4), "attention_chunk_size is 4, and must be left away"),
    "both ways": (
        (NEW,),
        text(is_causal=False),
        "is_causal is false, and must be true: every token attends to what is before it alone",
    ),
    "tuples": ((NEW,), text(return_dict=False), "return_dict is false, and must be true"),
    "key heads that do not divide": (
        BOTH,
        text(num_key_value_heads=3),
        "num_key_value_heads is 3, and must be a divisor of num_attention_heads",
    ),
    "no key heads": (BOTH, text(num_key_value_heads=0), "num_key_value_heads is 0, and must be a divisor"),
    "no heads": (
        (NEW,),
        text(num_attention_heads=0),
        "num_attention_heads is 0, and must be a whole number above 0",
    ),
    "channels": (BOTH, vision(in_channels=1), "in_channels is 1, and must be 3: images are read as RGB"),
    "oblong patches": (
        BOTH,
        vision(patch_size=[14, 14]),
        "patch_size is [14, 14], and must be a whole number above 0",
    ),
    "frames in a list": (
        BOTH,
        vision(temporal_patch_size=[2]),
        "temporal_patch_size is [2], and must be a whole number above 0",
    ),
    "heads of the tower": (BOTH, vision(num_heads=3), "num_heads is 3, and must be a divisor of hidden_size"),
    "thin heads of the tower": (
        BOTH,
        vision(num_heads=16),
        "num_heads is 16, and must be a divisor of hidden_size that leaves each head a multiple of 4",
    ),
    "width of the tower": (
        BOTH,
        vision(out_hidden_size=32),
        "out_hidden_size is 32, and must be 64, hidden_size of the language model",
    ),
    "no windows": (
        (OLD,),
        vision(window_size=0),
        "window_size is 0, and must be at least patch_size * spatial_merge_size",
    ),
    "windows below a token": ((OLD,), vision(window_size=27), "window_size is 27, and must be at least"),
    "endless windows": ((OLD,), vision(window_size=10**6), "window_size is 1000000, and must be at least"),
    "heads of the tower by name": (BOTH, vision(head_dim=32), "head_dim is 32, and must be left away"),
    "a tower that looks back": (BOTH, vision(is_causal=True), "is_causal is true, and must be left away"),
}


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, (families, *_) in REFUSED.items() for family in families]
)
def test_settings_that_are_not_honoured(name: str, family: str, tmp_path: Path) -> None:
    _, change, sentence = REFUSED[name]
    config = read_config(tmp_path, family, change)
    with pytest.raises(UserError) as refused:
        check_switches(tmp_path / "config.json", config)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", ["sliding windows", "rotary of tomorrow", "no key heads", "no windows"])
def test_a_run_with_a_setting_that_is_not_honoured(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also where transformers cannot make a model of it."""
    _, change, sentence = REFUSED[name]
    folder = write_checkpoint(tmp_path / "model", OLD)
    read_config(folder, OLD, change)
    monkeypatch.setattr(runtime, "load_source", None)
    assert (
        train.main(["--model", str(folder), "--data", DATA, "--out", str(tmp_path / "run"), *RECIPE, *SIZES])
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {folder / 'config.json'}: ")
    assert sentence in lines[0]
    assert not (tmp_path / "run").exists()


PREPARED = {
    "do_resize": False,
    "do_rescale": False,
    "do_normalize": False,
    "rescale_factor": 1 / 127.5,
    "resample": 2,
    "patch_size": 16,
    "merge_size": 1,
    "temporal_patch_size": 1,
}


@pytest.mark.parametrize("key", PREPARED)
def test_images_that_are_prepared_otherwise_are_refused(key: str, tmp_path: Path) -> None:
    """By the image processor's config: what plain transformers would then show the model is not what it is
    trained on."""
    folder = write_checkpoint(tmp_path / "model", OLD)
    own = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 0.00392156862745098,
        "resample": 3,
    }
    fields("preprocessor_config.json", **own)(folder)
    read_source(folder)
    fields("preprocessor_config.json", **{key: PREPARED[key]})(folder)
    with pytest.raises(
        UserError, match=rf"preprocessor_config\.json: {key} is {json.dumps(PREPARED[key])}, and must be "
    ):
        read_source(folder)
