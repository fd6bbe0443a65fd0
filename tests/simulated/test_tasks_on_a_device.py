"""Every task on a simulated GPU: none mixes devices, and it measures what it measures without a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import patch_zoo
import pytest
import torch
from test_tasks import CASES, config_of, judge  # noqa: F401
from test_vision_models import clip_dir  # noqa: F401

from steerlab import models, patches
from steerlab.evaluation import TASKS
from steerlab.evaluation.statistics.summaries import Metric, summarise_all
from steerlab.inputs.drawings import Prompter
from steerlab.inputs.encoding import Encoder
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, EmbeddingPatch
from steerlab.patches.maps import AffineMap
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel

TEXTS = ["the cow and the dog", "the old cat"]
OTHERS = {
    "efficiency": {"batch_sizes": (1,), "prompt_tokens": 4, "new_tokens": 2, "repeats": 1, "warmup": 1},
    "embedding_shift": {},
}
"""Fields of the configs of tasks over no rows."""
DRAWN = {"source": "pixels:digits/test", "format": "text", "equals": {"style": "thin"}, "limit": 2, "seeds": [0, 2]}
LABELLED = {"source": "pixels:digits/train", "format": "image", "limit": 60}
PICTURES: dict[str, dict[str, Any]] = {
    "image_concept": {"concept": "three", "away": "four", "classifier": LABELLED, "held_out": LABELLED},
    "image_similarity": {"classifier": LABELLED},
    "diversity": {"classifier": LABELLED},
    "clip_score": {},
}


def measured(task: str, model: Any, config: Any) -> dict[tuple[float, str], Metric]:
    """Return the metrics of a task by strength and name, but for those of time and memory."""
    found = summarise_all(TASKS[task].run(model, config))
    return {(s, name): value for s, of in found.items() for name, value in of.items() if "efficiency" not in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def steered(tiny_dir: Path, encoder: Encoder, folder: Path, device: torch.device) -> dict[str, SteeredModel]:
    """The tiny model with patches that depend on roles, by device; a policy for tasks that compare with one."""
    found = {}
    for place in ("cpu", device):
        model: Any = models.load_model(tiny_dir, seed=0, attention="eager")
        maps = patch_zoo.FORMS["maps with bounds on some roles"](model, folder)
        if place == "cpu":
            models.save_model(model, encoder.tokenizer, folder / "policy/model")
            patches.save(maps, folder / "policy/patch", models.fingerprint(model))
            (folder / "policy/prompt.json").write_text(json.dumps(encoder.spec))
        stack = (EmbeddingPatch(model.config.hidden_size, 1.0), maps)
        found[str(place)] = SteeredModel(model.to(place), encoder, stack)
    return found


@pytest.mark.parametrize("task", [*CASES, *OTHERS])
def test_a_task_over_texts(task: str, steered: dict[str, SteeredModel], folder: Path, device: torch.device) -> None:
    if task in OTHERS:
        config = TASKS[task].Config.model_validate(OTHERS[task])
    else:
        config = config_of(task, folder / f"{task}.jsonl", TEXTS)
    found = {place: measured(task, model, config) for place, model in steered.items()}
    assert found["cpu"] == found[str(device)]


@pytest.fixture(scope="module")
def drawing(digits_dir: Path, device: torch.device) -> dict[str, SteeredPipeline]:
    """The pipeline of digits with maps in it, by device."""
    place, found = "unet.mid_block.resnets.0.norm2", {}
    for where in ("cpu", device):
        model: Any = models.load_model(digits_dir, seed=0, sampler={"steps": 2, "guidance": 2.0})
        maps = {place: AffineMap(torch.full((64,), 3.0), torch.full((64,), 2.0))}
        patch = ActivationPatch.from_maps(maps, Selection(modules=place))
        found[str(where)] = SteeredPipeline(model.to(where), Prompter(model), (patch,))
    return found


@pytest.mark.parametrize("task", PICTURES)
def test_a_task_on_images(task: str, drawing: dict[str, SteeredPipeline], clip_dir: Path, device: torch.device) -> None:  # noqa: F811
    own = {"clip_source": str(clip_dir)} if task == "clip_score" else PICTURES[task]
    config = TASKS[task].Config.model_validate({"data": DRAWN, "strengths": (1.0, 0.0), **own})
    found = {place: measured(task, model, config) for place, model in drawing.items()}
    assert found["cpu"].keys() == found[str(device)].keys()
    for metric, value in found["cpu"].items():
        # Convolutions of the two devices are computed by other kernels of torch.
        assert found[str(device)][metric].value == pytest.approx(value.value, rel=1e-3, abs=1e-4), metric


def test_every_task_is_tested() -> None:
    assert {*CASES, *OTHERS, *PICTURES} == set(TASKS) - {"lm_eval"}  # whose requests are those of scoring and generation
