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
math/orthonormal.py has the eigenvectors of step 1, math/masks.py the ranking of step 3, and math/rotation.py the layer that
trains (steps 4 and 5).

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

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.guards.json_values import Json
from steerlab.inputs.tokens import Batch
from steerlab.job import Job, MethodConfig, Seed
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained, next_token_loss
from steerlab.methods.math import lora, masks, rotation, weight_space
from steerlab.methods.math import weight_space_plan as plan
from steerlab.methods.math.gradients import GradientSums, Tokens
from steerlab.methods.math.lora import Lora
from steerlab.methods.math.masks import Unit
from steerlab.methods.math.selected_layers import Layers, Types
from steerlab.methods.math.selected_layers import places as selected
from steerlab.methods.preparations import Prepare, Source
from steerlab.models import LayerType, ModelFacts, WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER_TYPES: tuple[LayerType, ...] = ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down")
"""Linear layers that the manuscript rotates."""


class Config(MethodConfig):
    """Hyperparameters of Safety-WaRP."""

    name: Literal["warp"] = "warp"
    """The method."""
    # rho of the manuscript.
    keep_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the coefficients that is frozen, from 0 (none) to 1 (all). Paper: 0.1, swept from 0.01 to 0.2."""
    # W_O and the gate are not in the manuscript's list.
    layer_type: Types = PAPER_TYPES
    """Linear layers that are trained; the default is the paper's."""
    target_layers: Layers = ("all",)
    """Decoder layers: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""
    # Gradients differ in size from layer to layer, so that one threshold may freeze some layers completely and others not at
    # all.
    scope: Literal["module", "global"] = "module"
    """module: keep_ratio applies to each linear layer (paper); global: to all selected layers together."""
    rotation: Literal["safety", "random", "none"] = "safety"
    """Basis: safety: eigenvectors of the inputs on safety rows; controls: random: a random rotation, none: no rotation."""
    mask: Literal["importance", "random", "magnitude"] = "importance"
    """Frozen coefficients: importance: those with the largest gradients on safety rows; controls: random: drawn at random,
    magnitude: those with the largest absolute value."""
    # C is a sum over tokens, so that long prompts outweigh short refusals in it.
    basis_tokens: Literal["all", "prompt", "response"] = Field("all", exclude_if=lambda tokens: tokens == "all")
    """Tokens whose inputs span the basis: all (paper), or those of the prompt (the code's --only_prompt) or response alone."""
    importance_tokens: Tokens = Field("labelled", exclude_if=lambda tokens: tokens == "labelled")
    """Tokens whose loss gives the importance: labelled: those that the data set's loss_on names (paper: the response);
    prompt: those of the prompt alone."""
    mask_unit: Unit = Field("entry", exclude_if=lambda unit: unit == "entry")
    """Unit that is frozen: entry: a coefficient (paper); row: an output; column: a basis direction. A row or column has
    the Euclidean norm of its importance."""
    spare_ratio: float | None = Field(None, ge=0, le=1, exclude_if=lambda ratio: ratio is None)
    """Share of the coefficients that trains because its importance on data.utility is the largest, even if it matters for
    safety (the code's --two_mask, which uses keep_ratio for this share, too); null uses one mask."""
    others: Literal["frozen", "train"] = "frozen"
    """Weights outside of the selected layers: frozen, or trained without a mask."""
    # |sum of gradients| and sum of |gradients| differ, so the importance depends on the batch size.
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
        # Only types are compared here; a layer that computes several types is found in `prepares`, where the model is known.
        both = [name for name in self.lora.layer_type if name in self.layer_type]
        if both:
            raise ValueError(
                f"lora.layer_type {', '.join(both)}: a low-rank change of a rotated layer would move its frozen coefficients; "
                "adapt layers that are not in layer_type"
            )
        if self.others == "train":
            raise ValueError("lora: others train trains the whole weights of these layers already; remove one of them")
        return self


# --- mathematics: steps 1 and 2, as functions of one layer -------------------------------------------------------------
# Axes besides those of tokens.py: M outputs, N inputs of a linear layer.


def coefficients(matrix_MN: Tensor, vectors_NN: Tensor | None) -> Tensor:
    """Return the coefficients W U of a weight, or their gradient (dL/dW) U of a gradient (steps 1 and 2).

    Args:
        matrix_MN: W or dL/dW.
        vectors_NN: the basis U, beside the matrix; None means the identity.
    """
    # W = (W U) U^T for orthonormal U, and so dL/d(W U) = (dL/dW) U: one product serves both.
    return matrix_MN if vectors_NN is None else matrix_MN @ vectors_NN


def importance(grad_MN: Tensor, vectors_NN: Tensor | None) -> Tensor:
    """Return a batch's term of G, |(dL_b / dW) U|; it may be computed in the gradient's memory (step 2)."""
    # G sums the absolute values of the batches' gradients; in the absolute value of their sum, opposite signs would cancel. The
    # operation is in place, because the hook of gradients.py owns the gradient and nothing else reads it.
    return coefficients(grad_MN, vectors_NN).abs_()


# --- preparations: moments -> basis -> importance -> mask --------------------------------------------------------------


def safety_importance(model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> GradientSums:
    """Return sums of |dL_b / d(W U)| over batches b of safety rows (step 2), at zero."""
    # The function is at the top level of the module, because workers find it by its name.
    return weight_space.gradient_sums(importance, "safety", model, params, needed)


def utility_importance(model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> GradientSums:
    """Return the same sums over batches of the utility rows, for the second mask, at zero."""
    return weight_space.gradient_sums(importance, "utility", model, params, needed)


def magnitude(source: Source, part: str, path: Path) -> dict[str, object]:
    """Write |W U| instead of the importance: a control that does not depend on the safety rows."""
    return weight_space.write_scores(lambda weight_MN, vectors_NN: coefficients(weight_MN, vectors_NN).abs(), source, path)


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Declare the stages before the training; controls skip the stages that they do not need."""
    # The skeleton has no weights, but all names and shapes, so stages are planned before a model is loaded.
    chosen = places(skeleton, config)
    if config.lora is not None:
        lora.check_apart(skeleton, config.lora, chosen)
    if config.rotation != "none":
        plan.declare_basis(config, chosen, prepare)
    if config.mask == "importance":
        plan.declare_sums("importance", "safety", safety_importance, config, chosen, prepare)
    elif config.mask == "magnitude":
        plan.declare_magnitude(magnitude, config, chosen, prepare)
    if config.spare_ratio is not None:
        plan.declare_sums("utility_importance", "utility", utility_importance, config, chosen, prepare)
    plan.declare_mask(config, chosen, prepare)
    # The importance is read by the mask only, so workers of the training need not fetch it.
    return ("basis", "mask") if config.rotation != "none" else ("mask",)


def places(model: PreTrainedModel, config: Config) -> list[WeightPlace]:
    """Return the linear layers that are rotated. Raises ValueError if the model lacks a named type of layer, or block."""
    return selected(model, config.layer_type, config.target_layers)


# --- training ----------------------------------------------------------------------------------------------------------


class Warp(PatchAlone):
    """A causal language model whose selected weights train in their unfrozen coefficients only."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        # The files are opened, not read: bases are memory-mapped, since those of a model of 7B parameters take about 20 GB.
        basis = Parts.open(inputs.prepared["basis"]) if "basis" in inputs.prepared else None
        mask = Parts.open(inputs.prepared["mask"])
        chosen = places(model, config)
        # Queries, keys and values share one `SharedInput`, so that x U is computed once for the three.
        shared = weight_space.shared_inputs(basis, chosen, model)
        # The layers are in the order of the model's blocks, by which the state dict numbers them, so that a checkpoint loads
        # into the same layers.
        rotated = {}
        for place in chosen:
            # F of step 3 is the mask; the layer starts with D = 0, so that the model is unchanged (step 4).
            frozen_MN = masks.unpacked(mask.tensor(place.module), place.shape)
            linear = model.get_submodule(place.module)
            rotated[place.module] = rotation.RotatedLayer(linear, frozen_MN, shared.get(place.input_of))
        # A rotated layer has removed its weight from the linear module, so that these are the other weights only. A tied output
        # head is among them once, under its first name, as for autograd.
        others = dict(model.named_parameters()) if config.others == "train" else {}
        # The copies are on the CPU, since the weights themselves train; `finished` subtracts the copies.
        self._start = {name: weight.detach().cpu().clone() for name, weight in others.items()}
        for weight in others.values():
            weight.requires_grad_(True)
        self.patch = rotation.RotatedLayers(rotated, others, None if config.lora is None else lora.Adapters(model, config.lora))
        patches.attach(model, inputs.below)

    def train(self, mode: bool = True) -> Warp:
        """Set the training mode of the whole model."""
        # `PatchAlone.train` does not fit: the model's weights train here, with dropout as in plain fine-tuning.
        nn.Module.train(self, mode)
        return self

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of trained parameters, frozen coefficients included, and the bytes besides W_0: W, W_0 U, the mask
        and one basis."""
        chosen = places(skeleton, config)
        # D counts as trained, frozen entries included, because the optimizer has moments for all of them.
        num = sum(place.shape[0] * place.shape[1] for place in chosen)
        others = sum(p.numel() for p in skeleton.parameters()) - num if config.others == "train" else 0
        others += 0 if config.lora is None else lora.num_trained(skeleton, config.lora)
        # W and W_0 U take 4 bytes an entry each (float32), the mask 1 byte (bool); the largest basis is added.
        return Size(num + others, (4 + 4 + 1) * num + 4 * max(place.shape[1] for place in chosen) ** 2)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        # The loss has no term for the safety rows: only the mask protects them (step 4).
        return next_token_loss(self.model(**batch.patched_inputs).logits, batch.labels)

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Drop matrices that were computed from D before the optimizer, or a checkpoint, changed it."""
        self.patch.start_step()

    def after_step(self, lr: float) -> None:
        """Drop matrices that were computed from D before the step."""
        # An evaluation may come before the next `on_step`.
        self.patch.start_step()

    def before_pass(self, is_last: bool) -> None:
        """Pass on to the layers whether this is the step's last pass, in which the summed gradients are rotated once."""
        self.patch.start_pass(is_last)

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the trained weights as differences W - W_0 = D U^T in a patch (step 5)."""
        # Differences have the layout in which the model stores its weights (GPT-2: transposed).
        differences: dict[str, Tensor] = {}
        for number, (name, layer) in enumerate(zip(self.patch.names, self.patch.rotated(), strict=True)):
            # Layers are treated one at a time, so that only one basis is in memory.
            difference_MN = layer.difference(state[f"layers.{number}.change_MN"])
            differences[f"{name}.weight"] = models.linear_weight(self.model.get_submodule(name), difference_MN)
        for number, name in enumerate(self.patch.other_names):
            # Other weights are saved as differences, too, so that strength 0 is the model before the training for all weights
            # alike.
            differences[name] = state[f"others.{number}"].cpu() - self._start[name]
        if self.patch.adapters is not None:
            adapted = {name.removeprefix("adapters."): value for name, value in state.items() if name.startswith("adapters.")}
            # The factors are multiplied out, because one patch has one form, and the other differences are whole matrices.
            differences |= {name: up @ down for name, (up, down) in self.patch.adapters.factors(adapted).items()}
        return patches.WeightPatch.of(differences)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for settings that cannot work, before anything starts."""
    plan.check_rows(config, job)
    # Under ZeRO 1 and 2 each rank has whole parameters, while moments and gradients are flattened and sharded; the optimizer is
    # elementwise, so this does not change the result.
    if job.scale.zero_stage == 3:
        raise ValueError(
            "scale.zero_stage 3: method warp makes whole weights of their coefficients on every worker, which ZeRO 3 would "
            "shard; use 0, 1 or 2"
        )
    if config.others == "train" and job.model.dtype == "bfloat16":
        raise ValueError("method.others train: weights in bfloat16 would need float32 copies; set model.dtype: float32")
    # With spare_ratio some coefficients may be trainable even then.
    if config.keep_ratio == 1 and config.others == "frozen" and not config.spare_ratio and config.lora is None:
        raise ValueError("method.keep_ratio 1 freezes every coefficient, and method.others the other weights: nothing trains")


METHOD = Trained(Config, Warp, preparations=prepares, check=check, example="jobs/tiny/warp.yaml")
