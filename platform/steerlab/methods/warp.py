"""Safety-WaRP (WSR-Tune): fine-tune in a rotated weight space and freeze the coefficients that matter for safety.

Manuscript and code of min-seong-kim/Safety-WaRP-LLM, after Kim et al., "Warping the Space: Weight Space Rotation for
Class-Incremental Few-Shot Learning", ICLR 2023.

For a linear layer y = W x, with W of shape (M, N) and inputs x over all tokens of safety rows:

1. basis       C = sum x x^T = U S U^T; the coefficients of W in the basis of its inputs are W U
2. importance  G = sum over safety batches b of |dL_b / d(W U)| = |(dL_b / dW) U|, L_b over response tokens
3. mask        F is 1 for the share keep_ratio of the coefficients with the largest G: these are frozen
4. training    W = W_0 + D U^T on other data, dL/dD = ((dL/dW) U) * (1 - F), D = 0 at the start
5. fold        W replaces W_0, so that inference costs the same as before

The optimizer sees D. Any elementwise optimizer is therefore correct, also when ZeRO 0 to 2 flattens and shards its state. The
gradient of a frozen coefficient is always 0 and D starts at 0, so that neither momentum nor weight decay moves it.
math/rotation.py holds the layer that trains (steps 4 and 5), math/weight_space.py the steps 1 to 3.

Departures from the manuscript and its code:
- single coefficients are ranked; the authors' code ranks output rows by a norm that no rotation changes, so that its basis has
  no effect;
- Gram matrices are not centred, and are summed in float64;
- weight decay pulls D to zero, and so W to W_0; in the manuscript it pulls W U to zero;
- weights outside of the selected layers are frozen, which the manuscript does not specify; `others: train` trains them, too,
  and `lora` trains low-rank adapters of them.

Options of the authors' code: the basis from other rows (`data.basis`), or from the tokens of prompts alone (`basis_tokens`); a
second mask of what matters for `data.utility`, which stays trainable (`spare_ratio`); masks of whole rows or columns of W U
(`mask_unit`), whose importance is the Euclidean norm of G over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.guards.json_values import Json
from steerlab.inputs.tokens import Batch
from steerlab.job import ExtractConfig, Job, MethodConfig, Seed, Selection
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained, next_token_loss
from steerlab.methods.math import lora, rotation, weight_space
from steerlab.methods.math.gradients import Tokens
from steerlab.methods.math.lora import Lora
from steerlab.methods.math.selected_layers import Layers, Types
from steerlab.methods.math.selected_layers import places as selected
from steerlab.methods.math.weight_space import Unit
from steerlab.methods.preparations import MOMENTS, Prepare
from steerlab.models import LayerType, ModelFacts, WeightPlace
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER_TYPES: tuple[LayerType, ...] = ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down")
"""Linear layers that the manuscript rotates."""


class Config(MethodConfig):
    """Hyperparameters of Safety-WaRP."""

    name: Literal["warp"] = "warp"
    """The method."""
    keep_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the coefficients that is frozen, from 0 (none) to 1 (all). Paper: 0.1, swept from 0.01 to 0.2."""
    layer_type: Types = PAPER_TYPES
    """Linear layers that are trained; the default is the paper's."""
    target_layers: Layers = ("all",)
    """Decoder layers: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""
    scope: Literal["module", "global"] = "module"
    """module: keep_ratio applies to each linear layer (paper); global: to all selected layers together."""
    rotation: Literal["safety", "random", "none"] = "safety"
    """Basis: safety: eigenvectors of the inputs on safety rows; controls: random: a random rotation, none: no rotation."""
    mask: Literal["importance", "random", "magnitude"] = "importance"
    """Frozen coefficients: importance: those with the largest gradients on safety rows; controls: random: drawn at random,
    magnitude: those with the largest absolute value."""
    basis_tokens: Literal["all", "prompt", "response"] = Field("all", exclude_if=lambda tokens: tokens == "all")
    """Tokens whose inputs span the basis: all (paper), or those of the prompt (the code's --only_prompt) or response alone."""
    importance_tokens: Tokens = Field("labelled", exclude_if=lambda tokens: tokens == "labelled")
    """Tokens whose loss gives the importance: labelled: those that the data set's loss_on names (paper: the response);
    prompt: those of the prompt alone."""
    mask_unit: Unit = Field("entry", exclude_if=lambda unit: unit == "entry")
    """What is frozen as a whole: entry: a coefficient (paper); row: an output; column: a basis direction. A row or column has
    the Euclidean norm of its importance."""
    spare_ratio: float | None = Field(None, ge=0, le=1, exclude_if=lambda ratio: ratio is None)
    """Share of the coefficients with the largest importance on data.utility that is not frozen, even if it matters for safety
    (the code's --two_mask, where it is keep_ratio); null uses one mask."""
    others: Literal["frozen", "train"] = "frozen"
    """Weights outside of the selected layers: frozen, or trained without a mask."""
    rows_per_batch: int = Field(4, ge=1)
    """Safety rows in one batch of the importance, a sum of absolute gradients, which depends on the batch size. Paper: 4."""
    max_tokens: int = Field(512, ge=8)
    """Safety rows are cut after this many tokens."""
    rows_per_shard: int = Field(512, ge=1)
    """Safety rows that one worker sums before it writes a file; a killed run loses at most these rows' work."""
    seed: Seed = 0
    """Seed of a random rotation or a random mask; unused otherwise."""
    lora: Lora | None = Field(None, exclude_if=lambda lora: lora is None)
    """Also train low-rank adapters of linear layers that are not rotated; {} takes their defaults, null trains none. A rotated
    layer cannot have one, because a product of low-rank factors changes the frozen coefficients too."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.lora is None:
            return self
        both = [name for name in self.lora.layer_type if name in self.layer_type]
        if both:
            raise ValueError(
                f"lora.layer_type {', '.join(both)}: a low-rank change of a rotated layer would move its frozen coefficients; "
                "adapt layers that are not in layer_type"
            )
        if self.others == "train":
            raise ValueError("lora: others train trains the whole weights of these layers already; leave one of them out")
        return self


# --- preparations: moments -> basis -> importance -> mask --------------------------------------------------------------


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Declare the stages before the training; controls leave out the stages that they do not need."""
    # The skeleton has no weights, but all names and shapes: stages are planned before a model is loaded.
    chosen = places(skeleton, config)
    if config.lora is not None:
        lora.check_apart(skeleton, config.lora, chosen)
    if config.rotation != "none":
        _prepare_basis(config, chosen, prepare)
    if config.mask != "random":
        _prepare_importance(config, chosen, prepare)
    if config.spare_ratio is not None:
        _prepare_sums("utility_importance", "utility", config, chosen, prepare)
    _prepare_mask(config, chosen, prepare)
    # The importance is read by the mask alone: the training does not depend on it, and workers need not fetch it.
    return ("basis", "mask") if config.rotation != "none" else ("mask",)


def places(model: PreTrainedModel, config: Config) -> list[WeightPlace]:
    """Return the linear layers that are rotated. Raises ValueError if the model has no such type of layer, or block."""
    return selected(model, config.layer_type, config.target_layers)


def _prepare_basis(config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    # Layers that read the same input (queries, keys and values) share one basis.
    sizes = {place.input_of: place.shape[1] for place in chosen}
    # eigh holds the float64 matrix, its eigenvectors and its workspace: about four float64 matrices.
    estimate = Estimate(memory_bytes=32 * max(sizes.values()) ** 2, disk_bytes=4 * sum(size**2 for size in sizes.values()))
    if config.rotation == "random":
        params = weight_space.RandomBasis(seed=config.seed, sizes=sizes).model_dump(mode="json")
        return prepare.map_parts("basis", 1, params, tuple(sizes), weight_space.random_basis, estimate=estimate)
    # The inputs of the layers on every chosen token: their uncentred second moment is C of step 1, up to the count.
    phases = {"all": ("prompt", "generation"), "prompt": ("prompt",), "response": ("generation",)}[config.basis_tokens]
    select = Selection(modules="|".join(re.escape(name) for name in sizes), side="input", phases=phases)
    limits = {"max_tokens": config.max_tokens, "rows_per_shard": config.rows_per_shard}
    # pooling none: every token of a text is one vector of C, and no text counts more than its tokens.
    reads = {"select": select, "pooling": ("none",), "keep": "moments", "second_moment": True, **limits}
    role = "basis" if prepare.has("basis") else "safety"
    prepare.moments(role, ExtractConfig.model_validate(reads))
    # The role is named only where it is not the usual one, so that bases of earlier versions keep their keys.
    params = {"rotation": "safety"} if role == "safety" else {"rotation": "safety", "role": role}
    return prepare.map_parts("basis", 1, params, tuple(sizes), weight_space.eigenbasis, needs=(MOMENTS,), estimate=estimate)


def _prepare_importance(config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    if config.mask == "importance":
        return _prepare_sums("importance", "safety", config, chosen, prepare)
    sizes = [4 * place.shape[0] * place.shape[1] for place in chosen]
    layers, needs = _layers(config, "magnitude"), () if config.rotation == "none" else ("basis",)
    estimate = Estimate(memory_bytes=max(sizes), disk_bytes=sum(sizes))
    return prepare.map_parts(
        "importance", 1, layers, ("magnitude",), weight_space.magnitude, needs=needs, reads_model=True, estimate=estimate
    )


def _layers(config: Config, of: Literal["gradients", "magnitude"]) -> dict[str, Json]:
    target_layers = tuple(str(item) for item in config.target_layers)
    tokens = "labelled" if of == "magnitude" else config.importance_tokens
    return weight_space.SelectedLayers(
        of=of, layer_type=config.layer_type, target_layers=target_layers, tokens=tokens
    ).model_dump(mode="json")


def _prepare_sums(name: str, role: str, config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    sizes = [4 * place.shape[0] * place.shape[1] for place in chosen]
    needs = () if config.rotation == "none" else ("basis",)
    start = weight_space.importance if role == "safety" else weight_space.utility_importance
    # A shard holds whole batches: a batch split over two shards would be two terms of the sum of absolute values.
    per_shard = max(1, config.rows_per_shard // config.rows_per_batch) * config.rows_per_batch
    limits = {"rows_per_batch": config.rows_per_batch, "rows_per_shard": per_shard, "max_tokens": config.max_tokens}
    # Memory: the sums and one gradient at a time. Disk: a file of sums for each shard, and the result.
    estimate = Estimate(memory_bytes=sum(sizes), disk_bytes=sum(sizes), work_bytes=sum(sizes))
    prepare.sum_over_rows(name, 1, role, _layers(config, "gradients") | limits, start, needs=needs, estimate=estimate)


def _prepare_mask(config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    params = weight_space.Masks(
        keep_ratio=config.keep_ratio,
        scope=config.scope,
        places={place.module: (place.shape, place.outputs) for place in chosen},
        seed=config.seed if config.mask == "random" else None,  # seeds of a sweep otherwise share one mask
        unit=config.mask_unit,
        spare_ratio=config.spare_ratio,
    )
    sizes = [place.shape[0] * place.shape[1] for place in chosen]
    # Of one layer at a time: scores, their bits as int32 and int64, and masks.
    estimate = Estimate(memory_bytes=24 * max(sizes), disk_bytes=sum(-(-size // 8) for size in sizes))
    needs = () if config.mask == "random" else ("importance",)
    needs += () if config.spare_ratio is None else ("utility_importance",)
    prepare.map_parts("mask", 1, params.model_dump(mode="json"), ("mask",), weight_space.mask, needs=needs, estimate=estimate)


# --- training ----------------------------------------------------------------------------------------------------------


class Rotated(nn.Module):
    """The trained parameters: the changes D of the selected layers, and the other weights or adapters that train with them."""

    kind = "weight"

    def __init__(
        self,
        layers: Mapping[str, rotation.RotatedLayer],
        others: Mapping[str, nn.Parameter],
        adapters: lora.Adapters | None,
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.names, self.other_names = list(layers), list(others)
        self.layers = nn.ModuleList(layers.values())  # not a ModuleDict, which refuses the dots of module paths
        self.others = nn.ParameterList(others.values())

    def rotated(self) -> list[rotation.RotatedLayer]:
        """Return the rotated layers, in the order of `names`."""
        return [layer for layer in self.layers if isinstance(layer, rotation.RotatedLayer)]


class Warp(PatchAlone):
    """A causal language model whose selected weights train in their unfrozen coefficients only."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        # Opened, not read: bases stay memory-mapped, since those of a model of 7B parameters take about 20 GB.
        basis = Parts.open(inputs.prepared["basis"]) if "basis" in inputs.prepared else None
        mask = Parts.open(inputs.prepared["mask"])
        chosen = places(model, config)
        if basis is not None:
            check_basis(basis, model)
        shared = {} if basis is None else _shared_inputs(basis, chosen)
        rotated = {}
        for place in chosen:
            # The mask F of step 3; the layer starts with D = 0, so that the model is unchanged (step 4).
            frozen_MN = rotation.unpacked(mask.tensor(place.module), place.shape)
            linear = model.get_submodule(place.module)
            rotated[place.module] = rotation.RotatedLayer(linear, frozen_MN, shared.get(place.input_of))
        # A rotated layer has removed its weight from the linear module, so that these are the other weights alone.
        # A tied output head is in it once, under its first name, as autograd sees it.
        others = dict(model.named_parameters()) if config.others == "train" else {}
        # Copies on the CPU, since the weights themselves train; `finished` subtracts them.
        self._start = {name: weight.detach().cpu().clone() for name, weight in others.items()}
        for weight in others.values():
            weight.requires_grad_(True)
        self.patch = Rotated(rotated, others, None if config.lora is None else lora.Adapters(model, config.lora))
        patches.attach(model, inputs.below)

    def train(self, mode: bool = True) -> Warp:
        """Set the training mode of the whole model."""
        # Not PatchAlone.train: the model's weights train here, with its dropout as in plain fine-tuning.
        nn.Module.train(self, mode)
        return self

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of coefficients, and the bytes of W and W_0 U besides W_0, of the mask and of one basis."""
        chosen = places(skeleton, config)
        # D counts as trained, frozen entries included: the optimizer keeps moments for all of them.
        num = sum(place.shape[0] * place.shape[1] for place in chosen)
        others = sum(p.numel() for p in skeleton.parameters()) - num if config.others == "train" else 0
        others += 0 if config.lora is None else lora.num_trained(skeleton, config.lora)
        # W and W_0 U in float32 (4 + 4 bytes), the mask as bools (1 byte), and the largest basis.
        return Size(num + others, (4 + 4 + 1) * num + 4 * max(place.shape[1] for place in chosen) ** 2)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        # No term for the safety rows: what protects them is the mask alone (step 4).
        return next_token_loss(self.model(**batch.patched_inputs).logits, batch.labels)

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Drop matrices that were computed from D before the optimizer, or a checkpoint, changed it."""
        for layer in self.patch.rotated():
            layer.start_step()

    def after_step(self, lr: float) -> None:
        """Drop matrices that were computed from D before the step."""
        # An evaluation may follow before the next `on_step`.
        for layer in self.patch.rotated():
            layer.start_step()

    def before_pass(self, is_last: bool) -> None:
        """Tell the layers whether this is the step's last pass, in which the summed gradients are rotated once."""
        for layer in self.patch.rotated():
            layer.start_pass(is_last)

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the trained weights as differences W - W_0 = D U^T in a patch (step 5)."""
        # In the layout in which the model stores its weights (GPT-2: transposed).
        differences: dict[str, Tensor] = {}
        for number, (name, layer) in enumerate(zip(self.patch.names, self.patch.rotated(), strict=True)):
            # One layer at a time: only one basis is in memory.
            difference_MN = layer.difference(state[f"layers.{number}.change_MN"])
            differences[f"{name}.weight"] = models.linear_weight(self.model.get_submodule(name), difference_MN)
        for number, name in enumerate(self.patch.other_names):
            # As differences, too, so that strength 0 is the model before the training for all weights alike.
            differences[name] = state[f"others.{number}"].cpu() - self._start[name]
        if self.patch.adapters is not None:
            adapted = {name.removeprefix("adapters."): value for name, value in state.items() if name.startswith("adapters.")}
            differences |= {name: up @ down for name, (up, down) in self.patch.adapters.factors(adapted).items()}
        return patches.WeightPatch.of(differences)


def _shared_inputs(basis: Parts, chosen: list[WeightPlace]) -> dict[str, rotation.SharedInput]:
    """Return the bases by input, each with the number of outputs of all layers that read it."""
    outputs: dict[str, int] = {}
    for place in chosen:
        # The sum decides which of two products is cheaper (`RotatedLayer`): x U is shared by all of these outputs.
        outputs[place.input_of] = outputs.get(place.input_of, 0) + place.shape[0]
    return {name: rotation.SharedInput(basis.tensor(f"{name}/vectors"), num) for name, num in outputs.items()}


def check_basis(basis: Parts, model: PreTrainedModel) -> None:
    """Raise ValueError for a basis that was computed from another model's activations."""
    # Without this check a basis of the wrong model would still be orthonormal, and train as a random rotation does.
    own = models.fingerprint(model)
    for group, facts in basis.facts.items():
        # A random basis has no fingerprint: it fits every model with these sizes.
        if facts.get("fingerprint", own) != own:
            raise ValueError(
                f"the basis of {group} was made from activations of another model ({facts['architecture']}) than this"
            )


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for settings that cannot work, before anything starts."""
    _check_rows(config, job)
    if job.scale.zero_stage == 3:
        raise ValueError(
            "scale.zero_stage 3: method warp makes whole weights of their coefficients on every worker, which ZeRO 3 would "
            "shard; use 0, 1 or 2"
        )
    if config.others == "train" and job.model.dtype == "bfloat16":
        raise ValueError("method.others train: weights in bfloat16 would need float32 copies; set model.dtype: float32")
    if config.keep_ratio == 1 and config.others == "frozen" and not config.spare_ratio:
        raise ValueError("method.keep_ratio 1 freezes every coefficient, and method.others the other weights: nothing trains")


def _check_rows(config: Config, job: Job) -> None:
    """Raise ValueError if a data set that the settings need is missing, or would not be read."""
    data = job.data.by_role
    reads_safety = config.mask == "importance" or (config.rotation == "safety" and "basis" not in data)
    if "safety" not in data and reads_safety:
        raise ValueError("data.safety: method warp needs these rows: they say which directions are kept")
    if "basis" in data and config.rotation != "safety":
        raise ValueError(f"data.basis: method.rotation {config.rotation} makes no basis of rows; leave these rows out")
    if (config.spare_ratio is None) != ("utility" not in data):
        raise ValueError(
            "data.utility and method.spare_ratio belong together: the rows say which coefficients matter for an ability, the "
            "ratio how many of these are not frozen; give both or neither"
        )
    reads_loss = {"safety": config.mask == "importance", "utility": config.spare_ratio is not None}
    for role, reads in reads_loss.items():
        if reads and role in data and config.importance_tokens == "labelled" and data[role].loss_on != "response":
            raise ValueError(
                f"data.{role}.loss_on: set response; the importance is that of the safe answers, not of the questions"
            )


METHOD = Trained(Config, Warp, preparations=prepares, check=check, example="jobs/tiny/warp.yaml")
