"""Is a concept present in what the model writes?

AcT (arXiv 2410.23054) induces concepts: the prompt "Once upon a time" is continued 500 times, 50 tokens each, at temperature 1
and top-p 0.6, and an instruction model is asked about each text. Three scorers, from cheap to able; each gives its metric only
where it is configured:

    concept/words        continuations that hold one of `words` as a whole word, whatever its case and regular inflection
    concept/similarity   mean cosine between a continuation and the concept (or `examples` of it), as sentence embeddings
    concept/judged       continuations that a judge (yes or no) or a classifier finds to be about the concept
    concept/empty        empty continuations
    concept/distinct_1..3, concept/base_perplexity        see `fluency`

`words` takes plurals, -ed and -ing with English spelling (`fairy`: fairies; `stop`: stopped); irregular forms (mice, ran) are
words of their own. Only the continuation is scored; an empty one cannot be judged, nor can one to which the judge says
neither Yes nor No.

Departures: the judge's question is ours, the authors' is not published; the default scorer needs no hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from steerlab.evaluation.asking.answers import with_empty
from steerlab.evaluation.asking.continuation import ContinuationConfig, continue_texts, sample
from steerlab.evaluation.asking.items import Numbered, choose
from steerlab.evaluation.judging import fluency, scorers
from steerlab.evaluation.statistics.measures import Measure, empty, likeness, share
from steerlab.evaluation.statistics.metrics import Result, Score, Task, about, observed, plain_texts, spread
from steerlab.job import Source
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

_VOWELS = "aeiou"


class Config(ContinuationConfig):
    """Presence of a concept in continuations."""

    task: Literal["concept"] = "concept"
    """This task."""
    concept: str = Field(min_length=1)
    """The concept in a word or a few, as the judge is asked about it: `fantasy`."""
    prompt: tuple[str, ...] = Field(("Once upon a time",), min_length=1)
    """Beginnings that are continued."""
    samples: int = Field(500, ge=1)
    """Continuations of each prompt; `limit` chooses among all of them."""
    max_new_tokens: int = Field(50, ge=1)
    """Longest continuation in tokens."""
    top_p: float = Field(0.6, gt=0, le=1)
    """Nucleus of sampling."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divides the logits of tokens that occurred; 1 is none."""
    words: tuple[str, ...] = ()
    """Words or phrases that show the concept; empty leaves `concept/words` out."""
    embedding_source: Source | None = scorers.MINILM
    """Sentence encoder (mean over tokens); null leaves `concept/similarity` out."""
    examples: tuple[str, ...] = ()
    """Sentences that show the concept, for the similarity; empty compares with the concept's own text."""
    judge_source: Source | None = None
    """Causal language model that is asked about each continuation."""
    question: str = "Text: {text}\n\nIs this text about {concept}? Answer with Yes or No."
    """What the judge is asked; {text} and {concept} are filled in."""
    classifier_source: Source | None = None
    """Hugging Face sequence classifier, in place of a judge."""
    classifier_label: str | None = None
    """The classifier's class that means that the concept is present: more likely than not counts as present."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.judge_source and self.classifier_source:
            raise ValueError("judge_source and classifier_source both give concept/judged: choose one of them")
        if bool(self.classifier_source) != bool(self.classifier_label):
            raise ValueError("classifier_source and classifier_label belong together: one of them is missing")
        if not (self.words or self.embedding_source or self.judge_source or self.classifier_source):
            raise ValueError("nothing would be scored: set words, embedding_source, judge_source or classifier_source")
        if not all(text.strip() for text in (*self.prompt, *self.words, *self.examples)):
            raise ValueError("an entry of prompt, words or examples is empty")
        return self


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured; the task asks whether a concept is there, as methods that induce one are judged."""
    found = [share("words", "higher")] if config.words else []
    found += [likeness("similarity")] if config.embedding_source else []
    found += [share("judged", "higher")] if config.classifier_source or config.judge_source else []
    return (*found, empty(), *fluency.measures())


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse scorers that are not there, do not know the class or cannot say Yes and No. Raises ValueError."""
    if config.embedding_source is not None:
        with about("embedding_source"):
            scorers.check_embedder(config.embedding_source)
    if config.classifier_source is not None and config.classifier_label is not None:
        with about("classifier_source"):
            scorers.check_classifier(config.classifier_source, config.classifier_label)
    if config.judge_source is not None:
        with about("judge_source"):
            scorers.check_asked(config.judge_source, ("Yes", "No"))


def run(model: SteeredModel, config: Config) -> Result:
    """Continue the prompts at every strength and look for the concept."""
    judges = _scorers(model, config)
    items = _items(config)
    ids, prompts = [item.id for item in items], [str(item.row["text"]) for item in items]
    outputs = continue_texts(model, prompts, config)
    observations, samples = [], []
    for strength, row in zip(config.strengths, outputs, strict=True):
        texts = [output.text for output in row]
        scored = {metric: scorers.score(scorer, texts) for metric, scorer in judges.items()}
        for i, (item_id, prompt, output) in enumerate(zip(ids, prompts, row, strict=True)):
            found: dict[str, Score] = {metric: values[i] for metric, values in scored.items()}
            own = [observed(f"concept/{metric}", item_id, value, strength) for metric, value in found.items()]
            observations += with_empty("concept/empty", item_id, [output], own, strength)
            samples.append(sample(item_id, strength, prompt, output.text, concept=config.concept, **found))
    observations += fluency.observe("concept", model, ids, prompts, outputs, config.strengths)
    return Result(observations, spread(samples), measures(config))


def holds_a_word(words: Sequence[str]) -> scorers.Scorer:
    """Return the scorer that says 1 where a text holds one of the words or phrases, 0 otherwise."""
    forms = sorted({form for word in words for form in inflections(word.lower())}, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, forms))})(?!\w)")
    return lambda texts: [float(pattern.search(text.lower()) is not None) for text in texts]


def inflections(word: str) -> set[str]:
    """Return a lower-case word with its regular plural, -ed and -ing forms; of a phrase, the last word is inflected."""
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
    """Say whether a word's last letter is doubled: one vowel between consonants (stop, but not play or dream)."""
    last = word.split()[-1] if word.split() else ""
    return re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", last) is not None


def _items(config: Config) -> list[Numbered]:
    texts = [Numbered(f"{p}/{s}", {"text": text}) for p, text in enumerate(config.prompt) for s in range(config.samples)]
    return choose(texts, config.limit, config.seed)


def _scorers(model: SteeredModel, config: Config) -> dict[str, scorers.Scorer]:
    """Load what is configured, before anything is generated: metric -> scorer."""
    found: dict[str, scorers.Scorer] = {}
    if config.words:
        found["words"] = holds_a_word(config.words)
    if config.embedding_source:
        found["similarity"] = scorers.similarity(config.embedding_source, config.examples or (config.concept,), model.device)
    if config.classifier_source and config.classifier_label:
        judge = scorers.classifier(config.classifier_source, config.classifier_label, model.device)
        found["judged"] = scorers.more_likely(judge)
    if config.judge_source:
        asked = config.question.replace("{concept}", config.concept)
        found["judged"] = scorers.yes_or_no(config.judge_source, lambda text: asked.replace("{text}", text), model.device)
    return found


TASK = Task(Config, run, measures, check=check, chats=plain_texts)
