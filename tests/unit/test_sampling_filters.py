"""Filters of sampling against their definitions, token by token, and against transformers' own."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from steerlab.cli import terminal, trying
from steerlab.evaluation.asking import answers
from steerlab.evaluation.tasks.harm import toxicity
from steerlab.inputs.encoding import Encoder
from steerlab.patches import EmbeddingPatch
from steerlab.steered import sampling
from steerlab.steered.language import SteeredModel
from steerlab.steered.model import Asked, Shown
from steerlab.steered.sampling import Sampling, choose

UNIFORM = torch.linspace(0, 1, 4001)[:-1]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 4, "top_p": 0.7},
    {"top_p": 0.9, "min_p": 0.3},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1},
]
each_filter = pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "none")


def naive(logits: list[float], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[int, float]:
    """The distribution that is sampled from: token -> probability, by the definitions."""
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist()
    left = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        left = left[:top_k]
    whole, reached, nucleus = sum(weights[i] for i in left), 0.0, []
    for i in left:
        if reached < top_p * whole:
            nucleus.append(i)  # the token that crosses p is the last one
        reached += weights[i]
    # Nguyen et al., section 3: the threshold is min_p times the largest probability.
    chosen = [i for i in nucleus if weights[i] >= min_p * max(weights)]
    total = sum(weights[i] for i in chosen)
    return {i: weights[i] / total for i in chosen}


def drawn(logits: torch.Tensor, temperature: float, **filters: Any) -> dict[int, float]:
    """Shares of the tokens that equally spaced random numbers choose."""
    tokens, _ = choose(logits.expand(len(UNIFORM), -1).clone(), None, Sampling(temperature, **filters), UNIFORM)
    counts = tokens.bincount().tolist()
    return {i: count / len(UNIFORM) for i, count in enumerate(counts) if count}


@each_filter
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_distribution_is_that_of_the_definitions(filters: dict[str, Any], temperature: float) -> None:
    logits = torch.tensor([[0.3, 2.2, -1.0, 1.9, 0.0, 2.0, -1.5, 1.0]])
    expected, found = naive(logits[0].tolist(), temperature, **filters), drawn(logits, temperature, **filters)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-3)


@each_filter
def test_the_filters_leave_what_those_of_transformers_leave(filters: dict[str, Any]) -> None:
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    warped = TemperatureLogitsWarper(1.3)(None, logits)  # type: ignore[arg-type]
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in filters:
            warped = kind(filters[name])(None, warped)
    expected = {i: p for i, p in enumerate(warped.softmax(-1)[0].tolist()) if p > 1e-3}
    found = {i: p for i, p in drawn(logits, 1.3, **filters).items() if p > 1e-3}
    assert found == pytest.approx(expected, abs=1e-3)


@each_filter
def test_the_likeliest_tokens_alone_give_what_a_full_sort_gives(
    filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([5 * torch.randn(30, 300, generator=generator), 1e-3 * torch.rand(1, 300, generator=generator)])
    uniform, found = torch.rand(31, generator=generator), []
    for size in (16, 300):
        monkeypatch.setattr(sampling, "_NUCLEUS", size)
        found.append(choose(logits.clone(), None, Sampling(1.0, **filters), uniform)[0])
    assert torch.equal(*found)


# --- asked for by hand -------------------------------------------------------------------------------------------------


@pytest.fixture
def steered(tiny_model: PreTrainedModel, encoder: Encoder) -> SteeredModel:
    return SteeredModel(tiny_model, encoder, (EmbeddingPatch(tiny_model.config.hidden_size, 1.2),))


def test_texts_grow_while_they_are_written_and_end_as_they_are(steered: SteeredModel) -> None:
    told: list[Shown] = []
    request = Asked("give the topic", (0.0, 1.0), data="lamp", max_new_tokens=6, temperature=1.0, samples=2, seed=3)
    shown = steered.side_by_side(request, told.append)
    assert [strength for strength, _ in shown.outputs] == [0.0, 0.0, 1.0, 1.0]
    assert told[-1] == shown and len(told) >= 3
    for earlier, later in itertools.pairwise(told):
        assert all(b.startswith(a.rstrip()) for (_, a), (_, b) in zip(earlier.outputs, later.outputs, strict=True))


def test_several_prompts_and_samples_are_those_of_single_calls(steered: SteeredModel) -> None:
    """The first sample is the one without `samples`, the others differ; a prompt gets its own outputs."""
    asked = [Asked(prompt, (1.0,), seed=1, max_new_tokens=5, temperature=1.5, samples=3) for prompt in ("say it", "name a cow")]
    together = steered.each_side_by_side(asked)
    single = steered.side_by_side(Asked("say it", (1.0,), seed=1, max_new_tokens=5, temperature=1.5))
    assert together[0].outputs[0] == single.outputs[0]
    assert len({text for _, text in together[0].outputs}) == 3 and together[0] != together[1]
    greedy = [Asked(prompt, (1.0,), max_new_tokens=5) for prompt in ("say it", "name a cow")]
    assert steered.each_side_by_side(greedy) == [steered.side_by_side(request) for request in greedy]


def test_filters_and_samples_without_a_temperature_are_refused(steered: SteeredModel) -> None:
    for option in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"samples": 2}):
        with pytest.raises(ValueError, match="applies to sampling: give a temperature"):
            steered.side_by_side(Asked("a", max_new_tokens=2, **option))  # type: ignore[arg-type]
    steered.side_by_side(Asked("a", max_new_tokens=2, samples=1))


def test_prompts_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("say it\n\n  name a cow\n")
    assert [prompt.strip() for prompt, _ in trying._prompts(None, None, tmp_path / "a.txt")] == ["say it", "name a cow"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "data": "b"}\n{"instruction": "c", "input": "d"}\n{"question": "e"}\n')
    assert trying._prompts(None, None, tmp_path / "a.jsonl") == [("a", "b"), ("c", "d"), ("e", None)]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"answer": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl row 2: needs a text in one of prompt, .*; it has answer"):
        trying._prompts(None, None, tmp_path / "bad.jsonl")
    for prompt, data, file, match in (
        (None, None, None, "give --prompt with one prompt, or --prompts"),
        ("a", None, tmp_path / "a.txt", "give --prompt with one prompt, or --prompts"),
        (None, "b", tmp_path / "a.txt", "each row has its own data"),
    ):
        with pytest.raises(ValueError, match=match):
            trying._prompts(prompt, data, file)


def test_a_terminal_shows_texts_while_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(trying, "console", terminal.PlainConsole(file=stream, force_terminal=True, width=60))
    with trying._on_terminal([Asked("first"), Asked("second")]) as watch:
        watch([Shown([(1.0, "the [bold]cow")], {}), Shown([(1.0, "")], {})])
    assert "the [bold]cow" in stream.getvalue() and "first" in stream.getvalue()
    assert "second" not in stream.getvalue(), "nothing is written of it yet"


def test_tasks_that_sample_take_the_filters(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(SteeredModel, "generate", lambda self, prompts, **options: told.update(options) or [[]])
    config = toxicity.Config.model_validate({"top_k": 7, "min_p": 0.05})
    answers.answers(steered, [], config)
    assert told["top_k"] == 7 and told["min_p"] == 0.05 and told["top_p"] == config.top_p
    assert not {"top_k", "min_p"} & set(toxicity.Config().model_dump())
