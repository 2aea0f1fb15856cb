"""Where a run's model comes from, and so how it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from locus_fast.config import Config
from locus_fast.model.adapter_files import base_of, is_adapter_folder
from locus_fast.weights.adapter_reader import read_adapters
from locus_fast.weights.checkpoint import is_hub_id, model_folder
from locus_fast.weights.source import Source, read_source


@dataclass(frozen=True)
class Origin:
    """Where the model came from, and so how it is written."""

    source: Source  # the base model's folder, and the adapters that --model holds
    role: str  # of these adapters, see `run.given`
    base: str  # what adapters call the base model: its hub id, or its folder

    @staticmethod
    def of(config: Config, source: Source, role: str) -> Origin:
        named = base_of(model_folder(config.model)) if source.adapters else config.model
        return Origin(source, role, named if is_hub_id(named) else str(source.folder.resolve()))


def source_of(config: Config) -> Source:
    """The base model's folder: that of the model, or of what the model's adapters adapt, with these."""
    folder = model_folder(config.model)
    if not is_adapter_folder(folder):
        return read_source(folder)
    source = read_source(model_folder(base_of(folder)))
    return replace(source, adapters=read_adapters(folder, source.linears))


def source_on_disk(config: Config) -> Source | None:
    """As `source_of`, and None for a model that may have to be fetched."""
    return None if is_hub_id(config.model) else source_of(config)
