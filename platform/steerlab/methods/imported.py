"""A patch that another program has made: a control vector of repeng or llama.cpp, an adapter of PEFT, or an exported patch.

Nothing is trained: the job evaluates what the file does to the model, at any strength. Files that are read:

- a control vector (`.gguf`): one vector for each decoder layer, which is added to the layer's output on every token;
- the folder of a low-rank adapter (`adapter_config.json`, `adapter_model.safetensors`), whose changes are added to the weights;
- a folder that holds a patch of this package (`patch.json`).

The formats and their authors are named in patches/foreign. A file that does not fit the model is refused before the start.
"""

from __future__ import annotations

from typing import Literal

from steerlab import patches
from steerlab.data import sources
from steerlab.job import Job, MethodConfig, Source
from steerlab.methods.contract import Assembled
from steerlab.models import ModelFacts
from steerlab.patches import foreign
from steerlab.steered.language import SteeredModel


class Config(MethodConfig):
    """Source of the patch."""

    name: Literal["imported"] = "imported"
    """The method."""
    # Null, so that the method has a config without a file, as all methods have one; `check` refuses a job without a source.
    source: Source | None = None
    """Source of the patch, which is required: a file or folder, or hf:owner/name for one on the hub."""


def assemble(config: Config, model: SteeredModel) -> patches.SavedPatch:
    """Return the patch of the file. Raises ValueError if it is damaged, or for another model."""
    assert config.source is not None, "`check` has refused a job without it"
    # The model is needed, because a control vector names layers by number and an adapter names weights, which only a model can
    # resolve.
    return foreign.read(sources.fetch(config.source), model.model)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a file that does not exist, is damaged, or is for a model of another width or depth."""
    if config.source is None:
        raise ValueError("method.source: this key is required by method imported: the source of a patch")
    # The file is checked before the start: one that does not fit would otherwise fail only after the model was loaded.
    try:
        foreign.check(sources.fetch(config.source), facts.hidden_size, facts.num_layers)
    except ValueError as error:
        raise ValueError(f"method.source: {error}") from None


# No range of strengths is given, because the file's author chose what strength 1 means.
METHOD = Assembled(Config, assemble, check=check)
