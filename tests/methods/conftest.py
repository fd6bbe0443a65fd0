"""Activations of the tiny model, read as an extraction reads them and kept on disk as it keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from here import Here
from transformers import PreTrainedModel

from steerlab.activations import parquet, part_writing, reading
from steerlab.activations.parquet import Activations
from steerlab.inputs.drawings import Prompter
from steerlab.inputs.encoding import Encoder
from steerlab.job import ExtractConfig, MethodConfig
from steerlab.methods.contract import Method
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel

Extracted = Callable[..., Activations]
Prepared = Callable[..., dict[str, Path]]


@pytest.fixture
def extracted(tmp_path: Path, encoder: Encoder) -> Extracted:
    """A function (model, texts, **extract settings) -> activations."""

    def read(model: Any, texts: Sequence[str], label: str = "target", **settings: object) -> Activations:
        config = ExtractConfig.model_validate(settings)
        steered: Any = SteeredPipeline(model, Prompter(model)) if isinstance(model, Diffusion) else SteeredModel(model, encoder)
        reader = reading.TextReader(steered, config)
        encoded, _ = reader.encode([{"text": text} for text in texts], "text", 0)
        values: dict[str, torch.Tensor] = {}
        for vectors in reader.read(encoded):
            for name, value_MD in vectors.values.items():
                whole = values.setdefault(name, torch.zeros(len(texts), value_MD.shape[1]))
                whole[vectors.row_M.cpu()] = value_MD.cpu()
        reader.close()
        steered._attached.detach()
        directory = tmp_path / f"{label}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        widths = {name: value.shape[1] for name, value in values.items()}
        of = part_writing.schema(widths, config.dtype, False, reading.about_model(steered, config))
        about = {"sample_id": range(len(texts)), "label": [label] * len(texts), "text_sha256": [""] * len(texts)}
        table = part_writing.table(about, {name: value.numpy() for name, value in values.items()}, of)
        part = part_writing.write_part([table], directory / "part-00000.parquet")
        (directory / parquet.PARTS).write_text(json.dumps([part]))
        return Activations.open(directory)

    return read


@pytest.fixture
def prepared(tmp_path: Path, encoder: Encoder) -> Prepared:
    """A function (method, config, model, rows) -> directories: what its preparations leave, as their stages make it.

    Rows are pairs where the method trains on them; those kept are cut at `max_tokens`.
    """

    def run(
        method: Method, config: MethodConfig, model: PreTrainedModel, rows: Sequence[dict[str, Any]], max_tokens: int = 64
    ) -> dict[str, Path]:
        steered = SteeredModel(model, encoder)
        here = Here(tmp_path, steered, rows, max_tokens)
        method.prepares(config, model, here)
        steered.detach()
        return here.folders

    return run
