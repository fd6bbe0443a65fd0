"""The stage that reduces activations to moments: the same texts, actors and shards as extraction, no row is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlab import rows
from steerlab.activations import size_and_sha256
from steerlab.job import ExtractConfig, Job
from steerlab.plan import Stage, Work
from steerlab.stages import extract, shards

if TYPE_CHECKING:
    from steerlab.generation import SteeredModel
    from steerlab.moments import Sums


def stage(job: Job, role: str, below: Stage | None) -> Stage:
    """Return the stage that sums the activations of one of the job's data sets; `below` leaves the model, if a stage does."""
    return Stage(
        "moments",
        1,
        extract.params(job, role, below, exclude={"dtype"}),
        run,
        () if below is None else (below,),
        label=f"{role}: {rows.describe(job.data.by_role[role])}",
    )


def run(work: Work) -> None:
    """Sum each missing shard in a pool of actors, then merge the sums in the order of the shards."""
    from steerlab import moments

    start_s = time.monotonic()
    made = shards.run(work, SumsOfShard, lambda num_rows, some: extract.check_disk(work, num_rows, some))
    with shards.parts(work) as paths:
        found = {name: moments.merge_files(paths, name) for name in made[0]["about"]["widths"]}
    summary = {
        **made[0]["about"],
        "count": sum(row["rows"] for row in made),
        **{name: sum(row[name] for row in made) for name in ("texts", "tokens", "cut")},
        "seconds": round(time.monotonic() - start_s, 3),
        "actor_seconds": round(sum(row["seconds"] for row in made), 3),
    }
    work.directory.mkdir(parents=True, exist_ok=True)
    moments.save(found, work.directory, summary)


class SumsOfShard:
    """Makes the sums of a shard, one column after another, in a safetensors file."""

    suffix = ".safetensors"

    def __init__(self, model: SteeredModel, params: Mapping[str, Any]) -> None:
        from steerlab import reading

        self._config = ExtractConfig.model_validate(params["extract"])
        self._format = params["data"]["format"]
        self._reader = reading.TextReader(model, self._config)
        self._about = {
            **reading.about_model(model, self._config),
            "widths": self._reader.widths,
            "second_moment": self._config.second_moment,
            "label": params["role"],
        }

    def make(self, shard: shards.Shard, path: Path, tell: Callable[[int], None]) -> dict[str, Any]:
        """Leave the sums at `path`."""
        from steerlab import moments

        start_s = time.monotonic()
        texts, num_cut = self._reader.encode(shard.rows, self._format, shard.first)
        total: dict[str, Sums] = {}
        num_done = count = 0
        for vectors in self._reader.read(texts, shard.first):
            for name, z_MD in vectors.values.items():
                moments.check_finite(name, z_MD, vectors.row_M, shard.first)
                known = moments.sums(z_MD, self._config.second_moment)
                total[name] = moments.merged(total[name], known) if name in total else known
            count += len(vectors.row_M)
            tell(num_done := num_done + vectors.num_texts)
        moments.save_sums(total, path)
        return {
            "path": path.name,
            "rows": count,
            **size_and_sha256(path),
            "texts": len(texts),
            "tokens": sum(len(text) for text in texts),
            "cut": num_cut,
            "seconds": time.monotonic() - start_s,
            "about": self._about,
        }
