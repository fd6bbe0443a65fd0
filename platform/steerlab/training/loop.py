"""The training loop of every method. It does not use Ray and does not name a method.

With fixed settings, the rows of step t depend on (number of rows, seed, t) alone, the learning rate on t, the random state on
(seed, t, rank). A checkpoint holds the engine's state, the step, the metrics so far and the snapshots, but no state of a
sampler, scheduler or random generator. The number of workers does not change the rows of a step (schedule.py).
"""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steerlab import models
from steerlab.data.rows import describe
from steerlab.guards import files
from steerlab.inputs.encoded_rows import Rows
from steerlab.inputs.tokens import Batch
from steerlab.job import ScaleConfig, stops
from steerlab.methods.contract import trained_parameters
from steerlab.training import artifact, bad_steps, checkpoints, numerics
from steerlab.training.engine import Engine
from steerlab.training.link import Link
from steerlab.training.request import Request
from steerlab.training.schedule import learning_rate, rows_of_step, share_of_rank
from steerlab.training.start import load

_SMALLER = (
    "lower train.micro_batch (and raise train.grad_accum as much) or train.max_tokens, set scale.gradient_checkpointing, "
    "scale.zero_stage with more workers, scale.offload, or model.dtype: bfloat16"
)
"""Advice for a GPU that is out of memory, for the error message."""
_SNAPSHOTS = "snapshots.safetensors"


def _add(totals: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to sums in float64 on their device; reading them on the CPU would make it wait for the GPU in every pass."""
    for name, value in values.items():
        wide = value.detach().to(torch.float64)
        totals[name] = totals[name] + wide if name in totals else wide


def _check_finite(metrics: dict[str, float]) -> None:
    """Raise FloatingPointError for a NaN or infinite metric."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} of step {metrics['step']} is {value}; lower train.lr or use float32")


@dataclass
class _Training:
    """State of the training on one rank."""

    request: Request[Path]
    scale: ScaleConfig
    link: Link

    def __post_init__(self) -> None:
        start = load(self.request, self.link.device, self.scale.gradient_checkpointing)
        self.start, self.request, self.module, self.rows = start, start.request, start.module, start.rows
        parameters = trained_parameters(self.module).values()
        self.num_trained = sum(p.numel() for p in parameters)
        # Decided by the trained parameters: a patch on a bfloat16 model trains in float32, without copies in the optimizer.
        dtype = "bfloat16" if any(p.dtype == torch.bfloat16 for p in parameters) else "float32"
        self.engine = Engine(
            self.module, self.request.train, self.scale, dtype, self.link.rank, self.link.world_size, self.link.device
        )
        self.lengths = [len(row) for row in self.rows.rows]
        self.history: list[dict[str, float]] = []
        self.snapshots: dict[str, Tensor] = {}
        self.step = self.saved = 0
        self.fault: str | None = None

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint: step, history, snapshots, weights and optimizer."""
        state = checkpoints.check_state(self.engine.load(checkpoint), self.request.train.num_steps, checkpoint)
        self.step, self.history = state["step"], state["history"]
        self.saved = self.step
        if (checkpoint / _SNAPSHOTS).is_file():
            snapshots = checkpoint / _SNAPSHOTS
            self.snapshots = checkpoints.read_snapshots(snapshots, self.module, self.request.train.snapshots)
        # Sends the metrics of all steps again, because the last ones of the killed run may not have arrived.
        for line in self.history:
            self.link.tell({**line, "steps": self.request.train.num_steps})

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done, or the evaluation losses so far end the training early."""
        train = self.request.train
        if self.step >= train.num_steps or train.patience is None or not self.history:
            return self.step >= train.num_steps
        # Decided from recorded losses only, so that a run that continues from a checkpoint stops at the same step.
        losses = [line["eval/loss"] for line in self.history if "eval/loss" in line]
        return "eval/loss" in self.history[-1] and stops(losses, train.patience)

    def run(self) -> None:
        """Train until the end, with evaluations and checkpoints; all ranks call it."""
        train = self.request.train
        started_s, first = time.monotonic(), self.step
        while not self.has_ended:
            metrics = self._step()
            done = self.step - first
            rate = done / (time.monotonic() - started_s)
            due = self.step == train.num_steps or (train.eval_every and self.step % train.eval_every == 0)
            evaluates = self.start.validation is not None and due
            if evaluates:
                metrics |= self._evaluation()
            # Checked before a checkpoint is written, so that no run resumes from weights that are NaN. All ranks raise
            # together, because the metrics are sums over all of them.
            _check_finite(metrics)
            # Part of every checkpoint, so that metrics.jsonl of the artifact has each step once even after a kill.
            self.history.append(metrics)
            if self.step in train.snapshots:
                weights = self.engine.weights("patch.", masters=True)
                # Cloned, because on the CPU the engine returns the parameters themselves, which the next step changes.
                self.snapshots |= {f"{self.step}/{name}": value.clone() for name, value in weights.items()}
            left = train.num_steps - self.step
            self.link.tell({**metrics, "steps": train.num_steps, "steps_per_s": rate, "left_s": left / rate})
            if self.has_ended or self.step % self.scale.checkpoint_every == 0 or (evaluates and train.keep == "best"):
                self._checkpoint(metrics)

    def _step(self) -> dict[str, float]:
        """Train one step, and return its number, losses, learning rate and gradient norm. All ranks call it."""
        train, step = self.request.train, self.step
        # Seeded by step and rank, so that a resumed run draws the same random numbers (dropout) as an uninterrupted one.
        torch.manual_seed((train.seed * 1_000_003 + step) * 4_099 + self.link.rank)
        rows = rows_of_step(len(self.rows.rows), train.rows_per_step, train.seed, step)
        # Counts the targets of the whole step, not of this rank's share, so that every rank divides by the same number.
        num_targets = sum(self.module.counts(self.rows.rows[row], self.start.data.loss_on) for row in rows)
        lr = learning_rate(train, step)
        # Called before the first pass, which a gradual rotation (ASIDE) already computes with this step's angle.
        self.module.on_step(step, min(train.num_steps, len(self.rows.rows) / train.rows_per_step))
        # The learning rate is set before the first pass, because the last `engine.backward` of the step updates the weights.
        self.engine.start_step(lr)
        totals: dict[str, Tensor] = {}
        chunks = share_of_rank(rows, self.lengths, self.link.rank, self.link.world_size, train.micro_batch)
        self.fault = None
        passes: list[tuple[Sequence[int], Tensor]] = []
        # Every rank has the same number of passes (`share_of_rank`); one with more would wait forever in a reduction.
        for number, chunk in enumerate(chunks, 1):
            is_last = number == len(chunks)
            self.module.before_pass(is_last)
            # Given only if steps may be skipped, because it costs a reduction and, on a GPU, a synchronisation.
            accepts = partial(self._accepts, totals.get("loss"), num_targets) if is_last and train.skip_steps else None
            batch = self._batch(self.rows, chunk, self.start.data.loss_on)
            total, sums_by_name = self.engine.backward(batch, num_targets, accepts)
            passes.append((chunk, total))
            _add(totals, {"loss": total, **sums_by_name})
        # One reduction serves all metrics, because every rank has the same names in the same order.
        sums = self.engine.sum_over_ranks(totals.values())
        losses = {f"train/{name}": value / num_targets for name, value in zip(totals, sums, strict=True)}
        self.step += 1
        metrics: dict[str, float] = {"step": self.step, **losses, "train/lr": lr}
        # The limit counts skipped steps of the history: a resumed run skips the same ones. A checkpoint accepts finite metrics.
        if self.fault is not None and bad_steps.num_skipped(self.history) < train.skip_steps:
            return {**{name: value for name, value in metrics.items() if math.isfinite(value)}, bad_steps.SKIPPED: 1.0}
        metrics["train/grad_norm"] = self.engine.grad_norm
        self._check_step(metrics, rows, passes)
        # Called after the check, which raises for a bad step: the method's hook only sees the weights of good steps.
        self.module.after_step(lr)
        return metrics

    def _accepts(self, before: Tensor | None, num_targets: float, last: Tensor) -> bool:
        """Return whether the step may update the weights; all ranks call it.

        `last` is the summed loss of this rank's last pass, `before` that of its earlier passes, None if there are none.
        """
        loss = last if before is None else before + last
        # The sums over all ranks are the same on each, so all ranks decide alike: none waits in a step that another one skips.
        total, bad = self.engine.sum_over_ranks([loss, self.engine.bad_gradient])
        self.fault = bad_steps.fault_of(total / num_targets, self.history, self.request.train.spike)
        if self.fault is None and bad:
            self.fault = "has gradients that are NaN or infinite"
        return self.fault is None

    def _check_step(
        self, metrics: dict[str, float], rows: Sequence[int], passes: Sequence[tuple[Sequence[int], Tensor]]
    ) -> None:
        """Raise FloatingPointError if the step is bad: its loss, gradients or a metric. All ranks call it.

        Args:
            metrics: the metrics of the step, the same on all ranks.
            rows: the rows of the step.
            passes: (rows, summed loss) of each pass of this rank.
        """
        name, fault = (
            bad_steps.LOSS,
            self.fault or bad_steps.fault_of(metrics[bad_steps.LOSS], self.history, self.request.train.spike),
        )
        if fault is None:
            name, value = next(((n, v) for n, v in metrics.items() if not math.isfinite(v)), ("", 0.0))
            if not name:
                return
            fault = f"is {value}"
        # The losses of single passes are read from the GPU only for a bad step, so that a good one does not wait for them.
        bad_rows = {row for chunk, total in passes if not math.isfinite(float(total)) for row in chunk}
        # Each rank knows only its own passes; the sum over ranks marks a row that any rank found bad.
        flags = self.engine.sum_over_ranks([torch.tensor(float(row in bad_rows)) for row in rows])
        blamed = [row for row, flag in zip(rows, flags, strict=True) if flag] or list(rows)
        numbers = sorted(self.rows.numbers[row] for row in blamed)
        checkpoint = f"{self.link.checkpoints}/{self.saved:09d}" if self.saved else ""
        skipped = bad_steps.num_skipped(self.history)
        raise FloatingPointError(
            bad_steps.message(name, fault, self.step, numbers, describe(self.start.data), checkpoint, skipped)
        )

    def _batch(self, of: Rows, chosen: Sequence[int], loss_on: str) -> Batch:
        rows, numbers = [of.rows[i] for i in chosen], [of.numbers[i] for i in chosen]
        return self.start.encoder.collate(rows, loss_on=loss_on, numbers=numbers).to(self.link.device)

    def _evaluation(self) -> dict[str, float]:
        """Return `eval/loss` and the other metrics of the loss as means over validation targets; all ranks call it."""
        assert self.start.validation is not None and self.request.data.validation is not None
        rows, loss_on = self.start.validation.rows, self.request.data.validation.loss_on
        size = self.request.train.micro_batch
        chunks = [range(len(rows))[i : i + size] for i in range(0, len(rows), size)]
        mine = chunks[self.link.rank :: self.link.world_size]
        # Under ZeRO 3 each pass gathers weights from all ranks, so a rank with fewer chunks repeats the first, uncounted.
        num_repeats = -(-len(chunks) // self.link.world_size) - len(mine)
        totals: dict[str, Tensor] = {}
        for number, chunk in enumerate([*mine, *[chunks[0]] * num_repeats]):
            sums_by_name = self.engine.evaluate(self._batch(self.start.validation, chunk, loss_on))
            counted = number < len(mine)
            _add(totals, {name: value if counted else torch.zeros_like(value) for name, value in sums_by_name.items()})
        sums = self.engine.sum_over_ranks(totals.values())
        num_targets = sum(self.module.counts(row, loss_on) for row in rows)
        return {f"eval/{name}": value / num_targets for name, value in zip(totals, sums, strict=True)}

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint and report it with the metrics of its step; all ranks call it."""
        # Each checkpoint gets its own folder, because the previous one may still be uploading.
        directory = self.link.scratch / uuid.uuid4().hex
        directory.mkdir()
        # All ranks save, because under ZeRO every rank holds a shard.
        self.engine.save(directory, {"step": self.step, "history": self.history})
        if self.link.rank == 0 and self.snapshots:
            save_file(self.snapshots, directory / _SNAPSHOTS)
            files.share(directory, like=directory / checkpoints.META)  # another user may continue this training
        self.link.report(metrics, directory)
        self.saved = self.step

    def export(self, output: Path) -> None:
        """Write the artifact on rank 0: model, patch, snapshots, prompt settings, metrics. All ranks call it."""
        state = self.engine.weights() if self.module.leaves_model else self.engine.weights("patch.", masters=True)
        # The other ranks return only here, because under ZeRO 3 all of them take part in gathering the weights.
        if self.link.rank:
            return
        facts = {"trained_parameters": self.num_trained, "steps": self.step, **self.start.row_counts}
        result = artifact.Result(
            module=self.module,
            encoder=self.start.encoder,
            model=self.request.model,
            model_key=self.start.model_key,
            state=state,
            snapshots=self.snapshots,
            snapshot_steps=self.request.train.snapshots,
            history=self.history,
            facts=facts,
        )
        artifact.write(result, output)


def run(request: Request[Path], scale: ScaleConfig, link: Link, output: Path) -> None:
    """Train from the latest checkpoint, or from the start, to the end, and write the artifact on rank 0.

    Args:
        request: the training, with its inputs in directories of this node.
        scale: number of workers and sharding.
        link: rank, device, and the functions that report to the process that runs the loop.
        output: directory of the artifact; an existing one is replaced.
    """
    with numerics.of(request.train), models.memory_explained(_SMALLER):
        _run(request, scale, link, output)


def _run(request: Request[Path], scale: ScaleConfig, link: Link, output: Path) -> None:
    # A killed rank may have left half-written checkpoints.
    shutil.rmtree(link.scratch, ignore_errors=True)
    link.scratch.mkdir(parents=True)
    training = _Training(request, scale, link)
    if link.latest is not None:
        training.resume(link.latest)
    training.run()
    if request.train.keep == "best":
        # Every rank loads the best checkpoint, because each holds a part of the engine's state.
        best = link.best()
        if best is not None:
            training.engine.load(best)
    training.export(output)
    # Closed after the export, which gathers weights through DeepSpeed.
    training.engine.close()
