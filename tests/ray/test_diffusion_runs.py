"""A diffusion job through real Ray: base model, steering, images, page; the cache, and a worker that is killed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from steerlab import cli, job, report, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

JOBS = Path(__file__).parents[2] / "jobs/tiny"
STEPS = 32


def write_jobs(folder: Path) -> Path:
    """Write the jobs of jobs/tiny with few steps and drawings: digits.yaml, act.yaml, lineas.yaml; return the last."""
    base, *steering = (yaml.safe_load((JOBS / f"{name}.yaml").read_text()) for name in NAMES)
    base |= {"evaluate": [], "train": base["train"] | {"steps": STEPS}}
    (folder / "digits.yaml").write_text(yaml.safe_dump(base))
    for name, tree in zip(("act", "lineas"), steering, strict=True):
        if "train" in tree:
            tree["train"] |= {"steps": 3, "micro_batch": 8}
        for role in ("source", "target"):
            tree["data"][role] |= {"limit": 8}
        for task in tree["evaluate"]:
            task |= {"data": task["data"] | {"limit": 3, "seeds": [0, 1]}, "strengths": [0, 0.5, 1]}
        tree |= {"evaluate": tree["evaluate"][:2], "scale": {"warm": True, "checkpoint_every": 4}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder / "lineas.yaml"


NAMES = ("digits", "diffusion_act", "diffusion_lineas")


Reported = Callable[[plan.Stage, dict[str, Any]], None]


def do(path: Path, store: Store, reported: Reported = lambda stage, metrics: None) -> run.Run:
    wanted = job.read(path, JobType)
    capacity.check_cluster(Plan.of(wanted), store, run.check(Plan.of(wanted)))
    return run.execute(Plan.of(wanted), store, plan.Listener(reported=reported))


def base_weights(store: Store, done: run.Run) -> dict[str, torch.Tensor]:
    directory = store.local("train", done.records[0].stage.key) / "model"
    return {f"{part}/{n}": w for part in ("unet", "words") for n, w in load_file(next((directory / part).glob("*.s*"))).items()}


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, run.Run]:
    folder = tmp_path_factory.mktemp("undisturbed")
    store = Store.open(str(folder / "root"))
    return folder, store, do(write_jobs(folder), store)


def test_a_diffusion_job_from_file_to_page(undisturbed: tuple[Path, Store, run.Run]) -> None:
    folder, store, done = undisturbed
    stages = ["train", "extract", "train", *["evaluate"] * 2]
    assert [(r.stage.name, r.status) for r in done.records] == [(name, "ran") for name in stages]
    again = do(folder / "lineas.yaml", store)
    assert [r.status for r in again.records] == ["cached"] * len(stages) and again.summary == done.summary
    assert list(done.summary["strengths"]) == [1.0, 0.0, 0.5], "the headline is a steered number, however a grid begins"
    assert set(done.summary["reported"].values()) == {1.0}
    assert done.summary["metrics"]["image_similarity/ssim"] == done.summary["strengths"][1.0]["image_similarity/ssim"]
    assert done.summary["strengths"][0.0]["image_similarity/ssim"]["value"] == pytest.approx(1)
    assert done.summary["strengths"][1.0]["image_similarity/ssim"]["value"] < 1

    sheet = (folder / "root" / done.folder / "samples/images/sheet_2.000.png").read_bytes()
    page = folder / "page.html"
    report.write([report.read(store, done.folder)], page)
    assert base64.b64encode(sheet).decode() in page.read_text()


def test_strength_zero_is_the_base_model_bit_for_bit(undisturbed: tuple[Path, Store, run.Run]) -> None:
    """What the evaluation drew at strength 0, and what the same pipeline draws with no patch at all."""
    folder, store, done = undisturbed
    model = done.summary["model"]
    steered = stacks.load(store.local(model["stage"], model["key"]))
    base = stacks.load(store.local("train", done.records[0].stage.key), sampler=steered.model.sampler.model_dump())
    assert len(steered.patches) == 1 and base.patches == ()
    assert steered.model.sampler.steps == 8 and steered.model.sampler.read == (0, 3), "the job's sampler lies with the patch"
    samples = json.loads((folder / "root" / done.folder / "samples/image_concept.json").read_text())
    rows = {sample["id"]: {"text": sample["prompt"], "seed": sample["seed"]} for sample in samples}
    drawings = [base.encoder.from_row(row, "text") for row in rows.values()]
    # The same batch: a row a strength, prompt by prompt.
    plain = base.draw([d for d in drawings for _ in range(3)])[0].unflatten(0, (len(drawings), 3))  # type: ignore[union-attr]
    images = steered.draw(drawings, strengths=(1.0, 0.0, 0.5))  # type: ignore[union-attr]
    assert torch.equal(images[1], plain[:, 1]) and not torch.equal(images[0], plain[:, 0])
    for number, name in enumerate(rows):
        for strength, drawn in (("0.000", images[1]), ("1.000", images[0])):
            content = (folder / "root" / done.folder / f"samples/images/{strength}_2.000/{name}.png").read_bytes()
            kept = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(kept, (drawn[number, 0] * 255).round().byte().numpy())


def test_a_run_is_drawn_from_and_exported_by_hand(undisturbed: tuple[Path, Store, run.Run]) -> None:
    folder, _, done = undisturbed
    where, runner = str(folder / "root" / done.folder), CliRunner()
    images = folder / "by_hand"
    drawn = runner.invoke(
        cli.app, ["generate", where, "--prompt", "thin three", "--seed", "3", "-o", str(images), "--strength", "0.5"]
    )
    assert drawn.exit_code == 0 and (images / "0.500_2.000/3.png").is_file(), drawn.output
    exported = runner.invoke(cli.app, ["export", where, str(folder / "exported")])
    assert exported.exit_code == 0 and "at guidance 2 the half without a prompt is not steered" in exported.output
    found = stacks.load(folder / "exported").picture("thin three", seed=3, strength=0.5)  # type: ignore[union-attr]
    with Image.open(images / "0.500_2.000/3.png") as kept:
        assert np.array_equal(np.asarray(found), np.asarray(kept))


def test_maps_are_fitted_along_the_pipeline_on_the_same_base(undisturbed: tuple[Path, Store, run.Run]) -> None:
    """Linear-AcT place after place: the base model is that of the other job, and strength 0 is measured the same."""
    folder, store, lineas = undisturbed
    done = do(folder / "act.yaml", store)
    found = [(record.stage.name, record.status) for record in done.records]
    assert found == [("train", "cached"), ("fit", "ran"), ("evaluate", "ran"), ("evaluate", "ran")]
    plain, other = (of.summary["strengths"][0.0]["image_concept/rate"]["value"] for of in (done, lineas))
    assert plain == other
    assert done.summary["strengths"][1.0]["image_similarity/ssim"]["value"] < 0.999
    steered = stacks.load(store.local(done.summary["model"]["stage"], done.summary["model"]["key"]))
    places = {name for name, _ in steered.model.named_modules() if name.startswith("unet.") and "norm" in name}
    assert set(steered.patches[0].sizes) == places


@pytest.mark.slow
def test_a_killed_worker_of_the_base_model_changes_no_bit(undisturbed: tuple[Path, Store, run.Run], tmp_path: Path) -> None:
    _, store, done = undisturbed
    killed: list[int] = []

    def kill_once(stage: plan.Stage, metrics: dict[str, Any]) -> None:
        if metrics.get("step", 0) < STEPS // 4 or killed or "denoise" not in stage.label:
            return
        # Only workers of this test's own cluster: they descend from this process.
        family = psutil.Process().children(recursive=True)
        training = [process for process in family if process.is_running() and "ray::train" in " ".join(process.cmdline())]
        assert not Path(other.work(stage.name, stage.key), "output").exists(), "the training ended before it could be killed"
        killed.extend(process.pid for process in training)
        for process in training:
            process.kill()

    other = Store.open(str(tmp_path / "root"))
    again = do(write_jobs(tmp_path), other, kill_once)
    assert len(killed) == 1
    expected, found = base_weights(store, done), base_weights(other, again)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    history = (other.local("train", again.records[0].stage.key) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, STEPS + 1))
    assert again.summary["strengths"] == done.summary["strengths"]
