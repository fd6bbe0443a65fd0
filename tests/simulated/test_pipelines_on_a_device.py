"""Pipelines of one and of several steps on a simulated GPU, guided and not, with patches that act in all steps or in some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steerlab import models
from steerlab.inputs.drawings import Prompter
from steerlab.job import Selection
from steerlab.patches import ActivationPatch
from steerlab.patches.maps import AffineMap, LowRankMap
from steerlab.steered.drawing import SteeredPipeline

PLACE = "unet.mid_block.resnets.0.norm2"
WIDTH = 64
SAMPLERS: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "several steps": {"steps": 3},
    "guided": {"steps": 2, "guidance": 2.0},
    "guided, steered in both halves": {"steps": 2, "guidance": 2.0, "unconditional": True},
    "steered in some steps": {"steps": 3, "steer": [1]},
}
MAPS = {
    "affine": AffineMap(torch.full((WIDTH,), 3.0), torch.full((WIDTH,), 2.0)),
    "bounded": AffineMap(*(torch.full((WIDTH,), value) for value in (3.0, 2.0, -0.5, 0.5))),
    "low rank": LowRankMap.without(torch.arange(1.0, WIDTH + 1)),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pipeline_draws_as_without_a_device(sampler: str, kind: str, digits_dir: Path, device: torch.device) -> None:
    images = []
    for place in ("cpu", device):
        model: Any = models.load_model(digits_dir, seed=0, sampler=SAMPLERS[sampler]).to(place)  # type: ignore[arg-type]
        patch = ActivationPatch.from_maps({PLACE: MAPS[kind]}, Selection(modules=PLACE), pixels="mean")
        pipeline = SteeredPipeline(model, Prompter(model), (patch,))
        drawing = pipeline.encoder.from_row({"text": "thin three", "seed": 5}, "text")
        images.append(pipeline.draw([drawing], strengths=(0.0, 0.5, 1.0)))
    assert images[1].device.type == "cpu"
    # Convolutions of a subclass are computed by other kernels of torch.
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(images[1][2], images[1][0])
