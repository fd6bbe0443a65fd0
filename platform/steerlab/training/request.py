"""What one training computes, as its stage asks for it and as the loop gets it."""

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
    """What one training computes; its inputs lie at references that are valid on every node, or in directories of this one."""

    start: _Place
    """The model, or the artifact with a model and patches, that the training starts from."""
    model: ModelConfig
    method: JsonObject
    """The method's config as it stands in the stage's parameters."""
    data: DataConfig
    train: TrainConfig
    activations: Mapping[str, _Place] = field(default_factory=dict)
    """Extracted activations by the role of their data set."""
    prepared: Mapping[str, _Place] = field(default_factory=dict)
    """What the method's preparations left, by their name."""
    code: tuple[own_code.Code, ...] = ()
    """The file of a method of the user's own."""


def received(request: Request[ModelRef]) -> Request[Path]:
    """Return the request with all inputs as directories of this node, and take the user's own code."""
    own_code.receive(request.code)
    return Request(
        start=request.start.locate(),
        model=request.model,
        method=request.method,
        data=request.data,
        train=request.train,
        activations={role: ref.locate() for role, ref in request.activations.items()},
        prepared={name: ref.locate() for name, ref in request.prepared.items()},
    )
