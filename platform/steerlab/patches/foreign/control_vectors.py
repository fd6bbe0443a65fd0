"""Control vectors: a GGUF file with one vector for each decoder layer, which is added to the layer's output.

    h_N -> h_N + c v_N      on every token, of prompts and responses; c is the scale that the user of the file chooses

Tensors are called `direction.N`, of shape (D,), where N counts the model's decoder layers from 0; keys are
`general.architecture` (controlvector), `controlvector.model_hint` and `controlvector.layer_count`. Three programs read them:

- llama.cpp (common/common.cpp, `common_control_vector_load`) refuses `direction.0` and adds no vector to layer 0;
- repeng (https://github.com/vgel/repeng, extract.py) and EasySteer (https://github.com/ZJU-REAL/EasySteer, algorithm `direct`)
  number the layers in the same way, and also accept `direction.0`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerlab import models
from steerlab.guards import files
from steerlab.guards.faults import explained
from steerlab.job import Selection
from steerlab.models.language import gguf_header
from steerlab.patches.activation import ActivationPatch
from steerlab.patches.maps import AffineLayer, AffineMap
from steerlab.patches.saving import SavedPatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARCHITECTURE, _HINT, _COUNT = "general.architecture", "controlvector.model_hint", "controlvector.layer_count"
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,4})")
_LONGEST = 2**28
"""Largest file in bytes: 1,000 layers of width 65,536 in float32 fit into it."""


class NotAdditive(ValueError):
    """A patch does something else than adding vectors to the outputs of decoder layers; the message gives the reason."""


class ControlVector(NamedTuple):
    """Content of a file."""

    vectors: Mapping[int, Tensor]
    """Vectors (D,) in float32 by the number of the decoder layer, from 0."""
    model_hint: str
    """Type of the model, as transformers calls it in repeng's files and llama.cpp in its own; empty if the file has none."""


def of_patch(patch: SavedPatch, model: PreTrainedModel, strength: float = 1.0) -> dict[int, Tensor]:
    """Return the vector that a patch adds to the output of each decoder layer, by the number of the layer.

    Args:
        patch: The patch.
        model: The model that it is for.
        strength: Factor of the vectors.

    Raises:
        NotAdditive: The patch is not a sum of such vectors.
    """
    if not isinstance(patch, ActivationPatch):
        raise NotAdditive(f"a patch of kind {patch.kind} does not add a vector to activations")
    check_places(patch, model)
    numbers = {name: number for number, name in enumerate(models.layer_names(model))}
    vectors: dict[int, Tensor] = {}
    for name, layer in zip(patch.sizes, patch.layers(), strict=True):
        if not isinstance(layer, AffineLayer):
            raise NotAdditive(f"the map of {name} is of kind {layer.kind}, not a vector that is added")
        # The scale has to be exactly 1, because an added vector has no scale, and a scale of nearly 1 still steers by the size
        # of the activation.
        if not bool((layer.scale == 1).all()):
            num = int((layer.scale != 1).sum())
            raise NotAdditive(f"the map of {name} scales {num} of {len(layer.scale)} neurons, which an added vector cannot do")
        # A map without bounds has infinite ones in a patch where others have bounds.
        if layer.low is not None and layer.high is not None and not bool((layer.low.isinf() & layer.high.isinf()).all()):
            raise NotAdditive(f"the map of {name} acts only within bounds, and a vector is added to every value")
        vectors[numbers[name]] = strength * layer.shift.detach().float().cpu()
    return vectors


def check_places(patch: ActivationPatch, model: PreTrainedModel) -> None:
    """Raise NotAdditive unless a patch acts on the outputs of decoder layers, and on every token."""
    if not patch.selection.takes_all_tokens:
        raise NotAdditive("the patch acts only on some tokens (steer), and a control vector is added to every token")
    if patch.selection.side == "input":
        raise NotAdditive("the patch changes inputs of modules, and a control vector is added to outputs of decoder layers")
    layers = models.layer_names(model)
    other = next((name for name in patch.sizes if name not in layers), None)
    if other is not None:
        raise NotAdditive(
            f"the patch acts at {other}, and a control vector is added to outputs of decoder layers ({layers[0]})"
        )


def write(path: Path, vectors: Mapping[int, Tensor], model_hint: str) -> None:
    """Write vectors, (D,) by the number of the layer, as a GGUF file; `model_hint` is the config's `model_type`."""
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string(_HINT, model_hint)
    writer.add_uint32(_COUNT, len(vectors))
    for number, vector in sorted(vectors.items()):
        # llama.cpp takes float32 only.
        writer.add_tensor(f"direction.{number}", vector.detach().cpu().to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> ControlVector:
    """Read a file.

    Raises:
        ValueError: The file is damaged, is not a control vector, or holds a value that is not finite.
    """
    import gguf

    files.check(path, _LONGEST)
    # The library trusts the sizes in the header, so they are compared with the file first.
    gguf_header.read(path)
    with explained(f"the control vector {path}"):
        reader = gguf.GGUFReader(path)
    architecture = _text(reader.get_field(_ARCHITECTURE))
    if architecture != "controlvector":
        raise ValueError(f"{path} is not a control vector: its architecture is {architecture[:40]!r}, not 'controlvector'")
    vectors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise ValueError(f"{path}: tensor {tensor.name!r:.60} is not direction.N with the number of a layer")
        if len(tensor.shape) != 1 or tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name} of shape {tensor.shape.tolist()}, not a vector"
            )
        # The data are copied, because the reader's arrays are pages of the file.
        vectors[int(match[1])] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        if not bool(vectors[int(match[1])].isfinite().all()):
            raise ValueError(f"{path}: {tensor.name} holds a value that is NaN or infinite")
    if not vectors:
        raise ValueError(f"{path} holds no direction")
    return ControlVector(vectors, _text(reader.get_field(_HINT)))


def _text(field: object) -> str:
    """Return the text of a key of the library's reader; empty for a missing key, or one that holds no text."""
    import gguf

    if not isinstance(field, gguf.ReaderField) or field.types != [gguf.GGUFValueType.STRING]:
        return ""
    return bytes(field.parts[-1]).decode(errors="replace")


def check(vector: ControlVector, hidden_size: int, num_layers: int, where: str) -> None:
    """Raise ValueError unless a control vector fits a model; `where` is the file."""
    late = max(vector.vectors)
    if late >= num_layers:
        raise ValueError(f"{where} has a direction for layer {late}; the model has the layers 0 to {num_layers - 1}")
    for number, direction in vector.vectors.items():
        if len(direction) != hidden_size:
            raise ValueError(f"{where}: direction.{number} has width {len(direction)}; the model has width {hidden_size}")


def patch(vector: ControlVector, model: PreTrainedModel, where: str) -> ActivationPatch:
    """Return the patch that adds a control vector to a model's layers, on every token; `where` is the file.

    Raises:
        ValueError: The vector is for a model of another width, or of fewer or more layers.
    """
    names = models.layer_names(model)
    check(vector, models.embedding_shape(model)[1], len(names), where)
    kind = models.text_config(model).model_type
    # A difference gives only a warning, because llama.cpp calls several types of transformers by one name.
    if vector.model_hint and vector.model_hint not in (kind, model.config.model_type):
        warnings.warn(f"{where} was made for a model of type {vector.model_hint!r:.40}; this one is {kind!r}", stacklevel=2)
    maps = {names[number]: AffineMap.shift(direction) for number, direction in sorted(vector.vectors.items())}
    # Module paths are escaped, because their dots would match any character.
    return ActivationPatch.from_maps(maps, Selection(modules="|".join(map(re.escape, maps))))
