"""Files of strangers that lead elsewhere, have no end, or fill the memory: refused in a line, and nothing is touched."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from chat_families import family
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from steerlab import cli, job, models, report
from steerlab.data import sources
from steerlab.data.sources import SourceError, file_sets, packages, remote
from steerlab.data.worlds import tiny_checkpoint
from steerlab.evaluation.tasks.ability import harness
from steerlab.guards import counts, expressions, files
from steerlab.inputs import encoding, rendering, tokenising
from steerlab.inputs.encoding import Encoder
from steerlab.models.diffusion import saved_pipelines
from steerlab.run import folder as folders
from steerlab.stages import JobType
from steerlab.storage.store import Store, StoreError
from steerlab.tracking import run_history, spool

MINUTE_S = 60
TREE: dict[str, Any] = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 4}},
    "method": {"name": "vanilla"},
    "train": {"steps": 2, "max_tokens": 64},
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user that nobody names."""
    path = tmp_path / "victim" / "keys"
    path.parent.mkdir()
    path.write_text("mine")
    os.utime(path, (0, 0))
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_checkpoint.write_model(folder)
    return folder


# What leads elsewhere


class Bucket:
    """A store whose keys are called as its owner likes."""

    def __init__(self, *names: str) -> None:
        self.infos = [pafs.FileInfo(name, type=pafs.FileType.File, size=3) for name in names]

    def get_file_info(self, of: Any) -> Any:
        if isinstance(of, str):
            return next((info for info in self.infos if info.path == of), pafs.FileInfo(of, type=pafs.FileType.Directory))
        return self.infos

    def create_dir(self, *_: Any, **__: Any) -> None:
        """Do nothing: an object store has no folders."""

    def open_input_stream(self, path: str) -> Any:
        return io.BytesIO(b"new")


NAMES = ("b/data/../../../victim/keys", "b/data/x/../../../victim/keys", "b/other/x", "/victim/keys", "..")


@pytest.mark.parametrize("name", NAMES)
def test_no_key_of_a_bucket_is_written_outside(
    name: str, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket: Any = Bucket("b/data/a.jsonl", name)
    store = Store.open("mock:///bucket/root")
    with pytest.raises(SourceError, match="which leads outside the folder; it is not read"):
        remote.files_below(bucket, "b/data")
    monkeypatch.setattr(remote, "opened", lambda uri: (bucket, "b/data"))
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SourceError, match="which leads outside the folder"):
        sources.fetch("s3://b/data")
    store._fs = bucket
    for use in (lambda: store.work("train", "k"), lambda: store.move_from_work("train", "k", "output", tmp_path / "made")):
        with pytest.raises(SourceError, match="which leads outside the folder"):
            use()
    assert victim.read_text() == "mine"


def test_the_files_of_a_bucket_are_copied_as_they_lie(tmp_path: Path) -> None:
    bucket: Any = Bucket("b/data/a.txt", "b/data/deep/b.txt")
    remote.copy(bucket, "b/data/", remote.files_below(bucket, "b/data/"), tmp_path / "copy")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.txt")) == ["copy/a.txt", "copy/deep/b.txt"]


def test_what_is_swept_is_what_was_made_here(tmp_path: Path, victim: Path) -> None:
    store = Store.open(str(tmp_path / "root"))
    tmp = Path(store.root) / "tmp"
    for name in ("train-0123456789ab-0123456789ab", "notes", "incomplete-0123456789ab"):
        (tmp / name).mkdir(parents=True)
        (tmp / f"{name}.lock").write_text(files.kernel())
    (tmp / "train-abcdefabcdef-0123456789ab").symlink_to(victim.parent)
    (tmp / "train-abcdefabcdef-0123456789ab.lock").write_text(files.kernel())
    (tmp / "train-abcdefabcdea-0123456789ab").mkdir()
    (tmp / "train-abcdefabcdea-0123456789ab.lock").symlink_to(victim)
    assert store.sweep_temporary() == 2
    assert (tmp / "notes").is_dir() and victim.read_text() == "mine"


def test_a_temporary_folder_that_is_a_link_is_not_used(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "tmp").symlink_to(victim.parent)
    with pytest.raises((StoreError, ValueError), match="root/tmp is a link"):
        Store.open(str(tmp_path / "root")).sweep_temporary()
    assert victim.read_text() == "mine"


def test_a_lock_and_a_log_follow_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "x.lock").symlink_to(victim)
    with pytest.raises(ValueError, match=r"x\.lock is a link"), files.locked(tmp_path / "x.lock"):
        pass
    with pytest.raises(ValueError, match=r"x\.lock is a link"):
        files.appending(tmp_path / "x.lock")
    assert victim.read_text() == "mine"


def test_nothing_that_lies_beside_a_gguf_file_is_taken_for_its_content(
    tmp_path: Path, victim: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link where a lock would be, and a model made ready: neither is looked at."""
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gguf"
    shutil.copytree(model_dir, folder / "x.dequantised")
    (folder / "x.gguf").write_bytes(b"GGUF, but none")
    (folder / "x.lock").symlink_to(victim)
    with pytest.raises(ValueError, match=r"the GGUF file .*x\.gguf cannot be read"):
        models.prepare(folder)
    assert victim.read_text() == "mine"


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with files.locked(tmp_path / "a.lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "a.lock", wait=False):
        pass
    with files.locked(tmp_path / "a.lock", wait=False):
        pass


def test_a_spool_sends_images_of_its_own_run_alone(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a" / "1"
    (run / "samples").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    (run / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    history: Any = run_history.History.__new__(run_history.History)
    history.folder = run
    for path in (
        tmp_path / "secret.png",
        run / "samples" / "link.png",
        run / ".." / ".." / ".." / "secret.png",
        "http://host/x.png",
    ):
        with pytest.raises(ValueError, match="is not an image of the run in"):
            history._content({"kind": "images", "key": "k", "paths": [str(path)], "captions": ["c"]})


# Code


def test_no_module_of_the_folder_from_which_a_command_runs_is_imported(tmp_path: Path) -> None:
    """`pip.py` beside a job: the child that asks pip for its settings starts in that folder."""
    for name in ("pip.py", "wandb.py", "steerlab.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    ask = "from steerlab.data.sources import indexes; print(sorted(indexes.pip_settings()))"
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ask], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "find-links" in done.stdout
    assert not (tmp_path / "marker").exists()


def test_every_child_that_is_started_by_module_leaves_the_current_folder_out() -> None:
    """`python -m` takes modules from the current folder first; -P (or -I) takes none from there."""
    for path in sorted((Path(cli.__file__).parents[1]).rglob("*.py")):
        for line in path.read_text().splitlines():
            if "sys.executable" in line and '"-m"' in line:
                assert '"-P"' in line, f"{path.name}: {line.strip()}"


def test_task_files_of_the_harness_run_only_where_a_job_says_so(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\ndef go(x): return x\n")
    (tmp_path / "evil.yaml").write_text("task: evil\ndataset_path: json\nprocess_docs: !function evil.go\n")
    config = harness.Config(name="evil", tasks_source=str(tmp_path))
    with pytest.raises(ValueError, match=r"tasks_source: the harness runs the Python .*trust_remote_code: true"):
        harness.check(config, None)  # type: ignore[arg-type]
    assert config.trusted_source is None
    assert harness.Config(name="evil", tasks_source="/x", trust_remote_code=True).trusted_source == "/x"
    assert not (tmp_path / "marker").exists()


def test_a_page_offers_no_command_of_a_stranger(tmp_path: Path) -> None:
    entry = report.Entry("a", "runs/a/1", {}, {}, [], {"git": "$(touch marker)"}, {}, None)
    assert "touch" not in report._command(entry)
    assert "git checkout c0ffee0" in report._command(report.Entry("a", "runs/a/1", {}, {}, [], {"git": "c0ffee0"}, {}, None))


# What has no end


def hangs(kind: str, path: Path) -> None:
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_file(kind: str, tmp_path: Path, model_dir: Path) -> None:
    """As a job, a base job, rows, a template, a file of a model, of a pipeline, of a run, of a spool."""
    hangs(kind, tmp_path / "bad")
    word = "a named pipe" if kind == "pipe" else "a device"
    with pytest.raises(ValueError, match=f"bad is {word}, not a file, so it is not a job"):
        job.read(tmp_path / "bad", JobType)
    with pytest.raises(ValueError, match=f"bad is {word}, not a file, so it is not a job"):
        job.validate({**TREE, "model": {"source": "job:bad"}}, JobType, tmp_path / "a.yaml")
    with pytest.raises(SourceError, match="bad' is neither a file nor a folder"):
        sources.fingerprint(str(tmp_path / "bad"))
    hangs(kind, model_dir / "generation_config.json")
    with pytest.raises(ValueError, match=rf"generation_config\.json is {word}, not a file"):
        models.facts(model_dir)
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / saved_pipelines.INDEX).write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet2DModel"]}))
    hangs(kind, pipeline / "unet" / "config.json")
    with pytest.raises(ValueError, match=rf"config\.json is {word}, not a file"):
        models.facts(pipeline)
    run = tmp_path / "root" / "runs" / "a" / "1"
    run.mkdir(parents=True)
    hangs(kind, run / "summary.json")
    with pytest.raises(ValueError, match=r"summary\.json is not a file"):
        report.read(Store(str(tmp_path / "root")), "runs/a/1")
    hangs(kind, run / spool.EVENTS)
    with pytest.raises(ValueError, match=f"is {word}, not a file"):
        list(spool.read(run / spool.EVENTS))


def test_a_job_of_millions_of_values_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [" + "1,\n" * 3_000_000 + "]")
    (tmp_path / "b.yaml").write_text("a: [" + "1,\n" * 200_000 + "]")
    began_s = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.yaml has 9,000,005 bytes; the maximum is 1,048,576, so it is not a job"):
        job.read(tmp_path / "a.yaml", JobType)
    with pytest.raises(ValueError, match="there are more than 100,000 values"):
        job.read(tmp_path / "b.yaml", JobType)
    assert time.monotonic() - began_s < MINUTE_S


def test_a_pattern_that_walks_through_a_disk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_sets, "_WALK_S", 0.2)
    monkeypatch.setattr(file_sets.glob, "iglob", lambda *_, **__: iter(lambda: time.sleep(0.01) or "", "never"))
    with pytest.raises(SourceError, match=r"the pattern '/\*\*/\*\.nothing' takes longer than 0\.2 s.*name the folder"):
        sources.fingerprint("/**/*.nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"num_hidden_layers": 1e9},
        {"num_hidden_layers": -1},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"vision_config": {"depth": 10**9}},
    ],
)
def test_a_config_of_more_layers_than_any_model_has_is_refused(change: dict[str, Any], model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=r"config\.json: \w+ is (1\w+\.?0*; no model has more than|-1, which is not a number)"):
        models.facts(model_dir)


def test_real_configs_have_fewer_parts_than_the_bounds() -> None:
    """Numbers as they stand in published configs: widths and lengths are no parts."""
    numbers = {"num_hidden_layers": 126, "n_routed_experts": 256, "num_train_timesteps": 1000, "layers_per_block": [2, 2]}
    numbers |= {"block_out_channels": [320, 640, 1280, 1280], "transformer_layers_per_block": [1, 2, 10], "vocab_size": 10**7}
    numbers |= {"max_position_embeddings": 10**9, "hidden_size": 10**5, "tokens_per_block": 4096, "vision_feature_layer": -2}
    counts.check_counts(numbers, "config.json")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 7 ** (10 ** 9) }}", "computes a power in line 1"),
        (
            "{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "computes a product in line 1",
        ),
        ("{{ 1 / 0 }}", "refuses the messages .*division by zero"),
        ("{% for i in range(200000) %}{% endfor %}", "refuses the messages .*Range too big"),
        ("{{ 'a' * 10000000000000000000000000000000 }}", "refuses the messages"),
        ("{{ 'a'|center(1000000000000) }}", "asks for more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses the messages .*recursion"),
        ("".join(f"{{% for a{i} in [1] %}}" for i in range(30)) + "{% endfor %}" * 30, "refuses the messages"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "refuses the messages"),
    ],
)
def test_whatever_a_template_computes_ends_in_a_message(source: str, message: str) -> None:
    tokenizer = copy.deepcopy(family("chatml base").tokenizer)
    tokenizer.chat_template = source + str(tokenizer.chat_template)
    encoder, began_s = Encoder(tokenizer), time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template {message}"):
        encoder.encode(encoder.conversation("a", "b", "c"))
    assert time.monotonic() - began_s < MINUTE_S


@pytest.mark.parametrize(
    "source", ["{{ ' ' * 4 }}", "{{ 2 * loop_count }}", "{% if a %}*{% endif %}", "a ** b", "{# x ** y #}"]
)
def test_products_with_a_written_factor_and_stars_in_texts_are_no_matter(source: str) -> None:
    assert rendering._product_in(source) is None


def test_a_tokenizer_that_multiplies_a_text_is_refused(tmp_path: Path, model_dir: Path) -> None:
    """The library would end the process where the memory is full, so that nobody could say why."""
    tokenizer = models.load_tokenizer(model_dir)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 1000) for _ in range(4)])  # type: ignore[assignment]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"the normalizer of the tokenizer in .* makes 1,000,000,000,000 characters of one"):
        encoding.load(tmp_path / "tokenizer", None)


def test_texts_are_tokenised_a_few_at_a_time_and_one_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(family("gpt2").tokenizer)
    rows = [{"text": word * 3} for word in ("one two ", "a ", "three four ", "b ", "five ")]
    before = [row.input_ids for row in encoder.encode_data(rows, "text", 100).rows]
    monkeypatch.setattr(tokenising, "_LONGEST_TEXT", 40)
    assert list(tokenising._together([0, 1, 3], ["x" * 30, "x" * 20, "", "x" * 20])) == [[0], [1, 3]]
    assert [row.input_ids for row in encoder.encode_data(rows, "text", 100).rows] == before
    with pytest.raises(ValueError, match="row 2 has 41 characters, more than 40: cut it into rows"):
        encoder.encode_data([{"text": "a"}, {"text": "x" * 41}], "text", 100)


def test_a_tokenizer_without_its_unknown_token_is_said_to_be_the_fault(tmp_path: Path, model_dir: Path) -> None:
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"a": 0}
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizer .* cannot be read: Exception: .*Missing \[UNK\]"):
        encoder = encoding.load(model_dir, {"prompt_style": "plain"})
        encoder.encode_data([{"text": "strange words"}], "text", 100)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?R)", r"calls itself \(\(\?R\)\)"),
        ("(a|(?1))", "calls itself"),
        ("(?:(?:x|y){2000}){2000}", r"asks for more than 0\.25 GiB|takes longer than"),
    ],
)
def test_an_expression_that_fills_the_memory_is_refused(pattern: str, message: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=message):
        expressions.whole(pattern, ["x" * 50])
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def archive(kind: str, path: Path) -> Path:
    """Archives that cannot be unpacked, each in its own way."""
    if kind in ("bomb", "encrypted", "method", "empty"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            if kind == "bomb":
                file.writestr("a", b"0" * 2**22)
            elif kind != "empty":
                file.writestr("a", b"x")
        content = bytearray(path.read_bytes())
        if kind == "encrypted":  # the flag, in the header of the file and in that of the directory
            content[6] |= 1
            content[content.index(b"PK\x01\x02") + 8] |= 1
        elif kind == "method":
            content[8], content[content.index(b"PK\x01\x02") + 10] = 99, 99
        path.write_bytes(bytes(content))
        return path
    with tarfile.open(path, "w:gz") as file:
        for name in ("a", "a/b") if kind == "file and folder" else ("x" * 300,):
            file.addfile(tarfile.TarInfo(name))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize("kind", ["bomb", "encrypted", "method", "empty", "file and folder", "cut", "long name"])
def test_an_archive_that_cannot_be_unpacked_is_refused_in_a_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_MOST_BYTES", 2**20)
    source = sources.parse("wheel:a==1@sha256:" + "0" * 64)
    with pytest.raises(SourceError, match=r"cannot be unpacked: |which is over the limit|holds no file") as refusal:
        packages._unpack(archive(kind, tmp_path / "a.whl"), tmp_path / "to" / "content", source, drops_top=False)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


@pytest.mark.parametrize("uri", ["hdfs://h/x", "viewfs://h/x", "https://h/x", "nothing://h/x"])
def test_a_store_of_an_unknown_kind_is_refused_in_a_line(uri: str) -> None:
    for use in (sources.fingerprint, Store.open):
        with pytest.raises(ValueError, match=r"\w+:// is not read here; known: s3, gs") as refusal:
            use(uri)
        assert len(str(refusal.value)) < 200


# Whose fault it is


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": os.system}))


def a_list_of_weights(folder: Path) -> None:
    torch.save([1, 2], folder / "pytorch_model.bin")


def an_index_without_metadata(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "config.json"}}')


def utf16(folder: Path) -> None:
    (folder / "config.json").write_bytes((folder / "config.json").read_text().encode("utf-16"))


def a_list_of_settings(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "generation_config.json").write_text("[]")


def an_adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


SPOILS: list[Callable[[Path], None]] = [
    pickled, a_list_of_weights, an_index_without_metadata, utf16, a_list_of_settings, an_adapter_beside,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_model_folder_that_is_none_is_refused_in_a_line(
    spoil: Callable[[Path], None], model_dir: Path, tmp_path: Path
) -> None:
    spoil(model_dir)
    tree = {**TREE, "model": {"source": str(model_dir)}}
    (tmp_path / "a.yaml").write_text(json.dumps(tree))
    done = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "a.yaml"), "--root", str(tmp_path / "root")])
    assert done.exit_code == 2, done.output + repr(done.exception)
    assert "Traceback" not in done.output and "weights_only" not in done.output and len(done.output) < 1_000


@pytest.mark.parametrize("kernel", ["kernels-community/flash-attn", "flash_attention_2", "nothing"])
def test_a_config_chooses_no_kernel(kernel: str, model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "attn_implementation": kernel}))
    assert models.facts(model_dir).num_layers > 0
    assert models.load_model(model_dir).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("index", "config"),
    [
        ({"unet": ["diffusers", "UNet2DModel"]}, {"block_out_channels": "x"}),
        ({"unet": ["diffusers", "UNet2DModel"]}, {"block_out_channels": [10**9]}),
        ({"unet": ["diffusers", "UNet2DModel"]}, {"layers_per_block": 10**8}),
        ({"unet": [None, None]}, {}),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, {}),
        ({"unet": ["diffusers", "ConfigMixin"]}, {}),
        ({"unet": ["transformers", "LlamaForCausalLM"]}, {}),
        ({"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}, {"num_train_timesteps": 10**10}),
    ],
)
def test_a_pipeline_folder_that_is_none_is_refused_in_a_line(
    index: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / saved_pipelines.INDEX).write_text(json.dumps({"_class_name": "PixelPipeline", **index}))
    for name in index:
        (tmp_path / name).mkdir()
        own = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / own).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot be read|no model has more than|is a ") as refusal:
        models.load_model(tmp_path)
    assert len(str(refusal.value)) < 1_000


@pytest.mark.parametrize(
    ("source", "message"), [("job:~nobody-here/x", "this machine has no user"), ("job:/tmp/\0x", "null character")]
)
def test_a_base_job_at_a_place_that_cannot_be_is_refused(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        job.validate({**TREE, "model": {"source": source}}, JobType, tmp_path / "a.yaml")


def test_a_limit_beyond_all_numbers_of_rows_is_refused() -> None:
    tree = copy.deepcopy(TREE)
    tree["data"]["train"]["limit"] = 10**20
    with pytest.raises(ValueError, match=r"data\.train\.limit: Input should be less than or equal to"):
        job.validate(tree, JobType, Path("a.yaml"))


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_sample_that_is_no_image_is_said_in_a_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"the image samples/0\.png cannot be read"):
        report.samples._embedded(content, "samples/0.png")


def test_the_type_of_a_run_is_one_that_is_known(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_text("runs/a/1/job.yaml", "name: a\nmethod: {name: none}\nmodel: {dtype: os}\n")
    with pytest.raises(ValueError, match=r"job\.yaml is damaged: model\.dtype"):
        folders.job(store, "runs/a/1")
