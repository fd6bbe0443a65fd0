"""Whether the model's continuations are about a concept.

AcT (arXiv 2410.23054) induces concepts: the prompt "Once upon a time" is continued 500 times, 50 tokens each, at temperature 1
and top-p 0.6, and an instruction-tuned model is asked about each text. There are three scorers, from the cheapest to the most
capable; each metric is reported only if its scorer is configured:

    concept/words        continuations that contain one of `words` as a whole word, in any case and regular inflection
    concept/similarity   mean cosine between the sentence embeddings of a continuation and of the concept (or `examples`)
    concept/judged       continuations that a judge (yes or no) or a classifier considers to be about the concept
    concept/empty, concept/unfinished, concept/repetition, concept/letters        see `legibility`
    concept/distinct_1..3, concept/base_perplexity, concept/reader_perplexity        see `fluency`

`words` also matches regular plurals, -ed and -ing forms in English spelling (`fairy`: fairies; `stop`: stopped); list irregular
forms (mice, ran) as separate words. Only the continuation is scored. It cannot be judged if it is empty, or if the judge
answers neither Yes nor No.

Departures: the judge's question is this repository's, because the authors' is not published; the default scorer needs no hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import fate, with_legibility
from steerlab.evaluation.asking.continuation import ContinuationConfig, continue_texts, sample
from steerlab.evaluation.asking.items import Numbered, choose
from steerlab.evaluation.judging import fluency, scorers
from steerlab.evaluation.statistics.measures import Measure, likeness, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Scorer, Task, about, observed, plain_texts, score_of
from steerlab.evaluation.statistics.written import Written
from steerlab.job import Source
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

_VOWELS = "aeiou"


class Config(ContinuationConfig):
    """Presence of a concept in continuations."""

    task: Literal["concept"] = "concept"
    """This task."""
    concept: str = Field(min_length=1)
    """The concept in one or a few words, for the judge's question: `fantasy`."""
    prompt: tuple[str, ...] = Field(("Once upon a time",), min_length=1)
    """Beginnings of texts that are continued."""
    samples: int = Field(500, ge=1)
    """Number of continuations of each prompt; `limit` chooses among all of them."""
    max_new_tokens: int = Field(50, ge=1)
    """Longest continuation in tokens."""
    top_p: float = Field(0.6, gt=0, le=1)
    """Probability mass of nucleus sampling; 1 samples from all tokens."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Factor that lowers the logits of tokens that already occurred; 1 changes nothing."""
    words: tuple[str, ...] = ()
    """Words or phrases that indicate the concept; empty skips `concept/words`."""
    embedding_source: Source | None = scorers.MINILM
    """Sentence encoder (mean over tokens); null skips `concept/similarity`."""
    examples: tuple[str, ...] = ()
    """Sentences about the concept, for the similarity; empty compares with the text of `concept`."""
    judge_source: Source | None = None
    """Causal language model that judges each continuation; null uses none."""
    question: str = "Text: {text}\n\nIs this text about {concept}? Answer with Yes or No."
    """The question to the judge; {text} and {concept} are replaced."""
    classifier_source: Source | None = None
    """Hugging Face sequence classifier, instead of a judge."""
    classifier_label: str | None = None
    """The classifier's class for texts about the concept; a probability above 1/2 counts as present."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.judge_source and self.classifier_source:
            raise ValueError("judge_source and classifier_source both give concept/judged: choose one of them")
        if bool(self.classifier_source) != bool(self.classifier_label):
            raise ValueError("classifier_source and classifier_label belong together: one of them is missing")
        if not (self.words or self.embedding_source or self.judge_source or self.classifier_source):
            raise ValueError("no scorer is set: give words, embedding_source, judge_source or classifier_source")
        if not all(text.strip() for text in (*self.prompt, *self.words, *self.examples)):
            raise ValueError("an entry of prompt, words or examples is empty")
        return self


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; more of the concept is better, as for methods that induce one."""
    configured = [share("words", "higher")] if config.words else []
    configured += [likeness("similarity")] if config.embedding_source else []
    configured += [share("judged", "higher")] if config.classifier_source or config.judge_source else []
    return (*configured, *legibility.measures(always_cut=True), *fluency.measures(config.reader_source))


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse scorers that do not exist, lack the class or have no tokens for Yes and No. Raises ValueError."""
    fluency.check(config.reader_source)
    if config.embedding_source is not None:
        with about("embedding_source"):
            scorers.check_embedder(config.embedding_source)
    if config.classifier_source is not None and config.classifier_label is not None:
        with about("classifier_source"):
            scorers.check_classifier(config.classifier_source, config.classifier_label)
    if config.judge_source is not None:
        with about("judge_source"):
            scorers.check_judge(config.judge_source, ("Yes", "No"))


def run(model: SteeredModel, config: Config) -> Result:
    """Continue the prompts at every strength and score the presence of the concept in the continuations."""
    # Loaded before anything is generated, so that a missing model is reported within seconds.
    judge_texts = scorer(config, model.device)
    items = _items(config)
    ids, prompts = [item.id for item in items], [str(item.row["text"]) for item in items]
    outputs = continue_texts(model, prompts, config)
    observations, samples = [], []
    for strength, row in zip(config.strengths, outputs, strict=True):
        written = [Written(i, strength, p, output.text) for i, p, output in zip(ids, prompts, row, strict=True)]
        for text, output, own in zip(written, row, judge_texts(written), strict=True):
            observations += with_legibility("concept", text.id, [output], own, strength)
            scores = {o.metric.partition("/")[2]: score_of(own, o.metric) for o in own}
            shown = sample(text.id, strength, text.prompt, text.text, concept=config.concept, **scores)
            samples.append({**shown, **fate(output)})
    observations += fluency.observe("concept", model, ids, prompts, outputs, config.strengths, config.reader_source)
    return Result(observations, samples, measures(config))


def scorer(config: Config, device: torch.device | str) -> Scorer:
    """Return the scorer of continuations, with its models loaded."""
    judges = _scorers(config, device)

    def judge_texts(written: Sequence[Written]) -> list[list[Observation]]:
        texts = [text.text for text in written]
        scored = {metric: scorers.score(judge, texts) for metric, judge in judges.items()}
        return [
            [observed(f"concept/{metric}", text.id, values[i], text.strength) for metric, values in scored.items()]
            for i, text in enumerate(written)
        ]

    return judge_texts


def holds_a_word(words: Sequence[str]) -> scorers.Scorer:
    """Return the scorer that gives 1 if a text contains one of the words or phrases, otherwise 0."""
    forms = sorted({form for word in words for form in inflections(word.lower())}, key=len, reverse=True)
    # Lookarounds are used instead of \b, since a word of the list may begin or end with a mark ("C++").
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, forms))})(?!\w)")
    return lambda texts: [float(pattern.search(text.lower()) is not None) for text in texts]


def inflections(word: str) -> set[str]:
    """Return a lower-case word with its regular plural, -ed and -ing forms; in a phrase the last word is inflected."""
    # English spelling: fairy, fairies; box, boxes; hope, hoping; stop, stopped.
    consonant_y = word.endswith("y") and word[-2:-1] not in _VOWELS
    if consonant_y:
        plural, past = f"{word[:-1]}ies", f"{word[:-1]}ied"
    else:
        plural = word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")
        past = word + ("d" if word.endswith("e") else "ed")
    stem = word[:-1] if word.endswith("e") and not word.endswith("ee") else word
    if _doubles(word):
        stem = word + word[-1]
        past = f"{stem}ed"
    return {word, plural, past, f"{stem}ing"}


def _doubles(word: str) -> bool:
    """Return whether the last letter is doubled before -ed: one vowel between consonants (stop, but not play or dream)."""
    last = word.split()[-1] if word.split() else ""
    return re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", last) is not None


def _items(config: Config) -> list[Numbered]:
    texts = [Numbered(f"{p}/{s}", {"text": text}) for p, text in enumerate(config.prompt) for s in range(config.samples)]
    return choose(texts, config.limit, config.rows_seed)


def _scorers(config: Config, device: torch.device | str) -> dict[str, scorers.Scorer]:
    """Load the configured scorers: metric -> scorer."""
    loaded: dict[str, scorers.Scorer] = {}
    if config.words:
        loaded["words"] = holds_a_word(config.words)
    if config.embedding_source:
        loaded["similarity"] = scorers.similarity(config.embedding_source, config.examples or (config.concept,), device)
    if config.classifier_source and config.classifier_label:
        judge = scorers.classifier(config.classifier_source, config.classifier_label, device)
        loaded["judged"] = scorers.more_likely(judge)
    if config.judge_source:
        question = config.question.replace("{concept}", config.concept)
        loaded["judged"] = scorers.yes_or_no(config.judge_source, lambda text: question.replace("{text}", text), device)
    return loaded


TASK = Task(Config, run, measures, check=check, chats=plain_texts, scorer=scorer, example={"concept": "sea"})
