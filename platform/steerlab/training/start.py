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
    """The trainee of a rank, and its rows."""

    request: Request[Path]
    """The request, with epochs resolved to a number of steps."""
    module: Trainee
    encoder: RowEncoder
    rows: Rows
    validation: Rows | None
    model_key: str
    """Fingerprint of the model for a patch without trained weights; empty if the model itself is trained."""

    @property
    def data(self) -> DataSet:
        """The training data set."""
        return self.request.data.by_role[self.module.trains_on]

    @property
    def row_counts(self) -> dict[str, int]:
        """Numbers of training rows, and of truncated, changed and dropped rows."""
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
    # Seeded before the method adds its parameters, so that every rank initialises them with the same values.
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
    # Computed before the trainee is made, since some trainees change the modules of the model.
    model_key = "" if method.leaves_model else models.fingerprint(model)
    # Moved before the trainee is made, which may run the model, copy it, and create tensors on the device of its weights.
    model.to(device)
    rows = load_rows(request.data.by_role[method.module.trains_on], encoder, request.train.max_tokens)
    # Epochs are counted in training rows; rows that were dropped because their prompt does not fit do not count.
    request = replace(request, train=request.train.resolved(len(rows.rows)))
    # Encoded on every rank, since the loop gives each rank a share of the passes.
    validation_data = request.data.validation
    validation = load_rows(validation_data, encoder, request.train.max_tokens) if validation_data else None
    activations = {role: Activations.open(path) for role, path in request.activations.items()}
    # `below` are the patches of the starting model, which the trainee attaches together with its own.
    inputs = Inputs(below, activations, request.prepared)
    # The stage's parameters contain the config as JSON.
    config = method.Config.model_validate(request.method)
    module = method.module(model, config, inputs).to(device)  # type: ignore[call-arg]
    # Checked here, since the contract's constructor cannot run after that of the derived class.
    module.check(inputs.below)
    # `from_pretrained` returns a model in evaluation mode, in which transformers checkpoints no activations.
    module.train()
    return Start(request, module, encoder, rows, validation, model_key)
