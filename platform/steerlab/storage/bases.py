"""What a saved model or patch stands on, and how it is asked: two small files of an artifact or an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from steerlab.data import sources
from steerlab.guards import saved
from steerlab.job import Frozen, SamplerConfig

PROMPT, BASE = "prompt.json", "base.json"
_MAX_BASES = 100
"""Models that stand on one another: jobs may build on jobs, but not for ever."""


class SavedPrompt(Frozen):
    """How a saved model or patch is asked: the settings of an encoder, or those of a pipeline."""

    prompt_style: Literal["aside", "plain"] = "aside"
    response_role: Literal["data", "instruction", "response"] = "data"
    thinking: bool = False
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    sampler: SamplerConfig | None = None


class SavedBase(Frozen):
    """What the patch of a frozen model stands on: a source, or the artifact of a stage beside its own."""

    source: str | None = None
    stage: Annotated[str, Field(pattern=r"^[a-z_]*$")] = ""
    key: Annotated[str, Field(pattern=r"^[0-9a-z]*$")] = ""


def read(directory: Path) -> SavedBase | None:
    """Return what the patch in a directory stands on; None where the directory holds the whole model. Raises ValueError."""
    return saved.read(directory / BASE, SavedBase) if (directory / BASE).is_file() else None


def below(directory: Path) -> Path:
    """Return the directory of the model that the patch in a directory stands on.

    Raises:
        ValueError: `base.json` is damaged, or the model is not there.
    """
    base = saved.read(directory / BASE, SavedBase)
    if base.source is not None:
        return sources.fetch(base.source)
    found = directory.absolute().parents[1] / base.stage / base.key
    if not base.stage or not base.key or not (found / PROMPT).is_file():
        raise ValueError(f"{directory} stands on the artifact {base.stage}/{base.key[:12]}, which is not beside it")
    return found


def chain(directory: Path) -> list[Path]:
    """Return a directory and those of the models below it, the lowest last.

    Raises:
        ValueError: one of them is not there, or they go in a circle.
    """
    found = [directory]
    while (found[-1] / BASE).is_file():
        found.append(below(found[-1]))
        if len(found) > _MAX_BASES or found[-1].resolve() in [path.resolve() for path in found[:-1]]:
            raise ValueError(f"{directory / BASE}: the models that it stands on go in a circle, or are more than {_MAX_BASES}")
    return found
