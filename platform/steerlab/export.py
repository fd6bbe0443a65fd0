"""Write what a run left as a checkpoint of a plain library: with the patches in its weights, or model and patch apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steerlab import generation, models, patches

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

    `loading` holds options of `generation.load`. The folder is loaded again and compared with the patched model: a
    conversation's log-probabilities, or an image.

    Raises:
        ValueError: the folder exists, several patches do not fold, or what was saved is not the patched model; nothing stays.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; name a new folder")
    loaded = generation.load(artifact, **loading)
    expected = loaded.probe(strength)
    reason = None
    try:
        loaded.fold(strength)
    except patches.CannotFold as refusal:
        reason = str(refusal)
        loaded = generation.load(artifact, **loading)  # some of the weights may have changed
        _write_apart(loaded, directory)
    else:
        loaded.save_model(directory)
    (directory / generation.PROMPT).write_text(json.dumps(loaded.encoder.saved_spec))
    if reason is not None:
        (directory / STRENGTH).write_text(json.dumps(strength))
    saved = generation.load(directory)
    error = float((saved.probe(1.0 if reason is None else strength) - expected).square().mean().sqrt())
    if not error <= loaded.tolerance:
        shutil.rmtree(directory)
        raise ValueError(
            f"nothing was exported: what was saved differs by {error:.2g} from the patched model, which is not rounding"
        )
    if reason is None:
        return Exported(loaded.loading_lines(directory), None)
    return Exported(f"from steerlab import load\nmodel = load({str(directory)!r})\n{loaded.asking_line(strength)}", reason)


def strength_of(directory: Path) -> float:
    """Return the strength at which a folder was exported, as what it holds now takes it."""
    saved = directory / STRENGTH
    return float(json.loads(saved.read_text())) if saved.is_file() else 1.0


def _write_apart(loaded: generation.SteeredModel | generation.SteeredPipeline, directory: Path) -> None:
    """Write a model and the one patch on it. Raises ValueError for several, which belong to what lies below them."""
    if len(loaded.patches) != 1:
        raise ValueError(
            f"this run stacks {len(loaded.patches)} patches that do not all fold into weights: load its run folder instead"
        )
    loaded.save_model(directory / "model")
    patches.save(loaded.patches[0], directory / "patch", models.fingerprint(loaded.model))
