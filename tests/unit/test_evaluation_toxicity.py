"""Toxicity as published: several completions of a prompt, toxic and harmless prompts, a judge, and a model that reads."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import pandas
import pytest
import torch
from pydantic import ValidationError

from steerlab import models
from steerlab.evaluation.judging import scorers
from steerlab.evaluation.statistics import seeds, stored
from steerlab.evaluation.statistics.metrics import TOO_LONG, Result
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.statistics.written import Written
from steerlab.evaluation.tasks.harm import toxicity
from steerlab.evaluation.tasks.style import sentiment
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import INSTRUCTION, Message, Part
from steerlab.job import DataSet
from steerlab.models import ModelFacts
from steerlab.run import texts_judged
from steerlab.steered.language import SteeredModel

PROMPTS = {"the cow": 0.9, "the old dog and": 0.5, "the cat and the duck": 0.49, "the big cow": None}
"""Prompts of the published form, and their toxicity; the published file lacks it for some."""
FACTS = ModelFacts("LlamaForCausalLM", 64, 2, 100, 1000, 256, True)


@pytest.fixture
def prompts(tmp_path: Path) -> DataSet:
    rows = [{"prompt": {"text": text, "toxicity": score, "threat": None}} for text, score in PROMPTS.items()]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rename = {"prompt.text": "text", "prompt.toxicity": "prompt_toxicity"}
    return DataSet(source=str(tmp_path / "prompts.jsonl"), format="text", rename=rename)


@pytest.fixture
def plain(tiny_model, encoder: Encoder) -> SteeredModel:
    return SteeredModel(tiny_model, encoder)


@pytest.fixture
def toxic_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer whose probability is the share of words that are `the` or longer than three letters: different for each text."""

    def probability(texts: list[str]) -> list[float | None]:
        return [sum(len(word) > 3 for word in text.split()) / max(1, len(text.split())) for text in texts]

    monkeypatch.setattr(toxicity, "_classifier", lambda *_: probability)


def by_item(result: Result, metric: str) -> dict[str, float | None]:
    own = [o for o in result.observations if o.metric == metric]
    assert len({o.id for o in own}) == len(own), "each item counts once"
    return {o.id: o.value for o in own}


def test_the_completions_of_a_prompt_are_one_item(plain: SteeredModel, prompts: DataSet, toxic_words: None) -> None:
    config = toxicity.Config(prompts=prompts, completions=5, top_p=1.0, max_new_tokens=6, threshold=0.3)
    result = toxicity.run(plain, config)
    probabilities: dict[str, list[float]] = defaultdict(list)
    for row in result.samples:
        probabilities[str(row["id"])].append(float(row["toxic_probability"]))  # type: ignore[arg-type]
    assert [len(own) for own in probabilities.values()] == [5] * 4
    assert [row["completion"] for row in result.samples] == [0, 1, 2, 3, 4] * 4
    assert len({row["continuation"] for row in result.samples}) > 10, "they are sampled one by one"
    toxic = {item: [p > 0.3 for p in own] for item, own in probabilities.items()}
    assert any(0 < sum(own) < 5 for own in toxic.values()), "the case must tell any from all"
    assert by_item(result, "toxicity/share") == {i: pytest.approx(sum(own) / 5) for i, own in toxic.items()}
    assert by_item(result, "toxicity/score") == {i: pytest.approx(sum(own) / 5) for i, own in probabilities.items()}
    assert by_item(result, "toxicity/any") == {i: float(any(own)) for i, own in toxic.items()}
    assert by_item(result, "toxicity/worst") == {i: pytest.approx(max(own)) for i, own in probabilities.items()}
    assert by_item(result, "toxicity/unscored") == dict.fromkeys(toxic, 0.0)
    assert summarise_all(result)[1.0]["toxicity/share"].n == 4


def test_what_cannot_be_judged_does_not_count_among_the_completions() -> None:
    """An empty continuation beside a toxic one, a prompt whose continuations are all empty, and one that does not fit."""
    written = [Written(item, 1.0, "p", "t") for item in "aabbcc"] + [Written("a", 0.0, "p", "t")]
    scores = [None, 0.8, None, None, TOO_LONG, TOO_LONG, 0.1]
    found = toxicity.of_prompts(written, scores, 0.5)
    both = {"any": 1.0, "worst": 0.8}
    nothing, too_long = {"any": None, "worst": None}, {"any": TOO_LONG, "worst": TOO_LONG}
    assert found == [both, both, nothing, nothing, too_long, too_long, {"any": 0.0, "worst": 0.1}]


def test_completions_that_cannot_be_scored_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over the completions of a prompt would hide that some of them were empty."""
    scores = {"rude": 0.8, "": None, "long": TOO_LONG}
    monkeypatch.setattr(toxicity.scorers, "profanity", lambda: lambda texts: [scores[text] for text in texts])
    monkeypatch.setattr(toxicity.scorers, "score", lambda score, texts: score(texts))
    texts = (("a", "rude"), ("a", ""), ("b", ""), ("b", ""), ("c", "long"))
    written = [Written(item, 1.0, "p", text) for item, text in texts]
    found = toxicity.scorer(toxicity.Config(completions=2), "cpu")(written)
    values = [[o.value if o.value is not None else o.reason for o in own if o.metric == "toxicity/unscored"] for own in found]
    assert values == [[0.0], [1.0], [1.0], [1.0], [1.0]]
    single = toxicity.scorer(toxicity.Config(), "cpu")(written)
    assert not [o for own in single for o in own if o.metric.endswith("unscored")], "the number of items tells it there"


def test_toxic_and_harmless_prompts_apart(plain: SteeredModel, prompts: DataSet, toxic_words: None) -> None:
    config = toxicity.Config(
        prompts=prompts, prompt_toxicity="prompt_toxicity", max_new_tokens=6, threshold=0.1, strengths=(1.0,)
    )
    toxicity.check(config, FACTS)
    result = toxicity.run(plain, config)
    share = by_item(result, "toxicity/share")
    assert by_item(result, "toxicity/share_after_toxic") == {i: share[i] for i in ("0", "1")}, "0.5 is toxic"
    assert by_item(result, "toxicity/share_after_harmless") == {"2": share["2"]}, "null is neither"
    assert [row["prompt_toxicity"] for row in result.samples] == [0.9, 0.5, 0.49, None]
    # A file of an earlier run as prompts, whose field has the name of a field of the samples, and a CSV file's text.
    again = prompts.model_copy(update={"rename": {"prompt.text": "text", "prompt.toxicity": "toxic_probability"}})
    config_again = config.model_copy(update={"prompts": again, "prompt_toxicity": "toxic_probability"})
    assert by_item(toxicity.run(plain, config_again), "toxicity/share") == share
    assert toxicity.is_toxic(Written("0", 1.0, "", "", {"score": "0.7"}), "score") is True
    assert {"share_after_toxic", "share_after_harmless"} <= {measure.name for measure in toxicity.measures(config)}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("toxicity", "prompt_toxicity: row 0 has no field 'toxicity'; it has text, nulls, percent"),
        ("text", r"prompt_toxicity: row 0 has a text \('the cow'\) in 'text'; a number from 0 to 1"),
        ("nulls", "no row of the prompts has a number in 'nulls'"),
        ("percent", r"row 0 has a number \(90\) in 'percent'"),
    ],
)
def test_rows_without_a_toxicity_are_refused_before_the_start(field: str, message: str, tmp_path: Path) -> None:
    rows = [{"text": text, "nulls": None, "percent": 90} for text in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSet(source=str(tmp_path / "rows.jsonl"), format="text")
    with pytest.raises(ValueError, match=message):
        toxicity.check(toxicity.Config(prompts=data, prompt_toxicity=field), FACTS)


def test_a_judge_is_asked_about_each_continuation(
    plain: SteeredModel, prompts: DataSet, toxic_words: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def yes_or_no(source, question, device):
        assert source.endswith("judge")
        return lambda texts: [asked.append(question(text)) or float("cow" in text) for text in texts]

    monkeypatch.setattr(scorers, "yes_or_no", yes_or_no)
    config = toxicity.Config(
        prompts=prompts, judge_source="judge", question="Rude? {text}", completions=2, top_p=1.0, max_new_tokens=6
    )
    result = toxicity.run(plain, config)
    texts: dict[str, list[str]] = defaultdict(list)
    for row in result.samples:
        texts[str(row["id"])].append(str(row["continuation"]))
    written = {item: [text for text in own if text.strip()] for item, own in texts.items()}
    assert asked == [f"Rude? {text}" for own in written.values() for text in own], "an empty text is not shown to a judge"
    assert by_item(result, "toxicity/judged") == {
        item: pytest.approx(sum("cow" in text for text in own) / len(own)) for item, own in written.items() if own
    }


def test_another_model_reads_the_texts(plain: SteeredModel, prompts: DataSet, tiny_dir: Path, tmp_path: Path) -> None:
    """Against log-probabilities of the other model, computed here token by token."""
    other = models.load_model(tiny_dir, seed=5)
    models.save_model(other, models.load_tokenizer(tiny_dir), tmp_path / "other")
    config = toxicity.Config(prompts=prompts, reader_source=str(tmp_path / "other"), max_new_tokens=6, strengths=(1.0,))
    toxicity.check(config, FACTS)
    result = toxicity.run(plain, config)
    nats, tokens = 0.0, 0
    for row in result.samples:
        before, whole = (
            plain.encoder.encode((Message("text", (Part(text, INSTRUCTION),)),)).input_ids
            for text in (str(row["prompt"]), f"{row['prompt']} {row['continuation']}")
        )
        assert whole[: len(before)] == before
        with torch.no_grad():
            log_probs = other(torch.tensor([whole])).logits[0].log_softmax(-1)
        nats -= sum(float(log_probs[t - 1, whole[t]]) for t in range(len(before), len(whole)))
        tokens += len(whole) - len(before)
    metrics = summarise_all(result)[1.0]
    assert metrics["toxicity/reader_perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["toxicity/base_perplexity"].value != pytest.approx(math.exp(nats / tokens), rel=1e-2)


@pytest.mark.parametrize("task", [toxicity, sentiment])
def test_a_reader_that_is_no_language_model_is_refused_before_the_start(task, tmp_path: Path, digits_dir: Path) -> None:
    for source in (tmp_path, digits_dir):
        with pytest.raises(ValueError, match="reader_source: "):
            task.check(task.Config(reader_source=str(source)), FACTS)


def test_judging_the_file_of_a_run_counts_each_prompt_once(
    plain: SteeredModel, prompts: DataSet, toxic_words: None, tmp_path: Path
) -> None:
    """The completions are rows of the file with one id; a file of one's own may use ids in any way, so its rows count."""
    config = toxicity.Config(
        prompts=prompts, completions=3, top_p=1.0, max_new_tokens=6, prompt_toxicity="prompt_toxicity", threshold=0.3
    )
    config = config.model_copy(update={"seeds": (0, 1), "seed": 0})
    result = seeds.pooled(seeds.run(toxicity.TASK, plain, config))
    outcome = stored.Outcome(result.observations, result.samples, metrics={1.0: {}})
    stored.write(tmp_path, outcome, {"task": config.model_dump(mode="json")})
    file = tmp_path / "generations.parquet"
    expected, judged = summarise_all(result)[1.0], texts_judged.judge(file, config, texts_judged.read(file)).metrics[1.0]
    names = [
        f"toxicity/{name}"
        for name in ("share", "score", "any", "worst", "unscored", "share_after_toxic", "share_after_harmless")
    ]
    names += [f"toxicity/{name}" for name in ("empty", "repetition", "letters")]
    for name in names:
        assert tuple(judged[name]) == pytest.approx(tuple(expected[name])), name
    # The same rows as another program writes them: without metadata, and with texts in place of numbers.
    pandas.read_parquet(file).to_csv(tmp_path / "copy.csv", index=False)
    copy = texts_judged.judge(tmp_path / "copy.csv", config, texts_judged.read(tmp_path / "copy.csv")).metrics[1.0]
    assert [copy[name].n for name in names] == [expected[name].n for name in names]
    assert copy["toxicity/any"].value == pytest.approx(expected["toxicity/any"].value)
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text("".join(json.dumps({"id": "mine", "text": text}) + "\n" for text in PROMPTS))
    config = toxicity.Config()
    assert texts_judged.judge(foreign, config, texts_judged.read(foreign)).metrics[1.0]["toxicity/share"].n == 4


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValidationError, match="at temperature 0 all of them are the same text"):
        toxicity.Config(completions=2, temperature=0)
    with pytest.raises(ValidationError, match=r"question has no \{text\}"):
        toxicity.Config(question="Is it toxic?")


def test_settings_that_are_not_used_leave_the_key_of_old_results() -> None:
    new = {"completions", "prompt_toxicity", "judge_source", "question", "reader_source"}
    assert not new & toxicity.Config().model_dump(mode="json").keys()
