"""The description of one training, which the stage sends to the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from steerlab.guards.json_values import JsonObject
from steerlab.job import DataConfig, ModelConfig, TrainConfig, own_code
from steerlab.storage.plan import ModelRef

_Place = TypeVar("_Place", ModelRef, Path)


@dataclass(frozen=True)
class Request(Generic[_Place]):
    """Everything on which the result of a training depends.

    Its inputs are references that are valid on every node (`ModelRef`), or directories of this node (`Path`).
    """

    start: _Place
    """The model from which the training starts, or an artifact with a model and patches."""
    model: ModelConfig
    method: JsonObject
    """The method's config, as in the stage's parameters."""
    data: DataConfig
    train: TrainConfig
    activations: Mapping[str, _Place] = field(default_factory=dict)
    """Extracted activations by the role of their data set."""
    prepared: Mapping[str, _Place] = field(default_factory=dict)
    """Outputs of the method's preparations, by the preparation's name."""
    # Code is sent by value, since other nodes may lack the user's file.
    code: tuple[own_code.Code, ...] = ()
    """The user's own file with the method; empty for a method of the platform."""


def received(request: Request[ModelRef]) -> Request[Path]:
    """Install the user's own code on this node, and return the request with its inputs as directories of this node."""
    # Received first, since the method's config is a class of that file.
    own_code.receive(request.code)
    return Request(
        start=request.start.locate(),
        model=request.model,
        method=request.method,
        data=request.data,
        train=request.train,
        activations={role: ref.locate() for role, ref in request.activations.items()},
        # `locate` downloads an artifact of a bucket to this node, once for all of its ranks.
        prepared={name: ref.locate() for name, ref in request.prepared.items()},
    )
