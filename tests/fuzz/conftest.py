"""Files that a stranger might hand in, made by the platform's own writers, for mutants to be made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from steerlab import models, patches
from steerlab.activations import parquet, part_writing
from steerlab.data.worlds import tiny_checkpoint
from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.inputs.encoding import Encoder
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, EmbeddingPatch, LogitPatch, WeightPatch
from steerlab.patches.maps import AffineMap
from steerlab.run.record import SCHEMA
from steerlab.steered import export
from steerlab.steered.language import SteeredModel
from steerlab.storage.store import Store
from steerlab.storage.whole import size_and_sha256


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's model with weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint.write_model(folder)
    model = models.load_model(folder, seed=0)
    models.save_model(model, models.load_tokenizer(folder), folder)
    return folder


def patches_of(model: Any) -> dict[str, Any]:
    """A patch of each kind that a file may hold."""
    norm = next(name for name, _ in model.named_modules() if name.endswith("post_attention_layernorm"))
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    maps = {norm: AffineMap(torch.full((width,), 1.1), torch.full((width,), 0.1))}
    weight = next(name for name, parameter in model.named_parameters() if parameter.dim() == 2)
    return {
        "activation": ActivationPatch.from_maps(maps, Selection(modules=norm)),
        "embedding": EmbeddingPatch(width, 0.5, shift=True),
        "logit": LogitPatch(width, vocabulary, "low_rank", 2),
        "weight": WeightPatch.of({weight: torch.zeros_like(model.get_parameter(weight))}),
    }


@pytest.fixture(scope="session")
def patch_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Patches of every kind on disk."""
    model = models.load_model(model_dir)
    folders = []
    for name, patch in patches_of(model).items():
        folders.append(tmp_path_factory.mktemp(name))
        patches.save(patch, folders[-1], models.fingerprint(model))
    return folders


@pytest.fixture(scope="session")
def exported_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Exported folders: the patch in the weights, and the model with the patch beside it."""
    folders = []
    for name in ("activation", "logit"):
        model = models.load_model(model_dir)
        steered = SteeredModel(model, Encoder(models.load_tokenizer(model_dir)), (patches_of(model)[name],))
        folders.append(tmp_path_factory.mktemp("exports") / name)
        steered.fold(1.0)
        steered.save_model(folders[-1])
        (folders[-1] / "prompt.json").write_text(json.dumps(steered.encoder.saved_spec))
    folders.append(tmp_path_factory.mktemp("exports") / "apart")
    model = models.load_model(model_dir)
    steered = SteeredModel(model, Encoder(models.load_tokenizer(model_dir)), (patches_of(model)["embedding"],))
    export._write_apart(steered, folders[-1], 0.5)
    return folders


@pytest.fixture(scope="session")
def shard_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of four texts."""
    folder = tmp_path_factory.mktemp("shards")
    widths = {"a.b": 4, "c.d": 3}
    about = {"model_key": "k", "architecture": "A", "modules": list(widths), "pooling": ["mean"], "fingerprint": "f"}
    to = part_writing.schema(widths, "float32", False, about)
    values = {name: np.arange(4 * width, dtype=np.float32).reshape(4, width) for name, width in widths.items()}
    table = part_writing.table({"sample_id": range(4), "label": ["x"] * 4, "text_sha256": ["s"] * 4}, values, to)
    pq.write_table(table, folder / "part-00000.parquet")
    part = {"path": "part-00000.parquet", "rows": 4, **size_and_sha256(folder / "part-00000.parquet")}
    (folder / parquet.PARTS).write_text(json.dumps([part]))
    return folder


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Data files of every type."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [{"text": f"a text {i}", "label": i, "meta": {"score": i / 3, "tags": ["x", "y"]}} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, pa.Table.from_pylist(rows).schema) as writer,
    ):
        writer.write_table(pa.Table.from_pylist(rows))
    (folder / "rows.json").write_text(json.dumps({"data": rows}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.csv").write_text("text,label\n" + "".join(f'"a, text {i}",{i}\n' for i in range(5)))
    (folder / "rows.tsv").write_text("text\tlabel\n" + "".join(f"a text {i}\t{i}\n" for i in range(5)))
    (folder / "rows.txt").write_text("one\ntwo\n")
    (folder / "rows.yaml").write_text("- text: one\n  label: 1\n- {text: two, label: 2}\n")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a small model."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 16), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 32), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4), (writer.add_vocab_size, 8),
    ):  # fmt: skip
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "d", "e", "ab", "<s>", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(6)
    writer.add_eos_token_id(7)
    ones = lambda *shape: np.ones(shape, np.float32) * 0.1  # noqa: E731
    for name, tensor in (
        ("token_embd", ones(8, 16)), ("output_norm", ones(16)), ("output", ones(8, 16)), ("blk.0.attn_norm", ones(16)),
        ("blk.0.attn_q", ones(16, 16)), ("blk.0.attn_k", ones(16, 16)), ("blk.0.attn_v", ones(16, 16)),
        ("blk.0.attn_output", ones(16, 16)), ("blk.0.ffn_norm", ones(16)), ("blk.0.ffn_gate", ones(32, 16)),
        ("blk.0.ffn_up", ones(32, 16)), ("blk.0.ffn_down", ones(16, 32)),
    ):  # fmt: skip
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TRAINED, EVALUATED = "b" * 64, ("c" * 64, "d" * 64)
JOB = {"name": "tiny", "model": {"source": "tiny:model"}, "method": {"name": "vanilla"}}
METRIC = {
    "value": 0.5,
    "stderr": 0.1,
    "n": 10,
    "unparsable": 0,
    "too_long": 0,
    "rows_cut": 0,
    "empty": 0,
    "low": 0.4,
    "high": 0.6,
}


def _artifacts(store: Store, model_dir: Path) -> None:
    """Leave a patch on the tiny model, and the evaluations of two runs."""
    model = models.load_model(model_dir)
    with store.temporary("train", TRAINED) as directory:
        patches.save(patches_of(model)["embedding"], directory / "patch", models.fingerprint(model))
        (directory / "prompt.json").write_text(json.dumps(Encoder(models.load_tokenizer(model_dir)).saved_spec))
        (directory / "base.json").write_text(json.dumps({"source": "tiny:model"}))
        store.commit("train", TRAINED, directory, {"params": {}, "seconds": 1.0})
    for key, values in zip(EVALUATED, ((0.1, 0.2, 0.3), (0.4, 0.2, 0.6)), strict=True):
        seen = [Observation("toxicity/share", str(i), v, strength=s) for i, v in enumerate(values) for s in (1.0, 0.0)]
        metrics = {"toxicity/share": METRIC}
        sample = {"id": "1", "strength": 1.0, "prompt": "a", "continuation": "b"}
        share = {"toxicity/share": Measure("toxicity/share", "lower", transform="mean")}
        outcome = stored.Outcome(seen, [sample], {}, {1.0: metrics, 0.0: metrics}, share)
        with store.temporary("evaluate", key) as directory:
            stored.write(directory, outcome)
            params = {"task": {"task": "toxicity", "limit": 3}, "task_version": 1, "fingerprints": {"source": "f"}}
            store.commit("evaluate", key, directory, {"params": params, "seconds": 1.0})


@pytest.fixture(scope="session")
def run_root(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ROOT with two runs, a sweep, and their artifacts, as `steerlab run` leaves it."""
    root = tmp_path_factory.mktemp("root")
    _artifacts(Store.open(str(root)), model_dir)
    for run_id, key in zip(("1", "2"), EVALUATED, strict=True):
        _run(root / "runs" / "tiny" / run_id, key)
    _sweep(root / "sweeps" / "tiny" / "1")
    return root


def _sweep(folder: Path) -> None:
    """Leave a sweep over alpha whose trials are the two runs."""
    folder.mkdir(parents=True)
    rows = [
        {
            "trial_id": f"t{number}", "seed": 0, "status": "finished", "reason": "", "run": f"runs/tiny/{number + 1}",
            "param.method.alpha": 0.5 + number, "param.train.lr": "1e-3", "param.train.betas": [0.9, 0.9 + number / 20],
            "seconds.train": 1.0, "cached.train": False,
            "key.train": TRAINED, "key.evaluate.toxicity": key,
            **{f"{part}.toxicity/share": 0.5 for part in ("metric", "stderr", "low", "high")}, "n.toxicity/share": 10,
        }
        for number, key in enumerate(EVALUATED)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    best = {"trial_id": "t0", "params": {"method.alpha": 0.5}, "metric": "toxicity/share", "value": 0.5}
    summary = {
        "metric": "toxicity/share", "mode": "min", "best": best, "seconds": {"train": 3.0}, "indistinguishable": ["t1"],
        "test": {"toxicity/share": METRIC}, "test_runs": ["runs/tiny/1"],
    }  # fmt: skip
    entry = {"kind": "grid_search", "values": [0.5, 1.5]}
    space = {"space": {"method.alpha": entry}, "metric": "toxicity/share", "mode": "min"}
    for name, content in {"summary.json": summary, "space.json": space, "job.yaml": JOB}.items():
        (folder / name).write_text(json.dumps(content))


def _run(folder: Path, evaluated: str) -> None:
    (folder / "samples").mkdir(parents=True)
    metrics = {"toxicity/share": METRIC, "perplexity/value": {**METRIC, "value": 50.0}}
    files = {
        "summary.json": {
            "metrics": metrics, "reported": {"toxicity": 1.0, "perplexity": 1.0}, "strengths": {"1.0": metrics, "0.0": metrics},
            "choice": None, "model": {"stage": "train", "key": TRAINED, "snapshot": None},
            "evaluations": {"toxicity": evaluated}, "unsteered": {}, "schema": SCHEMA,
        },
        "plan.json": {"stages": [{"name": "train", "label": "x", "status": "ran", "seconds": 1.0, "key": "a" * 64}]},
        "environment.json": {
            "command": "steerlab run a.yaml", "python": "3.11", "versions": {"torch": "2"}, "git": None, "git_changes": "",
            "cluster": {"CPU": 2.0}, "nodes": 1, "created": "2026-01-01T00:00:00+0000",
        },
        "samples/toxicity.json": [{"id": "1", "strength": s, "prompt": "a", "continuation": "b"} for s in (0.0, 1.0)],
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "job.yaml").write_text(json.dumps(JOB))
    lines = [{"key": "a" * 64, "step": step, "train/loss": 1 / step} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
