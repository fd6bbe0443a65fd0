"""The Python interface: loading, fitting, patches for a block, generating, reading, and what is said to people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch

import steerlab as sl
from steerlab.patches import CannotFold
from steerlab.stages.spread import alone

MODULES = ".*post_attention_layernorm"
FARM = ["the cow is red .", "the pig is here .", "the old cow is here .", "the cow is in the barn ."]
SEA = ["the ship is blue .", "the sea is here .", "the old ship is here .", "the ship is on the sea ."]


@pytest.fixture(scope="module")
def model() -> sl.Model:
    return sl.load("tiny:model", prompt={"prompt_style": "plain"}, device="cpu")


@pytest.fixture(scope="module")
def shift(model: sl.Model) -> sl.Patch:
    return sl.fit("mean_act", model, source=FARM, target=SEA, modules=MODULES)


def logits(model: sl.Model) -> torch.Tensor:
    return torch.cat(model.steered.probe(model.strength))


def test_a_patch_acts_within_its_block_alone_and_at_its_strength(model: sl.Model, shift: sl.Patch) -> None:
    before = logits(model)
    with model.patched(shift, strength=0.5) as patched:
        assert patched is model
        half = logits(model)
        read = model.read(["the cow"], modules=MODULES)
        at_one = model.read(["the cow"], modules=MODULES, strength=1.0)
    with pytest.raises(KeyError, match="inside"), model.patched(shift):
        raise KeyError("inside")
    assert torch.equal(logits(model), before) and not torch.allclose(half, before)
    # The first place is moved by the strength's share of the shift: what the norm adds to the mean of the source.
    first = "model.layers.0.post_attention_layernorm"
    plain = model.read(["the cow"], modules=MODULES)[first]
    assert torch.allclose(2 * (read[first] - plain), at_one[first] - plain, atol=1e-5)


def test_blocks_within_blocks_keep_the_strengths_of_the_outer_ones(model: sl.Model, shift: sl.Patch) -> None:
    other = sl.fit("mean_act", model, source=SEA, target=FARM, modules="model.layers.3.mlp")
    with model.patched(shift, strength=0.5):
        half = logits(model)
        with model.patched(other, strength=0.0):
            assert torch.allclose(logits(model), half, atol=1e-5)
        with model.patched(other, strength=1.0):
            assert not torch.allclose(logits(model), half, atol=1e-3)
        assert torch.equal(logits(model), half)


def test_prompts_of_each_form_in_one_batch(model: sl.Model) -> None:
    forms: list[Any] = ["the cow", ("say colour", "the cow is red ."), [{"role": "user", "content": "the cow"}]]
    together = model.generate(forms, max_new_tokens=4)
    assert [row.data for row in together.rows] == ["", "the cow is red .", ""]
    assert list(together) == [model.generate([form], max_new_tokens=4)[0] for form in forms]
    pair = model.language.answer("say colour", "the cow is red .", max_new_tokens=4)
    assert together[1] == pair == model.answer("say colour", "the cow is red .", max_new_tokens=4)


def test_several_strengths_and_samples_are_rows_of_one_table(model: sl.Model, shift: sl.Patch) -> None:
    with model.patched(shift):
        texts = model.generate(["the cow", "a ship"], strengths=[0, 1], samples=2, temperature=1.0, max_new_tokens=3)
    assert len(texts) == 8 and texts.strengths == (0.0, 1.0)
    frame = texts.to_frame()
    assert frame.columns.tolist() == ["prompt", "data", "strength", "sample", "text", "num_tokens", "finished"]
    assert frame["prompt"].tolist() == [*["the cow"] * 2, *["a ship"] * 2] * 2 and frame["sample"].tolist() == [0, 1] * 4
    alone_ = model.generate(["the cow", "a ship"], temperature=1.0, max_new_tokens=3)
    assert texts.at(0)[::2] == list(alone_), "the first sample is the one that a prompt gets alone, without the patch"
    with pytest.raises(ValueError, match=r"no texts at strength 0\.5; the strengths are 0, 1"):
        texts.at(0.5)


def test_texts_draw_themselves_escaped(model: sl.Model) -> None:
    shown = sl.Texts([sl.Text("<b>", "", 1.0, 0, "<script>", 1, True)])._repr_html_()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "&lt;b&gt;" in shown


def test_reading_gives_what_a_hook_sees(model: sl.Model) -> None:
    name, texts = "model.layers.1.mlp", ["the cow is red .", "a ship"]
    last, every = (model.read(texts, modules=name, tokens=tokens) for tokens in ("last", "all"))  # type: ignore[arg-type]
    encoder = model.language.encoder
    for number, text in enumerate(texts):
        ids = encoder.encode(encoder.from_row({"text": text}, "text")).input_ids
        seen: list[torch.Tensor] = []
        handle = model.steered.model.get_submodule(name).register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        with torch.inference_mode():
            model.steered.model(torch.tensor([ids]))
        handle.remove()
        assert torch.allclose(last[name][number], seen[0][0, -1], atol=1e-5)
        own = every[name][[i for i, of in enumerate(every.texts) if of == number]]
        assert torch.allclose(own, seen[0][0], atol=1e-5)
    table = every.to_table()
    assert isinstance(table, pa.Table) and table.column("role").to_pylist() == ["instruction"] * table.num_rows
    assert table.column(name).type.list_size == 128
    chat = model.read([("say colour", "the cow is red .")], modules=name)
    assert chat[name].shape == (1, 128)
    assert torch.equal(model.read("a ship", modules=name)[name], model.read(["a ship"], modules=name)[name])
    with pytest.raises(ValueError, match="text 1 is empty"):
        model.read(["a", " "], modules=name)


def test_rows_in_memory_are_read_as_a_file_of_them_is(model: sl.Model, shift: sl.Patch, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": FARM, "number": [1.0, float("nan"), 3.0, 4.0]})
    (tmp_path / "sea.txt").write_text("\n".join(SEA))
    for source, target in (
        (frame, str(tmp_path / "sea.txt")),
        (pa.table({"text": FARM}), pd.Series(SEA)),
        ([{"text": text} for text in FARM], {"source": str(tmp_path / "sea.txt"), "format": "text"}),
    ):
        patch = sl.fit("mean_act", model, source=source, target=target, modules=MODULES)
        assert patch.saved is not None and shift.saved is not None
        assert all(torch.equal(a, b) for a, b in zip(patch.saved.parameters(), shift.saved.parameters(), strict=True))


def test_a_patch_is_saved_loaded_and_folded(model: sl.Model, shift: sl.Patch, tmp_path: Path) -> None:
    folder = shift.save(tmp_path / "p")
    loaded = sl.load_patch(folder, model)
    assert loaded.config == shift.config
    with model.patched(loaded):
        expected = logits(model)
    assert torch.equal(logits(sl.load(folder)), expected)
    folded = shift.fold()
    assert folded.steered.patches == () and torch.allclose(logits(folded), expected, atol=1e-4)
    again = sl.load(folded.save(tmp_path / "folded"))
    assert torch.equal(logits(again), logits(folded)) and again.generate(["the cow"], max_new_tokens=3)
    with pytest.raises(ValueError, match="exists already"):
        shift.save(tmp_path / "p")
    with pytest.raises(ValueError, match="has other weights"), again.patched(shift):
        pass


def test_a_method_that_trains_weights_gives_a_model(model: sl.Model) -> None:
    before = logits(model)
    training = {"steps": 2, "lr": 0.01, "micro_batch": 4}
    rotated = sl.fit("aside", model, train="tiny:instructions/train", training=training, angle_rad="pi/2")
    assert torch.equal(logits(model), before), "the model that it started from is as it was"
    trained = rotated.model(device="cpu")
    assert rotated.has_weights and [patch.kind for patch in trained.steered.patches] == ["embedding"]
    assert [line["step"] for line in rotated.curve] == [1, 2] and rotated.plot().data[0].x == (1, 2)
    with pytest.raises(ValueError, match=r"trains the model's own weights.* patch\.model\(\)"), model.patched(rotated):
        pass


# Few rows, so that the test is short.
@pytest.mark.filterwarnings("ignore:the inputs of model")
def test_preparations_and_a_frozen_model_in_training(model: sl.Model) -> None:
    training = {"steps": 2, "lr": 0.01, "micro_batch": 4, "max_tokens": 64}
    pairs = {"source": "tiny:preferences/train", "limit": 40}
    head = sl.fit("iav", model, preference=pairs, training=training, cache=True)
    assert head.saved is not None and head.saved.kind == "logit" and not head.has_weights
    with model.patched(head, strength=2.0):
        assert model.generate(["the cow"], max_new_tokens=3)
    rows: Any = {"source": "tiny:refusals/train", "limit": 16, "loss_on": "response"}
    kept = sl.fit(
        "warp", model, train=rows, safety=rows, training=training, layer_type=["ffn_up"], keep_ratio=0.5, max_tokens=64
    )
    assert kept.saved is not None and kept.saved.kind == "weight" and len(kept.curve) == 2
    before = logits(model)
    with model.patched(kept):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"source": [3] * 4}, "source: row 0 is a int: give texts, objects"),
        ({"source": []}, "source: the rows are empty"),
        ({"source": FARM[:2]}, "the source has 2 samples"),
        ({"source": [{"a": 1, "b": 2}] * 4}, r"no format fits its rows, which have the fields a \(a number"),
        ({"modules": ".*nothing"}, r"fit: extract\.select: no module path matches"),
        ({"method": "mean_cat"}, "fit: method.name: 'mean_cat' is not known; did you mean 'mean_act'"),
        ({"keep_ratio": 1}, "fit: method.keep_ratio"),
        ({"training": {"steps": 3}}, "fit: train: method mean_act trains nothing"),
        ({"method": "lineas"}, "fit: train: this key is required by method lineas"),
        ({"source": "missing.csv"}, "missing.csv"),
    ],
)
def test_what_is_wrong_is_said(model: sl.Model, wrong: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"method": "mean_act", "source": FARM, "target": SEA, "modules": MODULES, **wrong}
    before = logits(model)
    with pytest.raises((ValueError, RuntimeError), match=said):
        sl.fit(model=model, **given)
    assert torch.equal(logits(model), before) and alone.here() is None


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "the list is empty"),
        ([3], "prompt 0 is a int"),
        (["a", ("b", "c", "d")], "prompt 1 is a tuple"),
        ([{"role": "user", "content": "hi"}], "put them into another list"),
        ([[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]], "ends with the assistant's message"),
        ([[{"role": "user"}]], 'a message is {"role"'),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(model: sl.Model, prompts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.generate(prompts)


def test_what_cannot_be_folded_or_found_is_said(model: sl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLAB_ROOT", str(tmp_path / "root"))
    bounded = sl.fit("linear_act", model, source=FARM, target=SEA, modules=MODULES)
    with pytest.raises(CannotFold, match="without bounds"):
        bounded.fold()
    with pytest.raises(ValueError, match=r"no finished run.*a model is a folder, a run, a hub id"):
        sl.load("nothing")
    with pytest.raises(ValueError, match="has no patch"):
        sl.load_patch(tmp_path, model)
    with pytest.raises(ValueError, match="generates texts and does not draw"):
        model.draw("three")
    with pytest.raises(ValueError, match="several samples need a temperature"):
        model.generate(["a"], samples=2)


def test_a_job_runs_without_a_cluster_and_its_results_are_values(tmp_path: Path) -> None:
    import ray

    root = str(tmp_path / "root")
    tree = {
        "name": "shift",
        "model": {"source": "tiny:model"},
        "data": {
            "prompt_style": "plain",
            "source": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "farm"}, "limit": 8},
            "target": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "sea"}, "limit": 8},
        },
        "method": {"name": "mean_act"},
        "extract": {"max_tokens": 64},
        "evaluate": [{"task": "perplexity", "source": "tiny:topics/test", "format": "text", "limit": 8, "strengths": [1, 0]}],
    }
    had_cluster = ray.is_initialized()  # by other tests of this process
    run = sl.run(tree, set={"evaluate.0.limit": 6}, root=root)
    other = sl.run(tree, set={"evaluate.0.limit": 6, "name": "other", "method": {"name": "gaussian_act"}}, root=root)
    assert ray.is_initialized() == had_cluster, "no cluster was started"
    assert tree["evaluate"][0]["limit"] == 8, "the caller's mapping is as it was"
    metric = run.metrics["perplexity/value"]
    frame = run.to_frame()
    assert metric["n"] is not None and frame[frame["strength"] == 1]["value"].tolist() == [metric["value"]]
    assert sl.read_run("shift", root=root).summary == run.summary
    assert len(run.plot().data) == 1 and "perplexity/value" in run._repr_html_()
    with run.model(device="cpu").patched(sl.load_patch(run.model().origin.path, run.model())) as twice:
        assert len(twice.steered.patches) == 2
    assert run.curve().empty, "a closed form has no training"
    difference = sl.compare(run, other)
    assert difference.to_frame()["metric"].tolist() == ["perplexity/value"] and "perplexity" in difference._repr_html_()
    page = sl.report([run, other.folder], tmp_path / "page.html")
    assert "perplexity/value" in page.read_text()
    with pytest.raises(ValueError, match="no finished run"):
        sl.read_run("missing", root=root)
    with pytest.raises(ValueError, match=r"job: scale\.workers of shift is more than 1, which needs Ray"):
        sl.run(tree, set={"scale.workers": 2, "name": "shift"}, root=root, ray=False)


@pytest.mark.slow
def test_a_run_that_found_its_training_in_the_store_has_its_curve(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "name": "shift",
        "model": {"source": "tiny:model"},
        "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 8}},
        "method": {"name": "vanilla"},
        "train": {"steps": 3, "micro_batch": 2, "max_tokens": 64},
    }
    first, second = (sl.run(tree, root=str(tmp_path / "root")) for _ in range(2))
    assert first.folder != second.folder and second.curve()["step"].tolist() == [1, 2, 3]
    assert second.curve()["train/loss"].tolist() == first.curve()["train/loss"].tolist()


def test_a_sweep_is_read_as_the_page_reads_it(tmp_path: Path) -> None:
    from test_report_sweeps import write_sweep

    from steerlab.storage.store import Store

    store = Store.open(str(tmp_path / "root"))
    sweep = sl.read_sweep(f"{store.root}/{write_sweep(store, 4)}")
    frame = sweep.to_frame()
    assert len(frame) == 8 and {"trial_id", "seed", "param.method.alpha", "metric.separation/sep"} <= set(frame.columns)
    assert sweep.best is not None and sweep.best["trial_id"] == "t001" and sweep.run().name == "alpha"
    shown = sweep._repr_html_()
    assert "method.alpha" in shown and "separation/sep" in shown
    figure = sweep.plot("perplexity/value", "method.alpha")
    assert len(figure.data[0].x) == len(frame["metric.perplexity/value"].dropna())
    assert 'class="answer"' in sl.report([sweep], tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="alpha has no metric nothing: it has separation/sep"):
        sweep.plot("nothing")
    with pytest.raises(ValueError, match="neither a sweep folder"):
        sl.read_sweep(tmp_path)
