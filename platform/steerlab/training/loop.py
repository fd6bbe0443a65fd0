"""The training loop of every method. It does not use Ray and does not name a method.

The rows of step t depend only on (number of rows, seed, t), the learning rate on t, and the random state on (seed, t, rank). A
checkpoint therefore holds only the engine and the step, and the number of workers does not change which rows a step has. The
file is longer than others because the loop, its state and its export are read together.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerlab import models, patches
from steerlab.activations.parquet import Activations
from steerlab.data.rows import describe, is_mixture
from steerlab.data.rows import read as read_rows
from steerlab.guards import files
from steerlab.guards.faults import explained
from steerlab.inputs.encoded_rows import RowEncoder, Rows
from steerlab.inputs.tokens import Batch
from steerlab.job import DataSet, ScaleConfig, TrainConfig, prompt_settings, stops
from steerlab.methods import trained
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.steered.stacks import load_stack
from steerlab.training import bad_steps, checkpoints, numerics
from steerlab.training.engine import Engine
from steerlab.training.request import Request

_SMALLER = (
    "lower train.micro_batch (and raise train.grad_accum as much) or train.max_tokens, set scale.gradient_checkpointing, "
    "scale.zero_stage with more workers, scale.offload, or model.dtype: bfloat16"
)
"""What takes less memory of a GPU."""
_SNAPSHOTS = "snapshots.safetensors"


@dataclass(frozen=True)
class Link:
    """The loop's connection to the process that runs it, such as a worker of Ray Train."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[dict[str, float], Path | None], None]
    """(metrics, checkpoint directory or None) -> None; all ranks call it equally often."""
    scratch: Path
    """Directory in which checkpoints are written before they are reported; emptied at the start, because a killed rank may have
    left files."""
    checkpoints: str = ""
    """Where the checkpoints lie, for messages."""
    latest: Path | None = None
    """Checkpoint to continue from; None starts from the beginning."""
    best: Callable[[], Path | None] = lambda: None
    """Returns the checkpoint with the lowest `eval/loss`; None if no checkpoint was reported."""
    tell: Callable[[dict[str, float]], None] = lambda metrics: None
    """Takes the metrics of every step, for the progress display."""


def rows_of_step(num_rows: int, rows_per_step: int, seed: int, step: int) -> list[int]:
    """Return the row numbers of step `step` (from 0), the next `rows_per_step` of a random permutation for each epoch."""
    # A step may reach over the end of an epoch: its rows are then the last of one permutation and the first of the next.
    chosen: list[int] = []
    position = step * rows_per_step
    while len(chosen) < rows_per_step:
        epoch, start = divmod(position, num_rows)
        taken = _order(num_rows, seed, epoch)[start : start + rows_per_step - len(chosen)].tolist()
        chosen += taken
        position += len(taken)
    return chosen


# Two of them: those of a step that reaches over the end of an epoch. Drawn at every step, ten million rows would cost 0.7 s.
@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of all rows in an epoch, (num_rows,)."""
    # Seeded by its epoch, so that a resumed run draws the same one and needs no state of a sampler.
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    # Half the memory, which stays taken for the epoch; drawn as int64, since the type may change what is drawn.
    return order.to(torch.int32)


def share_of_rank(rows: Sequence[int], lengths: Sequence[int], rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """Return the row numbers of a rank's forward passes in one step, rows of similar length together.

    Args:
        rows: row numbers of the whole step.
        lengths: number of tokens of every row.
        rank: the rank, from 0.
        world_size: number of ranks.
        micro_batch: most rows of a pass.
    """
    # By (length, number), so that rows of equal length have one order on every rank.
    by_length = sorted(rows, key=lambda row: (lengths[row], row))
    # Every n-th of the sorted rows: all ranks get as many rows, and nearly as many tokens.
    mine = by_length[rank::world_size]
    num_passes = -(-len(mine) // micro_batch)
    size, larger = divmod(len(mine), num_passes)
    # Passes of equal size, not full ones and a small last one: the ranks' passes then take equally long.
    starts = [i * size + min(i, larger) for i in range(num_passes + 1)]
    return [mine[a:b] for a, b in itertools.pairwise(starts)]


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then constant, or a decay to `lr_floor * lr`."""
    if step < train.warmup_steps:
        # step + 1: a first step with learning rate 0 would compute gradients and move nothing.
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    share = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
    left = 1 - share if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return train.lr * (train.lr_floor + (1 - train.lr_floor) * left)


def load_rows(data: DataSet, encoder: RowEncoder, max_tokens: int) -> Rows:
    """Read and tokenise one data set of a job. Raises ValueError, naming the data set, for a row that cannot be encoded."""
    # Part by part, because each has its own format; a mixture by weights has one, and its rows are chosen from all parts.
    parts = [_load_part(part, encoder, max_tokens) for part in ((data,) if is_mixture(data) else data.parts)]
    rows = Rows.joined([rows for rows, _ in parts], [num_read for _, num_read in parts])
    rows.check(max_tokens)
    return rows


def _load_part(data: DataSet, encoder: RowEncoder, max_tokens: int) -> tuple[Rows, int]:
    """Return the tokenised rows of a data set with one format, and the number of rows that were read."""
    read = read_rows(data)
    try:
        return encoder.encode_data(read, data.format, max_tokens, skip_bad=data.skip_bad), len(read)
    except ValueError as error:
        raise ValueError(f"{describe(data)}: {error}; skip_bad: true leaves such rows out") from None


def _add(totals: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to sums in float64, where they are computed: they are read once a step, for which a GPU is waited for."""
    for name, value in values.items():
        wide = value.detach().to(torch.float64)
        totals[name] = totals[name] + wide if name in totals else wide


def _check_finite(metrics: dict[str, float]) -> None:
    """Raise FloatingPointError for a NaN or infinite metric: no later step would recover from it."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} of step {metrics['step']} is {value}; lower train.lr or use float32")


@dataclass
class _Training:
    """The training on one rank."""

    request: Request[Path]
    scale: ScaleConfig
    link: Link

    def __post_init__(self) -> None:
        # Before the method adds its parameters, so that every rank initialises them with the same values.
        torch.manual_seed(self.request.train.seed)
        request = self.request
        self.method = trained(request.method)
        self.encoder: RowEncoder
        model, self.encoder, below = load_stack(
            request.start,
            dtype=request.model.dtype,
            attention=request.model.attention,
            trust_remote_code=request.model.trust_remote_code,
            seed=request.train.seed,
            sampler=request.model.drawing.model_dump(mode="json"),
            prompt=prompt_settings(request.model, request.data),
        )
        models.start_training(model, self.scale.gradient_checkpointing)
        # Taken before the trainee is made: some trainees change the modules of the model.
        self.model_key = "" if self.method.leaves_model else models.fingerprint(model)
        # Before the trainee is made: it may run the model, copy it, and make tensors beside its weights.
        model.to(self.link.device)
        self.rows = load_rows(self.data, self.encoder, request.train.max_tokens)
        # Epochs are counted in rows that train: those that were dropped because their prompt does not fit do not count.
        request = self.request = replace(request, train=request.train.resolved(len(self.rows.rows)))
        validation = request.data.validation
        self.validation = load_rows(validation, self.encoder, request.train.max_tokens) if validation else None
        activations = {role: Activations.open(path) for role, path in request.activations.items()}
        inputs = Inputs(below, activations, request.prepared)
        config = self.method.Config.model_validate(request.method)
        self.module = self.method.module(model, config, inputs).to(self.link.device)  # type: ignore[call-arg]
        # Here and not in the contract's constructor, which cannot run after that of the class that derives from it.
        self.module.check(inputs.below)
        self.module.train()
        parameters = trained_parameters(self.module).values()
        self.num_trained = sum(p.numel() for p in parameters)
        # A patch on a frozen model trains in float32, whatever the model's dtype, and needs no float32 copy in the optimizer.
        dtype = "bfloat16" if any(p.dtype == torch.bfloat16 for p in parameters) else "float32"
        self.engine = Engine(
            self.module, request.train, self.scale, dtype, self.link.rank, self.link.world_size, self.link.device
        )
        self.lengths = [len(row) for row in self.rows.rows]
        self.history: list[dict[str, float]] = []
        self.snapshots: dict[str, Tensor] = {}
        self.step = self.saved = 0
        self.fault: str | None = None

    @property
    def data(self) -> DataSet:
        """The data set whose rows are trained on."""
        return self.request.data.by_role[self.method.module.trains_on]

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint: step, history, snapshots, weights and optimizer."""
        state = checkpoints.check_state(self.engine.load(checkpoint), self.request.train.num_steps, checkpoint)
        self.step, self.history = state["step"], state["history"]
        self.saved = self.step
        if (checkpoint / _SNAPSHOTS).is_file():
            self.snapshots = self._read_snapshots(checkpoint / _SNAPSHOTS)
        # All of them again: the last metrics of the killed run may not have arrived.
        for line in self.history:
            self.link.tell({**line, "steps": self.request.train.num_steps})

    def _read_snapshots(self, path: Path) -> dict[str, Tensor]:
        """Read the snapshots of the patch in a checkpoint. Raises ValueError if one has another step or shape."""
        with explained(str(path)):
            snapshots = load_file(path)
        # Under ZeRO 3 a parameter's own shape is that of its shard; DeepSpeed keeps the full one in `ds_shape`.
        own = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in self.module.named_parameters()}
        for name, value in snapshots.items():
            step, _, weight = name.partition("/")
            if step not in map(str, self.request.train.snapshots) or own.get(f"patch.{weight}", value.shape) != value.shape:
                raise ValueError(f"{path}: {name!r:.100} with {tuple(value.shape)} is no snapshot of this training")
        return snapshots

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done, or the evaluation losses so far end the training early."""
        train = self.request.train
        if self.step >= train.num_steps or train.patience is None or not self.history:
            return self.step >= train.num_steps
        # A function of the recorded losses: a run that continues from a checkpoint stops at the same step.
        losses = [line["eval/loss"] for line in self.history if "eval/loss" in line]
        return "eval/loss" in self.history[-1] and stops(losses, train.patience)

    def run(self) -> None:
        train = self.request.train
        started_s, first = time.monotonic(), self.step
        while not self.has_ended:
            metrics = self._step()
            done = self.step - first
            rate = done / (time.monotonic() - started_s)
            due = self.step == train.num_steps or (train.eval_every and self.step % train.eval_every == 0)
            evaluates = self.validation is not None and due
            if evaluates:
                metrics |= self._evaluation()
            # Before a checkpoint is written: a resumed run would continue from weights that are NaN.
            # On every rank: the metrics are sums over all, so that all ranks raise together and none waits for another.
            _check_finite(metrics)
            self.history.append(metrics)
            if self.step in train.snapshots:
                weights = self.engine.weights("patch.", masters=True)
                # A clone: on the CPU the engine returns the parameters themselves, which the next step changes.
                self.snapshots |= {f"{self.step}/{name}": value.clone() for name, value in weights.items()}
            left = train.num_steps - self.step
            self.link.tell({**metrics, "steps": train.num_steps, "steps_per_s": rate, "left_s": left / rate})
            if self.has_ended or self.step % self.scale.checkpoint_every == 0 or (evaluates and train.keep == "best"):
                self._checkpoint(metrics)

    def _step(self) -> dict[str, float]:
        """Train one step, and return its number, losses, learning rate and gradient norm. All ranks call it."""
        train, step = self.request.train, self.step
        # Seeded for each step and rank: a resumed run draws the same numbers (dropout) as an undisturbed one.
        torch.manual_seed((train.seed * 1_000_003 + step) * 4_099 + self.link.rank)
        rows = rows_of_step(len(self.rows.rows), train.rows_per_step, train.seed, step)
        # Of the whole step and not of this rank's share: every rank divides by the same number.
        num_targets = sum(self.module.counts(self.rows.rows[row], self.data.loss_on) for row in rows)
        lr = learning_rate(train, step)
        self.module.on_step(step, min(train.num_steps, len(self.rows.rows) / train.rows_per_step))
        self.engine.start_step(lr)
        totals: dict[str, Tensor] = {}
        chunks = share_of_rank(rows, self.lengths, self.link.rank, self.link.world_size, train.micro_batch)
        self.fault = None
        passes: list[tuple[Sequence[int], Tensor]] = []
        # As many passes on every rank (`share_of_rank`): with fewer, a rank would wait for ever in a reduction.
        for number, chunk in enumerate(chunks, 1):
            is_last = number == len(chunks)
            self.module.before_pass(is_last)
            # Asked only where steps may be left out: it costs a reduction, and on a GPU a wait.
            accepts = partial(self._accepts, totals.get("loss"), num_targets) if is_last and train.skip_steps else None
            batch = self._batch(self.rows, chunk, self.data.loss_on)
            total, sums_by_name = self.engine.backward(batch, num_targets, accepts)
            passes.append((chunk, total))
            _add(totals, {"loss": total, **sums_by_name})
        # One reduction for all metrics; every rank has the same names in the same order.
        sums = self.engine.sum_over_ranks(totals.values())
        losses = {f"train/{name}": value / num_targets for name, value in zip(totals, sums, strict=True)}
        self.step += 1
        metrics: dict[str, float] = {"step": self.step, **losses, "train/lr": lr}
        if self.fault is not None and bad_steps.num_skipped(self.history) < train.skip_steps:
            return {**{name: value for name, value in metrics.items() if math.isfinite(value)}, bad_steps.SKIPPED: 1.0}
        metrics["train/grad_norm"] = self.engine.grad_norm
        self._check_step(metrics, rows, passes)
        self.module.after_step(lr)
        return metrics

    def _accepts(self, before: Tensor | None, num_targets: float, last: Tensor) -> bool:
        """Return whether a step may update the weights, given the summed losses of its last pass and of those before it.

        All ranks call it.
        """
        loss = last if before is None else before + last
        total, bad = self.engine.sum_over_ranks([loss, self.engine.bad_gradient])
        self.fault = bad_steps.fault_of(total / num_targets, self.history, self.request.train.spike)
        if self.fault is None and bad:
            self.fault = "has gradients that are NaN or infinite"
        return self.fault is None

    def _check_step(
        self, metrics: dict[str, float], rows: Sequence[int], passes: Sequence[tuple[Sequence[int], Tensor]]
    ) -> None:
        """Raise FloatingPointError for a bad step that is not left out. All ranks call it.

        Args:
            metrics: the metrics of the step, the same on all ranks.
            rows: the rows of the step.
            passes: the rows of each pass of this rank, and its summed loss.
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
        bad_rows = {row for chunk, total in passes if not math.isfinite(float(total)) for row in chunk}
        flags = self.engine.sum_over_ranks([torch.tensor(float(row in bad_rows)) for row in rows])
        blamed = [row for row, flag in zip(rows, flags, strict=True) if flag] or list(rows)
        numbers = sorted(self.rows.numbers[row] for row in blamed)
        checkpoint = f"{self.link.checkpoints}/{self.saved:09d}" if self.saved else ""
        skipped = bad_steps.num_skipped(self.history)
        raise FloatingPointError(bad_steps.message(name, fault, self.step, numbers, describe(self.data), checkpoint, skipped))

    def _batch(self, of: Rows, chosen: Sequence[int], loss_on: str) -> Batch:
        rows, numbers = [of.rows[i] for i in chosen], [of.numbers[i] for i in chosen]
        return self.encoder.collate(rows, loss_on=loss_on, numbers=numbers).to(self.link.device)

    def _evaluation(self) -> dict[str, float]:
        """Return `eval/loss` and the loss's other metrics, means over the targets of the validation rows; all ranks call it."""
        assert self.validation is not None and self.request.data.validation is not None
        rows, loss_on = self.validation.rows, self.request.data.validation.loss_on
        size = self.request.train.micro_batch
        chunks = [range(len(rows))[i : i + size] for i in range(0, len(rows), size)]
        mine = chunks[self.link.rank :: self.link.world_size]
        # Under ZeRO 3 a forward pass gathers weights from all ranks, so that every rank must run equally many: a rank with
        # fewer chunks repeats the first one, without counting it.
        idle = -(-len(chunks) // self.link.world_size) - len(mine)
        totals: dict[str, Tensor] = {}
        for number, chunk in enumerate([*mine, *[chunks[0]] * idle]):
            found = self.engine.evaluate(self._batch(self.validation, chunk, loss_on))
            _add(totals, found if number < len(mine) else {name: torch.zeros_like(value) for name, value in found.items()})
        sums = self.engine.sum_over_ranks(totals.values())
        num_targets = sum(self.module.counts(row, loss_on) for row in rows)
        return {f"eval/{name}": value / num_targets for name, value in zip(totals, sums, strict=True)}

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint and report it with the metrics of its step; all ranks call it."""
        # A folder of its own for each checkpoint: the last one may still be uploading.
        directory = self.link.scratch / uuid.uuid4().hex
        directory.mkdir()
        self.engine.save(directory, {"step": self.step, "history": self.history})
        if self.link.rank == 0 and self.snapshots:
            save_file(self.snapshots, directory / _SNAPSHOTS)
            files.share(directory, like=directory / checkpoints.META)  # another user may continue this training
        self.link.report(metrics, directory)
        self.saved = self.step

    def export(self, output: Path) -> None:
        """Write the artifact on rank 0: model, patch, snapshots, prompt settings, metrics. All ranks call it."""
        state = self.engine.weights() if self.method.leaves_model else self.engine.weights("patch.", masters=True)
        # After the gathering, in which all ranks take part under ZeRO 3.
        if self.link.rank:
            return
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        patch = self.module.patch
        if self.method.leaves_model:
            state = self._export_model(state, output)
        if patch is not None:
            patches.save(self.module.finished(state), output / "patch", self.model_key)
            for step in self.request.train.snapshots:
                weights = {n.partition("/")[2]: value for n, value in self.snapshots.items() if n.startswith(f"{step}/")}
                patches.save(self.module.finished(weights), output / "snapshots" / str(step), self.model_key)
        # A saved model brings its tokenizer; a patch alone must say from where its model's tokenizer came.
        prompt = self.encoder.saved_spec if self.method.leaves_model else self.encoder.spec
        (output / "prompt.json").write_text(json.dumps(prompt))
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.history))
        facts = {
            "trained_parameters": self.num_trained,
            "steps": self.step,
            "rows": len(self.rows.rows),
            "rows_cut": self.rows.num_cut,
            "rows_melted": self.encoder.num_melted,
            "rows_dropped": self.rows.num_dropped,
            "rows_refused": self.rows.num_refused,
            "specials_neutralised": self.encoder.num_neutralised,
        }
        (output / "training.json").write_text(json.dumps(facts, indent=2))

    def _export_model(self, state: dict[str, Tensor], output: Path) -> dict[str, Tensor]:
        """Write the trained weights and the tokenizer, and return the patch's state; `model_key` becomes the new model's."""
        model = self.module.model
        models.save_trained(model, self.module.model_state(state), output / "model")
        self.encoder.save(output / "model")
        if self.module.patch is not None:
            # The fingerprint is that of the model as it is loaded from disk, with which `patches.load` compares it.
            loading = {"dtype": self.request.model.dtype, "trust_remote_code": self.request.model.trust_remote_code}
            self.model_key = models.fingerprint(models.load_model(output / "model", **loading))
        return {name.removeprefix("patch."): value for name, value in state.items() if name.startswith("patch.")}


def run(request: Request[Path], scale: ScaleConfig, link: Link, output: Path) -> None:
    """Train from the latest checkpoint, or from the start, to the end, and write the artifact on rank 0.

    Args:
        request: the training, with its inputs in directories of this node.
        scale: number of workers and sharding.
        link: rank, device, and the functions that report to the caller.
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
        # All ranks ask: each has to load the same checkpoint.
        best = link.best()
        if best is not None:
            training.engine.load(best)
    training.export(output)
    training.engine.close()
