"""Load what lies in a directory: a model, what makes its inputs, and the patches of its artifacts, none attached yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steerlab import models, patches
from steerlab.guards import saved
from steerlab.inputs import encoding
from steerlab.inputs.drawings import Prompter
from steerlab.inputs.encoded_rows import RowEncoder
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.storage import bases
from steerlab.storage.bases import BASE, PROMPT, SavedPrompt

BELOW = "below"
"""Folder of an artifact with the patches under its newest one, numbered from the lowest."""


def encoder_of(model: Any, directory: Path, prompt: Mapping[str, object] | None, trust_remote_code: bool = False) -> Any:
    """Return what makes rows of data into inputs of a model: the encoder of its tokenizer, or a pipeline's prompter."""
    encoder: RowEncoder = (
        Prompter(model) if isinstance(model, Diffusion) else encoding.load(directory, prompt, trust_remote_code)
    )
    return encoder


class Stack(NamedTuple):
    """A loaded model and its patches, none attached yet."""

    model: Any
    """A `PreTrainedModel` or a `Diffusion`."""
    encoder: Any
    """An `Encoder` or a `Prompter`."""
    patches: tuple[patches.SavedPatch, ...]
    """The lowest first."""


def load_stack(
    directory: str | Path,
    *,
    dtype: str | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    prompt: Mapping[str, object] | None = None,
    snapshot: int | None = None,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
) -> Stack:
    """Load a model, its encoder and the patches of its artifacts, the lowest first, none attached yet.

    A directory without prompt settings of its own is a plain model, prompted by `prompt`. An artifact of a frozen model holds
    its patch alone and names in `base.json` what it stands on: a source, or an artifact beside it.
    """
    directory = Path(directory)
    if not (directory / PROMPT).is_file():
        model = models.load_model(
            directory,
            dtype=dtype or "float32",
            seed=seed,
            sampler=sampler,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
        return Stack(model, encoder_of(model, directory, prompt, trust_remote_code), ())
    prompt = saved.read(directory / PROMPT, SavedPrompt).model_dump(mode="json", exclude_unset=True)
    sampler = prompt.get("sampler") if sampler is None else sampler
    below: tuple[patches.SavedPatch, ...] = ()
    if (directory / BASE).is_file():
        bases.chain(directory)  # which ends
        model, encoder, below = load_stack(
            bases.below(directory),
            dtype=dtype,
            prompt=prompt,
            sampler=sampler,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
    else:
        checkpoint = directory / "model" if (directory / "model").is_dir() else directory
        # Other weights of a denoiser are in the checkpoint, trained further or not.
        sampler = None if sampler is None else {**sampler, "denoiser": None}
        model = models.load_model(
            checkpoint,
            dtype=dtype or models.saved_dtype(checkpoint),
            sampler=sampler,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
        encoder = encoder_of(model, checkpoint, prompt, trust_remote_code)
    numbered = [path for path in (directory / BELOW).glob("*") if path.name.isdecimal()]
    numbered.sort(key=lambda path: int(path.name))
    below = (*below, *(patches.load(path) for path in numbered))
    patch_dir = directory / "patch" if snapshot is None else directory / "snapshots" / str(snapshot)
    if not patches.exists(patch_dir):
        if snapshot is not None:
            raise ValueError(f"{directory} holds no patch of step {snapshot}; train.snapshots says which steps are kept")
        return Stack(model, encoder, below)
    newest = patches.load(patch_dir, model if (directory / BASE).is_file() else None)
    return Stack(model, encoder, (*below, newest))


def model_directory(directory: Path) -> Path:
    """Return where the config and the tokenizer of a source or an artifact lie, whatever patches stand on it."""
    directory = bases.chain(directory)[-1]
    return directory / "model" if (directory / "model").is_dir() else directory
