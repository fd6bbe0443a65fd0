"""Preparations made in this process as they are asked for, by what makes a shard or a part on a worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerlab.activations import moments
from steerlab.methods.preparations import KeepOfRows, MapParts, Moments, Preparation, Prepare, Source, SumOverRows
from steerlab.stages.extract import Params
from steerlab.stages.reduce import SumsOfShard
from steerlab.stages.spread.making import SumOfShard, TensorsOfShard
from steerlab.stages.spread.shard_plan import Shard
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts

PART = "part-00000.safetensors"
DATA = {"source": "tiny:instructions/train", "format": "instruction", "loss_on": "response"}
PAIRS = DATA | {"format": "preference"}


def nothing(done: int) -> None:
    """Take how far a shard is."""


class Here(Prepare):
    """Leaves what is asked for in folders of its own, `folders` by name. All rows are one shard, but those that are kept."""

    def __init__(
        self, root: Path, model: SteeredModel | None = None, rows: Sequence[dict[str, Any]] = (), max_tokens: int = 64
    ) -> None:
        super().__init__()
        self.folders: dict[str, Path] = {}
        self._root, self._model, self._rows, self._max_tokens = root, model, list(rows), max_tokens

    def make(self, preparation: Preparation) -> None:
        folder = self._root / f"{preparation.name}-{len(list(self._root.iterdir()))}"
        folder.mkdir()
        match preparation:
            case Moments():
                self._moments(preparation, folder)
            case SumOverRows():
                params = {**preparation.params, "data": DATA}
                maker = SumOfShard(preparation.start, {}, params, self._loaded)
                maker._needed = self._needed(preparation.needs)
                facts = maker.make(Shard(0, 0, self._rows), folder / PART, nothing)
                Parts.write_index(folder, {"all": facts.model_dump()}, {"all": PART})
            case KeepOfRows():
                self._keep_of_rows(preparation, folder)
            case MapParts():
                self._map_parts(preparation, folder)
        self.folders[preparation.name] = folder

    def _moments(self, asked: Moments, folder: Path) -> None:
        params = Params.model_validate({
            "extract": asked.config, "data": DATA, "data_fingerprint": "", "role": asked.role,
            "model": {"dtype": "float32", "attention": "sdpa"},
        })  # fmt: skip
        facts = SumsOfShard(params, self._loaded).make(Shard(0, 0, self._rows), folder / PART, nothing)
        widths = moments.Columns.model_validate(facts.about).widths
        merged = ((name, moments.merge_files([folder / PART], name)) for name in widths)
        moments.save(merged, folder, {**facts.about, "count": facts.rows})

    def _keep_of_rows(self, asked: KeepOfRows, folder: Path) -> None:
        facts, size = {}, int(str(asked.params["rows_per_shard"]))
        whole: Any = {**asked.params, "data": PAIRS, "max_tokens": self._max_tokens}
        for number, first in enumerate(range(0, len(self._rows), size)):
            part = folder / f"part-{number:05d}.safetensors"
            shard = Shard(number, first, self._rows[first : first + size])
            facts[part.name] = TensorsOfShard(asked.start, whole, self._loaded).make(shard, part, nothing).model_dump()
        Parts.write_index(folder, facts, {name: name for name in facts})

    def _map_parts(self, asked: MapParts, folder: Path) -> None:
        source = Source(asked.params, self._needed(asked.needs), self._loaded if asked.reads_model else None)
        files = {part: f"part-{number:05d}.safetensors" for number, part in enumerate(asked.parts)}
        Parts.write_index(folder, {part: asked.make(source, part, folder / file) for part, file in files.items()}, files)

    @property
    def _loaded(self) -> SteeredModel:
        assert self._model is not None, "this preparation reads a model"
        return self._model

    def _needed(self, names: tuple[str, ...]) -> dict[str, Path]:
        return {name: self.folders[name] for name in names}
