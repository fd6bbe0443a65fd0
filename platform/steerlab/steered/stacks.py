"""Load a model, its encoder and its patches from a directory: with the patches attached, or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from steerlab import models, patches
from steerlab.guards import saved
from steerlab.guards.json_values import Json
from steerlab.inputs import encoding
from steerlab.inputs.drawings import Prompter
from steerlab.job import Preamble
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.patches import foreign
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel
from steerlab.storage import bases
from steerlab.storage.bases import BASE, PROMPT, SavedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BELOW = "below"
"""Folder of an exported model with the older patches, in subfolders numbered from the oldest."""


def encoder_of(
    model: PreTrainedModel | Diffusion,
    directory: Path,
    prompt: Mapping[str, object] | None,
    trust_remote_code: bool = False,
) -> encoding.Encoder | Prompter:
    """Return the object that turns rows of data into inputs of a model: an `Encoder`, or a `Prompter` for a pipeline."""
    return Prompter(model) if isinstance(model, Diffusion) else encoding.load(directory, prompt, trust_remote_code)


class Stack(NamedTuple):
    """A loaded model and its patches, which are not attached yet."""

    model: Any
    """A `PreTrainedModel` or a `Diffusion`."""
    encoder: Any
    """An `Encoder` or a `Prompter`."""
    patches: tuple[patches.SavedPatch, ...]
    """The patches, the oldest first."""


def load_stack(
    directory: str | Path,
    *,
    dtype: str | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    prompt: Mapping[str, object] | None = None,
    snapshot: int | None = None,
    inverse: bool = False,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
) -> Stack:
    """Load a model, its encoder and its patches.

    Args:
        directory: An artifact, an exported folder, or a plain checkpoint (a directory without `prompt.json`).
        dtype: "float32" or "bfloat16"; None for the saved type, or float32 for a plain checkpoint.
        attention: Attention implementation of transformers.
        seed: Seed of weights that a plain checkpoint does not hold.
        prompt: Prompt settings of a plain checkpoint.
        snapshot: Training step after which the newest patch was saved; None for the end of the training.
        inverse: Load the inverse of the newest patch, which induces what its maps remove.
        sampler: How a pipeline draws; None for the settings with which it was made.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.

    Raises:
        ValueError: a file is damaged, a model that a patch is for does not exist, there is no patch of this snapshot, or
            the newest patch has no inverse.
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
    settings = saved.read(directory / PROMPT, SavedPrompt).model_dump(mode="json", exclude_unset=True)
    sampler = settings.get("sampler") if sampler is None else sampler
    under = _under_patches(
        directory, settings, dtype=dtype, sampler=sampler, attention=attention, trust_remote_code=trust_remote_code
    )
    below = (*under.patches, *_older_patches(directory))
    newest = _newest_patch(directory, under.model, snapshot, inverse)
    return Stack(under.model, under.encoder, below if newest is None else (*below, newest))


def _under_patches(
    directory: Path,
    prompt: Mapping[str, Json],
    *,
    dtype: str | None,
    attention: str,
    sampler: Mapping[str, object] | None,
    trust_remote_code: bool,
) -> Stack:
    """Load what the patches in a directory act on: the stack that `base.json` names, or the checkpoint in the directory."""
    # An artifact of a frozen model holds only its patch, and names in `base.json` the model that the patch is for.
    if (directory / BASE).is_file():
        bases.chain(directory)  # raises if the models refer to one another in a circle: the recursion below would not end
        # The prompt settings are for a plain checkpoint at the end of the chain, which has no settings of its own.
        model, encoder, below = load_stack(
            bases.below(directory),
            dtype=dtype,
            prompt=prompt,
            sampler=sampler,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
        # Each artifact contains the whole preamble of its prompts, including that of the models below it.
        if isinstance(encoder, encoding.Encoder) and "preamble" in prompt:
            encoder = encoder.preceded_by(Preamble.model_validate(prompt["preamble"]))
        return Stack(model, encoder, below)
    checkpoint = directory / "model" if (directory / "model").is_dir() else directory
    # The sampler's own weights of the denoiser were loaded before the model was saved, so the checkpoint holds them.
    sampler = None if sampler is None else {**sampler, "denoiser": None}
    model = models.load_model(
        checkpoint,
        dtype=dtype or models.saved_dtype(checkpoint),
        sampler=sampler,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    return Stack(model, encoder_of(model, checkpoint, prompt, trust_remote_code), ())


def _older_patches(directory: Path) -> tuple[patches.SavedPatch, ...]:
    """Return the older patches that an exported folder holds, the oldest first."""
    numbered = [path for path in (directory / BELOW).glob("*") if path.name.isdecimal()]
    numbered.sort(key=lambda path: int(path.name))  # as numbers: "10" comes after "9"
    return tuple(patches.load(path) for path in numbered)


def _newest_patch(
    directory: Path, model: PreTrainedModel | Diffusion, snapshot: int | None, inverse: bool
) -> patches.SavedPatch | None:
    """Return the directory's own patch, or its inverse; None if it holds none. Raises ValueError as `load_stack` does."""
    patch_dir = directory / "patch" if snapshot is None else directory / "snapshots" / str(snapshot)
    if not patches.exists(patch_dir):
        if snapshot is not None:
            raise ValueError(f"{directory} holds no patch of step {snapshot}; train.snapshots lists the saved steps")
        if inverse:
            raise ValueError(f"{directory} holds no patch, so there is nothing to invert")
        return None
    # A patch in the folder of its own model was saved with it; a patch on another model is checked against that model's
    # fingerprint.
    patch = patches.load(patch_dir, model if (directory / BASE).is_file() else None)
    return patches.inverse(patch) if inverse else patch


def model_directory(directory: Path) -> Path:
    """Return the directory with the config and the tokenizer of a model, given its own directory or that of a patch for it."""
    directory = bases.chain(directory)[-1]
    return directory / "model" if (directory / "model").is_dir() else directory


def load(
    directory: str | Path,
    *,
    dtype: str | None = None,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
    prompt: Mapping[str, object] | None = None,
    snapshot: int | None = None,
    inverse: bool = False,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
    patch: str | Path | Sequence[str | Path] = (),
) -> SteeredModel | SteeredPipeline:
    """Load a model with its patches from an artifact, an exported folder or a plain checkpoint.

    Args:
        directory: The artifact, folder or checkpoint.
        dtype: "float32" or "bfloat16"; None for the type in which the model was saved, or float32 for a plain checkpoint.
        attention: Attention implementation of transformers.
        device: Device of model and patches: auto (a GPU if torch can use one), cpu, cuda, cuda:1.
        prompt: Prompt settings of a plain checkpoint, which has none of its own (the fields of `SavedPrompt`).
        snapshot: Training step after which the patch was saved; None for the patch at the end of the training.
        inverse: Load the inverse of the newest patch, which induces what its maps remove.
        sampler: How a pipeline draws (the fields of `SamplerConfig`); None for the settings with which it was made.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        patch: Control vector (.gguf), folder of a PEFT adapter, or folder of a saved patch, which is added to the model's own
            patches; several in a list, of which the strength scales the last.

    Returns:
        A `SteeredModel` for a language model, a `SteeredPipeline` for a diffusion model.

    Raises:
        ValueError: a file of the artifact is damaged or missing, it holds no patch of that snapshot, the patch has no inverse,
            or `patch` does not fit the model.
    """
    where = models.device(device)  # before minutes of loading
    model, encoder, stack = load_stack(
        directory,
        dtype=dtype,
        attention=attention,
        prompt=prompt,
        snapshot=snapshot,
        inverse=inverse,
        sampler=sampler,
        trust_remote_code=trust_remote_code,
    )
    added = (patch,) if isinstance(patch, str | Path) else tuple(patch)
    if added and isinstance(model, Diffusion):
        raise ValueError(f"{added[0]} is a patch for a language model, and {directory} holds a diffusion pipeline")
    stack = (*stack, *(foreign.read(Path(path), model) for path in added))
    # The patches move to the device when they are attached.
    if isinstance(model, Diffusion):
        return SteeredPipeline(model.to(where), encoder, stack)
    return SteeredModel(model.to(where), encoder, stack)
