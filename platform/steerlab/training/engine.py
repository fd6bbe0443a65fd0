"""A DeepSpeed engine for one stage: forward and backward with exact normalisation, checkpoints, gathered weights.

DeepSpeed is imported in workers only (ray #50406) and uses the process group that exists. The optimizer is torch's own and the
learning rate is written at every step, so a checkpoint needs no scheduler.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Callable
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

_TAG = "state"
_SMALL = 4_000_000
"""Trained numbers up to which the optimizer takes all parameters together on the CPU."""


class WorldSizeError(ValueError):
    """A sharded checkpoint cannot be loaded on another number of workers."""


def _without_code(check: Callable[[object, Path], None]) -> object:
    """Return a reader and writer of DeepSpeed's checkpoint files that runs no code of them: they lie where others may write.

    `check` sees what was read before it is taken.
    """
    engine, classes = private_parts.checkpoint_engine()

    class WithoutCode(engine):
        """DeepSpeed's own unpickles anything (0.19); what it writes itself needs no more than these three classes."""

        def save(self, state_dict: object, path: str) -> None:
            super().save(_without_enums(state_dict), path)

        def load(self, path: str, map_location: Any = None) -> object:
            with torch.serialization.safe_globals([*classes]):
                found = torch.load(path, map_location=map_location, weights_only=True)
            check(found, Path(path))
            return found

    return WithoutCode()


def _without_enums(value: object) -> object:
    """Return a state whose enumerations are numbers: Python 3.11.2 pickles one as a call of getattr, which is not allowed."""
    if isinstance(value, enum.Enum) and isinstance(value, int):
        return int(value)
    if type(value) is dict:
        return {key: _without_enums(one) for key, one in value.items()}
    return [_without_enums(one) for one in value] if type(value) is list else value


@dataclass
class Engine:
    """A module under DeepSpeed on one rank."""

    module: nn.Module
    train: TrainConfig
    scale: ScaleConfig
    dtype: str
    rank: int
    world_size: int
    device: torch.device

    def __post_init__(self) -> None:
        if self.dtype == "bfloat16" and self.scale.zero_stage == 0:
            # A job's own settings were checked; those of a job below it are spread as the one above asks.
            raise ValueError("bfloat16 weights train with float32 copies, which needs scale.zero_stage 1, 2 or 3, not 0")
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))  # Ray Train sets it; a plain process may not
        import deepspeed

        if self.device.type == "cpu":
            private_parts.without_shared_memory()
        deepspeed.utils.logging.logger.setLevel("ERROR")
        optimizer = make_optimizer(self.module, self.train)
        self._grad_norm = 0.0
        if self._clips_itself:
            optimizer.register_step_pre_hook(lambda *_: self._clip())
        self._ds: Any
        self._ds, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=self._config())
        self._ds.checkpoint_engine = _without_code(self._check)

    @property
    def passes_per_step(self) -> int:
        """Forward passes of this worker in one optimizer step."""
        rows = self.train.rows_per_step // self.world_size
        return -(-rows // self.train.micro_batch)

    @property
    def _clips_itself(self) -> bool:
        """DeepSpeed clips too in plain float32 training, but keeps the norm to itself."""
        return self.scale.zero_stage == 0 and self.dtype == "float32"

    def _clip(self) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self._grad_norm = float(nn.utils.clip_grad_norm_(trained, self.train.clip_norm or float("inf")))

    def _config(self) -> dict[str, object]:
        zero: dict[str, object] = {"stage": self.scale.zero_stage}
        if self.scale.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.scale.zero_stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": self.train.micro_batch,
            "gradient_accumulation_steps": self.passes_per_step,
            "gradient_clipping": 0.0 if self._clips_itself else self.train.clip_norm,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def backward(self, batch: object, num_targets: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of one micro-batch; the optimizer moves after the last one of a step.

        Args:
            batch: what the module's forward takes.
            num_targets: targets of the whole step, over all passes and workers.

        Returns:
            The summed loss of this micro-batch, and its further sums by name, both without gradients.

        Raises:
            ValueError: the loss depends on no trained parameter.
        """
        loss = self._ds(batch)
        if not loss.total.requires_grad:
            # DeepSpeed's own message ("loss must be a scalar tensor") names neither the cause nor the remedy.
            raise ValueError(
                f"the loss of {type(self.module).__name__} does not depend on any trained parameter, so nothing would train: "
                "is its patch attached to the model, and is the loss computed with gradients?"
            )
        # DeepSpeed divides by passes and workers; multiplied by both first, total / num_targets is left, and the sum over
        # passes and workers is exact however the rows are split.
        self._ds.backward(loss.total * (self.passes_per_step * self.world_size / num_targets))
        self._ds.step()
        return loss.total.detach(), {name: value.detach() for name, value in loss.metrics.items()}

    def evaluate(self, batch: object) -> Tensor:
        """Return the summed loss of one batch without gradients."""
        self._ds.eval()
        with torch.no_grad():
            total = self._ds(batch).total
        self._ds.train()
        return total

    def start_step(self, lr: float) -> None:
        """Set the learning rate of the step that begins."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return self._grad_norm if self._clips_itself else float(self._ds.get_global_grad_norm())

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Add up numbers over all workers."""
        if self.world_size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()

    def save(self, directory: Path, state: LoopState) -> None:
        """Write this rank's part of a checkpoint; all ranks call it."""
        # Frozen weights are those of the model that the run starts from.
        self._ds.save_checkpoint(str(directory), tag=_TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True)
        if self.rank == 0:
            meta = {"world_size": self.world_size, "zero_stage": self.scale.zero_stage, "state": state}
            (directory / META).write_text(json.dumps(meta))

    def load(self, directory: Path) -> JsonObject:
        """Continue from a checkpoint and return the state of the loop, unchecked.

        Raises:
            WorldSizeError: a ZeRO 1-3 checkpoint of another number of workers.
            ValueError: a file of the checkpoint is damaged, would run code, or is not of this training.
        """
        meta = checkpoints.read_meta(directory)
        saved = (meta.world_size, meta.zero_stage)
        if saved != (self.world_size, self.scale.zero_stage) and (saved[1] or self.scale.zero_stage):
            raise WorldSizeError(
                f"the checkpoint was written by {saved[0]} workers with zero_stage {saved[1]}; it cannot continue on "
                f"{self.world_size} with zero_stage {self.scale.zero_stage}, because sharded optimizer state does not move. "
                "Use the same scale.workers and scale.zero_stage (zero_stage 0 may change workers), or delete the checkpoint"
            )
        checkpoints.check_files(directory / _TAG)
        with explained(f"the checkpoint in {directory}"):
            loaded, _ = self._ds.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False)
        assert loaded is not None, f"DeepSpeed found no checkpoint in {directory}"
        return meta.state

    def _check(self, found: object, path: Path) -> None:
        """Refuse what a file of a checkpoint holds unless it is that of this module and optimizer. Raises ValueError."""
        checkpoints.check_tensors(found, path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}, not the state of a training")
        if path.name.endswith("_model_states.pt"):
            trained = [name for name, one in self._ds.module.named_parameters() if one.requires_grad]
            checkpoints.check_module(found.get("module"), self._ds.module.state_dict(), trained, path)
        if path.name.endswith("_optim_states.pt"):
            zero = found.get("optimizer_state_dict")
            nested = "optimizer_state_dict" if self.scale.zero_stage == 3 else "base_optimizer_state"
            self._check_optimizer(zero.get(nested) if isinstance(zero, dict) else None, path)
        elif self.scale.zero_stage == 0:
            self._check_optimizer(found.get("optimizer"), path)

    def _check_optimizer(self, found: object, path: Path) -> None:
        """Compare a state with torch's optimizer, whose parameters are, under ZeRO, flat shares of those of the module."""
        optimizer = self._ds.optimizer if self.scale.zero_stage == 0 else self._ds.optimizer.optimizer
        if self.scale.zero_stage == 3:
            parameters = self._ds.optimizer.fp32_partitioned_groups_flat
        else:
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
        checkpoints.check_optimizer(found, optimizer, parameters, path)

    def weights(self, prefix: str = "", *, masters: bool = False) -> dict[str, Tensor]:
        """Return the module's state below `prefix` in full, on the CPU (rank 0; empty elsewhere). All ranks call it.

        `masters` takes, of weights that train in bfloat16, the float32 copies that the optimizer moves.
        """
        if self.scale.zero_stage < 3:
            full = self._ds.module.state_dict() if self.rank == 0 else {}
        else:
            full = self._ds._zero3_consolidated_16bit_state_dict() or {}
        if masters and self.dtype == "bfloat16":
            copies = self._masters(prefix)
            full = {**full, **copies} if self.rank == 0 else {}
        full = {name.removeprefix(prefix): tensor for name, tensor in full.items() if name.startswith(prefix)}
        # Tied weights share one copy, so that they are saved once.
        once: dict[int, Tensor] = {}
        return {name: once.setdefault(tensor.data_ptr(), tensor.detach().cpu()) for name, tensor in full.items()}

    def _masters(self, prefix: str) -> dict[str, Tensor]:
        """Gather the float32 copies of what trains below a prefix, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        for name, parameter in self._ds.module.named_parameters(remove_duplicate=False):
            if name.startswith(prefix) and parameter.requires_grad:
                copy = safe_get_full_fp32_param(parameter)
                assert copy is not None, f"the optimizer keeps no float32 copy of {name}"
                found[name] = copy
        return found

    def close(self) -> None:
        """Release hooks and buffers."""
        self._ds.destroy()


def make_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Make torch's optimizer over what trains; decay applies to matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # On the CPU torch takes parameters one by one unless told: the same bits, but twice the time where all are small, and there
    # the temporary copies do not matter.
    together = True if sum(p.numel() for p in trained) <= _SMALL else None
    match train.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, foreach=together)
        case "adam":
            return torch.optim.Adam(groups, lr=train.lr, betas=train.betas, foreach=together)
        case "sgd":
            return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, foreach=together)
