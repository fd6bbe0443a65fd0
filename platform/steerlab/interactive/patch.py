"""A patch in Python: the result of `fit`, to attach, plot, save, and fold into weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from steerlab import patches
from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.interactive.model_origin import Origin
from steerlab.interactive.opened_model import Model
from steerlab.interactive.outputs import html_table
from steerlab.steered.stacks import BELOW
from steerlab.storage.bases import BASE, PROMPT

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from steerlab.patches.maps import MapLayer

_METHOD = "method.json"
"""File with the config of the method that made a patch, beside a patch that `Patch.save` wrote."""


class _Spec(BaseModel):
    model: str


@dataclass(frozen=True, repr=False)
class Patch:
    """Result of a method: a patch for a model, or trained weights, with a patch on them if the method makes one."""

    folder: Path
    """The artifact: `patch/`, `prompt.json`, and `model/` if the method trained the model's own weights."""
    origin: Origin
    """The model that the method started from."""
    config: Mapping[str, object]
    """The method and its settings; empty if unknown."""
    below: tuple[patches.SavedPatch, ...] = ()
    """Patches of `with` blocks that acted on the model when this patch was made."""
    curve: Sequence[Mapping[str, float]] = ()
    """Metrics of each step of a training; empty for a closed form."""
    keeps: object = None
    """Object that keeps the folder alive; None for a permanent folder."""

    @property
    def method(self) -> str:
        """Name of the method; "patch" if it is unknown."""
        return str(self.config.get("name", "patch"))

    @property
    def has_weights(self) -> bool:
        """Whether the method trained the model's own weights, so that its result is more than the patch."""
        return (self.folder / "model").is_dir()

    @cached_property
    def saved(self) -> patches.SavedPatch | None:
        """The patch itself, on the CPU; None for a method that results in weights only."""
        return patches.load(self.folder / "patch") if patches.exists(self.folder / "patch") else None

    def on(self, model: Model) -> patches.SavedPatch:
        """Return the patch for a model.

        Raises:
            ValueError: the patch was made for another model, or belongs to trained weights.
        """
        if self.has_weights or self.saved is None:
            raise ValueError(
                f"{self.method} trains the model's own weights, which a `with` block cannot replace: use patch.model() instead"
            )
        about = saved.read(self.folder / "patch" / "patch.json", _Spec)
        if about.model != model.fingerprint:
            raise ValueError(
                f"this patch was made for the model of {self.origin.path}, but {model.origin.path} has other weights"
            )
        return self.saved

    def model(self, *, device: str | None = None) -> Model:
        """Load the result as a new model: the trained weights, or the model with the patch."""
        if self.has_weights:
            origin = Origin(self.folder, {}, self.keeps)
            whole = origin.opened(device or "auto")
            return Model(whole, origin, num_own=len(whole.patches))
        steered, own = self.origin.opened(device or "auto"), self.saved
        assert own is not None
        steered.detach()
        loaded = len(steered.patches)
        steered.patches = tuple(patch.to(steered.device) for patch in (*steered.patches, *self.below, own))
        steered.attach()
        return Model(steered, self.origin, num_own=loaded)

    def fold(self, strength: float = 1.0, *, device: str | None = None) -> Model:
        """Return the model with the patch merged into its weights; such a model does not need this package.

        Args:
            strength: Strength at which the patch is merged.
            device: Device of the model; None takes a GPU if there is one.

        Raises:
            patches.CannotFold: no weights of the model can express the patch; the message gives the reason.
        """
        model = self.model(device=device)
        model.steered.fold(strength)
        # Calls pass roles and strengths, which the bare model does not accept; the hooks of an empty stack accept them.
        model.steered.attach()
        return Model(model.steered, Origin(model.origin.path, model.origin.loading, (model.origin.keeps, self.keeps)))

    def save(self, directory: str | Path) -> Path:
        """Write the patch into a new folder, which `load_patch` and `load` read.

        Raises:
            ValueError: the folder exists, or the patch's model is in a temporary folder.
        """
        path = Path(directory)
        if path.exists():
            raise ValueError(f"{path} exists already; name a new folder")
        if not self.has_weights and self.origin.keeps is not None:
            raise ValueError("the model of this patch is in a temporary folder: save that, load it, and fit the patch on it")
        path.mkdir(parents=True)
        for name in ("model", "patch"):
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, path / name)
        shutil.copyfile(self.folder / PROMPT, path / PROMPT)
        if not self.has_weights:
            fingerprint = saved.read(self.folder / "patch" / "patch.json", _Spec).model
            for number, patch in enumerate(self.below):
                patches.save(patch, path / BELOW / str(number), fingerprint)
            (path / BASE).write_text(json.dumps({"source": str(self.origin.path.absolute())}))
        (path / _METHOD).write_text(json.dumps(dict(self.config), indent=1))
        return path

    @property
    def norms(self) -> dict[str, float]:
        """Size of the patch by place: the norm of each tensor, or of the vector that a map adds to the zero vector."""
        if self.saved is None:
            return {}
        if isinstance(self.saved, patches.ActivationPatch):
            return {name: _displacement(layer) for name, layer in zip(self.saved.sizes, self.saved.layers(), strict=True)}
        return {name: float(tensor.detach().float().norm()) for name, tensor in self.saved.tensors().items()}

    def plot(self) -> go.Figure:
        """Return a plotly figure: the loss of a training by step, or the size of the patch by place (`norms`)."""
        import plotly.graph_objects as go

        losses = [(line["step"], line["train/loss"]) for line in self.curve if "train/loss" in line]
        if losses:
            steps, values = zip(*losses, strict=True)
            figure = go.Figure(go.Scatter(x=steps, y=values, mode="lines"))
            return figure.update_layout(title=f"{self.method}: training", xaxis_title="step", yaxis_title="loss", height=360)
        figure = go.Figure(go.Bar(x=list(self.norms), y=list(self.norms.values())))
        title = "size of the shift at zero" if isinstance(self.saved, patches.ActivationPatch) else "norm"
        return figure.update_layout(title=f"{self.method}: {title} by place", yaxis_title=title, height=360)

    def __repr__(self) -> str:
        kind = "weights" if self.saved is None else self.saved.kind
        return f"Patch({self.method}, {kind}{' with weights' if self.has_weights and self.saved is not None else ''})"

    def _repr_html_(self) -> str:
        settings = [(name, value) for name, value in self.config.items() if value is not None]
        kind = "weights" if self.saved is None else self.saved.kind + (" patch on trained weights" if self.has_weights else "")
        rows = [("what it is", kind), ("model", self.origin.path), *settings, *((n, f"{v:.4g}") for n, v in self.norms.items())]
        return html_table(["", ""], rows[:40], f"patch of {self.method}")


def _displacement(layer: MapLayer) -> float:
    """Return the norm of the vector that a map adds to the zero vector."""
    import torch

    with torch.inference_mode():
        return float(layer(torch.zeros(1, 1, layer.fitted().width)).norm())


def load_patch(directory: str | Path, model: Model) -> Patch:
    """Read a patch that `Patch.save`, a job or `steerlab export` wrote, for a loaded model.

    Raises:
        ValueError: the folder has no patch, a file is damaged, or the patch is for another model.
    """
    path = Path(directory)
    if not patches.exists(path / "patch"):
        raise ValueError(f"{path} has no patch (patch/patch.json): name a folder that Patch.save wrote, or an artifact")
    config = saved.read(path / _METHOD, JsonObject) if (path / _METHOD).is_file() else {}
    patch = Patch(path, model.origin, config)
    if not patch.has_weights:
        patch.on(model)
    return patch
