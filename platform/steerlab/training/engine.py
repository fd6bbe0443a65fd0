"""A DeepSpeed engine for one training: forward and backward passes with exact normalisation, checkpoints, gathered weights.

DeepSpeed is imported in workers only (ray #50406) and uses the existing process group. The optimizer is torch's own, and the
learning rate is written at every step, so that a checkpoint needs no scheduler.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerlab.guards import private_parts
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject
from steerlab.job import ScaleConfig, TrainConfig
from steerlab.training import checkpoints
from steerlab.training.checkpoints import META, LoopState
from steerlab.training.optimizer import make_optimizer
from steerlab.training.safe_loading import without_code

_TAG = "state"


class WorldSizeError(ValueError):
    """A sharded checkpoint was written by another number of workers, and cannot be loaded."""


@dataclass
class Engine:
    """A module under DeepSpeed on one rank."""

    module: nn.Module
    """Module whose forward takes a batch and returns a `methods.contract.Loss`."""
    train: TrainConfig
    scale: ScaleConfig
    dtype: str
    rank: int
    world_size: int
    device: torch.device

    def __post_init__(self) -> None:
        if self.dtype == "bfloat16" and self.scale.zero_stage == 0:
            # The job itself was checked for this, but trainings of jobs that it builds on run with the scale of this job.
            raise ValueError("bfloat16 weights train with float32 copies, which needs scale.zero_stage 1, 2 or 3, not 0")
        if self.device.type == "cpu":
            # DeepSpeed reads the variable when it is imported below.
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))  # Ray Train sets it; a plain process may not
        import deepspeed

        if self.device.type == "cpu":
            private_parts.without_shared_memory()
        deepspeed.utils.logging.logger.setLevel("ERROR")
        optimizer = make_optimizer(self.module, self.train)
        self._grad_norm = torch.zeros(())
        self._leaves_out = False
        self._bad_gradient = torch.zeros((), dtype=torch.bool, device=self.device)
        if self.train.skip_steps:
            self._watch(optimizer)
        if self._clips_itself:
            optimizer.register_step_pre_hook(lambda *_: self._clip())
        self._ds: Any
        # A new engine is made for each training, since an engine cannot be reused (transformers #11894).
        self._ds, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=self._config())
        self._ds.checkpoint_engine = without_code(self._check)

    @property
    def passes_per_step(self) -> int:
        """Number of forward passes of this worker in one optimizer step."""
        rows = self.train.rows_per_step // self.world_size
        # Rounded up, as in `share_of_rank`: DeepSpeed counts passes and updates the weights after this number.
        return -(-rows // self.train.micro_batch)

    @property
    def _clips_itself(self) -> bool:
        """Whether this class clips the gradients, instead of DeepSpeed."""
        # DeepSpeed could clip in plain float32 training too, but would not return the norm.
        return self.scale.zero_stage == 0 and self.dtype == "float32"

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Record gradients that are not finite, and make the optimizer's step skippable."""
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note)
        step = optimizer.step
        # DeepSpeed calls this after gathering and clipping the gradients, which it then drops in either case.
        optimizer.step = lambda *args, **kwargs: None if self._leaves_out else step(*args, **kwargs)  # type: ignore[method-assign]

    def _note(self, gradient: Tensor) -> None:
        # The flag stays on the device: reading it here would wait for the GPU at every parameter.
        self._bad_gradient |= ~torch.isfinite(gradient).all()

    @property
    def bad_gradient(self) -> Tensor:
        """1 if a gradient of this rank in this step was NaN or infinite, else 0; known only with `train.skip_steps`."""
        return self._bad_gradient.double()

    def _clip(self) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        # With an infinite limit, nothing is clipped, but the norm is returned.
        self._grad_norm = nn.utils.clip_grad_norm_(trained, self.train.clip_norm or float("inf"))

    def _config(self) -> dict[str, object]:
        zero: dict[str, object] = {"stage": self.scale.zero_stage}
        if self.scale.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.scale.zero_stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": self.train.micro_batch,
            "gradient_accumulation_steps": self.passes_per_step,
            # 0 turns DeepSpeed's clipping off.
            "gradient_clipping": 0.0 if self._clips_itself else self.train.clip_norm,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            # bfloat16 would lose the small gradients of later passes in the sum of a step.
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
            # Without these, DeepSpeed refuses other optimizers than its own, and requires its C++ one with offloading.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def backward(
        self, batch: object, num_targets: float, accepts: Callable[[Tensor], bool] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of one micro-batch; after the last one of a step the optimizer updates the parameters.

        Args:
            batch: the argument of the module's forward.
            num_targets: number of targets of the whole step, over all passes and workers.
            accepts: for the last micro-batch, with `train.skip_steps`: called with its summed loss after its gradients were
                added; returns whether the optimizer updates the parameters. All ranks call it.

        Returns:
            The summed loss of this micro-batch and its further sums by name, without gradients.

        Raises:
            ValueError: the loss does not depend on any trained parameter.
        """
        loss = self._ds(batch)
        if not loss.total.requires_grad:
            # DeepSpeed's own message ("loss must be a scalar tensor") does not name the cause.
            raise ValueError(
                f"the loss of {type(self.module).__name__} does not depend on any trained parameter, so nothing would train: "
                "is its patch attached to the model, and is the loss computed with gradients?"
            )
        # DeepSpeed divides by passes and workers. After multiplication by both, the sum over passes and workers is the sum of
        # total / num_targets, for every division of the rows.
        self._ds.backward(loss.total * (self.passes_per_step * self.world_size / num_targets))
        # Decided after the backward pass, because in it all ranks reduce gradients, which no rank may skip.
        self._leaves_out = accepts is not None and not accepts(loss.total.detach())
        self._ds.step()
        self._leaves_out = False
        return loss.total.detach(), {name: value.detach() for name, value in loss.metrics.items()}

    def evaluate(self, batch: object) -> dict[str, Tensor]:
        """Return the summed loss of one batch, as `loss`, and its further sums, without gradients and in evaluation mode."""
        self._ds.eval()
        with torch.no_grad():
            loss = self._ds(batch)
        self._ds.train()
        return {"loss": loss.total, **loss.metrics}

    def start_step(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self._bad_gradient.zero_()
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr

    @property
    def grad_norm(self) -> float:
        """L2 norm of all gradients of the last step, over all workers, before clipping."""
        return float(self._grad_norm if self._clips_itself else self._ds.get_global_grad_norm())

    def sum_over_ranks(self, values: Iterable[Tensor]) -> list[float]:
        """Return the sums of numbers in float64 over all workers; all ranks call it with the same count of numbers."""
        # float64, since the loop divides these sums over thousands of targets.
        summed = torch.stack([value.to(self.device, torch.float64) for value in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(summed)
        return summed.tolist()

    def save(self, directory: Path, state: LoopState) -> None:
        """Write this rank's part of a checkpoint; all ranks call it."""
        # Frozen weights are excluded, since a resumed run loads them from its starting model.
        self._ds.save_checkpoint(str(directory), tag=_TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True)
        if self.rank == 0:
            meta = {"world_size": self.world_size, "zero_stage": self.scale.zero_stage, "state": state}
            (directory / META).write_text(json.dumps(meta))  # JSON, which is checked before any pickle is loaded

    def load(self, directory: Path) -> JsonObject:
        """Load a checkpoint and return the unchecked state of the loop (see `checkpoints.check_state`).

        Raises:
            WorldSizeError: the checkpoint is sharded (ZeRO 1 to 3) over another number of workers.
            ValueError: a file of the checkpoint is damaged, would run code, or belongs to another training.
        """
        meta = checkpoints.read_meta(directory)
        # With ZeRO 0 every rank has whole weights and moments, which any number of workers can load.
        written = (meta.world_size, meta.zero_stage)
        if written != (self.world_size, self.scale.zero_stage) and (written[1] or self.scale.zero_stage):
            raise WorldSizeError(
                f"the checkpoint was written by {written[0]} workers with zero_stage {written[1]}; it cannot continue on "
                f"{self.world_size} with zero_stage {self.scale.zero_stage}, because its optimizer state is sharded. "
                "Use the same scale.workers and scale.zero_stage (zero_stage 0 may change workers), or remove the checkpoints"
            )
        # Checked before DeepSpeed opens files, which it finds by its own patterns.
        checkpoints.check_files(directory / _TAG)
        with explained(f"the checkpoint in {directory}"):
            # Loading is not strict, since the checkpoint lacks the frozen weights; `_check` compares the trained ones.
            loaded, _ = self._ds.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False)
        assert loaded is not None, f"DeepSpeed found no checkpoint in {directory}"  # DeepSpeed itself only warns
        return meta.state

    def _check(self, contents: object, path: Path) -> None:
        """Raise ValueError if the contents of a checkpoint's file do not fit this module and optimizer."""
        checkpoints.check_tensors(contents, path)
        if not isinstance(contents, dict):
            raise ValueError(f"{path} has a {type(contents).__name__} instead of the state of a training")
        if path.name.endswith("_model_states.pt"):
            trained = [name for name, parameter in self._ds.module.named_parameters() if parameter.requires_grad]
            checkpoints.check_module(contents.get("module"), self._ds.module.state_dict(), trained, path)
        # DeepSpeed 0.19 stores torch's optimizer state under a different key for each kind of sharding.
        if path.name.endswith("_optim_states.pt"):
            zero = contents.get("optimizer_state_dict")
            nested = "optimizer_state_dict" if self.scale.zero_stage == 3 else "base_optimizer_state"
            self._check_optimizer(zero.get(nested) if isinstance(zero, dict) else None, path)
        elif self.scale.zero_stage == 0:
            self._check_optimizer(contents.get("optimizer"), path)

    def _check_optimizer(self, optimizer_state: object, path: Path) -> None:
        """Raise ValueError if a state does not fit torch's optimizer."""
        optimizer = self._ds.optimizer if self.scale.zero_stage == 0 else self._ds.optimizer.optimizer
        # Under ZeRO the optimizer's parameters are flat shards, not the module's parameters.
        if self.scale.zero_stage == 3:
            parameters = self._ds.optimizer.fp32_partitioned_groups_flat
        else:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        checkpoints.check_optimizer(optimizer_state, optimizer, parameters, path)

    def weights(self, prefix: str = "", *, masters: bool = False) -> dict[str, Tensor]:
        """Return the module's full state dict on the CPU on rank 0, and an empty one on other ranks. All ranks call it.

        Args:
            prefix: take only entries with this prefix, and remove it from their names.
            masters: for weights that train in bfloat16, take the float32 copies that the optimizer updates.
        """
        if self.scale.zero_stage < 3:
            full = self._ds.module.state_dict() if self.rank == 0 else {}
        else:
            # A collective: DeepSpeed 0.19 gathers layer by layer and moves each to rank 0's CPU.
            full = self._ds._zero3_consolidated_16bit_state_dict() or {}  # None on all ranks but 0
        if masters and self.dtype == "bfloat16":
            # Called on all ranks, since gathering is a collective operation under ZeRO 1 and 2, too.
            copies = self._masters(prefix)
            full = {**full, **copies} if self.rank == 0 else {}
        full = {name.removeprefix(prefix): tensor for name, tensor in full.items() if name.startswith(prefix)}
        # Tied weights share one copy, so that they are saved once.
        once: dict[int, Tensor] = {}
        return {name: once.setdefault(tensor.data_ptr(), tensor.detach().cpu()) for name, tensor in full.items()}

    def _masters(self, prefix: str) -> dict[str, Tensor]:
        """Return the optimizer's float32 copies of the trained parameters with a prefix, gathered on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        copies: dict[str, Tensor] = {}
        # Duplicates are included: a tied weight is saved under each of its names in the state dict.
        for name, parameter in self._ds.module.named_parameters(remove_duplicate=False):
            if name.startswith(prefix) and parameter.requires_grad:
                copy = safe_get_full_fp32_param(parameter)
                assert copy is not None, f"the optimizer has no float32 copy of {name}"
                copies[name] = copy
        return copies

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._ds.destroy()
