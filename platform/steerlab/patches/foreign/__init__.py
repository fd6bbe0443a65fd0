"""Patches in the file formats of other libraries: control vectors of llama.cpp and repeng, low-rank adapters of PEFT.

`read` takes a control vector, a folder with one, an adapter's folder, or a folder of `patches.save`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.guards import files
from steerlab.patches import saving
from steerlab.patches.foreign import adapters, control_vectors
from steerlab.patches.saving import SavedPatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapters", "check", "control_vectors", "read"]


def read(path: Path, model: PreTrainedModel) -> SavedPatch:
    """Read a patch of any known format for a language model, in evaluation mode on the CPU.

    Args:
        path: A control vector (.gguf) or a folder with one, the folder of a PEFT adapter, or a folder of `patches.save`.
        model: The model that the patch is for, with its values or on the meta device.

    Raises:
        ValueError: The path holds no patch, the file is damaged, or the patch is for another model.
    """
    place = _place(path)
    if place.is_file():
        return control_vectors.patch(control_vectors.read(place), model, str(place))
    if saving.exists(place):
        return saving.load(place, model)
    return adapters.read(place, model)


def check(path: Path, hidden_size: int, num_layers: int) -> None:
    """Raise ValueError if a path holds no patch, or one for a model of another width or depth, as far as its files contain
    these sizes."""
    place = _place(path)
    if place.is_file():
        control_vectors.check(control_vectors.read(place), hidden_size, num_layers, str(place))
    elif not saving.exists(place):
        adapters.read_config(place)


def _place(path: Path) -> Path:
    """Return the GGUF file, or the folder of an adapter or a patch, that a path refers to."""
    if path.is_dir():
        files.check_folder(path)
        if saving.exists(path) or (path / adapters.CONFIG).is_file():
            return path
        inside = sorted(path.glob("*.gguf"))
        if len(inside) == 1:
            return inside[0]
        what = f"{len(inside)} GGUF files" if inside else "neither"
        raise ValueError(f"{path} holds {what}: a patch is a control vector (one .gguf), or a PEFT adapter ({adapters.CONFIG})")
    if not path.exists():
        raise ValueError(f"{path} does not exist: a patch is a control vector (.gguf), or the folder of a PEFT adapter")
    files.check(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is not a patch: give a control vector (.gguf), or the folder of a PEFT adapter")
    return path
