"""The artifact of a training: the model's weights, the patch and its snapshots, prompt settings, metrics and facts."""

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
    """Result of a training, on rank 0."""

    module: Trainee
    """The trainee, which defines whether the artifact has a model, a patch or both."""
    encoder: RowEncoder
    model: ModelConfig
    model_key: str
    """Fingerprint of the model for a patch without trained weights; unused if the model itself was trained."""
    state: dict[str, Tensor]
    """The trained weights: of the whole module, or only of the patch if the model itself was not trained."""
    snapshots: Mapping[str, Tensor]
    """Weights of the patch after earlier steps, by `<step>/<name>`."""
    snapshot_steps: Sequence[int]
    history: Sequence[Mapping[str, float]]
    """Metrics of each step."""
    facts: Mapping[str, int]


def write(result: Result, output: Path) -> None:
    """Write the artifact into a directory; an existing one is replaced."""
    # A killed attempt may have left an incomplete one.
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    module, state, model_key = result.module, result.state, result.model_key
    if module.leaves_model:
        state, model_key = _write_model(result, output)
    if module.patch is not None:
        patches.save(module.finished(state), output / "patch", model_key)
        # Snapshots have the form of the final patch, so that a task can evaluate each of them.
        for step in result.snapshot_steps:
            weights = {n.partition("/")[2]: value for n, value in result.snapshots.items() if n.startswith(f"{step}/")}
            patches.save(module.finished(weights), output / "snapshots" / str(step), model_key)
    # A saved model includes its tokenizer; the settings of a patch alone must name the source of its model's tokenizer.
    prompt = result.encoder.saved_spec if module.leaves_model else result.encoder.spec
    (output / "prompt.json").write_text(json.dumps(prompt))
    # The lines, one per step, are written at the end, since a resumed run would otherwise write some of them twice.
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in result.history))
    (output / "training.json").write_text(json.dumps(result.facts, indent=2))


def _write_model(result: Result, output: Path) -> tuple[dict[str, Tensor], str]:
    """Write the trained weights and the tokenizer, and return the patch's state and the fingerprint of the new model."""
    # Saving rounds the weights to the model's dtype, so the fingerprint below is computed from the saved files.
    models.save_trained(result.module.model, result.module.model_state(result.state), output / "model")
    result.encoder.save(output / "model")
    model_key = result.model_key
    if result.module.patch is not None:
        # `patches.load` compares this fingerprint with that of the model as loaded from disk.
        loading = {"dtype": result.model.dtype, "trust_remote_code": result.model.trust_remote_code}
        model_key = models.fingerprint(models.load_model(output / "model", **loading))
    patch_state = {name.removeprefix("patch."): value for name, value in result.state.items() if name.startswith("patch.")}
    return patch_state, model_key
