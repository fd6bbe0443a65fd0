"""DeepSpeed under the loop, in real processes with gloo and without Ray: workers, ZeRO stages, resume."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steerlab import models
from steerlab.data.worlds import tiny_checkpoint
from steerlab.job import DataConfig, ModelConfig, ScaleConfig, TrainConfig

STEPS = 6
INSTRUCTIONS = {
    "train": {"source": "tiny:instructions/train", "limit": 50},
    "validation": {"source": "tiny:instructions/validation", "limit": 7},
}


class Stopped(Exception):
    """Ends a run in the middle."""


def rank_main(rank: int, world_size: int, root: str, settings: dict[str, Any], stop_at: int, resume: bool) -> None:
    """Train on one rank; every checkpoint is gathered in root/<step>."""
    from steerlab.training import loop
    from steerlab.training.link import Link
    from steerlab.training.request import Request

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{root}/group{stop_at}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    scale = ScaleConfig(workers=world_size, checkpoint_every=3, **settings["scale"])
    request = Request(
        Path(settings["model_dir"]),
        ModelConfig(source="tiny:model", dtype=settings.get("dtype", "float32")),
        settings["method"],
        DataConfig.model_validate({"prompt_style": "plain", **settings.get("data", INSTRUCTIONS)}),
        TrainConfig.model_validate(
            {
                "steps": STEPS,
                "lr": 5e-3,
                "warmup_steps": 2,
                "micro_batch": 2,
                "grad_accum": 4,
                "weight_decay": 0.01,
                "seed": 5,
                "eval_every": 2,
                **settings["train"],
            }
        ),
        prepared={name: Path(path) for name, path in settings.get("prepared", {}).items()},
    )
    best: list[tuple[float, Path]] = []

    def report(metrics: dict[str, float], directory: Path | None) -> None:
        assert directory is not None
        target = Path(root) / f"step{metrics['step']}"
        shutil.copytree(directory, target, dirs_exist_ok=True)
        best.append((metrics.get("eval/loss", math.inf), target))
        torch.distributed.barrier()
        if metrics["step"] == stop_at:
            raise Stopped

    link = Link(
        rank,
        world_size,
        torch.device("cpu"),
        report,
        scratch=Path(root) / f"scratch{rank}",
        latest=Path(root) / "step3" if resume else None,
        best=lambda: min(best)[1],
    )
    try:
        loop.run(request, scale, link, Path(root) / "output")
    except Stopped:
        pass


def train(
    root: Path, workers: int, stop_at: int = 0, resume: bool = False, **settings: Any
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Run all ranks; return the final weights and the history."""
    root.mkdir(exist_ok=True)
    model_dir = root / "model"
    if not model_dir.exists():
        tiny_checkpoint.write_model(model_dir)
    settings = {"model_dir": str(model_dir), "method": {"name": "aside", "learned": True}, "scale": {}, "train": {}, **settings}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["steerlab.training.loop", "deepspeed"])  # the ranks of all tests share the imports
    processes = [
        context.Process(target=rank_main, args=(r, workers, str(root), settings, stop_at, resume)) for r in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0] * workers
    if stop_at:
        return {}, []
    lines = (root / "output" / "metrics.jsonl").read_text().splitlines()
    files = [root / "output" / "model" / "model.safetensors", root / "output" / "patch" / "patch.safetensors"]
    weights = {name: tensor for file in files if file.is_file() for name, tensor in load_file(file).items()}
    return weights, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The reference: one process, no sharding."""
    return train(tmp_path_factory.mktemp("one"), 1)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("zero_stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_two_workers_equal_one(zero_stage: int, one_worker: Any, tmp_path: Path) -> None:
    weights, history = train(tmp_path, 2, scale={"zero_stage": zero_stage})
    # Adam divides by the root of tiny squared gradients, which magnifies the rounding of another order of summation.
    close(weights, one_worker[0], atol=2e-4)
    for ours, theirs in zip(history, one_worker[1], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-4)
        assert ours.get("eval/loss") == pytest.approx(theirs.get("eval/loss"), abs=1e-5)


def test_training_lowers_the_loss(one_worker: Any) -> None:
    losses = [line["train/loss"] for line in one_worker[1]]
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert [line["step"] for line in one_worker[1] if "eval/loss" in line] == [2, 4, 6]


def test_the_best_weights_are_kept_where_the_loss_rises(tmp_path: Path) -> None:
    """They are, bit for bit, those of a training that ends at the best step."""
    rising = {"lr": 0.5, "schedule": "constant", "warmup_steps": 0, "eval_every": 1, "steps": 4}
    best, history = train(tmp_path / "best", 1, train={**rising, "keep": "best"})
    losses = [line["eval/loss"] for line in history]
    step = losses.index(min(losses)) + 1
    assert step < 4 and len(history) == 4, losses
    last, _ = train(tmp_path / "last", 1, train=rising)
    short, _ = train(tmp_path / "short", 1, train={**rising, "steps": step})
    assert all(torch.equal(best[name], short[name]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(zero_stage: int, tmp_path: Path) -> None:
    scale = {"zero_stage": zero_stage}
    weights, history = train(tmp_path / "a", 2, scale=scale)
    train(tmp_path / "b", 2, stop_at=3, scale=scale)
    resumed, continued = train(tmp_path / "b", 2, resume=True, scale=scale)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert continued == history


def test_early_stopping_is_a_function_of_the_losses_also_after_a_kill(tmp_path: Path) -> None:
    """A training of 30 steps, given in epochs, whose validation loss rises: it stops, and a resumed one at the same step."""
    rising = {"steps": None, "epochs": 4.8, "lr": 0.5, "schedule": "constant", "warmup_steps": 0, "eval_every": 1}
    rising["patience"] = 3
    weights, history = train(tmp_path / "a", 1, train=rising)
    losses = [line["eval/loss"] for line in history]
    best = losses.index(min(losses)) + 1
    assert 3 < len(history) == best + 3 < 30, losses
    assert json.loads((tmp_path / "a" / "output" / "training.json").read_text())["steps"] == best + 3
    assert all(0 <= line["eval/token_accuracy"] <= 1 and "train/token_accuracy" in line for line in history)
    train(tmp_path / "b", 1, stop_at=3, train=rising)
    resumed, continued = train(tmp_path / "b", 1, resume=True, train=rising)
    assert continued == history
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


ADAPTED = {"name": "aside", "linear_shift": True, "lora": {"rank": 2}}


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_adapters_train_and_resume_on_any_scale_and_are_saved_in_the_weights(zero_stage: int, tmp_path: Path) -> None:
    """Two workers with a kill give what one worker gives; only the adapted weights and the patch differ from the start."""
    alone, _ = train(tmp_path / "alone", 1, method=ADAPTED)
    scale = {"zero_stage": zero_stage}
    train(tmp_path / "two", 2, stop_at=3, scale=scale, method=ADAPTED)
    weights, _ = train(tmp_path / "two", 2, resume=True, scale=scale, method=ADAPTED)
    close(weights, alone, atol=2e-4)
    start = models.load_model(tmp_path / "two" / "model", seed=5).state_dict()
    moved = {name for name in start if name in weights and not torch.equal(start[name], weights[name])}
    assert weights.keys() - start.keys() == {"shift_RD"} and start.keys() - weights.keys() <= {"lm_head.weight"}
    assert len(moved) == 2 * sum(name.endswith("q_proj.weight") for name in start)
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in moved)


class Payload:
    """A pickle of it leaves a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_that_somebody_else_wrote_runs_nothing(file: str, tmp_path: Path) -> None:
    """Whoever may write into ROOT could leave a pickle there, for the workers that continue."""
    train(tmp_path, 1, stop_at=3, scale={"zero_stage": 1})
    (path,) = (tmp_path / "step3").rglob(file)
    state = torch.load(path, weights_only=False)
    torch.save({**state, "more": Payload(tmp_path / "marker")}, path)
    with pytest.raises(AssertionError, match="assert"):
        train(tmp_path, 1, resume=True, scale={"zero_stage": 1})
    assert not (tmp_path / "marker").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists(), "the payload works"


@pytest.mark.slow
def test_replicated_state_continues_on_another_number_of_workers(one_worker: Any, tmp_path: Path) -> None:
    train(tmp_path, 2, stop_at=3)
    weights, _ = train(tmp_path, 1, resume=True)
    close(weights, one_worker[0], atol=2e-4)


def test_bfloat16_weights_without_float32_copies_are_refused() -> None:
    from steerlab.training.engine import Engine

    with pytest.raises(ValueError, match=r"needs scale.zero_stage 1, 2 or 3, not 0"):
        Engine(torch.nn.Linear(2, 2), TrainConfig(steps=1, lr=1.0), ScaleConfig(), "bfloat16", 0, 1, torch.device("cpu"))


def test_sharded_state_does_not_and_says_why(tmp_path: Path) -> None:
    from steerlab.training.engine import Engine, WorldSizeError

    (tmp_path / "steerlab.json").write_text(json.dumps({"world_size": 2, "zero_stage": 1, "state": {}}))
    engine = object.__new__(Engine)
    engine.scale, engine.world_size = ScaleConfig(zero_stage=1), 1
    with pytest.raises(
        WorldSizeError, match="written by 2 workers with zero_stage 1; it cannot continue on 1 with zero_stage 1"
    ):
        engine.load(tmp_path)


ROTATED = {"name": "warp", "keep_ratio": 0.3, "rotation": "random", "mask": "random", "others": "train"}


def rotated(root: Path, workers: int, **settings: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Train coefficients in random coordinates behind a random mask: preparations that need no model."""
    from here import Here

    from steerlab.methods import METHODS
    from steerlab.models import skeleton

    method, here = METHODS["warp"], Here(root)
    tiny_checkpoint.write_model(root / "model")
    method.prepares(method.Config.model_validate(ROTATED), skeleton(root / "model"), here)
    folders = here.folders
    return train(root, workers, method=ROTATED, prepared={name: str(path) for name, path in folders.items()}, **settings)


@pytest.fixture(scope="module")
def one_rotated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The reference for coefficients: one process, no sharding."""
    return rotated(tmp_path_factory.mktemp("rotated"), 1)


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_coefficients_train_alike_under_zero(zero_stage: int, one_rotated: Any, tmp_path: Path) -> None:
    """Gradients are rotated once a step, for all of its passes, on each worker before they are summed over workers."""
    weights, history = rotated(tmp_path, 2, scale={"zero_stage": zero_stage})
    close(weights, one_rotated[0], atol=5e-4)
    for ours, theirs in zip(history, one_rotated[1], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours.get("eval/loss") == pytest.approx(theirs.get("eval/loss"), abs=1e-5)
    assert history[-1]["train/loss"] < 0.95 * history[0]["train/loss"]


@pytest.mark.slow
def test_coefficients_resume_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    weights, history = rotated(tmp_path / "a", 2, scale={"zero_stage": 1})
    rotated(tmp_path / "b", 2, stop_at=3, scale={"zero_stage": 1})
    resumed, continued = rotated(tmp_path / "b", 2, resume=True, scale={"zero_stage": 1})
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert continued == history


PAIRS = {
    "preference": {"source": "tiny:preferences/train", "limit": 50, "format": "preference"},
    "validation": {"source": "tiny:preferences/validation", "limit": 7, "format": "preference"},
}


@pytest.mark.parametrize("name", ["iav", pytest.param("dpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero_stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pairs_train_alike_on_two_workers(name: str, zero_stage: int, tmp_path: Path) -> None:
    """A pair stays together, and the loss is that of the step's pairs."""
    settings = {"method": {"name": name}, "data": PAIRS, "train": {"max_tokens": 29}}
    weights, history = train(tmp_path / "one", 1, **settings)
    others, theirs = train(tmp_path / "two", 2, scale={"zero_stage": zero_stage}, **settings)
    close(weights, others, atol=5e-4)
    assert history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["eval/loss"] < history[1]["eval/loss"] < math.log(2)
    for ours, their in zip(history, theirs, strict=True):
        assert ours["train/loss"] == pytest.approx(their["train/loss"], abs=1e-5)
        assert ours.get("eval/loss") == pytest.approx(their.get("eval/loss"), abs=1e-5)
    facts = json.loads((tmp_path / "one" / "output" / "training.json").read_text())
    assert facts["rows"] == 50 and 0 < facts["rows_cut"] < 50


@pytest.mark.slow
def test_bfloat16_trains(tmp_path: Path) -> None:
    _, history = train(tmp_path, 2, scale={"zero_stage": 2}, dtype="bfloat16")
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]


def test_differences_of_bfloat16_weights_are_those_of_their_float32_copies(tmp_path: Path) -> None:
    settings = {"method": {"name": "dpo"}, "data": PAIRS, "scale": {"zero_stage": 1}, "train": {"max_tokens": 29}}
    weights, history = train(tmp_path, 2, dtype="bfloat16", **settings)
    assert history[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    # Differences of rounded weights would themselves be whole steps of bfloat16.
    between = torch.cat([(weight != weight.bfloat16()).flatten() for weight in weights.values()])
    assert between.float().mean() > 0.8


@pytest.mark.slow
def test_a_vector_trains_in_float32_on_a_frozen_bfloat16_model(tmp_path: Path) -> None:
    weights, history = train(tmp_path, 1, method={"name": "iav"}, data=PAIRS, dtype="bfloat16")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]
