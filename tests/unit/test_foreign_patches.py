"""Control vectors of llama.cpp and repeng, adapters of peft, logit heads: written for their own readers, and read from them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_export_language_models import left
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerlab import models, patches
from steerlab.job import Selection
from steerlab.methods import imported
from steerlab.patches import ActivationPatch, LogitPatch, WeightPatch
from steerlab.patches.foreign import adapters, control_vectors, read
from steerlab.patches.maps import AffineMap, LowRankMap
from steerlab.steered import foreign_formats, stacks
from steerlab.steered.stacks import load

WIDTH, LAYERS = 32, 3
IDS = torch.tensor([[3, 9, 4, 17, 5, 8, 20]])
PLAIN = {"prompt_style": "plain"}


@pytest.fixture(scope="module")
def bases(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of three layers; GPT-2 stores its weights transposed."""
    found = {name: tmp_path_factory.mktemp(name) / name for name in ("llama", "gpt2")}
    for name, folder in found.items():
        zoo.write(name, folder, tiny_dir, num_hidden_layers=LAYERS)
    return found


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


@pytest.fixture
def llama(bases: dict[str, Path]) -> Path:
    return bases["llama"]


@pytest.fixture(scope="module")
def model(bases: dict[str, Path]) -> Any:
    """The tiny Llama, for files that it does not take."""
    return models.load_model(bases["llama"])


def layers_of(base: Path) -> list[str]:
    return models.layer_names(models.load_model(base))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shifts(base: Path, *numbers: int, selection: Selection = Selection(modules="layers")) -> ActivationPatch:  # noqa: B008
    names = layers_of(base)
    return ActivationPatch.from_maps({names[n]: AffineMap.shift(draw(WIDTH, seed=n)) for n in numbers}, selection)


def llama_cpp(path: Path, num_layers: int, width: int) -> dict[int, np.ndarray[Any, Any]]:
    """What llama.cpp adds to the output of each layer: `common_control_vector_load`, `llama_adapter_cvec::apply`.

    Its buffer has a place for layers 1 to n_layer - 1; it gives up on a file with `direction.0`, with another name, another
    type than F32, more than one axis, or widths that differ.
    """
    buffer = np.zeros(0, np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        prefix, _, number = tensor.name.partition(".")
        index = int(number) if prefix == "direction" else -1
        assert index > 0 and tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(tensor.shape) == 1
        assert len(tensor.data) == width
        buffer = np.pad(buffer, (0, max(0, width * index - len(buffer))))
        buffer[width * (index - 1) : width * index] += tensor.data
    return {n: buffer[width * (n - 1) : width * n] for n in range(1, num_layers) if width * n <= len(buffer)}


def logits_with(base: Path, added: Mapping[int, Any], scale: float = 1.0) -> Tensor:
    """The logits of plain transformers with vectors added to the outputs of layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number, name in enumerate(layers_of(base)):
        if number in added:
            vector = scale * torch.tensor(added[number].tolist())
            model.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, v=vector: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
            )
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits(model: Any, strength: float = 1.0) -> Tensor:
    """The logits of a patched model; a strength is that of the newest patch."""
    strengths = torch.ones(len(model.patches), 1)
    strengths[-1] = strength
    positions = torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        return model.model(
            input_ids=IDS, position_ids=positions, roles=torch.zeros_like(IDS), strengths=strengths, use_cache=False
        ).logits


def test_llama_cpp_adds_what_the_patch_adds(base: Path, tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", base, shifts(base, 1, 2))
    assert foreign_formats.write(artifact, tmp_path / "out", "gguf", strength=0.7, loading={}).note is None
    added = llama_cpp(tmp_path / "out/vector.gguf", LAYERS, WIDTH)
    assert set(added) == {1, 2}
    expected = logits(stacks.load(artifact), 0.7)
    torch.testing.assert_close(logits_with(base, added), expected, atol=1e-5, rtol=0)
    assert (logits_with(base, {}) - expected).abs().max() > 0.1
    reader = gguf.GGUFReader(tmp_path / "out/vector.gguf")
    hint = reader.get_field("controlvector.model_hint")
    count = reader.get_field("controlvector.layer_count")
    assert hint is not None and count is not None
    assert (hint.contents(), count.contents()) == (models.load_model(base).config.model_type, 2)


def test_a_stack_of_vectors_is_one_sum(base: Path, tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", base, shifts(base, 1), shifts(base, 1, 2))
    foreign_formats.write(artifact, tmp_path / "out", "gguf", strength=-2.0, loading={})
    added = llama_cpp(tmp_path / "out/vector.gguf", LAYERS, WIDTH)
    torch.testing.assert_close(logits_with(base, added), logits(stacks.load(artifact), -2.0), atol=1e-5, rtol=0)


def repeng(path: Path, directions: Mapping[int, Any], hint: str = "llama", **more: Any) -> Path:
    """A file as repeng's `ControlVector.export_gguf` writes it."""
    writer = gguf.GGUFWriter(path, more.pop("architecture", "controlvector"))
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(layer if isinstance(layer, str) else f"direction.{layer}", direction, **more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_vector_of_repeng_steers_as_repeng_does(base: Path, tmp_path: Path) -> None:
    """repeng adds its vectors to the outputs of the layers that they name, layer 0 among them, on every token."""
    directions = {n: draw(WIDTH, seed=n).numpy() for n in (2, 0, 1)}
    path = repeng(tmp_path / "v.gguf", directions, models.load_model(base).config.model_type)
    for place in (path, tmp_path):
        steered = load(base, patch=place, prompt=PLAIN)
        for scale in (1.0, -0.5):
            torch.testing.assert_close(logits(steered, scale), logits_with(base, directions, scale), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(steered, 0.0), logits_with(base, {}), atol=0, rtol=0)


def test_a_vector_that_repeng_trained_and_wrote_itself(
    tiny_dir: Path, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way with the other program: it trains, writes the file and steers; here the file steers the same.

    It runs where repeng is installed: pip install --no-deps repeng, since the package asks for numpy below 2.
    """
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it; NumPy 2 has removed it
    other = pytest.importorskip("repeng", reason="repeng is not installed")
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    tiny_model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [("the cow is happy", "the cow is sad"), ("a duck and a cat", "a dog and a cow"), ("the old cat", "the big dog")]
    model = other.ControlModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), [0, 1, 2, 3])
    trained = other.ControlVector.train(model, tokenizer, [other.DatasetEntry(*pair) for pair in pairs])
    assert set(trained.directions) == {1, 2, 3}, "repeng trains no vector for the first layer"
    trained.export_gguf(str(tmp_path / "v.gguf"))
    steered = load(folder, patch=tmp_path / "v.gguf", prompt=PLAIN)
    model = other.ControlModel(model.unwrap(), [1, 2, 3])
    for scale in (1.5, -0.5):
        model.set_control(trained, scale)
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
        torch.testing.assert_close(logits(steered, scale), expected, atol=1e-5, rtol=0)
    model.reset()
    assert (model(input_ids=IDS).logits - expected).abs().max() > 0.01, "the vector changes something"


def test_the_method_assembles_the_patch_of_the_file(llama: Path, tmp_path: Path) -> None:
    repeng(tmp_path / "v.gguf", {1: draw(WIDTH).numpy()})
    model = load(llama, prompt=PLAIN)
    patch: Any = imported.METHOD.assemble(imported.Config(source=str(tmp_path / "v.gguf")), model)
    assert list(patch.sizes) == [layers_of(llama)[1]]


def test_a_vector_of_another_type_of_model_is_named(llama: Path, tmp_path: Path) -> None:
    path = repeng(tmp_path / "v.gguf", {1: draw(WIDTH).numpy()}, "mistral")
    with pytest.warns(UserWarning, match=r"was made for a model of type 'mistral'; this one is 'llama'"):
        load(llama, patch=path, prompt=PLAIN)


def _torn(path: Path) -> Path:
    content = repeng(path, {1: draw(WIDTH).numpy()}).read_bytes()
    path.write_bytes(content[:-40])
    return path


def _claiming(path: Path) -> Path:
    """A file whose tensor says that it has 2 ** 40 elements."""
    content = repeng(path, {1: draw(WIDTH).numpy()}).read_bytes()
    path.write_bytes(content.replace(WIDTH.to_bytes(8, "little"), (2**40).to_bytes(8, "little")))
    return path


def _twice(path: Path) -> Path:
    content = repeng(path, {1: draw(WIDTH).numpy(), 2: draw(WIDTH).numpy()}).read_bytes()
    path.write_bytes(content.replace(b"direction.2", b"direction.1"))
    return path


F = np.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: repeng(path, {1: np.zeros(16, F)}), r"direction\.1 has width 16; the model has width 32"),
        (lambda path: repeng(path, {3: np.zeros(WIDTH, F)}), "direction for layer 3; the model has the layers 0 to 2"),
        (lambda path: repeng(path, {1: np.array([np.nan] * WIDTH, F)}), r"direction\.1 holds a value that is NaN or infinite"),
        (lambda path: repeng(path, {1: np.array([np.inf] * WIDTH, F)}), "is NaN or infinite"),
        (lambda path: repeng(path, {1: np.zeros((2, WIDTH), F)}), r"direction\.1 is F32 of shape \[32, 2\], not a vector"),
        (lambda path: repeng(path, {1: np.zeros(WIDTH, np.int32)}), r"direction\.1 is I32 of shape"),
        (lambda path: repeng(path, {"direction.-1": np.zeros(WIDTH, F)}), r"'direction\.-1' is not direction\.N"),
        (lambda path: repeng(path, {"direction.01": np.zeros(WIDTH, F)}), r"'direction\.01' is not direction\.N"),
        (lambda path: repeng(path, {"token_embd.weight": np.zeros(WIDTH, F)}), "'token_embd.weight' is not direction"),
        (lambda path: repeng(path, {1: np.zeros(WIDTH, F)}, architecture="llama"), "is not a control vector: its architecture"),
        (lambda path: repeng(path, {}), "holds no direction"),
        (_torn, r"cannot be read: it claims that its tensors have 128 bytes up to 128; "),
        (_claiming, "cannot be read: it claims that its tensors have 4,398,046,511,104 bytes"),
        (_twice, "'direction.1' twice"),
        (lambda path: path.write_bytes(b"GGUF"), "cannot be read: it has 4 bytes"),
        (lambda path: path.write_text("not a file of this kind at all"), "is not a GGUF file"),
    ],
)
def test_what_a_stranger_may_give_for_a_vector(
    make: Callable[[Path], object], message: str, model: Any, tmp_path: Path
) -> None:
    make(tmp_path / "v.gguf")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "v.gguf", model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.gguf", "does not exist: a patch is a control vector"),
        ("notes.txt", "is not a patch: give a control vector"),
        ("empty", "holds neither: a patch is a control vector"),
        ("two", "holds 2 GGUF files"),
    ],
)
def test_places_without_a_patch(name: str, message: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for number in (1, 2):
        (tmp_path / f"two/{number}.gguf").touch()
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, model)


def _scaled(names: list[str], by: float) -> ActivationPatch:
    return ActivationPatch.from_maps({names[1]: AffineMap(torch.full((WIDTH,), by), draw(WIDTH))}, Selection(modules="x"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda names: _scaled(names, 1.1), r"scales 32 of 32 neurons, which an added vector cannot do; --approximate writes"),
        (
            lambda names: ActivationPatch.from_maps({names[1]: LowRankMap.without(draw(WIDTH))}, Selection(modules="x")),
            "is of kind low_rank, not a vector that is added; --approximate",
        ),
        (
            lambda names: ActivationPatch.from_maps(
                {names[1]: AffineMap(torch.ones(WIDTH), draw(WIDTH), -torch.ones(WIDTH), torch.ones(WIDTH))},
                Selection(modules="x"),
            ),
            "acts only within bounds, .*--approximate",
        ),
        (
            lambda names: ActivationPatch.from_maps(
                {names[1]: AffineMap.shift(draw(WIDTH))}, Selection(modules="x", phases=("generation",))
            ),
            "acts only on some tokens .* without --format, export writes a checkpoint",
        ),
        (
            lambda names: ActivationPatch.from_maps(
                {names[1]: AffineMap.shift(draw(WIDTH))}, Selection(modules="x", side="input")
            ),
            "changes inputs of modules, ",
        ),
        (
            lambda names: ActivationPatch.from_maps({f"{names[1]}.mlp": AffineMap.shift(draw(WIDTH))}, Selection(modules="x")),
            r"acts at model\.layers\.1\.mlp, and a control vector is added to outputs of decoder layers",
        ),
        (lambda names: patches.EmbeddingPatch(WIDTH, 1.0), "a patch of kind embedding does not add a vector"),
    ],
)
def test_what_is_no_vector_is_refused_with_the_reason(
    make: Callable[[list[str]], Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    artifact = left(tmp_path / "left", llama, make(layers_of(llama)))
    for format_name in ("gguf", "easysteer"):
        with pytest.raises(ValueError, match=reason):
            foreign_formats.write(artifact, tmp_path / "out", format_name, strength=1.0, loading={})
        assert not (tmp_path / "out").exists()
    if "approximate" not in reason:  # nor does a vector come near what acts elsewhere, or on some tokens
        with pytest.raises(ValueError, match="without --format, export writes a checkpoint"):
            foreign_formats.write(artifact, tmp_path / "out", "gguf", strength=1.0, loading={}, approximate=True)


def test_layer_0_is_for_those_who_take_it(base: Path, tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", base, shifts(base, 0, 2))
    with pytest.raises(ValueError, match=r"llama\.cpp refuses a file that does: steer from layer 1 on"):
        foreign_formats.write(artifact, tmp_path / "out", "gguf", strength=1.0, loading={})
    assert foreign_formats.write(artifact, tmp_path / "easy", "easysteer", strength=1.0, loading={}).note is None
    added = control_vectors.read(tmp_path / "easy/vector.gguf").vectors
    torch.testing.assert_close(logits_with(base, added), logits(stacks.load(artifact)), atol=1e-5, rtol=0)


def test_an_approximation_says_its_error(llama: Path, tmp_path: Path) -> None:
    """The mean of what a map adds: exact for the part that is the same everywhere, wrong by the rest, which is said."""
    artifact = left(tmp_path / "left", llama, _scaled(layers_of(llama), 1.02))
    note = foreign_formats.write(artifact, tmp_path / "out", "gguf", strength=1.0, loading={}, approximate=True).note
    match = re.search(r"the error is ([0-9.e-]+) nats a token, and the patch moves them by ([0-9.e-]+)", note or "")
    assert match is not None
    expected = stacks.load(artifact)
    found = load(llama, patch=tmp_path / "out", prompt=PLAIN)
    error = max(float((a - b).square().mean().sqrt()) for a, b in zip(found.probe(), expected.probe(), strict=True))
    effect = max(float((a - b).square().mean().sqrt()) for a, b in zip(expected.probe(0), expected.probe(), strict=True))
    assert float(match[1]) == pytest.approx(error, rel=0.1) and float(match[2]) == pytest.approx(effect, rel=0.1)
    assert 1e-4 < error < 0.5 * effect


def test_a_vector_that_is_no_better_than_none_is_not_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = left(tmp_path / "left", llama, _scaled(layers_of(llama), 1.02))
    away = {1: 40 * torch.ones(WIDTH)}
    monkeypatch.setattr(foreign_formats, "mean_moves", lambda *_: away)
    with pytest.raises(ValueError, match=r"the nearest vectors have an error of .* nats, the patch an effect of"):
        foreign_formats.write(artifact, tmp_path / "out", "gguf", strength=1.0, loading={}, approximate=True)
    assert not (tmp_path / "out").exists()


def low_rank(base: Path, rank: int = 2, modules: str = "qkv") -> WeightPatch:
    model = models.load_model(base)
    places = models.weight_places(model, ("attn_q", "ffn_down"), range(LAYERS))
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for number, place in enumerate(places):
        up, down = draw(place.shape[0], rank, seed=number), draw(rank, place.shape[1], seed=100 + number)
        transposed = models.stores_transposed(model.get_submodule(place.module))
        factors[f"{place.module}.weight"] = (down.T, up.T) if transposed else (up, down)
    return WeightPatch.of_factors(factors)


def peft_logits(base: Path, folder: Path) -> Tensor:
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, folder).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_peft_loads_what_was_written(base: Path, tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", base, low_rank(base, 3), low_rank(base))
    foreign_formats.write(artifact, tmp_path / "out", "peft", strength=0.6, loading={}, base="owner/model")
    expected = logits(stacks.load(artifact), 0.6)
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), expected, atol=2e-5, rtol=0)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model" and config["r"] == 5


def made_by_peft(base: Path, folder: Path, **fields: Any) -> Path:
    """An adapter that peft made and saved, with numbers in both matrices."""
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    places = models.weight_places(models.load_model(base), ("attn_q", "ffn_down"), range(LAYERS))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": [place.module for place in places], "init_lora_weights": False}
    config = LoraConfig(**{**settings, "fan_in_fan_out": "gpt2" in type(plain).__name__.lower(), **fields})
    torch.manual_seed(0)
    get_peft_model(plain, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {r".*\.1\.(self_attn\.q_proj|attn\.c_attn)": 2}, "alpha_pattern": {".*down_proj|.*c_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_of_peft_gives_pefts_logits(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = made_by_peft(base, tmp_path / "adapter", **fields)
    steered = load(base, patch=folder, prompt=PLAIN)
    torch.testing.assert_close(logits(steered), peft_logits(base, folder), atol=2e-5, rtol=0)
    assert (logits(steered) - logits(steered, 0.0)).abs().max() > 0.05
    torch.testing.assert_close(logits(steered, 0.0), logits_with(base, {}), atol=0, rtol=0)


def test_an_adapter_comes_back_as_it_was_written(base: Path, tmp_path: Path) -> None:
    folder = made_by_peft(base, tmp_path / "adapter")
    steered = load(base, patch=folder, prompt=PLAIN)
    (tmp_path / "again").mkdir()
    adapters.write(tmp_path / "again", steered.patches, 1.0, steered.model, None)
    torch.testing.assert_close(peft_logits(base, tmp_path / "again"), peft_logits(base, folder), atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by_peft(bases["llama"], tmp_path_factory.mktemp("peft") / "adapter")


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / adapters.TENSORS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / adapters.TENSORS)


def _config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps({**config, **fields}))


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _config(f, peft_type="IA3"), "peft_type 'IA3' is more than a low-rank change of linear layers"),
        (lambda f: _config(f, use_dora=True), "use_dora is more than a low-rank change"),
        (lambda f: _config(f, bias="all"), "bias 'all' is more than"),
        (lambda f: _config(f, modules_to_save=["lm_head"]), "modules_to_save is more than"),
        (lambda f: _config(f, r=0), "adapter_config.json is damaged: r"),
        (lambda f: _config(f, r="x"), "adapter_config.json is damaged: r"),
        (lambda f: _config(f, r=3), "has rank 4; adapter_config.json has 3"),
        (lambda f: _config(f, alpha_pattern={"(": 3.0}), "is not a regular expression"),
        (lambda f: (f / adapters.CONFIG).write_text("{"), "adapter_config.json is not JSON"),
        (
            lambda f: (f / adapters.TENSORS).rename(f / "adapter_model.bin"),
            r"has no adapter_model.safetensors \(a .bin file is",
        ),
        (lambda f: (f / adapters.TENSORS).write_bytes(b"x" * 40), "adapter_model.safetensors is damaged"),
        (lambda f: _tensors(f, lambda t: t.pop(A)), "lacks one of its two matrices"),
        (lambda f: _tensors(f, lambda t: t[A].fill_(torch.nan)), "holds a value that is NaN"),
        (lambda f: _tensors(f, lambda t: t.update({A: torch.zeros(4, 31)})), r"has matrices of shapes \(32, 4\) and \(4, 31\)"),
        (lambda f: _tensors(f, lambda t: t.update({"x.lora_A.weight": t[A]})), "'x.lora_A.weight' is not a matrix"),
        (lambda f: _tensors(f, lambda t: t.update({A.replace("layers.1", "layers.9"): t[A]})), "is not a module of Llama"),
        (
            lambda f: _tensors(f, lambda t: t.update({A.replace("self_attn.q_proj", "mlp.act_fn"): t[A]})),
            "changes linear layers",
        ),
        (lambda f: _tensors(f, dict.clear), "holds no tensor"),
    ],
)
def test_what_a_stranger_may_give_for_an_adapter(
    damage: Callable[[Path], object], message: str, model: Any, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read(folder, model)


@pytest.mark.parametrize(
    ("make", "format_name", "reason"),
    [
        (shifts, "peft", "a patch of kind activation does not change weights"),
        (
            lambda base, *_: WeightPatch.of({"model.layers.1.mlp.down_proj.weight": draw(32, 48)}),
            "peft",
            r"changes whole weights \(its method trained no adapters\)",
        ),
        (lambda base, *_: low_rank(base), "logit-head", "a logit head is the export of one patch of kind logit; .* weight"),
    ],
)
def test_a_format_that_cannot_hold_a_patch(
    make: Callable[..., Any], format_name: str, reason: str, llama: Path, tmp_path: Path
) -> None:
    width = models.load_model(llama).get_submodule("model.layers.1.mlp.down_proj").weight.shape
    assert width == (32, 48), "the test's own difference has the shape of this weight"
    artifact = left(tmp_path / "left", llama, make(llama, 1))
    with pytest.raises(ValueError, match=reason):
        foreign_formats.write(artifact, tmp_path / "out", format_name, strength=1.0, loading={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("head", "layer"), [("linear", None), ("low_rank", 0), ("mlp", None), ("mlp", LAYERS - 1)])
def test_the_code_beside_a_logit_head_gives_the_logits(base: Path, tmp_path: Path, head: Any, layer: int | None) -> None:
    vocab = models.linear_shape(models.head(models.load_model(base)))[0]
    patch = LogitPatch(WIDTH, vocab, head, 0 if head == "linear" else 3, layer)
    patch.load_state_dict({name: draw(*value.shape, seed=7) for name, value in patch.state_dict().items()})
    artifact = left(tmp_path / "left", base, patch)
    written = foreign_formats.write(artifact, tmp_path / "out", "logit-head", strength=0.8, loading={}, base=str(base))
    names: dict[str, Any] = {}
    exec(written.lines.removeprefix("```python\n").removesuffix("```"), names)
    with torch.no_grad():
        found = names["logits"](input_ids=IDS)
    torch.testing.assert_close(found, logits(stacks.load(artifact), 0.8), atol=1e-5, rtol=0)
    assert (found - logits_with(base, {})).abs().max() > 0.05
