"""Export the patches of a language model in the file formats of other programs.

gguf          control vector for llama.cpp and repeng (patches/foreign/control_vectors.py)
easysteer     the same file for EasySteer, which also takes a vector for layer 0
peft          low-rank adapter for `peft.PeftModel.from_pretrained` (patches/foreign/adapters.py)
logit-head    the second head of a logit patch as safetensors, with its arithmetic in the README

A patch that a format cannot hold is refused with the reason. Maps of decoder layers that do more than add a vector can be
approximated by one, on request: each layer's vector is the mean of what its map adds on a few fixed texts, and the error is
measured on these texts. The written files are read again and compared with the patched model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from steerlab import models
from steerlab.patches import LogitPatch, foreign
from steerlab.patches.foreign import adapters, control_vectors
from steerlab.patches.foreign.control_vectors import NotAdditive
from steerlab.steered import stacks
from steerlab.steered.language import SteeredModel
from steerlab.steered.model import differences
from steerlab.steered.nearest_vectors import is_approximable, mean_moves

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VECTOR, HEAD = "vector.gguf", "logit_head.safetensors"
_SHARE = 0.1
"""Maximum error of the written file, as a share of the patches' own effect."""


class Written(NamedTuple):
    """Code that uses the exported folder, and its difference to the patched model."""

    lines: str
    """Commands or Python code that use it, as a Markdown block."""
    note: str | None
    """Difference to the patched model in words; None if there is no difference."""


class _Request(NamedTuple):
    model: SteeredModel
    directory: Path
    strength: float
    base: str | None
    approximate: bool


def write(
    artifact: Path,
    directory: Path,
    format_name: str,
    *,
    strength: float,
    loading: Mapping[str, Any],
    base: str | None = None,
    approximate: bool = False,
) -> Written:
    """Write the patches of an artifact into a new folder.

    Args:
        artifact: Directory of the artifact.
        directory: The folder; it must not exist.
        format_name: A key of FORMATS.
        strength: Strength of the newest patch, which becomes part of the numbers; older patches have strength 1.
        loading: Options of `stacks.load`.
        base: Hub id or path of the model, which adapters name; None if it is not known.
        approximate: Whether maps that do more than add a vector are approximated by a vector.

    Raises:
        ValueError: The folder exists, the format cannot hold the patches, or the written file computes something else.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; name a new folder")
    model = stacks.load(artifact, **loading)
    if not isinstance(model, SteeredModel):
        raise ValueError(f"{format_name} holds patches of language models, and this one draws images; export a checkpoint")
    if not model.patches:
        raise ValueError(f"this model has no patch that {format_name} could hold (its weights were trained as a whole)")
    if approximate and format_name not in _OF_VECTORS:
        raise ValueError(f"only the vectors of {' and '.join(_OF_VECTORS)} can approximate a map; {format_name} is exact")
    directory.mkdir(parents=True)
    try:
        return FORMATS[format_name](_Request(model, directory, strength, base, approximate))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _gguf(request: _Request) -> Written:
    note = _write_vectors(request, first_layer=1)
    path = request.directory / VECTOR
    return Written(
        "```bash\n"
        f"llama-cli -m model.gguf --control-vector {path} -p 'a prompt'   # or --control-vector-scaled FILE SCALE\n"
        "```\n\n```python\n"
        "from repeng import ControlModel, ControlVector\n\n"
        f"vector = ControlVector.import_gguf({str(path)!r})\n"
        "model = ControlModel(model, list(vector.directions))\n"
        "model.set_control(vector, 1.0)\n```\n\n"
        f"{_own_lines(path)}",
        note,
    )


def _easysteer(request: _Request) -> Written:
    note = _write_vectors(request, first_layer=0)
    path = request.directory / VECTOR
    return Written(
        f"In EasySteer, `{VECTOR}` is the `source` of a vector with the algorithm `direct`, scale 1, without\n"
        "normalisation, on all tokens of prompt and generation. The file names its layers as the model counts them, from 0.\n\n"
        f"{_own_lines(path)}",
        note,
    )


def _own_lines(path: Path) -> str:
    return (
        "```python\nfrom steerlab import load\n\n"
        f"model = load('MODEL', patch={str(path)!r})\nprint(model.answer('instruction'))\n```"
    )


def _write_vectors(request: _Request, first_layer: int) -> str | None:
    """Write the sum of a stack's vectors; return the difference to the patched model in words, or None."""
    model, below = request.model, request.model.patches[:-1]
    total: dict[int, Tensor] = {}
    try:
        parts = [control_vectors.of_patch(patch, model.model) for patch in below]
    except NotAdditive as reason:
        raise ValueError(f"an older patch of this model cannot be exported as vectors: {reason}") from None
    note = None
    try:
        parts.append(control_vectors.of_patch(model.patches[-1], model.model, request.strength))
    except NotAdditive as reason:
        if not is_approximable(model):
            raise ValueError(f"{reason}; without --format, export writes a checkpoint") from None
        if not request.approximate:
            raise ValueError(f"{reason}; --approximate writes the nearest vectors and reports the error") from None
        note = str(reason)
        parts.append(mean_moves(model, request.strength))
    for vectors in parts:
        for number, vector in vectors.items():
            total[number] = total[number] + vector if number in total else vector
    total = {number: vector for number, vector in total.items() if bool(vector.any())}
    if not total:
        raise ValueError(f"the patch adds nothing at strength {request.strength:g}")
    if first_layer and 0 in total:
        if not request.approximate:
            raise ValueError(
                "the patch adds a vector to layer 0, and llama.cpp refuses a file that does: steer from layer 1 on, or give "
                "--approximate to omit layer 0, or --format easysteer for a program that accepts it"
            )
        total.pop(0)
        note = "; ".join(filter(None, [note, "the vector of layer 0 is omitted, because llama.cpp has no place for it"]))
    control_vectors.write(request.directory / VECTOR, total, models.text_config(model.model).model_type)
    return _compared(request, request.directory / VECTOR, note)


def _compared(request: _Request, path: Path, note: str | None) -> str | None:
    """Compare the model that uses the written file with the patched model; return the note, with the error of an approximation.

    Raises:
        ValueError: They differ, by more than rounding or, for an approximation, by as much as the patch does.
    """
    model = request.model
    expected = model.probe(request.strength)
    model.detach()
    written = foreign.read(path, model.model)
    plain = SteeredModel(model.model, model.encoder, ())
    effect = max(differences(plain.probe(), expected))
    plain.detach()
    again = SteeredModel(model.model, model.encoder, (written,))
    error = max(differences(again.probe(), expected))
    again.detach()
    if note is None:
        # Rounding of float32 is about 1e-6 nats; a share alone would refuse a patch with almost no effect.
        if not error <= min(model.tolerance, max(_SHARE * effect, 1e-5)):
            raise ValueError(
                f"nothing was exported: the written file differs by {error:.2g} nats, and the patch's whole effect is "
                f"{effect:.2g}"
            )
        return None
    if not error < effect or math.isinf(effect):
        raise ValueError(
            f"{note}; the nearest vectors have an error of {error:.2g} nats, the patch an effect of {effect:.2g}: without "
            "--format, export writes a checkpoint"
        )
    return f"{note}. Approximated: the error is {error:.2g} nats a token, and the patch moves them by {effect:.2g}"


def _peft(request: _Request) -> Written:
    model, directory = request.model, request.directory
    try:
        adapters.write(directory, model.patches, request.strength, model.model, request.base)
    except adapters.NoAdapter as reason:
        raise ValueError(f"{reason}; without --format, export writes a checkpoint") from None
    _compared(request, directory, None)
    base = request.base or "MODEL"
    return Written(
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(model, {str(directory)!r})\n```",
        None,
    )


def _logit_head(request: _Request) -> Written:
    model = request.model
    patch, below = model.patches[-1], model.patches[:-1]
    if not isinstance(patch, LogitPatch) or below:
        kinds = ", ".join(each.kind for each in model.patches)
        raise ValueError(f"a logit head is the export of one patch of kind logit; this model has {kinds}")
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in patch.tensors().items()}
    facts = {"head": patch.head, "layer": "" if patch.layer is None else str(patch.layer), "alpha": f"{request.strength:g}"}
    save_file(tensors, request.directory / HEAD, metadata=facts)
    return Written(_head_lines(request.directory / HEAD, patch, request.strength, request.base or "MODEL", model.model), None)


def _head_lines(path: Path, patch: LogitPatch, alpha: float, base: str, model: PreTrainedModel) -> str:
    """Return Python code that adds the head to a model of plain transformers."""
    # `output_hidden_states` is not used, because its last entry is the output of the final norm and not of the last layer.
    place = "get_output_embeddings().register_forward_pre_hook(lambda _m, inputs: states.append(inputs[0]))"
    if patch.layer is not None:
        name = models.layer_names(model)[patch.layer]
        kept = "states.append(out[0] if isinstance(out, tuple) else out)"
        place = f"get_submodule({name!r}).register_forward_hook(lambda _m, _i, out: {kept})"
    # These are f(h) of `LogitPatch`, which `up` is multiplied with.
    features = {
        "linear": "h",
        "low_rank": "F.linear(h, head['down'])",
        "mlp": "F.gelu(F.linear(h, head['down'], head['bias']))",
    }[patch.head]
    lines = [
        "```python",
        "import torch.nn.functional as F",
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({base!r})",
        f"head, alpha = load_file({str(path)!r}), {alpha:g}",
        "states = []",
        f"model.{place}",
        "",
        "",
        "def logits(**inputs):",
        "    states.clear()",
        "    plain = model(**inputs).logits",
        "    h = states[0]",
        f"    return plain + alpha * F.linear({features}, head['up'])",
        "```",
    ]
    return "\n".join(lines)


_OF_VECTORS = ("gguf", "easysteer")
FORMATS: Mapping[str, Callable[[_Request], Written]] = {
    "gguf": _gguf,
    "easysteer": _easysteer,
    "peft": _peft,
    "logit-head": _logit_head,
}
"""Writer by the name of the format."""
