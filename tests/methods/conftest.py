"""Activations of the tiny model, read as an extraction reads them and kept on disk as it keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab.activations import moments, parquet, reading
from steerlab.activations.parquet import Activations
from steerlab.inputs.drawings import Prompter
from steerlab.inputs.encoding import Encoder
from steerlab.job import ExtractConfig, MethodConfig
from steerlab.methods.contract import Method
from steerlab.methods.preparations import Moments, OfEachRow, OverParts, OverRows, Preparation, Source
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.stages import prepare
from steerlab.stages.reduce import SumsOfShard
from steerlab.stages.spread.shard_plan import Shard
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts

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
                whole[vectors.row_M] = value_MD
        reader.close()
        steered._attached.detach()
        directory = tmp_path / f"{label}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        widths = {name: value.shape[1] for name, value in values.items()}
        of = parquet.schema(widths, config.dtype, False, reading.about_model(steered, config))
        about = {"sample_id": range(len(texts)), "label": [label] * len(texts), "text_sha256": [""] * len(texts)}
        table = parquet.table(about, {name: value.numpy() for name, value in values.items()}, of)
        part = parquet.write_part([table], directory / "part-00000.parquet")
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
        found: dict[str, Path] = {}
        for asked in method.prepares(config, model):
            directory = tmp_path / f"{asked.name}-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            steered = SteeredModel(model, encoder)
            needed = {name: found[name] for name in asked.needs}
            _prepare(asked, steered, needed, list(rows), directory, max_tokens)
            steered.detach()
            found[asked.name] = directory
        return found

    return run


def _prepare(
    asked: Preparation,
    model: SteeredModel,
    needed: dict[str, Path],
    rows: list[dict[str, Any]],
    directory: Path,
    max_tokens: int,
) -> None:
    shard = Shard(0, 0, rows)
    data = {"format": "instruction", "loss_on": "response"}
    path = directory / "part-00000.safetensors"
    match asked:
        case Moments():
            params = {"extract": asked.extract.model_dump(mode="json"), "data": data, "role": asked.role}
            made = SumsOfShard(model, params).make(shard, path, lambda done: None)
            summary = {**made["about"], "count": made["rows"]}
            saved = ((name, moments.merge_files([path], name)) for name in made["about"]["widths"])
            moments.save(saved, directory, summary)
        case OverRows():
            maker = prepare._SumOfShard(asked.start, {}, model, {**asked.params, "data": data})
            maker._needed = needed
            Parts.write_index(directory, {"all": maker.make(shard, path, lambda done: None)}, {"all": path.name})
        case OfEachRow():
            params = {**asked.params, "data": data | {"format": "preference"}, "max_tokens": max_tokens}
            facts = {}
            for first in range(0, len(rows), size := asked.params["rows_per_shard"]):
                part = directory / f"part-{first // size:05d}.safetensors"
                maker = prepare._TensorsOfShard(asked.start, model, params)
                facts[part.name] = maker.make(Shard(first // size, first, rows[first : first + size]), part, lambda done: None)
            Parts.write_index(directory, facts, {name: name for name in facts})
        case OverParts():
            source = Source(asked.params, needed, model if asked.reads_model else None)
            files = {part: f"part-{number:05d}.safetensors" for number, part in enumerate(asked.parts)}
            facts = {part: asked.make(source, part, directory / file) for part, file in files.items()}
            Parts.write_index(directory, facts, files)
