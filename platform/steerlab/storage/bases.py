"""Two small files beside a saved model or patch: `base.json` names the model of a patch, `prompt.json` how it is prompted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from steerlab.data import sources
from steerlab.guards import saved
from steerlab.job import Frozen, Preamble, SamplerConfig

PROMPT, BASE = "prompt.json", "base.json"
_MAX_BASES = 100
"""Maximum length of a chain of patched models; a longer one counts as a damaged file."""


class SavedPrompt(Frozen):
    """Content of `prompt.json`: the settings of a language model's encoder, or `sampler` for a diffusion pipeline.

    The settings have the meanings of the fields of a job's `data` and `model` sections.
    """

    prompt_style: Literal["aside", "plain"] = "aside"
    response_role: Literal["data", "instruction", "response"] = "data"
    thinking: bool = False
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    preamble: Preamble = Preamble()
    """Text that is put before each prompt."""
    sampler: SamplerConfig | None = None


class SavedBase(Frozen):
    """Content of `base.json`: the model that a patch is for, as a source or as an artifact in the same ROOT."""

    source: str | None = None
    """Source of the model; None if it is an artifact."""
    # The patterns ensure that a file written by somebody else cannot name a path outside ROOT.
    stage: Annotated[str, Field(pattern=r"^[a-z_]*$")] = ""
    """Stage of the artifact; empty if the model is a source."""
    key: Annotated[str, Field(pattern=r"^[0-9a-z]*$")] = ""
    """Key of the artifact; empty if the model is a source."""


def read(directory: Path) -> SavedBase | None:
    """Return the reference to the model of the patch in a directory; None if the directory holds a whole model.

    Raises:
        ValueError: `base.json` is damaged.
    """
    return saved.read(directory / BASE, SavedBase) if (directory / BASE).is_file() else None


def below(directory: Path) -> Path:
    """Return the directory of the model that the patch in a directory is for.

    Raises:
        ValueError: `base.json` is damaged, or the model does not exist.
    """
    base = saved.read(directory / BASE, SavedBase)
    if base.source is not None:
        return sources.fetch(base.source)
    # Artifacts are at artifacts/STAGE/KEY, both in ROOT and in the cache of an object store.
    model = directory.absolute().parents[1] / base.stage / base.key
    if not base.stage or not base.key or not (model / PROMPT).is_file():
        raise ValueError(
            f"{directory} holds a patch for the model of the artifact {base.stage}/{base.key[:12]}, which is missing: "
            f"copy it to {model}"
        )
    return model


def chain(directory: Path) -> list[Path]:
    """Return a directory, the directory of the model that its patch is for, and so on; the last one holds a whole model.

    Raises:
        ValueError: one of the models does not exist, or they refer to one another in a circle.
    """
    directories = [directory]
    while (directories[-1] / BASE).is_file():
        directories.append(below(directories[-1]))
        # Paths are resolved, because a link would give the same directory a new name in each round.
        if len(directories) > _MAX_BASES or directories[-1].resolve() in [path.resolve() for path in directories[:-1]]:
            raise ValueError(
                f"{directory / BASE}: the models that its patch builds on refer to one another in a circle, or are more than "
                f"{_MAX_BASES}"
            )
    return directories
