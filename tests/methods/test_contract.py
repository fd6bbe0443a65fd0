"""One contract for every entry of the table of methods, on every kind of model that it works on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import steerlab
from steerlab import models, patches
from steerlab.data.worlds import pixels, tiny
from steerlab.inputs.drawings import Prompter
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.job import MethodConfig, Selection
from steerlab.methods import METHODS, fitted, trained
from steerlab.methods.contract import (
    Fitted,
    Inputs,
    Loss,
    PatchAlone,
    PatchedModel,
    SteeringConfig,
    Trained,
    Trainee,
    WholeModel,
    language_modelling_loss,
    trained_parameters,
)
from steerlab.patches import taps
from steerlab.patches.maps import mapped_pixels
from steerlab.steered import stacks
from steerlab.steered.drawing import SteeredPipeline
from steerlab.tracking.wandb_client import workspaces

TRAINED = [(name, kind) for name, method in METHODS.items() if isinstance(method, Trained) for kind in method.kinds]
each_method = pytest.mark.parametrize("name", METHODS)
each_trained = pytest.mark.parametrize(("name", "kind"), TRAINED)
each_fitted = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, Fitted)])
# LinEAS compares whole distributions; WaRP's gradients of a step are one, its loss is vanilla's.
additive = pytest.mark.parametrize(("name", "kind"), [pair for pair in TRAINED if pair[0] not in ("lineas", "warp")])

SAMPLER = {"steps": 3, "guidance": 2.0, "read": [0, 1]}
STEERED = {"modules": "unet.*norm.*"}


@pytest.fixture
def model_dir(kind: str, tiny_dir: Path, digits_dir: Path) -> Path:
    """A small model of the kind, without weights."""
    return tiny_dir if kind == "causal_lm" else digits_dir


@pytest.fixture
def model(model_dir: Path) -> Any:
    """The model with random weights, the same in every test."""
    return models.load_model(model_dir, seed=0, sampler=SAMPLER)


@pytest.fixture
def batch(name: str, kind: str, encoder: Encoder, model: Any) -> Any:
    """Rows of the sort that the method trains on."""
    if kind == "diffusion":
        data_format = "image" if trained({"name": name}).module.trains_on == "train" else "text"
        prompter = Prompter(model)
        rows = prompter.encode_data(pixels.rows("digits/train", Path)[:6], data_format, 0).rows
        return prompter.collate(rows, numbers=range(6))  # type: ignore[arg-type]
    texts, data_format = TEXTS.get(trained({"name": name}).module.trains_on, ("instructions", "instruction"))
    rows = encode_data(encoder, tiny.rows(f"{texts}/train", 6), data_format, 64).rows
    return collate(rows, encoder.pad_id, loss_on="response" if data_format == "preference" else "all", numbers=range(6))


TEXTS = {"preference": ("preferences", "preference")}


Make = Callable[..., Any]


@pytest.fixture
def make(extracted: Any, prepared: Any) -> Make:
    """A function (name, kind, model, patches below, **settings) -> trainee, with what the method reads and prepares, of other
    texts."""

    def trainee(name: str, kind: str, model: Any, below: Sequence[Any] = (), **settings: Any) -> torch.nn.Module:
        method, config = trained({"name": name}), config_of(name, kind, **settings)
        if kind == "diffusion":
            texts = [row["text"] for row in pixels.rows("digits/test", Path)[:8]]
            pooled = {"pooling": [settings["pooling"]]} if "pooling" in settings else {}
            read = {role: extracted(model, texts, select=STEERED, **pooled) for role in method.reads(config)}
            before = {}
        else:
            texts = [row["text"] for row in tiny.rows("topics/train", 8)]
            read = {role: extracted(model, texts) for role in method.reads(config)}
            before = prepared(method, config, model, tiny.rows("refusals/train", 8))
        torch.manual_seed(0)
        return method.module(model, config, Inputs(tuple(below), read, before))

    return trainee


def config_of(name: str, kind: str, **settings: Any) -> MethodConfig:
    """The method's defaults, with places that the kind of model has."""
    fields = METHODS[name].Config.model_fields
    places = {"steer": STEERED} if kind == "diffusion" and "steer" in fields else {}
    return METHODS[name].Config.model_validate({**places, **settings})


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits, or images."""
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@each_method
def test_the_config_knows_its_name_and_round_trips(name: str) -> None:
    config = METHODS[name].Config()
    assert config.name == name
    assert METHODS[name].Config.model_validate(config.model_dump(mode="json")) == config


@each_method
def test_every_field_is_documented(name: str) -> None:
    undocumented = [field for field, info in METHODS[name].Config.model_fields.items() if not info.description]
    assert undocumented == []


@additive
def test_the_loss_is_a_sum_over_targets(name: str, kind: str, make: Make, model: Any, batch: Any) -> None:
    """Any split of a batch adds up to the same loss, so passes and workers may be split at will."""
    module = make(name, kind, model)
    whole = module(batch).total
    fields = [getattr(batch, name) for name in batch.__dataclass_fields__]
    parts = [type(batch)(*(value[i : i + 2] for value in fields)) for i in range(0, len(fields[0]), 2)]
    torch.testing.assert_close(sum(module(part).total for part in parts), whole, rtol=1e-5, atol=1e-4)


BOARDS = workspaces.load(Path(__file__).parents[2] / "dashboards")


@each_trained
def test_a_board_draws_what_the_training_reports(name: str, kind: str, make: Make, model: Any, batch: Any) -> None:
    """Under the names that `Tracker.log` gives them; a curve that no method of its board reports is a fault of the board."""
    metrics = make(name, kind, model)(batch).metrics
    # Numbers of single places are curves of the report's page, one for each module.
    own = {f"train/{metric}" for metric in metrics if "/" not in metric}
    curves = {curve for board in BOARDS.values() if name in board.methods for curve in board.curves}
    assert "train/loss" in curves
    assert not own or own & curves, f"{name} reports {sorted(own)}; its boards draw {sorted(curves)}"


@each_trained
def test_steps_lower_the_loss_and_move_only_what_trains(name: str, kind: str, make: Make, model: Any, batch: Any) -> None:
    module = make(name, kind, model)
    trained = trained_parameters(module)
    assert trained
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if n not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for step in range(4):
        module.on_step(step, 10.0)  # type: ignore[operator]
        module.before_pass(True)  # type: ignore[operator]
        loss = module(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for n, p in module.named_parameters() if n in frozen)
        optimizer.step()
        module.after_step(1e-3)  # type: ignore[operator]
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(module.named_parameters())[n], value) for n, value in frozen.items())


@each_trained
def test_the_saved_result_gives_the_same_logits(
    name: str, kind: str, make: Make, model: Any, batch: Any, encoder: Encoder, tmp_path: Path
) -> None:
    """What is trained, saved and loaded again is one model: the loss through the loaded patch equals the trained one's."""
    fingerprint = models.fingerprint(model)
    if kind == "causal_lm":
        models.save_model(model, encoder.tokenizer, tmp_path / "model")
    else:
        models.save_trained(model, {}, tmp_path / "model")
    (tmp_path / "prompt.json").write_text('{"prompt_style": "plain", "response_role": "data"}')
    module = make(name, kind, model).eval()
    inputs = batch.patched_inputs if module.patch or kind == "diffusion" else batch.model_inputs
    with torch.no_grad():
        expected = output(module.model, inputs)
    if module.patch is not None:
        patches.save(module.finished(module.patch.state_dict()), tmp_path / "patch", fingerprint)
    loaded = stacks.load(tmp_path, sampler=SAMPLER)
    assert bool(loaded.patches) == METHODS[name].leaves_patch
    with torch.no_grad():
        assert torch.equal(output(loaded.model, batch.patched_inputs), expected)


def frozen_by_hand(base: type[Trainee]) -> type[Trainee]:
    """A trainee with a small patch on a frozen model, as a reader of the README may write it, from one of the bases."""

    class Biased(base):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, config: Any, inputs: Inputs) -> None:
            super().__init__(model)
            model.requires_grad_(False)
            self.patch = patches.EmbeddingPatch(models.embedding_shape(model)[1], shift=True)
            patches.attach(model, [self.patch])

        def forward(self, batch: Any) -> Loss:
            logits_BTV = self.model(**batch.patched_inputs).logits
            return Loss(language_modelling_loss(logits_BTV, batch.labels), {})

    return Biased


def test_a_trainee_that_is_not_what_its_base_says_is_refused(tiny_dir: Path) -> None:
    """A small patch on a frozen model is never saved as a whole model beside it."""

    def made(base: type[Trainee]) -> Trainee:
        return frozen_by_hand(base)(models.load_model(tiny_dir, seed=0), None, Inputs())  # type: ignore[call-arg]

    made(PatchAlone).check()
    for base in (WholeModel, PatchedModel):
        with pytest.raises(ValueError, match=r"Biased freezes the model, .* derive it from PatchAlone"):
            made(base).check()
    loose = made(WholeModel)
    loose.model.requires_grad_(True)
    with pytest.raises(ValueError, match="Biased has a patch, which WholeModel does not save: derive it from PatchedModel"):
        loose.check()
    bare = made(PatchAlone)
    bare.patch = None
    with pytest.raises(ValueError, match=r"Biased has no patch: set self\.patch, or derive it from WholeModel"):
        bare.check()


def test_a_trainee_that_leaves_off_patches_of_its_model_is_refused(tiny_dir: Path) -> None:
    """It would train, without a word, on another model than the one that it is evaluated on."""
    model = models.load_model(tiny_dir, seed=0)
    below = patches.EmbeddingPatch(models.embedding_shape(model)[1], angle_rad=1.0)
    trainee = frozen_by_hand(PatchAlone)(model, None, Inputs((below,)))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"Biased trains without 1 of 1 patches .* \(embedding\): call patches\.attach"):
        trainee.check((below,))
    whole = frozen_by_hand(WholeModel)(models.load_model(tiny_dir, seed=0), None, Inputs((below,)))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="start from a model without patches, since its own weights train"):
        whole.check((below,))

    again = models.load_model(tiny_dir, seed=0)
    patches.attach(again, [below, trainee.patch])
    trainee.model = again
    trainee.check((below,))


def test_a_method_of_no_kind_is_none() -> None:
    """What is left out of a method cannot be wrong in it: a closed form reads both samples, what trains has a base."""
    for wrong in (torch.nn.Linear, Trainee):
        with pytest.raises(TypeError, match="derive it from WholeModel, PatchedModel or PatchAlone"):
            Trained(MethodConfig, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="MethodConfig of a closed form: derive it from SteeringConfig"):
        Fitted(MethodConfig, lambda config, source, target: {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of a method that reads activations: derive it from SteeringConfig"):
        Trained(MethodConfig, frozen_by_hand(PatchAlone), roles_read=("target",))

    class Config(SteeringConfig):
        """A closed form's."""

        name: str = "mine"

    mine = Fitted(Config, lambda config, source, target: {})
    assert mine.reads(Config()) == ("source", "target") and mine.leaves_patch and not mine.leaves_model


LEAVES = {
    "none": (False, False),
    "prompt": (False, False),
    "vanilla": (True, False),
    "denoise": (True, False),
    "aside": (True, True),
    "ise": (True, True),
}


@each_method
def test_what_a_method_leaves_is_that_of_its_kind(name: str) -> None:
    """Once more and by hand: whether the artifact holds a model, and whether there is a strength to vary."""
    assert (METHODS[name].leaves_model, METHODS[name].leaves_patch) == LEAVES.get(name, (False, True))


@each_trained
def test_a_trainee_is_what_its_base_says(name: str, kind: str, make: Make, model: Any) -> None:
    make(name, kind, model).check()  # type: ignore[operator]


@each_fitted
def test_a_fit_maps_every_place_it_names_and_moves_source_towards_target(name: str) -> None:
    """After the map, at some strength, the source's mean lies nearer to the target's; the same samples give the same maps."""
    generator = torch.Generator().manual_seed(0)
    source = {place: torch.randn(16, 6, generator=generator).abs() + 1 for place in ("a", "b", "c")}
    target = {place: 0.5 * torch.randn(12, 6, generator=generator).abs() for place in ("a", "b", "c")}
    method = fitted({"name": name})
    maps = method.fit(method.Config(), source, target)
    assert maps and set(maps) <= set(source)
    for place, one in maps.items():
        step = one(source[place]) - source[place]
        far = [(source[place] + s * step).mean(0).sub(target[place].mean(0)).norm() for s in (0.0, 0.01, 0.1, 1.0)]
        assert min(far[1:]) < far[0]
        assert one.width == 6
        torch.testing.assert_close(one.layer()(source[place]).detach(), one.layer().fitted()(source[place]))
    again = method.fit(method.Config(), source, target)
    for place, one in maps.items():
        layers = [each.layer().state_dict() for each in (one, again[place])]
        assert all(torch.equal(value, layers[1][key]) for key, value in layers[0].items())


@each_fitted
def test_a_fit_refuses_what_says_nothing(name: str) -> None:
    method = fitted({"name": name})
    few, many = {"a": torch.randn(3, 4)}, {"a": torch.randn(8, 4)}
    with pytest.raises(ValueError, match="3 samples"):
        method.fit(method.Config(), few, many)
    broken = {"a": torch.full((8, 4), torch.nan)}
    with pytest.raises(ValueError, match="row 0, neuron 0 is nan"):
        method.fit(method.Config(), broken, many)


ADAPTED = [(name, "causal_lm") for name, method in METHODS.items() if "lora" in method.Config.model_fields]
# GenARM's adapters are in its second model, which `test_preference_baselines.py` tests.
each_adapted = pytest.mark.parametrize(("name", "kind"), [pair for pair in ADAPTED if pair[0] != "genarm"])


def lora_of(name: str) -> dict[str, Any]:
    """Settings of adapters; Safety-WaRP adapts layers only that it does not rotate."""
    return {"lora": {"rank": 2}, **({"layer_type": ["ffn_up"]} if name == "warp" else {})}


def test_methods_that_train_weights_offer_adapters() -> None:
    assert {name for name, _ in ADAPTED} >= {"vanilla", "aside", "ise", "warp", "dpo", "genarm"}


@each_adapted
def test_adapters_train_alone_and_end_in_the_weights(
    name: str, kind: str, make: Make, model: Any, batch: Any, encoder: Encoder, tiny_dir: Path, tmp_path: Path
) -> None:
    """The result is loaded without peft: it has the weights' own names, and computes what the adapted model computed."""
    fingerprint, base = models.fingerprint(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    models.save_model(model, encoder.tokenizer, tmp_path / "model")
    (tmp_path / "prompt.json").write_text('{"prompt_style": "plain", "response_role": "data"}')
    module = make(name, kind, model, **lora_of(name))
    parameters = trained_parameters(module)
    own = [n for n in parameters if n.startswith(("model.", "second.")) and "lora_" not in n]
    assert own == [] and any("lora_" in n for n in parameters), "none of the model's own weights trains"
    method, config = trained({"name": name}), config_of(name, kind, **lora_of(name))
    size = method.module.size(config, models.skeleton(tiny_dir))
    extra = 0 if module.patch is None or name != "ise" else module.patch.shift_RD.numel()
    assert size is not None and size.trained == sum(p.numel() for p in parameters.values()) - extra
    train_a_little(module, batch)
    module.eval()
    inputs = batch.patched_inputs if module.patch else batch.model_inputs
    with torch.no_grad():
        expected = output(module.model, inputs)
    if method.leaves_model:
        weights = module.model_state(module.state_dict())
        assert weights.keys() == models.load_model(tiny_dir, seed=0).state_dict().keys()
        moved = {n for n, value in base.items() if not torch.equal(weights[n], value)}
        assert moved and all(n.endswith(("q_proj.weight", "v_proj.weight")) for n in moved)
        models.save_trained(module.model, weights, tmp_path / "model")
        fingerprint = models.fingerprint(models.load_model(tmp_path / "model"))
    if module.patch is not None:
        patches.save(module.finished(module.patch.state_dict()), tmp_path / "patch", fingerprint)
    loaded = stacks.load(tmp_path)
    with torch.no_grad():
        # A folded product is rounded once in the weight, an adapter's own product with each input.
        torch.testing.assert_close(output(loaded.model, batch.patched_inputs), expected, rtol=1e-4, atol=1e-4)
        if method.leaves_patch:
            off = output(loaded.model, {**batch.patched_inputs, "strengths": torch.zeros(len(batch.input_ids))})
            assert torch.equal(off, output(models.load_model(tmp_path / "model"), batch.model_inputs))
            assert not torch.allclose(off, expected, atol=1e-3)


def train_a_little(module: Any, batch: Any) -> None:
    """Four steps, which lower the loss."""
    optimizer = torch.optim.AdamW(trained_parameters(module).values(), lr=2e-2)
    losses = []
    for step in range(4):
        module.on_step(step, 10.0)
        module.before_pass(True)
        loss = module(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(2e-2)
    assert losses[-1] < losses[0]


@each_trained
def test_gradient_checkpointing_changes_no_gradient(name: str, kind: str, make: Make, model_dir: Path, batch: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.load_model(model_dir, seed=0, sampler=SAMPLER).train()
        models.start_training(model, checkpointing)
        module = make(name, kind, model).train()
        module(batch).total.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("none", "prompt")])  # a pooling, and a field
def test_no_other_file_names_the_method(name: str) -> None:
    """The loop, the stages and the tasks never ask which method they serve."""
    package = Path(steerlab.__file__).parent
    for folder in ("training", "stages", "evaluation"):
        files = list((package / folder).rglob("*.py"))
        assert files
        for file in files:
            assert f'"{name}"' not in file.read_text(), f"{file} names the method {name}"


DRAWING = [name for name, method in METHODS.items() if "diffusion" in method.kinds]
SAMPLERS = {"one step": {"steps": 1}, "guided steps": {"steps": 4, "guidance": 2.0, "read": [0, 2]}}


@pytest.fixture
def left(make: Make, extracted: Any) -> Callable[[str, Any], Any]:
    """A function (method's name, pipeline) -> the patch that the method leaves on it, None where it leaves none."""

    def patch_of(name: str, pipeline: Any) -> Any:
        method = METHODS[name]
        texts = [row["text"] for row in pixels.rows("digits/test", Path)[:16]]
        if isinstance(method, Fitted):
            config, pooling = method.Config(), method.Config().pooling
            read = [extracted(pipeline, part, select=STEERED, pooling=[pooling]) for part in (texts[:8], texts[8:])]
            source, target = ({tap: found.column(tap, pooling) for tap in found.modules} for found in read)
            maps = method.fit(config, source, target)
            return patches.ActivationPatch.from_maps(maps, Selection.model_validate(STEERED), method.strength_range)
        if not method.leaves_patch:
            return None
        module: Any = make(name, "diffusion", pipeline)
        prompter = Prompter(pipeline)
        batch = prompter.collate([prompter.from_row({"text": text}, "text") for text in texts[:8]], numbers=range(8))
        optimizer = torch.optim.Adam(trained_parameters(module).values(), lr=0.1)
        for step in range(2):
            module.on_step(step, 1.0)
            optimizer.zero_grad()
            module(batch).total.backward()
            optimizer.step()
        return module.finished(module.patch.state_dict())

    return patch_of


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("name", DRAWING)
def test_what_a_method_leaves_on_a_pipeline(
    name: str, sampler: dict[str, Any], left: Callable[[str, Any], Any], digits_dir: Path, tmp_path: Path
) -> None:
    """Saved and loaded, it draws with one step and with several; at strength 0 the bits are those of the pipeline itself."""
    base = models.load_model(digits_dir, seed=0, sampler=sampler)
    models.save_trained(base, {}, tmp_path / "base")
    made_on = models.load_model(tmp_path / "base", sampler=sampler)
    patch, fingerprint = left(name, made_on), models.fingerprint(base)
    (tmp_path / "left").mkdir()
    (tmp_path / "left/base.json").write_text(json.dumps({"source": str(tmp_path / "base")}))
    (tmp_path / "left/prompt.json").write_text(json.dumps(Prompter(base).spec))
    if patch is not None:
        patches.save(patch, tmp_path / "left/patch", fingerprint)
    loaded: Any = stacks.load(tmp_path / "left")
    assert bool(loaded.patches) == METHODS[name].leaves_patch and loaded.model.sampler == base.sampler

    drawings = [Prompter(base).from_row({"text": text, "seed": 5}, "text") for text in ("thin three", "bold two")]
    plain = SteeredPipeline(base, Prompter(base)).draw([drawing for drawing in drawings for _ in range(3)])[0][::3]
    if not loaded.patches:
        assert torch.equal(loaded.draw([drawing for drawing in drawings for _ in range(3)])[0][::3], plain)
        return
    images = loaded.draw(drawings, strengths=(0.0, 0.5, 1.0))
    assert torch.equal(images[0], plain) and images.isfinite().all()
    assert not torch.equal(images[1], plain) and not torch.equal(images[2], images[1])
    other = models.load_model(digits_dir, seed=1, sampler=sampler)
    with pytest.raises(ValueError, match="made for another model than this Diffusion"):
        patches.load(tmp_path / "left/patch", other)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if isinstance(m, Fitted) and "diffusion" in m.kinds])
def test_maps_fitted_on_a_pipeline_act_on_it(name: str, digits_dir: Path, extracted: Any) -> None:
    """The patch of a fit, attached, makes of every pixel of a place what the map makes of it."""
    method = fitted({"name": name})
    assert "diffusion" in method.kinds
    pipeline = models.load_model(digits_dir, seed=0, sampler={"steps": 2, "guidance": 2.0})
    config, place = method.Config(), {"modules": "unet.mid_block.resnets.0.norm2"}
    pooling = config.pooling
    texts = [row["text"] for row in pixels.rows("digits/test", Path)[:16]]
    read = [extracted(pipeline, part, select=place, pooling=[pooling]) for part in (texts[:8], texts[8:])]
    source, target = ({tap: found.column(tap, pooling) for tap in found.modules} for found in read)
    maps = method.fit(config, source, target)
    before = values_at(pipeline, texts, place)
    patch = patches.ActivationPatch.from_maps(maps, Selection.model_validate(place), pixels=config.pixels)
    attached = patches.attach(pipeline, (patch,))
    after = values_at(pipeline, texts, place)
    attached.detach()
    (one,) = maps.values()
    torch.testing.assert_close(after, mapped_pixels(one, before, config.pixels), rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, after)


def values_at(pipeline: Any, texts: list[str], place: dict[str, str]) -> torch.Tensor:
    """What a pipeline computes at one place, (B, pixels, D)."""
    prompter = Prompter(pipeline)
    batch = prompter.collate([prompter.from_row({"text": text}, "text") for text in texts])
    reader = taps.Reader(pipeline, taps.select(pipeline, Selection.model_validate(place)))
    with torch.no_grad():
        (value,) = reader(**batch.read_inputs).values()
    reader.close()
    return value
