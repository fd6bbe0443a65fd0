"""Safety-WaRP (WSR-Tune): fine-tune in a rotated weight space and freeze what safety needs.

Manuscript and code of min-seong-kim/Safety-WaRP-LLM, after Kim et al., "Warping the Space: Weight Space Rotation for
Class-Incremental Few-Shot Learning", ICLR 2023.

For a linear layer y = W x, with W of shape (M, N) and inputs x over all tokens of safety rows:

1. basis       C = sum x x^T = U S U^T; the coefficients of W in the basis of its inputs are W U
2. importance  G = sum over safety batches of |dL_b / d(W U)| = |(dL_b / dW) U|, L_b over response tokens
3. mask        F marks the keep_ratio of the coefficients with the largest G: they are frozen
4. training    W = W_0 + D U^T on other data, dL/dD = ((dL/dW) U) * (1 - F), D = 0 at the start
5. fold        W replaces W_0; inference costs what it did

D is what an optimizer sees, so any elementwise one is right, also flattened and partitioned by ZeRO 0 to 2, and a frozen
coefficient, whose gradient is always 0, does not move by a bit whatever momentum or decay do. What of it is computed where is
in rotation.py.

Departures from the manuscript and its code:
- coefficients are ranked one by one; the seed code ranks output rows by a norm that no rotation changes, so that its basis has
  no effect;
- Gram matrices are not centred, and are summed in float64;
- weight decay pulls D to zero, hence W to W_0, where the manuscript pulls W U to zero;
- weights outside of the selected layers are frozen, which the manuscript leaves open; `others: train` trains them, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.activations.moments import Moments as SavedMoments
from steerlab.inputs.tokens import Batch
from steerlab.job import ExtractConfig, Job, MethodConfig, Seed, Selection
from steerlab.methods.contract import (
    Inputs,
    Loss,
    PatchAlone,
    Size,
    Trained,
    language_modelling_loss,
)
from steerlab.methods.math import rotation
from steerlab.methods.preparations import Moments, OverParts, OverRows, Preparation, Source
from steerlab.models import LayerType, ModelFacts, WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Parts, Shape, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER_TYPES: tuple[LayerType, ...] = ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down")
_RANGES = ("all", "early", "middle", "late", "last")
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


def _listed(value: Any) -> Any:
    """Accept one item, or several in a text with commas, in place of a list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return (value,) if isinstance(value, int) else value


def _known(value: tuple[int | str, ...]) -> tuple[int | str, ...]:
    for item in value:
        if not re.fullmatch(_LAYER, str(item)):
            message = f"{item!r} is none of {', '.join(_RANGES)}, no number and no span such as 8-15"
            raise PydanticCustomError("layers", "{message}", {"message": message})
    return value


_LAYER = rf"({'|'.join(_RANGES)}|[0-9]+(-[0-9]+)?)"
_Layers = tuple[Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=f"^{_LAYER}$")], ...]
# What may be written: a list, one item, or a text with commas.
_WrittenLayers = (
    Annotated[_Layers, Field(min_length=1)] | int | Annotated[str, Field(pattern=f"^ *{_LAYER} *(, *{_LAYER} *)*$")]
)
_TYPES = f"({'|'.join(get_args(LayerType))})"
_Types = Annotated[tuple[LayerType, ...], Field(min_length=1)]
_WrittenTypes = _Types | Annotated[str, Field(pattern=f"^ *{_TYPES} *(, *{_TYPES} *)*$")]


class Config(MethodConfig):
    """Hyperparameters of Safety-WaRP."""

    name: Literal["warp"] = "warp"
    """The method."""
    keep_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the coefficients that is frozen. Paper: 0.1, swept from 0.01 to 0.2."""
    layer_type: Annotated[_Types, BeforeValidator(_listed, json_schema_input_type=_WrittenTypes)] = (
        "attn_q",
        "attn_k",
        "attn_v",
        "ffn_up",
        "ffn_down",
    )
    """Linear layers that are trained; the default is the paper's."""
    target_layers: Annotated[
        tuple[int | str, ...],
        Field(min_length=1),
        AfterValidator(_known),
        BeforeValidator(_listed, json_schema_input_type=_WrittenLayers),
    ] = ("all",)
    """Decoder layers: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""
    scope: Literal["module", "global"] = "module"
    """Whether the share is that of each linear layer (paper) or of all together."""
    rotation: Literal["safety", "random", "none"] = "safety"
    """Coordinates: eigenvectors of the inputs on safety rows; controls: a random rotation, the weights as they are."""
    mask: Literal["importance", "random", "magnitude"] = "importance"
    """What is frozen: the coefficients with the largest gradients on safety rows; controls: random ones, the largest ones."""
    others: Literal["frozen", "train"] = "frozen"
    """Weights outside of the selected layers: frozen, or trained without a mask."""
    rows_per_batch: int = Field(4, ge=1)
    """Safety rows whose gradient is one term of the importance: a sum of absolute values depends on it. Paper: 4."""
    max_tokens: int = Field(512, ge=8)
    """Longest safety row."""
    rows_per_shard: int = Field(512, ge=1)
    """Safety rows that one worker sums up before it writes; a kill costs at most these."""
    seed: Seed = 0
    """Of a random rotation or mask."""


def layers(config: Config, num_layers: int) -> list[int]:
    """Return the numbers of the decoder layers that `target_layers` names, in order."""
    third, two_thirds = -(-num_layers // 3), -(-2 * num_layers // 3)
    named = {
        "all": range(num_layers),
        "early": range(third),
        "middle": range(third, two_thirds),
        "late": range(two_thirds, num_layers),
        "last": range(num_layers - 1, num_layers),
    }
    found: set[int] = set()
    for item in config.target_layers:
        if str(item) in named:
            found.update(named[str(item)])
        else:
            first, last = _SPAN.fullmatch(str(item)).groups()  # type: ignore[union-attr]
            found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def places(model: PreTrainedModel, config: Config) -> list[WeightPlace]:
    """Return the linear layers that are rotated. Raises ValueError if the model lacks a type of layer, or a layer."""
    return models.weight_places(model, config.layer_type, layers(config, len(models.layer_names(model))))


# --- preparations: moments -> basis -> importance -> mask --------------------------------------------------------------


def prepares(config: Config, skeleton: PreTrainedModel) -> tuple[Preparation, ...]:
    """Return the stages before the training; a control leaves out what it does not use."""
    chosen = places(skeleton, config)
    sizes = {place.input_of: place.shape[1] for place in chosen}
    found: list[Preparation] = []
    if config.rotation == "safety":
        select = Selection(modules="|".join(re.escape(name) for name in sizes), side="input")
        limits = {"max_tokens": config.max_tokens, "rows_per_shard": config.rows_per_shard}
        reads = {"select": select, "pooling": ("none",), "keep": "moments", "second_moment": True, **limits}
        found.append(Moments("safety", ExtractConfig.model_validate(reads)))
    if config.rotation != "none":
        found.append(_basis(config, sizes))
    if config.mask != "random":
        found.append(_importance(config, chosen))
    found.append(_mask(config, chosen))
    return tuple(found)


def _basis(config: Config, sizes: Mapping[str, int]) -> OverParts:
    largest = max(sizes.values())
    estimate = Estimate(memory_bytes=4 * 8 * largest**2, disk_bytes=4 * sum(size**2 for size in sizes.values()))
    if config.rotation == "random":
        params = {"rotation": "random", "seed": config.seed, "sizes": dict(sizes)}
        return OverParts("basis", 1, params, tuple(sizes), _random_basis, estimate=estimate)
    return OverParts("basis", 1, {"rotation": "safety"}, tuple(sizes), _eigenbasis, ("moments",), estimate=estimate)


def _eigenbasis(source: Source, group: str, path: Path) -> dict[str, Any]:
    """Write the eigenvectors of one Gram matrix (step 1)."""
    moments = SavedMoments.open(source.needed["moments"])
    try:
        basis = rotation.eigenbasis(moments.second_moment(group))
    except ValueError as error:
        raise ValueError(f"basis of the inputs of {group}: {error}") from None
    _write(path, {f"{group}/vectors": basis.vectors_NN, f"{group}/values": basis.values_N})
    size = len(basis.values_N)
    facts: dict[str, Any] = {"rank": basis.rank, "size": size, "vectors": moments.count}
    if basis.rank < size:
        facts["note"] = (
            f"the inputs of {group} span {basis.rank} of {size} directions on {moments.count} tokens of data.safety; others "
            "are arbitrary, and more rows would say something about them"
        )
    return facts | {name: moments.metadata[name] for name in ("fingerprint", "architecture")}


def _random_basis(source: Source, group: str, path: Path) -> dict[str, Any]:
    size = source.params["sizes"][group]
    _write(path, {f"{group}/vectors": rotation.random_basis(size, source.params["seed"], group)})
    return {"rank": size, "size": size}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with writing(path, {name: Shape(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _importance(config: Config, chosen: list[WeightPlace]) -> OverRows | OverParts:
    declared = {"layer_type": list(config.layer_type), "target_layers": [str(item) for item in config.target_layers]}
    needs = () if config.rotation == "none" else ("basis",)
    num = sum(place.shape[0] * place.shape[1] for place in chosen)
    if config.mask == "magnitude":
        estimate = Estimate(memory_bytes=4 * max(place.shape[0] * place.shape[1] for place in chosen), disk_bytes=4 * num)
        return OverParts("importance", 1, {"of": "magnitude", **declared}, ("magnitude",), _magnitude, needs, True, estimate)
    per_shard = max(1, config.rows_per_shard // config.rows_per_batch) * config.rows_per_batch
    params = {
        "of": "gradients",
        **declared,
        "rows_per_batch": config.rows_per_batch,
        "rows_per_shard": per_shard,
        "max_tokens": config.max_tokens,
    }
    # The sums, and one gradient at a time; a file of them for each shard besides the result.
    estimate = Estimate(memory_bytes=4 * num, disk_bytes=4 * num, work_bytes=4 * num)
    return OverRows("importance", 1, "safety", params, Importance, needs, estimate)


class Importance:
    """Sums of absolute gradients of the coefficients over batches (step 2)."""

    def __init__(self, model: SteeredModel, params: Mapping[str, Any], needed: Mapping[str, Path]) -> None:
        config = Config.model_validate({name: params[name] for name in ("layer_type", "target_layers")})
        self._model = model
        self._places = places(model.model, config)
        self._basis = Parts.open(needed["basis"]) if "basis" in needed else None
        self._sums = {place.module: torch.zeros(place.shape) for place in self._places}
        self._where = ""
        model.model.requires_grad_(False)
        weights: list[Any] = [model.model.get_submodule(place.module).weight.requires_grad_(True) for place in self._places]
        self._handles = [
            weight.register_post_accumulate_grad_hook(self._taker(place))
            for weight, place in zip(weights, self._places, strict=True)
        ]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the sums."""
        return {place.module: Shape(torch.float32, place.shape) for place in self._places}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the sums by module."""
        yield from self._sums.items()

    def close(self) -> None:
        """Take no more gradients."""
        for handle in self._handles:
            handle.remove()

    def add(self, batch: Batch, number: int) -> None:
        """Add |dL_b / d(W U)| of one batch, L_b being the mean loss of its response tokens."""
        self._where = f"batch {number}"
        num_targets = int((batch.labels[:, 1:] >= 0).sum())
        logits_BTV = self._model.model(**batch.patched_inputs, use_cache=False).logits
        loss = language_modelling_loss(logits_BTV, batch.labels) / max(1, num_targets)
        if not bool(loss.isfinite()):
            raise ValueError(f"data.safety, {self._where}: the loss is {float(loss.detach())}, so there is no importance")
        loss.backward()

    def _taker(self, place: WeightPlace) -> Any:
        """Take a gradient as soon as it is there: one is held at a time."""

        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            module = self._model.model.get_submodule(place.module)
            grad_MN = models.linear_weight(module, weight.grad).float()
            weight.grad = None
            if not bool(grad_MN.isfinite().all()):
                raise ValueError(f"data.safety, {self._where}: the gradient of {place.module} holds a NaN or infinite value")
            if self._basis is not None:
                grad_MN = grad_MN @ self._basis.tensor(f"{place.input_of}/vectors").to(grad_MN.device)
            self._sums[place.module] += grad_MN.abs_().cpu()

        return take


def _magnitude(source: Source, part: str, path: Path) -> dict[str, Any]:
    """Write |W U|: the control that knows nothing of safety."""
    assert source.model is not None
    model = source.model.model
    config = Config.model_validate({name: source.params[name] for name in ("layer_type", "target_layers")})
    basis = Parts.open(source.needed["basis"]) if "basis" in source.needed else None
    chosen = places(model, config)
    with writing(path, {place.module: Shape(torch.float32, place.shape) for place in chosen}) as writer:
        for place in chosen:
            weight_MN = models.linear_weight(model.get_submodule(place.module)).detach().float().cpu()
            rotated_MN = weight_MN if basis is None else weight_MN @ basis.tensor(f"{place.input_of}/vectors")
            writer.write(place.module, rotated_MN.abs())
    return {}


def _mask(config: Config, chosen: list[WeightPlace]) -> OverParts:
    params = {
        "keep_ratio": config.keep_ratio,
        "scope": config.scope,
        "places": {place.module: [list(place.shape), _spans(place)] for place in chosen},
        **({"seed": config.seed} if config.mask == "random" else {}),
    }
    needs = () if config.mask == "random" else ("importance",)
    num_bytes = [-(-place.shape[0] * place.shape[1] // 8) for place in chosen]
    largest = max(place.shape[0] * place.shape[1] for place in chosen)
    estimate = Estimate(memory_bytes=24 * largest, disk_bytes=sum(num_bytes))
    return OverParts("mask", 1, params, ("mask",), _freeze, needs, estimate=estimate)


def _spans(place: WeightPlace) -> list[list[int]] | None:
    return None if place.outputs is None else [list(span) for span in place.outputs]


def _freeze(source: Source, part: str, path: Path) -> dict[str, Any]:
    """Write which coefficients are frozen (step 3), a bit each; of fused layers, outputs that are not meant are frozen."""
    params = source.params
    importance = Parts.open(source.needed["importance"]) if "importance" in source.needed else None
    sizes = {name: tuple(shape) for name, (shape, _) in params["places"].items()}
    meant = {name: _meant(shape, outputs) for name, (shape, outputs) in params["places"].items()}

    def scores(names: list[str]) -> Iterator[Tensor]:
        for name in names:
            score_MN = (
                torch.rand(sizes[name], generator=rotation.generator(params["seed"], name))
                if importance is None
                else importance.tensor(name)
            )
            yield score_MN[meant[name]]

    groups = [[name] for name in sizes] if params["scope"] == "module" else [list(sizes)]
    num_frozen: dict[str, int] = {}
    with writing(path, {name: Shape(torch.uint8, [-(-m * n // 8)]) for name, (m, n) in sizes.items()}) as writer:
        for names in groups:
            num = round(params["keep_ratio"] * sum(int(meant[name].sum()) * sizes[name][1] for name in names))
            for name, taken in zip(names, rotation.largest(lambda names=names: scores(names), num), strict=True):
                frozen_MN = torch.ones(sizes[name], dtype=torch.bool)
                frozen_MN[meant[name]] = taken
                num_frozen[name] = int(taken.sum())
                writer.write(name, rotation.packed(frozen_MN))
    return {"frozen": num_frozen, "meant": {name: int(meant[name].sum()) * sizes[name][1] for name in sizes}}


def _meant(shape: list[int], outputs: list[list[int]] | None) -> Tensor:
    """Return which outputs of a layer are meant, (M,)."""
    meant_M = torch.full((shape[0],), outputs is None)
    for start, end in outputs or ():
        meant_M[start:end] = True
    return meant_M


# --- training ----------------------------------------------------------------------------------------------------------


class Rotated(nn.Module):
    """What trains: the changes of the selected layers and, where they train too, the other weights."""

    kind = "weight"

    def __init__(self, layers: Mapping[str, rotation.RotatedLayer], others: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names, self.other_names = list(layers), list(others)
        self.layers = nn.ModuleList(layers.values())
        self.others = nn.ParameterList(others.values())

    def rotated(self) -> list[rotation.RotatedLayer]:
        """Return the rotated layers, in the order of `names`."""
        return [layer for layer in self.layers if isinstance(layer, rotation.RotatedLayer)]


class Warp(PatchAlone):
    """A causal language model whose selected weights move along unfrozen directions only."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        basis = Parts.open(inputs.prepared["basis"]) if "basis" in inputs.prepared else None
        mask = Parts.open(inputs.prepared["mask"])
        chosen = places(model, config)
        if basis is not None:
            check_basis(basis, model)
        shared = {} if basis is None else _shared_inputs(basis, chosen)
        rotated = {}
        for place in chosen:
            frozen_MN = rotation.unpacked(mask.tensor(place.module), place.shape)
            linear = model.get_submodule(place.module)
            rotated[place.module] = rotation.RotatedLayer(linear, frozen_MN, shared.get(place.input_of))
        others = dict(model.named_parameters()) if config.others == "train" else {}
        self._start = {name: weight.detach().cpu().clone() for name, weight in others.items()}
        for weight in others.values():
            weight.requires_grad_(True)
        self.patch = Rotated(rotated, others)
        patches.attach(model, inputs.below)

    def train(self, mode: bool = True) -> Warp:
        """Train with the model's dropout, as plain fine-tuning does: its weights are what moves."""
        nn.Module.train(self, mode)
        return self

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of coefficients, and the bytes of W and W_0 U beside W_0, of the mask and of one basis."""
        chosen = places(skeleton, config)
        num = sum(place.shape[0] * place.shape[1] for place in chosen)
        others = sum(p.numel() for p in skeleton.parameters()) - num if config.others == "train" else 0
        return Size(num + others, (4 + 4 + 1) * num + 4 * max(place.shape[1] for place in chosen) ** 2)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        return Loss(language_modelling_loss(self.model(**batch.patched_inputs).logits, batch.labels), {})

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Begin with the changes that the optimizer, or a checkpoint, has left."""
        for layer in self.patch.rotated():
            layer.start_step()

    def after_step(self, lr: float) -> None:
        """Let an evaluation see the step."""
        for layer in self.patch.rotated():
            layer.start_step()

    def before_pass(self, is_last: bool) -> None:
        """Let gradients be rotated in a step's last pass, for all of its passes."""
        for layer in self.patch.rotated():
            layer.start_pass(is_last)

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return what was trained as differences of plain weights (step 5), one layer at a time."""
        differences: dict[str, Tensor] = {}
        for number, (name, layer) in enumerate(zip(self.patch.names, self.patch.rotated(), strict=True)):
            difference_MN = layer.difference(state[f"layers.{number}.change_MN"])
            differences[f"{name}.weight"] = models.linear_weight(self.model.get_submodule(name), difference_MN)
        for number, name in enumerate(self.patch.other_names):
            differences[name] = state[f"others.{number}"].cpu() - self._start[name]
        return patches.WeightPatch.of(differences)


def _shared_inputs(basis: Parts, chosen: list[WeightPlace]) -> dict[str, rotation.SharedInput]:
    """Return the bases by the layers' inputs."""
    outputs: dict[str, int] = {}
    for place in chosen:
        outputs[place.input_of] = outputs.get(place.input_of, 0) + place.shape[0]
    return {name: rotation.SharedInput(basis.tensor(f"{name}/vectors"), num) for name, num in outputs.items()}


def check_basis(basis: Parts, model: PreTrainedModel) -> None:
    """Refuse a basis of another model's activations."""
    own = models.fingerprint(model)
    for group, facts in basis.facts.items():
        if facts.get("fingerprint", own) != own:
            raise ValueError(
                f"the basis of {group} was made from activations of another model ({facts['architecture']}) than this"
            )


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Refuse what the method cannot do, before anything starts."""
    if "safety" not in job.data.by_role and (config.rotation == "safety" or config.mask == "importance"):
        raise ValueError("data.safety: method warp needs these rows: they say which directions are kept")
    safety = job.data.by_role.get("safety")
    if safety is not None and config.mask == "importance" and safety.loss_on != "response":
        raise ValueError("data.safety.loss_on: set response; the importance is that of the safe answers, not of the questions")
    if job.scale.zero_stage == 3:
        raise ValueError(
            "scale.zero_stage 3: method warp makes whole weights of their coefficients on every worker, which ZeRO 3 would "
            "shard; use 0, 1 or 2"
        )
    if config.others == "train" and job.model.dtype == "bfloat16":
        raise ValueError("method.others train: weights in bfloat16 would need float32 copies; set model.dtype: float32")
    if config.keep_ratio == 1 and config.others == "frozen":
        raise ValueError("method.keep_ratio 1 freezes every coefficient, and method.others the other weights: nothing trains")


METHOD = Trained(Config, Warp, preparations=prepares, trains_with=("basis", "mask"), check=check)
