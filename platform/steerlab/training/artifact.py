"""The artifact of a training: the model's weights, the patch and its snapshots, the prompt settings, the metrics, facts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from steerlab import models, patches
from steerlab.inputs.encoded_rows import RowEncoder
from steerlab.job import ModelConfig
from steerlab.methods.contract import Trainee


@dataclass(frozen=True)
class Result:
    """What a training has made, as rank 0 holds it at the end."""

    module: Trainee
    """The trainee, which says whether the artifact holds a model, a patch or both."""
    encoder: RowEncoder
    model: ModelConfig
    model_key: str
    """Fingerprint of the model that a patch alone belongs to; unused if the model itself trained."""
    state: dict[str, Tensor]
    """The trained weights: those of the whole module, or those of the patch if it is all that is left."""
    snapshots: Mapping[str, Tensor]
    """Weights of the patch after earlier steps, by `<step>/<name>`."""
    snapshot_steps: Sequence[int]
    history: Sequence[Mapping[str, float]]
    """Metrics of each step."""
    facts: Mapping[str, int]


def write(result: Result, output: Path) -> None:
    """Write the artifact into a directory; an existing one is replaced."""
    # An attempt that was killed while it wrote may have left half of one.
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    module, state, model_key = result.module, result.state, result.model_key
    if module.leaves_model:
        state, model_key = _write_model(result, output)
    if module.patch is not None:
        patches.save(module.finished(state), output / "patch", model_key)
        # In the same form as the final patch, so that a task can evaluate any of them.
        for step in result.snapshot_steps:
            weights = {n.partition("/")[2]: value for n, value in result.snapshots.items() if n.startswith(f"{step}/")}
            patches.save(module.finished(weights), output / "snapshots" / str(step), model_key)
    # A saved model brings its tokenizer; a patch alone must say from where its model's tokenizer came.
    prompt = result.encoder.saved_spec if module.leaves_model else result.encoder.spec
    (output / "prompt.json").write_text(json.dumps(prompt))
    # One line a step, written at the end: a line of a killed run would stand in it twice.
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in result.history))
    (output / "training.json").write_text(json.dumps(result.facts, indent=2))


def _write_model(result: Result, output: Path) -> tuple[dict[str, Tensor], str]:
    """Write the trained weights and the tokenizer, and return the patch's state and the fingerprint of the new model."""
    # The patch's fingerprint below is taken of what is on disk: rounding to the model's dtype happens here.
    models.save_trained(result.module.model, result.module.model_state(result.state), output / "model")
    result.encoder.save(output / "model")
    model_key = result.model_key
    if result.module.patch is not None:
        # The fingerprint is that of the model as it is loaded from disk, with which `patches.load` compares it.
        loading = {"dtype": result.model.dtype, "trust_remote_code": result.model.trust_remote_code}
        model_key = models.fingerprint(models.load_model(output / "model", **loading))
    patch_state = {name.removeprefix("patch."): value for name, value in result.state.items() if name.startswith("patch.")}
    return patch_state, model_key
