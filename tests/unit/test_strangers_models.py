"""Models, checkpoints and pipelines of strangers that claim what they do not hold, or lead elsewhere: refused in a line."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel

from steerlab import models
from steerlab.data.worlds import tiny_checkpoint
from steerlab.evaluation.judging import scorers, vision
from steerlab.models.diffusion import pipeline_index
from steerlab.storage.store import Store

SHORT = 400
MINUTE_S = 60


def refused(use: Callable[[], Any], message: str) -> None:
    """See that a use ends at once in a short line that says so."""
    began_s = time.monotonic()
    with pytest.raises(ValueError, match=message) as refusal:
        use()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < SHORT, str(refusal.value)
    assert time.monotonic() - began_s < MINUTE_S, "it does not end by itself"


# Work folders


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user that nobody names."""
    path = tmp_path / "victim"
    path.mkdir()
    (path / "thesis").write_text("mine")
    return path


@pytest.mark.parametrize("place", ["train", "train/k", "train/k/checkpoints", "train/k/output/model/weights"])
def test_work_folders_hold_no_links(place: str, tmp_path: Path, victim: Path) -> None:
    store = Store.open(str(tmp_path / "root"))
    link = tmp_path / "root" / "work" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    refused(lambda: store.work("train", "k"), r"is a link")
    assert [path.name for path in victim.iterdir()] == ["thesis"]


def test_a_disk_for_work_may_be_linked_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "work").symlink_to(tmp_path / "disk")
    store = Store.open(str(tmp_path / "root"))
    folder = Path(store.work("train", "k"))
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "a").write_text("")
    assert Path(store.work("train", "k")) == folder


# Training checkpoints

WEIGHTS = "state/mp_rank_00_model_states.pt"


def changed_meta(**state: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        meta = json.loads((folder / "steerlab.json").read_text())
        meta["state"].update(state)
        (folder / "steerlab.json").write_text(json.dumps(meta))

    return change


def written_meta(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "steerlab.json").write_text(text)


def changed(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = torch.load(folder / WEIGHTS, weights_only=True)
        edit(found)
        torch.save(found, folder / WEIGHTS)

    return change


def first(found: dict[str, Any]) -> str:
    return next(iter(found["module"]))


def piped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def packed(folder: Path) -> None:
    found = {**torch.load(folder / WEIGHTS, weights_only=True), "more": torch.zeros(5_000_000)}
    torch.save(found, folder / "big.pt")
    with zipfile.ZipFile(folder / "big.pt") as source, zipfile.ZipFile(folder / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member.filename))


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5_000])


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (written_meta(""), "is not JSON"),
    "list": (written_meta("[]"), "is damaged"),
    "no keys": (written_meta("{}"), "world_size: Field required"),
    "deep": (written_meta("[" * 200_000), "is not JSON"),
    "gone": (lambda folder: (folder / "steerlab.json").unlink(), "is not a checkpoint: it has no steerlab.json"),
    "pipe": (piped("steerlab.json"), "is a named pipe"),
    "pipe of weights": (piped(WEIGHTS), "is a named pipe"),
    "step of text": (changed_meta(step="x"), "step: Input should be a valid integer"),
    "step below 0": (changed_meta(step=-5), "step: Input should be greater"),
    "step beyond": (changed_meta(step=10**30), "is at step 10000"),
    "half a step": (changed_meta(step=1.5), "step: Input should be a valid integer"),
    "other steps": (changed_meta(step=0), "is at step 0"),
    "history of numbers": (changed_meta(history=[1]), "history.0"),
    "history of NaN": (changed_meta(history=[{"step": 1, "x": float("nan")}]), "finite"),
    "cut": (cut, "may be truncated"),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(b"hello"), "cannot be read"),
    "no files": (lambda folder: shutil.rmtree(folder / "state"), "has no part of a checkpoint"),
    "second": (lambda folder: shutil.copy(folder / WEIGHTS, folder / "state/mp_rank_01_model_states.pt"), "is not a part of"),
    "code": (lambda folder: torch.save({"module": os.system}, folder / WEIGHTS), "it could run code"),
    "bare list": (lambda folder: torch.save([1], folder / WEIGHTS), "has a list instead"),
    "no module": (changed(lambda found: found.pop("module")), "has no weights"),
    "weight gone": (changed(lambda found: found["module"].pop(first(found))), "lacks 1 of the trained weights"),
    "one more": (changed(lambda found: found["module"].update(x=torch.zeros(2))), "has no weight 'x'"),
    "shape": (changed(lambda found: found["module"].update({first(found): torch.zeros(3)})), r"is \(3,\) float32, not"),
    "type": (changed(lambda found: found["module"].update({first(found): found["module"][first(found)].half()})), "float16"),
    "no optimizer": (changed(lambda found: found.update(optimizer=None)), "no state of this training's optimizer"),
    "moments": (changed(lambda found: found["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))), r"is \(3,\) float32"),
    "parameter": (changed(lambda found: found["optimizer"]["state"].update({10**6: {}})), "does not belong to a parameter"),
    "settings": (changed(lambda found: found["optimizer"]["param_groups"][0].update(eps=1.0)), "has another eps"),
    "one number spread": (
        changed(lambda found: found["optimizer"]["state"][0].update(exp_avg=torch.zeros(1).half().expand(1_200_000_000))),
        "whose values are not all in the file",
    ),
    "overlapping": (
        changed(lambda found: found.update(x=torch.zeros(10_000).as_strided((9_000, 1_000), (1, 1)))),
        "whose values are not all in the file",
    ),
    "packed": (packed, "has compressed members"),
}


def resume_each(root: str) -> None:
    """Train, and continue from the checkpoint as it is and from each that is spoiled; leave what was said in root/said.json."""
    from torch import distributed

    from steerlab.job import DataConfig, ModelConfig, ScaleConfig, TrainConfig
    from steerlab.training import loop
    from steerlab.training.link import Link
    from steerlab.training.request import Request

    torch.set_num_threads(1)
    made, base = Path(root) / "made", Path(root)
    store: Any = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    tiny_checkpoint.write_model(base / "model")
    rows = {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 16}}
    request = Request(
        base / "model",
        ModelConfig(source="tiny:model"),
        {"name": "vanilla"},
        DataConfig.model_validate(rows),
        TrainConfig(steps=2, lr=2e-3, micro_batch=4, max_tokens=64),
    )

    def train(output: str, latest: Path | None = None) -> bytes:
        def report(metrics: dict[str, float], directory: Path | None) -> None:
            assert directory is not None
            if latest is None and metrics["step"] == 1:
                shutil.copytree(directory, made)

        scale = ScaleConfig(workers=1, checkpoint_every=1)
        link = Link(0, 1, torch.device("cpu"), report, scratch=base / "scratch", latest=latest)
        loop.run(request, scale, link, base / output)
        return (base / output / "model" / "model.safetensors").read_bytes()

    said: dict[str, Any] = {"same bits": train("whole") == train("resumed", made)}
    for name, (spoil, _) in SPOILED.items():
        shutil.rmtree(base / "spoiled", ignore_errors=True)
        shutil.copytree(made, base / "spoiled")
        spoil(base / "spoiled")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            train("none", base / "spoiled")
            said[name] = "nothing"
        except ValueError as error:
            more_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
            said[name] = f"{error}" if more_mib < 500 else f"took {more_mib:.0f} MiB"
        except Exception as error:
            said[name] = repr(error)
    (base / "said.json").write_text(json.dumps(said))
    os._exit(0)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training says of each checkpoint, in a process of its own: DeepSpeed leaves its marks in one."""
    root = tmp_path_factory.mktemp("checkpoints")
    process = multiprocessing.get_context("spawn").Process(target=resume_each, args=(str(root),))
    process.start()
    process.join(2 * MINUTE_S)
    if process.is_alive():
        process.kill()
    return json.loads((root / "said.json").read_text())


def test_a_training_continues_from_its_own_checkpoint_bit_by_bit(said: dict[str, Any]) -> None:
    assert said["same bits"] is True


@pytest.mark.parametrize("name", SPOILED)
def test_a_training_continues_from_no_other(name: str, said: dict[str, Any]) -> None:
    def say() -> None:
        raise ValueError(said[name])

    refused(say, SPOILED[name][1])


# GGUF files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(name: str, value: int) -> bytes:
    return key(name, 4, struct.pack("<I", value))


def tensor(name: str, shape: tuple[int, ...], *, kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape) if axes is None else axes) + sizes + struct.pack("<IQ", kind, offset)


def gguf_of(
    *keys: bytes, tensors: tuple[bytes, ...] = (), num_keys: int | None = None, num_tensors: int | None = None
) -> bytes:
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(keys) + b"".join(tensors)


def llama(**sizes: int) -> tuple[bytes, ...]:
    found = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "attention.head_count": 1, "vocab_size": 8}
    keys = [number(f"llama.{name}", value) for name, value in {**found, **sizes}.items()]
    epsilon = key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))
    return (key("general.architecture", 8, text("llama")), number("llama.context_length", 64), epsilon, *keys)


ONE = (tensor("x.weight", (8,)),)
GGUFS: dict[str, tuple[bytes, str]] = {
    "array": (gguf_of(key("a", 9, struct.pack("<IQ", 0, 2**62))), "claims 4,611,686,018,427,387,904 items"),
    "array beyond the file": (gguf_of(key("a", 9, struct.pack("<IQ", 10, 1_000_000))), "ends at byte"),
    "texts beyond the file": (gguf_of(key("a", 9, struct.pack("<IQ", 8, 1_000_000))), "ends at byte"),
    "arrays of arrays": (gguf_of(key("a", 9, struct.pack("<IQ", 9, 1) * 100_000)), "an array of type 9"),
    "text": (gguf_of(key("general.architecture", 8, struct.pack("<Q", 2**63) + b"x")), "ends at byte"),
    "keys": (gguf_of(num_keys=2**62), "no model has as many"),
    "tensors": (gguf_of(*llama(), num_tensors=2**62), "no model has as many"),
    "keys twice": (gguf_of(number("a", 1), number("a", 2)), "has the key 'a' twice"),
    "unknown": (gguf_of(key("a", 99, b"")), "of type 99"),
    "name": (gguf_of(struct.pack("<Q", 2**40)), "has a name of"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 2 or 3"),
    "shape": (gguf_of(*llama(), tensors=(tensor("t", (2**40, 2**20)),)), "claims that its tensors have"),
    "many of the same bytes": (
        gguf_of(*llama(), tensors=tuple(tensor(f"t{i}", (8,)) for i in range(9))) + b"\0" * 64, "claims that its tensors have",
    ),
    "offset": (gguf_of(*llama(), tensors=(tensor("t", (8,), offset=2**60),)) + b"\0" * 64, "claims that its tensors have"),
    "axes": (gguf_of(*llama(), tensors=(tensor("t", (8,), axes=2**32 - 1),)), "axes"),
    "kind": (gguf_of(*llama(), tensors=(tensor("t", (8,), kind=9_999),)), "of type 9999"),
    "layers": (gguf_of(*llama(block_count=10**6), tensors=ONE) + b"\0" * 64, "that it has 1,000,000 layers"),
    "vocabulary": (
        gguf_of(*llama(vocab_size=2**16, embedding_length=2**13), tensors=ONE) + b"\0" * 64, "a model of .* and holds 8",
    ),
    "feed-forward": (gguf_of(*llama(feed_forward_length=2**30), tensors=ONE) + b"\0" * 64, "describes a model of"),
    "weights gone": (gguf_of(*llama(), tensors=ONE) + b"\0" * 64, "is missing"),
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_file_that_claims_more_than_it_holds_is_refused(name: str, tmp_path: Path, cache: Path) -> None:
    content, message = GGUFS[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.gguf").write_bytes(content)
    refused(lambda: models.facts(tmp_path / "model"), message)


def whole_gguf(path: Path, tied: bool) -> None:
    import gguf

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
    shapes = {
        "token_embd": (8, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (16, 16), "blk.0.attn_v": (16, 16), "blk.0.attn_output": (16, 16), "blk.0.ffn_norm": (16,),
        "blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32),
        **({} if tied else {"output": (8, 16)}),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_gguf_file_is_read(tied: bool, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model").mkdir()
    whole_gguf(tmp_path / "model" / "x.gguf", tied)
    model = models.load_model(tmp_path / "model")
    assert float(model.get_input_embeddings().weight.detach().mean()) == pytest.approx(0.1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.gguf").write_bytes((tmp_path / "model" / "x.gguf").read_bytes() + b"\0")
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    refused(lambda: models.load_model(tmp_path / "other"), "adapter")


# Models that tasks name

CLASSIFIER: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "id2label": {"0": "ok", "1": "toxic"},
}
CONFIGS: dict[str, tuple[Any, str]] = {
    "labels": ({"id2label": None, "num_labels": 10**8}, "num_labels is 100000000; no model has more"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; no model has more"),
    "numbers of classes": ({"id2label": {"7": "toxic", "9": "ok"}}, "id2label numbers its classes 7, 9"),
    "list of classes": ({"id2label": ["ok", "toxic"]}, "config.json cannot be read"),
    "names of classes": ({"id2label": {"a": "toxic"}}, "config.json cannot be read"),
    "unknown": ({"model_type": "nope"}, "model_type 'nope' is not supported by"),
    "no type": ({"model_type": None}, "model_type None is not supported by"),
    "list of types": ({"model_type": ["bert"]}, r"model_type \['bert'\] is not supported by"),
    "code": (
        {"model_type": "zzz", "auto_map": {"AutoConfig": "x.Y"}},
        "comes with the checkpoint, which no task runs",
    ),
    "size of text": ({"hidden_size": "big"}, "cannot be read"),
    "size that does not divide": ({"hidden_size": 9}, "cannot be read"),
    "other model": ({"model_type": "clip"}, "holds a clip, which cannot be loaded as a ModelForSequenceClassification"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_of_a_stranger_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[name]
    config = {key: value for key, value in {**CLASSIFIER, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for use in (scorers.check_classifier, lambda source: scorers.load_classifier(source, "cpu")):
        if name != "numbers of classes" or use is scorers.check_classifier:
            refused(lambda use=use: use(str(tmp_path)), message)


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "", "{"])
def test_a_config_that_is_none_is_refused_in_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    checks = (scorers.check_classifier, scorers.check_embedder, vision.check_clip, vision.check_embedder)
    for check in checks:
        refused(lambda check=check: check(str(tmp_path)), r"config\.json is (damaged|not JSON)")


def test_a_model_that_a_task_names_is_not_made_of_random_numbers(tmp_path: Path) -> None:
    """A vocabulary of a billion words in a config, and weights of 30."""
    BertForSequenceClassification(BertConfig(**CLASSIFIER)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 10**9}))
    refused(lambda: scorers.load_classifier(str(tmp_path), "cpu"), r"is \[30, 8\], not \[1000000000, 8\]")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(lambda: scorers.load_classifier(str(tmp_path), "cpu"), "adapter")


def small_clip() -> CLIPModel:
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 4}
    pixels = {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config={**part, "vocab_size": 30}, vision_config={**part, **pixels}, projection_dim=4))


@pytest.mark.parametrize("place", [(), ("text_config",), ("vision_config",)])
@pytest.mark.parametrize("kernel", ["evil/kernel", "flash_attention_2"])
def test_a_model_that_a_task_names_chooses_no_kernel(kernel: str, place: tuple[str, ...], tmp_path: Path) -> None:
    small_clip().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    part = config
    for name in place:
        part = part[name]
    part.update({"_attn_implementation": kernel, "attn_implementation": kernel, "experts_implementation": kernel})
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded: Any = models.named.load(tmp_path, CLIPModel)
    assert loaded.text_model.config._attn_implementation == loaded.vision_model.config._attn_implementation == "sdpa"
    vision.check_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 10**6, "width": 10**6}}, r"size\.(height|width) is 1000000; the maximum is"),
        ({"size": {"shortest_edge": 10**6}}, "size.shortest_edge is 1000000"),
        ({"crop_size": 10**9}, "crop_size is 1000000000"),
        ({"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "x.Y"}}, "which no task runs"),
    ],
)
def test_a_processor_makes_no_huge_images_and_runs_no_code(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    small_clip().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    refused(lambda: vision.check_clip(str(tmp_path)), message)
    refused(lambda: models.named.load_processor(tmp_path, transformers.AutoImageProcessor), message)


# Components of pipelines


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", {"target_modules": "(.*.*.*.*)*x"}, "holds an adapter"),
        ("adapter_config.json", {"base_model_name_or_path": "/elsewhere"}, "holds an adapter"),
        ("config.json", {"_attn_implementation": "evil/kernel"}, "_attn_implementation is 'evil/kernel'"),
        (
            "config.json",
            {"text_config": [{"attn_implementation": {"": "evil/kernel"}}]},
            "attn_implementation is 'evil/kernel'",
        ),
        ("config.json", {"attn_implementation": ["sdpa"]}, "attn_implementation is "),
        ("model.safetensors.index.json", {"weight_map": {"a": "../../elsewhere/x.safetensors"}}, "leads outside the folder"),
    ],
)
def test_a_component_of_a_pipeline_takes_nothing_from_elsewhere(
    file: str, content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    index = {"_class_name": "PixelPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / pipeline_index.INDEX).write_text(json.dumps(index))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"_attn_implementation": "sdpa"}')
    pipeline_index.read(tmp_path)
    (tmp_path / "text_encoder" / file).write_text(json.dumps(content))
    for use in (pipeline_index.read, models.facts, models.load_model):
        refused(lambda use=use: use(tmp_path), message)
