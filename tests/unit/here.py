"""Preparations made in this process as they are asked for, by what makes a shard or a part on a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlab.activations import moments
from steerlab.job import ExtractConfig
from steerlab.methods.preparations import MOMENTS, MakePart, Prepare, Source, StartKeeper, StartSums
from steerlab.stages.reduce import SumsOfShard
from steerlab.stages.spread.making import SumOfShard, TensorsOfShard
from steerlab.stages.spread.shard_plan import Shard
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts

PART = "part-00000.safetensors"
DATA = {"format": "instruction", "loss_on": "response"}


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

    def moments(self, role: str, config: ExtractConfig, *, name: str = MOMENTS) -> None:
        super().moments(role, config, name=name)
        folder = self._folder(name)
        params = {"extract": config.model_dump(mode="json"), "data": DATA, "role": role}
        made = SumsOfShard(self._loaded, params).make(Shard(0, 0, self._rows), folder / PART, nothing)
        merged = ((name, moments.merge_files([folder / PART], name)) for name in made["about"]["widths"])
        moments.save(merged, folder, {**made["about"], "count": made["rows"]})

    def sum_over_rows(
        self,
        name: str,
        version: int,
        role: str,
        params: Mapping[str, Any],
        start: StartSums,
        *,
        needs: tuple[str, ...] = (),
        **told: Any,
    ) -> None:
        super().sum_over_rows(name, version, role, params, start, needs=needs)
        folder = self._folder(name)
        maker = SumOfShard(start, {}, self._loaded, {**params, "data": DATA})
        maker._needed = self._needed(needs)
        Parts.write_index(folder, {"all": maker.make(Shard(0, 0, self._rows), folder / PART, nothing)}, {"all": PART})

    def keep_of_rows(
        self, name: str, version: int, role: str, params: Mapping[str, Any], start: StartKeeper, values_per_target: int
    ) -> None:
        super().keep_of_rows(name, version, role, params, start, values_per_target)
        folder, facts, size = self._folder(name), {}, params["rows_per_shard"]
        whole = {**params, "data": DATA | {"format": "preference"}, "max_tokens": self._max_tokens}
        for number, first in enumerate(range(0, len(self._rows), size)):
            part = folder / f"part-{number:05d}.safetensors"
            shard = Shard(number, first, self._rows[first : first + size])
            facts[part.name] = TensorsOfShard(start, self._loaded, whole).make(shard, part, nothing)
        Parts.write_index(folder, facts, {name: name for name in facts})

    def map_parts(
        self, name: str, version: int, params: Mapping[str, Any], parts: tuple[str, ...], make: MakePart, *,
        needs: tuple[str, ...] = (), reads_model: bool = False, **told: Any,
    ) -> None:  # fmt: skip
        super().map_parts(name, version, params, parts, make, needs=needs)
        folder = self._folder(name)
        source = Source(params, self._needed(needs), self._loaded if reads_model else None)
        files = {part: f"part-{number:05d}.safetensors" for number, part in enumerate(parts)}
        Parts.write_index(folder, {part: make(source, part, folder / file) for part, file in files.items()}, files)

    @property
    def _loaded(self) -> SteeredModel:
        assert self._model is not None, "this preparation reads a model"
        return self._model

    def _folder(self, name: str) -> Path:
        self.folders[name] = self._root / f"{name}-{len(list(self._root.iterdir()))}"
        self.folders[name].mkdir()
        return self.folders[name]

    def _needed(self, names: tuple[str, ...]) -> dict[str, Path]:
        return {name: self.folders[name] for name in names}
