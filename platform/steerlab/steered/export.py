"""Write what a run left as a checkpoint of a plain library: with the patches in its weights, or model and patch apart."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from steerlab import models, patches
from steerlab.guards import saved
from steerlab.steered import language
from steerlab.steered.stacks import BELOW
from steerlab.storage.bases import PROMPT

_Steered = language.SteeredModel | language.SteeredPipeline
STRENGTH = "strength.json"
"""The strength that is meant where a patch lies beside its model; in weights it is 1."""


class Exported(NamedTuple):
    """What was written."""

    lines: str
    """Python that loads it."""
    reason: str | None
    """Why the patch lies beside the model; None where it is in the weights."""


def write(artifact: Path, directory: Path, *, strength: float, loading: Mapping[str, Any]) -> Exported:
    """Write a model with the patch that it carries, at a strength, into a new folder.

    `loading` holds options of `language.load`. The folder is loaded again and compared with the patched model: the
    log-probabilities of several conversations, or images. Patches that do not become weights lie beside the model.

    Raises:
        ValueError: the folder exists, or what was saved is not the patched model; nothing stays.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; name a new folder")
    loaded = language.load(artifact, **loading)
    expected = loaded.probe(strength)
    effect = max(_differences(expected, loaded.plain_probe()))
    reason = _fold(loaded, directory, strength, expected, effect, loading)
    if reason is None:
        return Exported(loaded.loading_lines(directory), None)
    shutil.rmtree(directory, ignore_errors=True)
    loaded = language.load(artifact, **loading)  # some of the weights may have changed
    _write_apart(loaded, directory, strength)
    error = max(_differences(_load(directory, loading).probe(strength), expected))
    if not error <= loaded.tolerance:
        shutil.rmtree(directory)
        raise ValueError(
            f"nothing was exported: what was saved differs by {error:.2g} from the patched model, which is not rounding"
        )
    return Exported(f"from steerlab import load\nmodel = load({str(directory)!r})\n{loaded.asking_line(strength)}", reason)


def strength_of(directory: Path) -> float:
    """Return the strength at which a folder was exported, as what it holds now takes it."""
    return saved.read(directory / STRENGTH, float) if (directory / STRENGTH).is_file() else 1.0


_SHARE = 0.1
"""Share of the patches' own effect by which the folded weights may miss it."""


def _fold(
    loaded: _Steered,
    directory: Path,
    strength: float,
    expected: Sequence[Tensor],
    effect: float,
    loading: Mapping[str, Any],
) -> str | None:
    """Write a model whose weights hold its patches, and return why that is not the patched model; None where it is."""
    bound = min(loaded.tolerance, _SHARE * effect) if loaded.patches else loaded.tolerance
    try:
        loaded.fold(strength)
    except patches.CannotFold as refusal:
        return str(refusal)
    loaded.save_model(directory)
    (directory / PROMPT).write_text(json.dumps(loaded.encoder.saved_spec))
    error = max(_differences(_load(directory, loading).probe(), expected))
    if error <= bound:
        return None
    return f"in the weights, the patch is off by {error:.2g}, where all that it does is {effect:.2g}"


def _load(directory: Path, loading: Mapping[str, Any]) -> _Steered:
    """Load what was written, in the type in which it was saved, with the same kernels."""
    kernels = {name: loading[name] for name in ("attention", "trust_remote_code") if name in loading}
    return language.load(directory, **kernels)


def _differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the root mean square difference of each of several probes; infinity where one of them is no number."""
    differences = [float((one - other).square().mean().sqrt()) for one, other in zip(found, expected, strict=True)]
    return [math.inf if math.isnan(difference) else difference for difference in differences]


def _write_apart(loaded: _Steered, directory: Path, strength: float) -> None:
    """Write a model, the patches on it, how it is asked, and the strength that is meant."""
    loaded.save_model(directory / "model")
    fingerprint = models.fingerprint(loaded.model)
    *below, newest = loaded.patches
    for number, patch in enumerate(below):
        patches.save(patch, directory / BELOW / str(number), fingerprint)
    patches.save(newest, directory / "patch", fingerprint)
    (directory / PROMPT).write_text(json.dumps(loaded.encoder.saved_spec))
    (directory / STRENGTH).write_text(json.dumps(strength))
