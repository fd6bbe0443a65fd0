"""The preference task and the analysis against plain forward passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab.data.worlds import tiny
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.preferences import preference
from steerlab.evaluation.tasks.preferences.preference import Config, observe, run
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Pair
from steerlab.job import DataSet
from steerlab.patches import ActivationPatch, LogitPatch, WeightPatch
from steerlab.steered import explain
from steerlab.steered.explain import Response, Scored
from steerlab.steered.language import SteeredModel

PAIRS = DataSet.model_validate({"source": "tiny:preferences/test", "format": "preference", "limit": 7})
STRENGTHS = (1.0, 0.0, 0.5)
LINEAR = "model.layers.0.mlp.up_proj"


def randomised(patch: Any, scale: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in patch.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return patch.eval()


def vector(model: PreTrainedModel) -> LogitPatch:
    return randomised(LogitPatch(model.config.hidden_size, model.config.vocab_size, "low_rank", 4, layer=1))


def stack(model: PreTrainedModel) -> tuple[Any, ...]:
    return (randomised(ActivationPatch({LINEAR: model.config.intermediate_size}, {"modules": LINEAR})), vector(model))


def two_vectors(model: PreTrainedModel) -> tuple[Any, ...]:
    return (randomised(LogitPatch(model.config.hidden_size, model.config.vocab_size)), vector(model))


def weights(model: PreTrainedModel) -> WeightPatch:
    return randomised(WeightPatch({f"{LINEAR}.weight": list(model.get_parameter(f"{LINEAR}.weight").shape)}))


def patched(make: Any, model: PreTrainedModel, encoder: Encoder) -> SteeredModel:
    made = make(model)
    return SteeredModel(model, encoder, made if isinstance(made, tuple) else (made,))


def naive(model: SteeredModel, pair: Pair, strength: float) -> list[tuple[float, float, float, int]]:
    """Log-probability, that of the base and KL of both responses, each in passes of their own."""
    found = []
    for sequence in pair.sequences:
        ids, chosen = torch.tensor([sequence.input_ids]), torch.tensor(sequence.in_response[1:])
        with torch.no_grad():
            logs = [
                model.model(ids, roles=ids * 0, strengths=model._strengths(torch.tensor([s])))
                .logits[0, :-1]
                .log_softmax(-1)[chosen]
                for s in (strength, 0.0)
            ]
        own = [float(log.gather(1, ids[0, 1:][chosen][:, None]).sum()) for log in logs]
        found.append((*own, float((logs[0].exp() * (logs[0] - logs[1])).sum()), int(chosen.sum())))
    return found


@pytest.mark.parametrize("make", [vector, stack, two_vectors, weights], ids=lambda make: make.__name__)
def test_scores_are_those_of_plain_passes(make: Any, tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = patched(make, tiny_model, encoder)
    pairs = [p for p in encode_data(encoder, tiny.rows("preferences/test", 5), "preference", 64).rows if isinstance(p, Pair)]
    model.batch_tokens = 80
    for strength, scored in zip(STRENGTHS, explain.score(model, pairs, STRENGTHS), strict=True):
        for pair, found in zip(pairs, scored, strict=True):
            for ours, theirs in zip(found, naive(model, pair, strength), strict=True):
                assert tuple(ours) == pytest.approx(theirs, abs=2e-4)
                assert strength or (ours.log_prob == ours.base_log_prob and ours.kl == 0)


def test_a_vector_costs_one_pass_for_all_strengths(
    tiny_model: PreTrainedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = patched(vector, tiny_model, encoder), []
    tiny_model.model.register_forward_hook(lambda *_: calls.append(1))
    run(model, Config(pairs=PAIRS, strengths=(1.0, 0.0, 0.5, 1.5, 2.0)))
    assert len(calls) == 1


def test_the_task_reports_every_metric_at_every_strength(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    result = run(patched(vector, tiny_model, encoder), Config(pairs=PAIRS, strengths=STRENGTHS))
    found = summarise_all(result)
    assert list(found) == list(STRENGTHS)
    names = {f"preference/{measure.name}" for measure in preference.measures(Config())}
    assert all(set(metrics) == names for metrics in found.values())
    value = {strength: {name: metric.value for name, metric in metrics.items()} for strength, metrics in found.items()}
    for strength in STRENGTHS:
        of = value[strength]
        assert of["preference/margin"] == pytest.approx(of["preference/chosen_reward"] - of["preference/rejected_reward"])
        moved = of["preference/chosen_logp"] - value[0.0]["preference/chosen_logp"]
        assert of["preference/chosen_reward"] == pytest.approx(0.1 * moved, abs=1e-6)
    assert all(m.n == 7 and m.unparsable == 0 for name, m in found[1.0].items())
    assert found[0.0]["preference/accuracy"].n == 0 and found[0.0]["preference/accuracy"].value is None
    for name in ("preference/margin", "preference/kl"):
        zero = found[0.0][name]
        assert zero.value == zero.low == zero.high == 0
    assert found[1.0]["preference/kl"].value > found[0.5]["preference/kl"].value > 0  # type: ignore[operator]
    assert result.samples[0]["prompt"].startswith("please")


def test_margins_and_shares_by_hand() -> None:
    scored = Scored(Response(-3.0, -5.0, 0.4, 2), Response(-2.0, -3.0, 0.8, 4))
    values = {o.metric: (o.value, o.weight) for o in observe("a", scored, 0.5, 1.0, True)}
    assert values == {
        "preference/accuracy": (1.0, 1.0),
        "preference/margin": (0.5 * (2 - 1), 1.0),
        "preference/likelihood_accuracy": (0.0, 1.0),
        "preference/chosen_logp": (-3.0, 1.0),
        "preference/rejected_logp": (-2.0, 1.0),
        "preference/chosen_reward": (0.5 * 2, 1.0),
        "preference/rejected_reward": (0.5 * 1, 1.0),
        "preference/kl": (pytest.approx(0.2), 6.0),
        "preference/shorter": (1.0, 1.0),
    }
    assert all(o.value is None for o in observe("a", None, 0.5, 1.0, True))
    worse = observe("a", Scored(scored.rejected, scored.chosen), 0.5, 1.0, True)
    assert [o.value for o in worse[:3]] == [0.0, -0.5, 1.0] and worse[4].value == 0.0
    assert observe("a", Scored(scored.chosen, scored.chosen), 0.5, 1.0, True)[4].value == 0.5


def test_a_model_without_a_patch_has_likelihoods_only(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    (found,) = summarise_all(run(SteeredModel(tiny_model, encoder), Config(pairs=PAIRS))).values()
    assert found["preference/accuracy"].n == 0 and found["preference/likelihood_accuracy"].n == 7
    assert found["preference/kl"].value == 0


def test_pairs_that_do_not_fit_are_counted(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = patched(vector, tiny_model, encoder)
    lengths = [len(row) for row in encode_data(encoder, tiny.rows("preferences/test", 7), "preference", 64).rows]
    (found,) = summarise_all(run(model, Config(pairs=PAIRS, max_tokens=min(lengths)))).values()
    long = sum(length > min(lengths) for length in lengths)
    assert 0 < long < 7
    assert all((m.n, m.unparsable, m.too_long) == (7 - long, 0, long) for m in found.values())
    (found,) = summarise_all(run(model, Config(pairs=PAIRS, max_tokens=5))).values()
    assert all((m.value, m.n, m.too_long) == (None, 0, 7) for m in found.values())


def test_other_rows_and_strengths_are_refused(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"set pairs\.format to preference, not instruction"):
        Config(pairs=DataSet(source="tiny:instructions/test"))
    with pytest.raises(ValueError, match="has no patch to scale"):
        run(SteeredModel(tiny_model, encoder), Config(pairs=PAIRS, strengths=(0.5,)))
    assert Config().pairs.source == preference.PAIRS and Config().pairs.offset == 240


@pytest.mark.parametrize("make", [vector, weights], ids=lambda make: make.__name__)
def test_promoted_and_demoted_tokens(make: Any, tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = patched(make, tiny_model, encoder)
    conversation = encoder.from_row(tiny.rows("instructions/test", 1)[0], "instruction")
    effects = explain.explain(model, conversation, num=3, strength=0.7)
    row = encoder.encode(conversation)
    positions = [t for t, inside in enumerate(row.in_response) if inside]
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        policy, base = (model.model(ids, roles=ids * 0, strengths=torch.tensor([s])).logits[0] for s in (0.7, 0.0))
    assert [effect.token for effect in effects] == [encoder.tokenizer.decode([row.input_ids[t]]) for t in positions]
    for effect, t in zip(effects, positions, strict=True):
        moved = (policy - base)[t - 1]
        assert effect.norm == pytest.approx(float(moved.norm()), rel=1e-4)
        logs = [z[t - 1].log_softmax(0) for z in (policy, base)]
        assert effect.kl == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum()), abs=1e-5)
        order = moved.argsort(descending=True)
        assert effect.promoted[0][0] == encoder.tokenizer.decode([int(order[0])])
        assert effect.promoted[0][1] == pytest.approx(float(moved.max()), rel=1e-4)
        assert effect.demoted[0] == (encoder.tokenizer.decode([int(order[-1])]), pytest.approx(float(moved.min()), rel=1e-4))
        assert len(effect.promoted) == len(effect.demoted) == 3 and math.isfinite(effect.kl)
