"""Extraction on a real cluster: the same rows whatever is killed, and errors that end it at once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from steerlab import job, models
from steerlab.activations.moments import Moments
from steerlab.activations.parquet import Activations
from steerlab.data import sources
from steerlab.job import Job
from steerlab.stages import JobType, Plan, extract, extraction_size, reduce
from steerlab.stages.spread import shards
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

LAYERS = [f"model.layers.{i}.post_attention_layernorm" for i in range(4)]


def wanted(
    limit: int = 60, model: str = "tiny:model", workers: int = 2, failures: int = 3, warm: bool = False, **read: Any
) -> Job:
    data = {"source": "tiny:topics/train", "format": "text", "limit": limit}
    tree = {
        "name": "read",
        "model": {"source": model},
        "data": {"source": data},
        "method": {"name": "vanilla"},
        "extract": {"rows_per_shard": 10, "batch_tokens": 64, **read},
        "scale": {"workers": workers, "max_failures": failures, "warm": warm},
    }
    return job.validate(tree, JobType, Path("read.yaml"))


def run(asked: Job, root: str, kind: Any = extract, told: list[dict[str, Any]] | None = None) -> Path:
    """Run the one stage and return its artifact."""
    store, stage = Store.open(root), kind.stage(asked, "source", Plan.of(asked).start, asked.extract)
    lines = [] if told is None else told
    plan.run([stage], store, asked.scale, plan.Listener(reported=lambda _, line: lines.append(line)), [])
    assert not store.list(f"work/{stage.name}"), "nothing is left to continue with"
    return store.local(stage.name, stage.key)


def all_rows(artifact: Path) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(artifact / part["path"]) for part in json.loads((artifact / "parts.json").read_text())]
    )


def one_by_one(asked: Job, place: str) -> np.ndarray[Any, Any]:
    """Return the mean of a module's output over each text, each read alone and without this platform's hooks."""
    from steerlab.data.rows import read
    from steerlab.inputs.encoding import Encoder

    assert isinstance(asked.model.source, str)
    model = models.load_model(sources.fetch(asked.model.source))
    encoder = Encoder(models.load_tokenizer(sources.fetch(asked.model.source)))
    outputs: list[torch.Tensor] = []
    model.get_submodule(place).register_forward_hook(lambda _m, _i, output: outputs.append(output[0].mean(0)))
    with torch.inference_mode():
        for row in read(asked.data.by_role["source"]):
            model(input_ids=torch.tensor([encoder.encode(encoder.from_row(row, "text")).input_ids]))
    return torch.stack(outputs).numpy()


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of 60 texts in six shards when nobody disturbs its two actors."""
    return run(wanted(), str(tmp_path_factory.mktemp("undisturbed")))


def test_rows_are_in_sample_order_and_as_read_one_by_one(undisturbed: Path) -> None:
    found = Activations.open(undisturbed)
    assert (found.modules, found.num_rows) == (LAYERS, 60)
    assert found.about("sample_id").to_pylist() == list(range(60))
    assert set(found.labels) == {"source"}
    np.testing.assert_allclose(found.column(LAYERS[2]).numpy(), one_by_one(wanted(), LAYERS[2]), rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "extraction.json", "manifest.json", *(f"part-{i:05d}.parquet" for i in range(6)), "parts.json",
    ]  # fmt: skip
    summary = json.loads((undisturbed / "extraction.json").read_text())
    assert (summary["texts"], summary["rows"], summary["cut"], summary["nan"]) == (60, 60, 0, 0)
    assert summary["widths"] == dict.fromkeys(LAYERS, 128)


def test_warm_processes_give_the_same_rows_and_start_no_actor(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_counting_rows", None)
    assert all_rows(run(wanted(workers=1, warm=True), str(tmp_path))).equals(all_rows(undisturbed))
    assert Moments.open(run(wanted(workers=1, warm=True, keep="moments"), str(tmp_path), reduce)).count == 60


def test_one_actor_and_a_file_uri_give_the_same_rows(undisturbed: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    artifact = run(wanted(workers=1), f"file://{tmp_path}/root", told=told)
    assert all_rows(artifact).equals(all_rows(undisturbed))
    assert told[0] == {"done": 0, "total": 60}
    assert (told[-1]["done"], told[-1]["total"]) == (60, 60)


def test_tokens_and_their_mean(undisturbed: Path, tmp_path: Path) -> None:
    artifact = run(wanted(12, pooling=["none"], workers=1), str(tmp_path))
    tokens, texts = Activations.open(artifact), Activations.open(undisturbed)
    assert tokens.num_rows == json.loads((artifact / "extraction.json").read_text())["tokens"]
    assert set(tokens.about("role").to_pylist()) == {"instruction"}
    of = np.array(tokens.about("sample_id").to_pylist())
    first = [index for index, text in zip(tokens.about("token_index").to_pylist(), of, strict=True) if text == 0]
    assert first == list(range(len(first)))
    z_ND = tokens.column(LAYERS[1])
    means = torch.stack([z_ND[of == text].mean(0) for text in range(12)])
    torch.testing.assert_close(texts.column(LAYERS[1])[:12], means, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_several_poolings_and_cut_texts(cluster: None, tmp_path: Path) -> None:
    tokens = Activations.open(run(wanted(12, max_tokens=5, pooling=["none"], workers=1), str(tmp_path / "a")))
    both = Activations.open(run(wanted(12, max_tokens=5, pooling=["mean", "last"], workers=1), str(tmp_path / "b")))
    z_NTD = tokens.column(LAYERS[1]).view(12, 5, -1)
    torch.testing.assert_close(both.column(LAYERS[1], "mean"), z_NTD.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.column(LAYERS[1], "last"), z_NTD[:, -1], rtol=1e-5, atol=1e-6)
    assert json.loads((both.directory / "extraction.json").read_text())["cut"] == 12


def check_moments(summed: Path, exact: np.ndarray[Any, Any]) -> None:
    found = Moments.open(summed)
    assert (found.count, found.modules) == (len(exact), LAYERS)
    np.testing.assert_allclose(found.mean(LAYERS[3]), exact.mean(0), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.variance(LAYERS[3]), exact.var(0), rtol=1e-5)
    np.testing.assert_allclose(found.second_moment(LAYERS[3]), exact.T @ exact / len(exact), rtol=1e-4, atol=1e-6)


def test_moments_are_those_of_one_pass_over_the_rows(undisturbed: Path, tmp_path: Path) -> None:
    """Two actors and shards of seven rows, against rows that were extracted in shards of ten."""
    summed = run(wanted(keep="moments", second_moment=True, rows_per_shard=7), str(tmp_path), reduce)
    check_moments(summed, Activations.open(undisturbed).column(LAYERS[3]).double().numpy())
    assert {path.name for path in summed.iterdir()} == {"moments.safetensors", "moments.json", "manifest.json"}


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 7, 100])
def test_moments_of_tokens_are_those_of_one_pass(cluster: None, tmp_path: Path, shard: int) -> None:
    read = {"pooling": ["none"], "rows_per_shard": shard}
    exact = Activations.open(run(wanted(20, **read), str(tmp_path))).column(LAYERS[3]).double().numpy()
    check_moments(run(wanted(20, keep="moments", second_moment=True, **read), str(tmp_path), reduce), exact)


def changed_model(directory: Path, value: float) -> str:
    """Write the tiny model with one weight of the third post-attention norm set to a value."""
    source = sources.fetch("tiny:model")
    model = models.load_model(source)
    with torch.no_grad():
        model.get_submodule(LAYERS[2]).weight[5] = value  # type: ignore[index,operator]
    models.save_model(model, models.load_tokenizer(source), directory)
    return str(directory)


def test_float16_overflow_names_module_row_and_value(cluster: None, tmp_path: Path) -> None:
    asked = wanted(20, changed_model(tmp_path / "model", 1e7), dtype="float16", pooling=["max"])
    start_s = time.monotonic()
    with pytest.raises(ValueError, match=r"layers.2.post_attention_layernorm, row \d+: .* exceeds the range of float16"):
        run(asked, str(tmp_path / "root"))
    assert time.monotonic() - start_s < 60, "it is not tried again"


@pytest.mark.slow
def test_a_nan_is_kept_counted_and_named(cluster: None, tmp_path: Path) -> None:
    source = changed_model(tmp_path / "model", float("nan"))
    artifact = run(wanted(20, source), str(tmp_path / "root"))
    summary = json.loads((artifact / "extraction.json").read_text())
    assert summary["first_bad"] == {"module": LAYERS[2], "row": 0}
    found = Activations.open(artifact)
    assert torch.isfinite(found.column(LAYERS[0])).all()
    with pytest.raises(ValueError, match=rf"{LAYERS[2]}, row 0 holds a NaN"):
        found.column(LAYERS[2])


@pytest.mark.slow
def test_a_nan_ends_moments(cluster: None, tmp_path: Path) -> None:
    source = changed_model(tmp_path / "model", float("nan"))
    with pytest.raises(ValueError, match=rf"{LAYERS[2]}, row \d+ holds a NaN .* nothing was summed"):
        run(wanted(20, source, keep="moments"), str(tmp_path / "root"), reduce)


def test_a_text_beyond_the_context_is_said(cluster: None, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "the red cat"}) + "\n" + json.dumps({"text": "the red cat " * 100}) + "\n")
    asked = wanted(2, max_tokens=300)
    asked = asked.model_copy(
        update={"data": asked.data.model_copy(update={"source": asked.data.source.model_copy(update={"source": str(long)})})}  # type: ignore[union-attr]
    )
    with pytest.raises(ValueError, match=r"row 1 has 300 tokens, .* holds 256: set extract.max_tokens to at most 256"):
        run(asked, str(tmp_path / "root"))


@pytest.mark.slow
def test_a_selection_of_no_token_names_the_row(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row \d+: no token is selected by extract.select"):
        run(wanted(20, select={"roles": ["data"]}), str(tmp_path / "root"))


def test_a_selection_of_nothing_fails_before_an_actor_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module path matches '.*norms' as a whole; similar: "):
        run(wanted(select={"modules": ".*norms"}), str(tmp_path))


def test_a_disk_that_is_too_small_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda _store: 1000)
    with pytest.raises(ValueError, match=r"0.0 GB free; 60 rows and 4 columns of 128 neurons need about 0.0 GB: select fewer"):
        run(wanted(), str(tmp_path))


def test_estimates_are_near_what_is_written(undisturbed: Path) -> None:
    directory = sources.fetch("tiny:model")

    def disk_bytes(asked: Job) -> int:
        assert asked.extract is not None
        return extraction_size.estimate(asked, "source", asked.extract, models.facts(directory), directory).disk_bytes

    expected = disk_bytes(wanted())
    assert expected == 60 * 4 * 128 * 4
    assert disk_bytes(wanted(pooling=["none"])) > 5 * expected


MANY = {"limit": 2000, "rows_per_shard": 50, "batch_tokens": 16, "failures": 50}
"""Enough small batches for a kill to fall among them."""
DRIVER = """
import logging, sys
import ray
sys.path.insert(0, {tests!r})
import test_extract
ray.init(address={address!r}, num_cpus={cpus}, logging_level=logging.ERROR, log_to_driver=False)
test_extract.run(test_extract.wanted(**test_extract.MANY), {root!r}, told=test_extract.Printed())
"""


class Printed(list[dict[str, Any]]):
    """Prints progress as it comes."""

    def append(self, line: dict[str, Any]) -> None:
        print(line["done"], flush=True)


class Killing(list[dict[str, Any]]):
    """Kills an actor of the pool, or a warm process, each time that the progress passes a mark."""

    def __init__(self, marks: list[int], which: str = "MapWorker") -> None:
        self.marks = sorted(marks, reverse=True)
        self.which, self.kills = which, 0

    def append(self, line: dict[str, Any]) -> None:
        super().append(line)
        if self.marks and line["done"] >= self.marks[-1]:
            actors = [p for p in psutil.Process().children(recursive=True) if self.which in " ".join(p.cmdline())]
            random.choice(actors).kill()
            self.marks.pop()
            self.kills += 1


@pytest.fixture(scope="module")
def undisturbed_many(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The rows of the long extraction when nobody disturbs it."""
    return all_rows(run(wanted(**MANY), str(tmp_path_factory.mktemp("many"))))


def started(root: Path, address: str, cpus: int | None) -> subprocess.Popen[str]:
    script = DRIVER.format(tests=str(Path(__file__).parent), address=address, cpus=cpus, root=str(root))
    package = str(Path(plan.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": package}, stdout=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], num_rows: int) -> None:
    """Wait until the process has printed that so many rows are done, then a moment more."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= num_rows:
            time.sleep(random.random() / 2)
            return
    raise AssertionError("the extraction ended before it could be killed")


def kill(process: subprocess.Popen[str], what: str) -> None:
    """SIGKILL a driver alone, or with everything that it started, its cluster included."""
    family = psutil.Process(process.pid).children(recursive=True) if what == "everything" else []
    process.kill()
    for member in family:
        if member.is_running():
            member.kill()
    process.wait()


WARM = "ray::Map(_in_warm_process)"


@pytest.mark.parametrize(
    ("kills", "which"),
    [(1, "MapWorker"), pytest.param(3, "MapWorker", marks=pytest.mark.slow), pytest.param(3, WARM, marks=pytest.mark.slow)],
)
def test_killed_workers_are_replaced_and_the_rows_are_the_same(
    undisturbed_many: pa.Table, tmp_path: Path, kills: int, which: str
) -> None:
    told = Killing([random.randint(1, 1500) for _ in range(kills)], which)
    warm = {"warm": True, "workers": 1} if which == WARM else {}
    artifact = run(wanted(**MANY, **warm), str(tmp_path), told=told)
    assert told.kills == kills
    assert all_rows(artifact).equals(undisturbed_many)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["everything"] * 3 + ["driver"] * 3)
def test_a_killed_extraction_started_again_continues_to_the_same_rows(
    undisturbed_many: pa.Table, tmp_path: Path, what: str
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address if what == "driver" else "local"
    with started(tmp_path, address, None if what == "driver" else 2) as process:
        wait_for(process, random.randint(200, 1300))
        kill(process, what)
    assert not list((tmp_path / "artifacts").glob("*/*")), "nothing half-written counts as an artifact"
    told: list[dict[str, Any]] = []
    assert all_rows(run(wanted(**MANY), str(tmp_path), told=told)).equals(undisturbed_many)
    assert told[0]["done"] > 0, "the second run continued with the shards that were missing"


@pytest.mark.slow
def test_an_extraction_whose_actors_always_die_ends(cluster: None, tmp_path: Path) -> None:
    told = Killing([1, 300])
    with pytest.raises(RuntimeError, match=r"2 actors died, more than scale.max_failures 1; .* lower extract.batch_tokens"):
        run(wanted(**MANY | {"failures": 1}), str(tmp_path), told=told)


@pytest.mark.slow
def test_a_shard_whose_process_always_dies_ends_the_extraction(cluster: None, tmp_path: Path) -> None:
    over = threading.Event()

    def always_kill() -> None:
        kills = 0
        while not over.wait(0.1):
            begun = [int(path.read_text()) for path in tmp_path.glob("work/*/*/attempts/*.json")]
            if begun and begun[0] > kills:
                kills += 1
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):
                        if WARM in " ".join(process.cmdline()):
                            process.kill()

    killer = threading.Thread(target=always_kill)
    killer.start()
    match = r"2 processes died, more than scale.max_failures 1; .* lower extract.batch_tokens"
    try:
        with pytest.raises(RuntimeError, match=match):
            run(wanted(2000, rows_per_shard=2000, batch_tokens=16, failures=1, warm=True, workers=1), str(tmp_path))
    finally:
        over.set()
        killer.join()
