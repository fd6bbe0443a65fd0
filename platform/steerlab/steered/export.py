"""Export a steered model as a checkpoint of transformers or diffusers.

If the patches can be merged into the weights, the checkpoint works without this package. Otherwise the folder holds the
model and the patches side by side, and `steerlab.load` opens it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from steerlab import models, patches
from steerlab.guards import saved
from steerlab.steered import drawing, language, stacks
from steerlab.steered.model import differences
from steerlab.steered.stacks import BELOW
from steerlab.storage.bases import PROMPT

_Steered = language.SteeredModel | drawing.SteeredPipeline
STRENGTH = "strength.json"
"""File with the strength for which a patch beside a model was exported; absent if the patch is in the weights."""


class Exported(NamedTuple):
    """Code that uses the exported folder, and the outcome of the merge."""

    lines: str
    """Python code that loads the folder."""
    reason: str | None
    """Reason why the patch could not be merged into the weights; None if it was."""


def write(artifact: Path, directory: Path, *, strength: float, loading: Mapping[str, Any]) -> Exported:
    """Write a model with its patches into a new folder, load it again, and compare it with the patched model.

    Args:
        artifact: Directory of the artifact.
        directory: The folder; it must not exist.
        strength: Strength of the newest patch.
        loading: Options of `stacks.load`.

    Raises:
        ValueError: the folder exists, or the loaded folder gives other log-probabilities or images than the patched model. The
            folder is then removed.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; name a new folder")
    loaded = stacks.load(artifact, **loading)
    # The probe runs before anything is merged, because afterwards the patched model does not exist any more.
    expected = loaded.probe(strength)
    # `effect` is how far the patches move the probe: a merged model must be much closer to the patched model than the plain one
    # is.
    effect = max(differences(expected, loaded.plain_probe()))
    reason = _fold(loaded, directory, strength, expected, effect, loading)
    if reason is None:
        return Exported(loaded.loading_lines(directory), None)
    shutil.rmtree(directory, ignore_errors=True)
    loaded = stacks.load(artifact, **loading)  # again, because `fold` may have changed some of the weights before it failed
    _write_apart(loaded, directory, strength)
    error = max(differences(_load(directory, loading).probe(strength), expected))
    if not error <= loaded.tolerance:  # written so that a NaN is refused as well
        shutil.rmtree(directory)
        raise ValueError(
            f"nothing was exported: the saved model differs by {error:.2g} from the patched model, which is more than rounding"
        )
    return Exported(f"from steerlab import load\nmodel = load({str(directory)!r})\n{loaded.asking_line(strength)}", reason)


def strength_of(directory: Path) -> float:
    """Return the strength at which an exported folder is to be used: 1 if the patch is in the weights."""
    return saved.read(directory / STRENGTH, float) if (directory / STRENGTH).is_file() else 1.0


_SHARE = 0.1
"""Maximum error of the merged weights, as a share of the patches' own effect: a weak patch must not vanish in rounding."""


def _fold(
    loaded: _Steered,
    directory: Path,
    strength: float,
    expected: Sequence[Tensor],
    effect: float,
    loading: Mapping[str, object],
) -> str | None:
    """Write a model whose weights hold its patches; return the reason if that failed, or None if it gives the outputs of
    `expected`."""
    bound = min(loaded.tolerance, _SHARE * effect) if loaded.patches else loaded.tolerance
    try:
        loaded.fold(strength)
    except patches.CannotFold as refusal:
        return str(refusal)
    loaded.save_model(directory)
    (directory / PROMPT).write_text(json.dumps(loaded.encoder.saved_spec))
    error = max(differences(_load(directory, loading).probe(), expected))
    if error <= bound:
        return None
    return f"merged into the weights, the patch has an error of {error:.2g}, and its whole effect is {effect:.2g}"


def _load(directory: Path, loading: Mapping[str, Any]) -> _Steered:
    """Load an exported folder in the type in which it was saved."""
    # The attention kernel is the same, because other kernels round in another way, which would look like an error of the
    # export.
    kernels = {name: loading[name] for name in ("attention", "trust_remote_code") if name in loading}
    return stacks.load(directory, **kernels)


def _write_apart(loaded: _Steered, directory: Path, strength: float) -> None:
    """Write a model, its patches, its prompt settings and the strength beside one another."""
    loaded.save_model(directory / "model")
    fingerprint = models.fingerprint(loaded.model)
    *below, newest = loaded.patches
    for number, patch in enumerate(below):
        patches.save(patch, directory / BELOW / str(number), fingerprint)
    patches.save(newest, directory / "patch", fingerprint)
    (directory / PROMPT).write_text(json.dumps(loaded.encoder.saved_spec))
    # The strength is not merged into the patch, because a user may still want other strengths; the file only sets the default.
    (directory / STRENGTH).write_text(json.dumps(strength))
