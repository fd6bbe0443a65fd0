"""A small training in a process of its own, as a worker runs it: stopped, continued, and its final bits."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 300
Task = Callable[["Training"], None]


class Stopped(Exception):
    """Ends a training in the middle, as a kill does."""


class Training:
    """Trains with the worker's own code; each call is another attempt in the same work directory."""

    def __init__(self, root: Path, zero_stage: int = 0, **train: Any) -> None:
        from steerlab.data.worlds import tiny_checkpoint
        from steerlab.job import DataConfig, ModelConfig, TrainConfig
        from steerlab.storage.plan import ModelRef
        from steerlab.training.request import Request

        self.root, self.zero_stage = root, zero_stage
        self.lines, self.steps, self.told = list[str](), list[int](), list[dict[str, float]]()
        if not (root / "model").exists():
            tiny_checkpoint.write_model(root / "model")
        rows = {
            "prompt_style": "plain",
            "train": {"source": "tiny:instructions/train", "limit": 16},
            "validation": {"source": "tiny:instructions/validation", "limit": 4},
        }
        settings = {"steps": 6, "lr": 2e-3, "micro_batch": 4, "max_tokens": 64, "eval_every": 2, "keep": "best", **train}
        self.request = Request(
            ModelRef(source=str(root / "model")),
            ModelConfig(source="tiny:model"),
            {"name": "vanilla"},
            DataConfig.model_validate(rows),
            TrainConfig.model_validate(settings),
        )

    def run(
        self, storage: str, stop_after: int | None = None, each: Callable[[dict[str, float]], None] = lambda metrics: None
    ) -> bytes | None:
        """Train to the end and return the final weights, or stop after a step and return None; `each` sees every step."""
        import torch

        from steerlab.job import ScaleConfig
        from steerlab.training import worker

        self.lines, self.steps, self.told = [], [], []

        def tell(metrics: dict[str, float]) -> None:
            self.steps.append(int(metrics["step"]))
            self.told.append(metrics)
            each(metrics)
            if metrics["step"] == stop_after:
                raise Stopped

        place = self.root / storage
        seat = worker.Seat(
            rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), storage=str(place), attempt="0" * 12,
            tell=tell, say=self.lines.append,
        )  # fmt: skip
        try:
            worker.run(self.request, ScaleConfig(workers=1, checkpoint_every=1, zero_stage=self.zero_stage), seat)
        except Stopped:
            return None
        return (place / "output" / "model" / "model.safetensors").read_bytes()


def _main(task: Callable[..., None], root: str, arguments: tuple[Any, ...]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store: Any = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        task(Path(root), *arguments)
    except BaseException:
        (Path(root) / "failed").write_text(traceback.format_exc())
    os._exit(0)  # DeepSpeed's and gloo's threads would keep the process


def in_a_process(task: Callable[..., None], root: Path, *arguments: Any) -> None:
    """Run `task(root, *arguments)` in a new process, since DeepSpeed leaves its marks in one; its failure is one here."""
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(task, str(root), arguments))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the training took more than {LIMIT_S} s")
    assert not (root / "failed").exists(), (root / "failed").read_text()
