"""The start of a training on one rank: the model, the tokenised rows, and the trainee of the method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from steerlab import models
from steerlab.activations.parquet import Activations
from steerlab.inputs.encoded_rows import RowEncoder, Rows
from steerlab.job import DataSet, prompt_settings
from steerlab.methods import trained
from steerlab.methods.contract import Inputs, Trainee
from steerlab.steered.stacks import load_stack
from steerlab.training.request import Request
from steerlab.training.training_rows import load_rows


@dataclass(frozen=True)
class Start:
    """What a rank trains, and on which rows."""

    request: Request[Path]
    """The request, whose number of steps is now known."""
    module: Trainee
    encoder: RowEncoder
    rows: Rows
    validation: Rows | None
    model_key: str
    """Fingerprint of the model that a patch alone belongs to; empty if the model itself trains."""

    @property
    def data(self) -> DataSet:
        """The data set whose rows are trained on."""
        return self.request.data.by_role[self.module.trains_on]

    @property
    def row_counts(self) -> dict[str, int]:
        """Numbers of rows that train, and of those that were cut, changed or left out."""
        return {
            "rows": len(self.rows.rows),
            "rows_cut": self.rows.num_cut,
            "rows_melted": self.encoder.num_melted,
            "rows_dropped": self.rows.num_dropped,
            "rows_refused": self.rows.num_refused,
            "specials_neutralised": self.encoder.num_neutralised,
        }


def load(request: Request[Path], device: torch.device, gradient_checkpointing: bool) -> Start:
    """Load the model and the rows, and make the trainee. Raises ValueError for rows or settings that do not fit."""
    # Before the method adds its parameters, so that every rank initialises them with the same values.
    torch.manual_seed(request.train.seed)
    method = trained(request.method)
    encoder: RowEncoder
    model, encoder, below = load_stack(
        request.start,
        dtype=request.model.dtype,
        attention=request.model.attention,
        trust_remote_code=request.model.trust_remote_code,
        seed=request.train.seed,
        sampler=request.model.drawing.model_dump(mode="json"),
        prompt=prompt_settings(request.model, request.data),
    )
    models.start_training(model, gradient_checkpointing)
    # Taken before the trainee is made: some trainees change the modules of the model.
    model_key = "" if method.leaves_model else models.fingerprint(model)
    # Before the trainee is made: it may run the model, copy it, and make tensors beside its weights.
    model.to(device)
    rows = load_rows(request.data.by_role[method.module.trains_on], encoder, request.train.max_tokens)
    # Epochs are counted in rows that train: those that were dropped because their prompt does not fit do not count.
    request = replace(request, train=request.train.resolved(len(rows.rows)))
    # Encoded on every rank: the loop gives each of them its share of the passes.
    validation_data = request.data.validation
    validation = load_rows(validation_data, encoder, request.train.max_tokens) if validation_data else None
    activations = {role: Activations.open(path) for role, path in request.activations.items()}
    # `below`: patches of the model that the training starts from, which the trainee attaches together with its own.
    inputs = Inputs(below, activations, request.prepared)
    # From the stage's parameters, where it lies as JSON.
    config = method.Config.model_validate(request.method)
    module = method.module(model, config, inputs).to(device)  # type: ignore[call-arg]
    # Here and not in the contract's constructor, which cannot run after that of the class that derives from it.
    module.check(inputs.below)
    # `from_pretrained` returns a model in evaluation mode, in which transformers checkpoints no activations.
    module.train()
    return Start(request, module, encoder, rows, validation, model_key)
