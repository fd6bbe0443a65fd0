"""Promoted and demoted tokens over many responses, against sums over plain passes; and the bars of the report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_evaluation_preference import vector, weights
from test_report import entry
from transformers import PreTrainedModel

from steerlab import report
from steerlab.data.worlds import tiny
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.preferences.token_effect import Config, run
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataSet
from steerlab.report import samples as report_samples
from steerlab.steered import explain
from steerlab.steered.language import SteeredModel

ROWS = DataSet.model_validate({"source": "tiny:instructions/test", "limit": 5})


def naive(model: SteeredModel, conversations: list[Any], strength: float) -> tuple[torch.Tensor, list[float], list[float]]:
    """Centred changes of the logits summed over all response tokens, and norm and KL of each response, row by row."""
    total, norms, kls = torch.zeros(model.model.config.vocab_size, dtype=torch.float64), [], []
    for conversation in conversations:
        row = model.encoder.encode(conversation)
        ids = torch.tensor([row.input_ids])
        places = torch.tensor([t - 1 for t, inside in enumerate(row.in_response) if inside])
        with torch.no_grad():
            policy, base = (
                model.model(ids, roles=ids * 0, strengths=torch.tensor([s])).logits[0, places].double() for s in (strength, 0.0)
            )
        change = policy - base
        total += sum(one - one.mean() for one in change)
        norms.append(float(change.norm(dim=-1).mean()))
        log_p, log_q = policy.log_softmax(-1), base.log_softmax(-1)
        kls.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return total, norms, kls


@pytest.mark.parametrize("make", [vector, weights], ids=lambda make: make.__name__)
def test_sums_are_those_of_plain_passes(make: Any, tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = SteeredModel(tiny_model, encoder, (make(tiny_model),))
    model.batch_tokens = 60  # several batches, in another order than the rows
    conversations = [encoder.from_row(row, "instruction") for row in tiny.rows("instructions/test", 5)]
    total, norms, kls = naive(model, conversations, 0.7)
    found = explain.summarise(model, conversations, num=6, strength=0.7)
    assert found.norms == pytest.approx(norms, rel=1e-4) and found.kls == pytest.approx(kls, rel=1e-3, abs=1e-6)
    places = sum(sum(encoder.encode(one).in_response) for one in conversations)
    assert sum(found.sizes) == places
    order = total.argsort(descending=True).tolist()
    for moved, ids in ((found.promoted, order[:6]), (found.demoted, order[::-1][:6])):
        assert [one.token for one in moved] == [encoder.shown(i) for i in ids]
        assert [one.total for one in moved] == pytest.approx([float(total[i]) for i in ids], rel=1e-3)
        assert [one.mean for one in moved] == pytest.approx([float(total[i]) / places for i in ids], rel=1e-3)


def test_a_constant_on_all_logits_of_a_place_does_not_add_up(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    """It changes no probability: a vector with a large common part has the same centred sums as one without it."""
    conversations = [encoder.from_row(row, "instruction") for row in tiny.rows("instructions/test", 3)]
    found = []
    for common in (0.0, 5.0):
        torch.manual_seed(0)
        patch = vector(tiny_model)
        patch.up.data += common
        steered = SteeredModel(tiny_model, encoder, (patch,))
        found.append(explain.summarise(steered, conversations, num=3))
        steered.detach()
    plain, shifted = found
    assert shifted.norms[0] > 2 * plain.norms[0], "the constant is there"
    assert [one.token for one in shifted.promoted] == [one.token for one in plain.promoted]
    assert [one.total for one in shifted.promoted] == pytest.approx([one.total for one in plain.promoted], rel=1e-3)


@pytest.mark.parametrize("responses", ["data", "own"])
def test_the_task_reports_norms_and_leaves_a_chart(responses: Any, tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = SteeredModel(tiny_model, encoder, (vector(tiny_model),))
    config = Config(data=ROWS, responses=responses, strengths=(1.0, 0.0, 0.5), max_new_tokens=6, num_tokens=4)
    result = run(model, config)
    found = summarise_all(result)
    assert found[0.0]["token_effect/norm"].value == found[0.0]["token_effect/kl"].value == 0
    assert found[1.0]["token_effect/norm"].value > found[0.5]["token_effect/norm"].value > 0  # type: ignore[operator]
    assert [sample["strength"] for sample in result.samples] == [1.0, 0.5], "nothing to draw at strength 0"
    bars: Any = json.loads(json.dumps(result.samples))[0]["chart"]["bars"]
    values = [value for _, value in bars]
    assert len(bars) == 8 and values == sorted(values, reverse=True) and values[0] > 0 > values[-1]


def test_a_model_without_a_patch_changes_nothing(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    result = run(SteeredModel(tiny_model, encoder), Config(data=ROWS))
    (found,) = summarise_all(result).values()
    assert found["token_effect/kl"].value == 0 and found["token_effect/kl"].n == 5 and not result.samples


def test_rows_that_do_not_fit_or_say_nothing_are_counted(
    tiny_model: PreTrainedModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SteeredModel(tiny_model, encoder, (vector(tiny_model),))
    lengths = [len(encoder.encode(encoder.from_row(row, "instruction"))) for row in tiny.rows("instructions/test", 5)]
    limit = sorted(lengths)[2]
    monkeypatch.setattr(SteeredModel, "max_tokens", property(lambda self: limit))
    (found,) = summarise_all(run(model, Config(data=ROWS))).values()
    long = sum(length > limit for length in lengths)
    assert 0 < long < 5 and found["token_effect/kl"].too_long == long and found["token_effect/kl"].n == 5 - long
    with pytest.raises(ValueError, match="rows of format text have no response"):
        Config(data=DataSet.model_validate({"source": "tiny:topics/test", "format": "text"}))


def test_the_report_draws_the_chart_of_any_task() -> None:
    """By the shape of the sample, whatever task left it; what has another shape is left out."""
    shown = entry("a", 0.5, 0.2, 50.4)
    chart = {"title": "tokens", "unit": "nats", "bars": [["<b>", 1.25], ["b", -0.5], ["b", -0.75]]}
    shown.samples["mine"] = [  # type: ignore[index]
        {"id": "1", "strength": 0.5, "chart": chart},
        *({"id": "2", "strength": 0.5, "chart": wrong} for wrong in ("x", {}, {"bars": 3}, {"bars": [[1]]})),
        {"id": "3", "strength": 0.5, "chart": {"bars": [["a", float("nan")], ["a", True, 2]]}},
    ]
    (found,) = report_samples.charts([shown])
    assert found["title"] == "mine, a: tokens" and found["bars"] == [("<b>", 1.25), ("b", -0.5), ("b", -0.75)]
    page = report.page([shown])
    assert '<section id="charts">' in page and "&#39;&lt;b&gt;&#39;" in page and "-0.75" in page
    figure = report.figures.chart(found)
    assert figure["data"][0]["x"] == [1.25, -0.5, -0.75] and len(set(figure["data"][0]["y"])) == 3
    assert '<section id="charts">' not in report.page([entry("a", 0.5, 0.2, 50.4)])
