"""LinEAS: the loss against a naive one, what trains, the penalty, and several workers as one."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.job import Selection
from steerlab.methods import lineas
from steerlab.methods.contract import Inputs
from steerlab.methods.lineas import Config, Lineas, proximal
from steerlab.patches import taps, token_masks

NORMS = r".*post_attention_layernorm"


def texts(label: str, number: int) -> list[str]:
    rows = [row["text"] for row in tiny.rows("topics/train") if row["label"] == label]
    return rows[:number]


def batch_of(encoder: Encoder, rows: list[str], side: Any = "right") -> Batch:
    return collate([encoder.encode(encoder.from_row({"text": t}, "text")) for t in rows], encoder.pad_id, side=side)


@pytest.fixture
def make(tiny_dir: Path, extracted: Any) -> Any:
    def trainee(num_target: int = 8, settings: dict[str, Any] | None = None, **extract: Any) -> Lineas:
        model = models.load_model(tiny_dir, seed=0)
        target = extracted(model, texts("sea", num_target), **extract)
        return Lineas(model, Config.model_validate(settings or {}), Inputs(activations={"target": target})).train()

    return trainee


def naive(model: PreTrainedModel, rows: list[str], target: list[str], encoder: Encoder, names: list[str]) -> torch.Tensor:
    """Sum over places and neurons of the mean squared difference of sorted values, one text at a time, sizes equal."""
    pooled = {}
    for side, side_rows in (("source", rows), ("target", target)):
        vectors: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for text in side_rows:
            reader = taps.Reader(model, [taps.Tap(name) for name in names], stop=False)
            values = reader(**batch_of(encoder, [text]).model_inputs)
            reader.close()
            for name in names:
                vectors[name].append(values[name][0].mean(0))
        pooled[side] = {name: torch.stack(v) for name, v in vectors.items()}
    total = torch.tensor(0.0)
    for name in names:
        a, b = pooled["source"][name], pooled["target"][name]
        for neuron in range(a.shape[1]):
            total = total + (a[:, neuron].sort().values - b[:, neuron].sort().values).square().mean()
    return total


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_papers(make: Any, encoder: Encoder, tiny_dir: Path, side: str) -> None:
    trainee, rows = make(), texts("farm", 8)
    loss = trainee(batch_of(encoder, rows, side)).total / len(rows)
    names = [tap.name for tap in taps.select(trainee.model, Selection(modules=NORMS))]
    expected = naive(models.load_model(tiny_dir, seed=0), rows, texts("sea", 8), encoder, names)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_codes_reduction_sums_over_samples_and_averages_over_neurons_and_places(make: Any, encoder: Encoder) -> None:
    """METHODS 3.2, verified there: means over layers and neurons, sum over the batch."""
    batch = batch_of(encoder, texts("farm", 8))
    paper, code = make()(batch).total, make(settings={"reduction": "code"})(batch).total
    num_neurons = 4 * 128
    torch.testing.assert_close(code, paper * 8 / num_neurons, rtol=1e-5, atol=1e-6)


def test_unequal_sizes_are_matched_exactly_by_repeating_rows(make: Any, encoder: Encoder) -> None:
    """4 source texts against 12 targets are the distance of 12 (each source text three times) against 12."""
    few = make(12)(batch_of(encoder, texts("farm", 4))).total / 4
    many = make(12)(batch_of(encoder, texts("farm", 4) * 3)).total / 12
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-6)


def test_steps_lower_the_loss_and_only_maps_get_gradients(make: Any, encoder: Encoder) -> None:
    trainee, batch = make(), batch_of(encoder, texts("farm", 8))
    trained = [name for name, p in trainee.named_parameters() if p.requires_grad]
    assert all(name.startswith("patch.maps.") for name in trained)
    assert sum(p.numel() for p in trainee.parameters() if p.requires_grad) == 2 * 4 * 128
    optimizer = torch.optim.Adam([p for p in trainee.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(8):
        trainee.on_step(step, 1.0)
        loss = trainee(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trainee.after_step(1e-2)
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in trainee.model.parameters())


def test_what_is_read_is_fixed_before_training_and_is_no_state(make: Any) -> None:
    """The target is data: it is not saved with the maps."""
    assert all(name.startswith(("patch.", "model.")) for name in make().state_dict())


def test_measured_places_may_differ_from_steered_ones(make: Any, encoder: Encoder) -> None:
    trainee = make(settings={"steer": {"modules": r"model\.layers\.0\.mlp"}}, select={"modules": r"model\.layers\.\d"})
    assert list(trainee.patch.sizes) == ["model.layers.0.mlp"]
    trainee(batch_of(encoder, texts("farm", 8))).total.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trainee.patch.parameters())


def test_the_forward_stops_behind_the_last_measured_place(make: Any, encoder: Encoder) -> None:
    trainee, ran = make(select={"modules": r"model\.layers\.1"}), []
    trainee.model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    trainee(batch_of(encoder, texts("farm", 8)))
    assert ran == []


def test_gradient_checkpointing_changes_no_gradient(make: Any, encoder: Encoder) -> None:
    gradients = []
    for checkpointing in (False, True):
        trainee = make()
        if checkpointing:
            trainee.model.config.use_cache = False
            trainee.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            trainee.train()
        trainee(batch_of(encoder, texts("farm", 8))).total.backward()
        gradients.append(torch.cat([p.grad for p in trainee.patch.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_proximal_step_is_the_minimum_of_its_problem() -> None:
    """prox(v) = argmin 1/2 |x - v|^2 + l1 |x|_1 + group sqrt(d) |x|_2, against a search by gradient descent."""
    torch.manual_seed(0)
    v, l1, group = torch.randn(2, 6, dtype=torch.float64), 0.3, 0.2
    x = v.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def smooth() -> torch.Tensor:
        absolute = (x.square() + 1e-14).sqrt()
        norms = (x.square().sum(1) + 1e-14).sqrt()
        return 0.5 * (x - v).square().sum() + l1 * absolute.sum() + group * math.sqrt(6) * norms.sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = smooth()
        value.backward()
        return value

    for _ in range(20):
        optimizer.step(closure)
    torch.testing.assert_close(proximal(v, l1, group), x.detach(), atol=2e-3, rtol=0)


def test_scales_and_shifts_have_weights_of_their_own() -> None:
    v = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    config = Config(gamma=0.5, l1=0.2, l1_shift=1.0, group=0.1, group_shift=0.0)
    l1_21, group_21 = config.penalty_21
    both = proximal(v, l1_21.double(), group_21.double())
    torch.testing.assert_close(both[:1], proximal(v[:1], 0.1, 0.05), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both[1:], proximal(v[1:], 0.5, 0.0), rtol=1e-6, atol=1e-6)
    same = Config(gamma=0.5, l1=0.2).penalty_21
    assert same[0].tolist() == [[pytest.approx(0.1)]] * 2 and same[1].tolist() == [[0.5]] * 2
    assert not {"l1_shift", "group_shift", "criterion"} & set(Config().model_dump()), "keys of earlier jobs stay"


def test_a_training_step_weighs_shifts_and_scales_as_the_config_says(make: Any, encoder: Encoder) -> None:
    """No scale is penalised, every shift by more than it has moved: shifts are emptied, scales stay."""
    trainee = make(settings={"gamma": 1.0, "l1": 0.0, "group": 0.0, "l1_shift": 1e3})
    batch = batch_of(encoder, texts("farm", 8))
    optimizer = torch.optim.SGD([p for p in trainee.parameters() if p.requires_grad], lr=1e-3)
    trainee(batch).total.backward()
    optimizer.step()
    trainee.after_step(1e-3)
    assert all((layer.shift == 0).all() and (layer.scale != 1).any() for layer in trainee.patch.layers())


@pytest.mark.parametrize("num_target", [8, 5])
def test_w1_is_the_mean_absolute_difference_of_quantiles(make: Any, encoder: Encoder, tiny_dir: Path, num_target: int) -> None:
    trainee, rows = make(num_target, settings={"criterion": "w1"}), texts("farm", 8)
    batch = batch_of(encoder, rows)
    with torch.no_grad():
        loss = trainee(batch).total / len(rows)
        model = models.load_model(tiny_dir, seed=0)
        places = taps.select(model, Selection(modules=NORMS))
        reader = taps.Reader(model, places)
        pooled = [
            {
                name: token_masks.pool(z, token_masks.selected(one, Selection()), "mean")
                for name, z in reader(**one.model_inputs).items()
            }
            for one in (batch, batch_of(encoder, texts("sea", num_target)))
        ]
    expected = 0.0
    for place in places:
        source, target = (side[place.name].double() for side in pooled)
        # Each value repeated until both samples have one size: then the sorted values are matched in order.
        a, b = (x.repeat_interleave(math.lcm(len(source), len(target)) // len(x), 0).sort(0).values for x in (source, target))
        expected += (a - b).abs().mean(0).sum().item()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_loss_and_the_support_of_each_place_are_reported(make: Any, encoder: Encoder) -> None:
    trainee, batch = make(settings={"reduction": "code"}), batch_of(encoder, texts("farm", 8))
    with torch.no_grad():
        trainee.patch.layers()[1].shift[:32] = 0.5
    loss = trainee(batch)
    names = [tap.name for tap in taps.select(trainee.model, Selection(modules=NORMS))]
    parts = [float(loss.metrics[f"loss_at/{name}"]) for name in names]
    assert sum(parts) == pytest.approx(float(loss.total.detach()), rel=1e-5) and len(set(parts)) == 4
    assert [float(loss.metrics[f"support_at/{name}"]) / 8 for name in names] == pytest.approx([0, 0.25, 0, 0])
    assert float(loss.metrics["support"]) / 8 == pytest.approx(32 / 512)


def test_proximal_step_empties_coordinates_and_whole_places() -> None:
    v = torch.tensor([[0.05, -0.5, 2.0], [0.1, 0.1, -0.1]])
    out = proximal(v, 0.2, 0.1)
    assert out[0, 0] == 0 and (out[1] == 0).all() and out[0, 2] > 0


def test_penalty_empties_neurons_and_refit_keeps_them_empty(make: Any, encoder: Encoder) -> None:
    trainee, batch = make(settings={"gamma": 0.6, "group": 0.0, "refit_from": 6}), batch_of(encoder, texts("farm", 8))
    optimizer = torch.optim.Adam([p for p in trainee.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.9))
    empty: list[torch.Tensor] = []
    for step in range(10):
        trainee.on_step(step, 1.0)
        loss = trainee(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        trainee.after_step(1e-2)
        if step >= 5:
            empty.append(torch.cat([layer.scale == 1 for layer in trainee.patch.layers()]))
    assert 0 < empty[0].float().mean() < 1, "the penalty should empty some scales and not all"
    assert all(bool((now >= empty[0]).all()) for now in empty), "what was empty at the refit stays empty"
    support = trainee(batch).metrics["support"] / 8
    assert 0 < float(support) < 1


def test_a_patch_below_stays_and_its_effect_is_seen(tiny_dir: Path, extracted: Any, encoder: Encoder) -> None:
    model = models.load_model(tiny_dir, seed=0)
    target = extracted(model, texts("sea", 8))
    below = patches.EmbeddingPatch(model.config.hidden_size, 1.0)
    trainee = Lineas(model, Config(), Inputs(below=(below,), activations={"target": target}))
    batch = batch_of(encoder, texts("farm", 8))
    batch = Batch(
        **{**{f: getattr(batch, f) for f in batch.__dataclass_fields__}, "roles": torch.where(batch.roles == 0, 1, 3)}
    )
    plain = Lineas(models.load_model(tiny_dir, seed=0), Config(), Inputs(activations={"target": target}))
    assert trainee(batch).total > 1.01 * plain(batch).total


def test_activations_of_another_model_are_refused(tiny_dir: Path, extracted: Any) -> None:
    target = extracted(models.load_model(tiny_dir, seed=1), texts("sea", 8))
    with pytest.raises(ValueError, match="another model"):
        Lineas(models.load_model(tiny_dir, seed=0), Config(), Inputs(activations={"target": target}))


def test_too_few_target_texts_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"data.target has 3 samples; a distribution needs 4 or more"):
        make(3)


def _worker(rank: int, world: int, port: int, trainee: Lineas, batch: Batch, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    mine = Batch(*(getattr(batch, f)[rank::world] for f in batch.__dataclass_fields__))
    loss = trainee(mine).total
    loss.backward()
    gradient = torch.cat([p.grad for p in trainee.patch.parameters() if p.grad is not None])
    torch.distributed.all_reduce(gradient)
    torch.distributed.all_reduce(loss := loss.detach())
    if rank == 0:
        queue.put((loss.item(), gradient.numpy()))
    torch.distributed.destroy_process_group()


def _rebuilt(rank: int, world: int, port: int, directory: Path, activations_dir: Path, batch: Batch, queue: Any) -> None:
    from steerlab.activations.parquet import Activations

    model = models.load_model(directory, seed=0)
    trainee = Lineas(model, Config(), Inputs(activations={"target": Activations.open(activations_dir)})).train()
    _worker(rank, world, port, trainee, batch, queue)


def test_two_workers_equal_one(tiny_dir: Path, extracted: Any, encoder: Encoder) -> None:
    """The distribution is that of the whole batch: loss and gradients of two processes add up to one's."""
    model = models.load_model(tiny_dir, seed=0)
    target = extracted(model, texts("sea", 6))
    batch = batch_of(encoder, texts("farm", 8))
    alone = Lineas(model, Config(), Inputs(activations={"target": target})).train()
    loss = alone(batch).total
    loss.backward()
    expected = torch.cat([p.grad for p in alone.patch.parameters() if p.grad is not None])
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        context.Process(target=_rebuilt, args=(rank, 2, port, tiny_dir, target.directory, batch, queue)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    total, gradient = queue.get(timeout=120)
    for worker in workers:
        worker.join(60)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(gradient), expected, rtol=1e-4, atol=1e-5)


def test_default_hyperparameters_are_the_papers() -> None:
    assert lineas.METHOD.strength_range == (0.0, 1.0)
    assert Config().reduction == "paper" and Config().gamma == 0
