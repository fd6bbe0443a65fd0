"""Activations of the tiny model, read as an extraction reads them and kept on disk as it keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import activations, reading
from steerlab.activations import Activations
from steerlab.generation import SteeredModel
from steerlab.job import ExtractConfig
from steerlab.tokens import Encoder

Extracted = Callable[..., Activations]


@pytest.fixture
def extracted(tmp_path: Path, encoder: Encoder) -> Extracted:
    """A function (model, texts, **extract settings) -> activations."""

    def read(model: PreTrainedModel, texts: Sequence[str], label: str = "target", **settings: object) -> Activations:
        config = ExtractConfig.model_validate(settings)
        steered = SteeredModel(model, encoder)
        reader = reading.TextReader(steered, config)
        encoded, _ = reader.encode([{"text": text} for text in texts], "text", 0)
        values: dict[str, torch.Tensor] = {}
        for vectors in reader.read(encoded):
            for name, value_MD in vectors.values.items():
                whole = values.setdefault(name, torch.zeros(len(texts), value_MD.shape[1]))
                whole[vectors.row_M] = value_MD
        reader.close()
        steered._attached.detach()
        directory = tmp_path / f"{label}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        widths = {name: value.shape[1] for name, value in values.items()}
        of = activations.schema(widths, config.dtype, False, reading.about_model(steered, config))
        about = {"sample_id": range(len(texts)), "label": [label] * len(texts), "text_sha256": [""] * len(texts)}
        table = activations.table(about, {name: value.numpy() for name, value in values.items()}, of)
        part = activations.write_part([table], directory / "part-00000.parquet")
        (directory / activations.PARTS).write_text(json.dumps([part]))
        return Activations.open(directory)

    return read
