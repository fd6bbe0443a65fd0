"""How often is the model's answer better than the same model's without the patch, or than a given one?

Every prompt is answered at every strength, and each answer stands against that of strength 0 (or the reference answer of its
row). With `best_of` N several answers are drawn, and the one stands that an implicit reward ranks first: what a reward buys
without any training, for N times the cost. One judge decides, and gives the metric its name:

    win_rate/implicit         an implicit reward: which of the two a model trained on preferences would rather write than the
                              model that it was trained from (`implicit_source`). No judge from outside is needed; it is one
                              only as far as that training went, and flatters a model that is judged by itself
    win_rate/reward_model     a reward model: a Hugging Face sequence classifier with one output (`judge_source`)
    win_rate/language_model   a causal language model that is asked, in both orders (`judge_source`)

1 is a win, 0 a loss, a tie a half; the interval is Wilson's. Beside it stands

    win_rate/ties             pairs without a winner: equal texts, equal rewards, orders that disagree
    win_rate/longer           the win rate of a judge that only counts tokens: judges favour length
    win_rate/answer_tokens    mean length of the answers, as the model's own tokenizer reads them
    win_rate/opponent_tokens  that of what they stand against
    win_rate/unfinished       answers cut at `max_new_tokens`
    win_rate/empty            empty answers

A verdict that cannot be read is counted as unparsable; a prompt that does not fit into the model's context, and a pair that
does not fit into the judge's, as too long. Against itself
the model at strength 0 ties everywhere. All of it is deterministic for a given seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from steerlab import models
from steerlab.data import sources
from steerlab.evaluation.asking.items import ALPACA, Numbered, data_rows, has_input
from steerlab.evaluation.judging import judges, scorers
from steerlab.evaluation.judging.judges import Answer, Pair, Verdict
from steerlab.evaluation.statistics.measures import Measure, empty, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, about, observed, spread, too_long
from steerlab.guards import saved
from steerlab.job import DataSet, Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered import language
from steerlab.steered.language import SteeredModel

FORMATS = ("instruction", "text", "preference")


def require_prompts(data: DataSet) -> DataSet:
    """Return a data set of prompts. Raises ValueError when its format is another."""
    if data.format not in FORMATS:
        raise ValueError(f"prompts are rows of one of the formats {', '.join(FORMATS)}: set prompts.format, not {data.format}")
    return data


class Config(TaskConfig):
    """Pairwise comparison with the model at strength 0, or with reference answers."""

    task: Literal["win_rate"] = "win_rate"
    """This task."""
    prompts: Annotated[DataSet, AfterValidator(require_prompts)] = DataSet.model_validate({"source": ALPACA})
    """Instruction rows, whose output is the reference; pairs, whose chosen response is; or plain texts."""
    against: Literal["base", "reference"] = "base"
    """base: the same model at strength 0; reference: the row's output, or its chosen response."""
    implicit_source: Source | None = None
    """An artifact, an exported folder or a model whose log-likelihood ratio to its base is the reward."""
    implicit_base_source: Source | None = None
    """That base; null takes the same model at strength 0, which needs a patch on it."""
    judge_source: Source | None = None
    """A reward model (a sequence classifier with one output) or a causal language model, as its config.json says."""
    question: str = judges.QUESTION
    """What a language model is asked; {prompt}, {first} and {second} are filled in."""
    both_orders: bool = True
    """Ask a language model in both orders and call it a tie where they disagree; false asks once, in an order drawn by the
    seed."""
    best_of: int = Field(1, ge=1)
    """Answers that are drawn for each prompt; their opponent is one of strength 0. Needs a temperature."""
    best_by_source: Source | None = None
    """What ranks them: a patched model as in `implicit_source`. The judge should be another, or it judges its own choice."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy. Both answers to a prompt are drawn with the same numbers."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of sampling."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if bool(self.judge_source) == bool(self.implicit_source):
            raise ValueError("one judge decides: set either implicit_source or judge_source")
        if self.implicit_base_source and not self.implicit_source:
            raise ValueError("implicit_base_source is the base of implicit_source, which is missing")
        if self.against == "reference" and self.prompts.format == "text":
            raise ValueError("against reference needs answers: set prompts.format to instruction or preference")
        if (self.best_of > 1) != bool(self.best_by_source):
            raise ValueError("best_of more than one needs best_by_source, which ranks the answers, and the other way round")
        if self.best_of > 1 and not self.temperature:
            raise ValueError("best_of draws answers: set a temperature, since greedy ones are all the same")
        missing = [place for place in judges.PLACES if f"{{{place}}}" not in self.question]
        if missing:
            raise ValueError(f"question lacks {', '.join(f'{{{place}}}' for place in missing)}")
        if not self.judge_source and (not self.both_orders or self.question != judges.QUESTION):
            raise ValueError("question and both_orders are for a language model: set judge_source")
        return self


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured; wins are named after the judge, which may have preferred the longer answers."""
    judges = ("implicit",) if config.implicit_source is not None else ("language_model", "reward_model")
    return (
        *(share(judge, "higher", "share") for judge in judges),
        share("ties", None),
        share("longer", None, "share"),
        Measure("answer_tokens", None, "tokens", low=0.0),
        Measure("opponent_tokens", None, "tokens", low=0.0),
        share("unfinished", "lower"),
        empty(),
    )


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse judges that are not there, or cannot judge. Raises ValueError."""
    for name in ("implicit_source", "implicit_base_source", "best_by_source"):
        source = getattr(config, name)
        if source is not None:
            with about(name):
                scorers.check_model(source)
    if config.judge_source is not None:
        with about("judge_source"):
            if _is_classifier(config.judge_source):
                judges.check_reward_model(config.judge_source)
            else:
                scorers.check_asked(config.judge_source, ("1", "2"))


def run(model: SteeredModel, config: Config) -> Result:
    """Answer every prompt at every strength and have the pairs judged."""
    name, judge = _judge(model, config)
    items = data_rows(config.prompts, config.limit, config.seed)
    pairs = _pairs(model, items, config)
    verdicts = iter(judges.decide(judge, [pair for row in pairs for pair in row]))
    observations, samples = [], []
    for strength, row in zip(config.strengths, pairs, strict=True):
        for item, pair in zip(items, row, strict=True):
            verdict = next(verdicts)
            lengths = [len(model.encoder.tokenizer.encode(a.text, add_special_tokens=False)) for a in pair]
            found = observe(name, item.id, pair, verdict, (lengths[0], lengths[1]), strength)
            observations += list(map(too_long, found)) if any(answer.too_long for answer in pair) else found
            samples.append(_sample(item.id, strength, pair, verdict))
    return Result(observations, spread(samples), measures(config))


def observe(
    judge: str, item_id: str, pair: Pair, verdict: Verdict, num_tokens: tuple[int, int], strength: float = 1.0
) -> list[Observation]:
    """Turn one verdict and the lengths of both answers into observations."""
    own, other = num_tokens
    values = {
        judge: verdict,
        "ties": float(verdict == 0.5) if isinstance(verdict, float) else verdict,
        "longer": 0.5 if own == other else float(own > other),
        "answer_tokens": float(own),
        "opponent_tokens": float(other),
        "unfinished": float(not pair[0].finished),
        "empty": float(not pair[0].text.strip()),
    }
    return [observed(f"win_rate/{name}", item_id, value, strength) for name, value in values.items()]


def _pairs(model: SteeredModel, items: list[Numbered], config: Config) -> list[list[Pair]]:
    """Return each answer with its opponent, indexed [strength][prompt]."""
    asked = [_asked(item.row, config.prompts.format) for item in items]
    base = 0.0 if model.patches else 1.0  # a model without a patch is its own base
    strengths = list(dict.fromkeys((*config.strengths, *((base,) if config.against == "base" else ()))))
    drawn = [_answers(model, asked, strengths, config, number) for number in range(config.best_of)]
    best = _best(model, drawn, config)
    opponents = drawn[0][base] if config.against == "base" else asked
    return [list(zip(best[strength], opponents, strict=True)) for strength in config.strengths]


Answers = dict[float, list[Answer]]
"""Answers to all prompts by strength."""


def _answers(model: SteeredModel, asked: list[Answer], strengths: list[float], config: Config, number: int) -> Answers:
    """Answer every prompt at every strength, for the time `number`."""
    found = model.generate(
        [one.conversation(model.encoder, answered=False) for one in asked],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed * config.best_of + number,
        strengths=strengths,
        skip_long=True,
    )
    return {
        strength: [
            one._replace(text=o.text.strip(), finished=o.finished, too_long=o.too_long)
            for one, o in zip(asked, row, strict=True)
        ]
        for strength, row in zip(strengths, found, strict=True)
    }


def _best(model: SteeredModel, drawn: list[Answers], config: Config) -> Answers:
    """Return the answers with the highest reward; one that cannot be rewarded is the last choice."""
    if config.best_by_source is None:
        return drawn[0]
    policy = _load(config.best_by_source, model)
    if not policy.patches:
        raise ValueError(f"{config.best_by_source} carries no patch, so it gives no implicit reward")
    reward = judges.implicit_reward(policy)

    def best(answers: Sequence[Answer]) -> Answer:
        rewards = [value if isinstance(value, float) else -math.inf for value in reward(answers)]
        return answers[rewards.index(max(rewards))]

    return {
        strength: [best(candidates) for candidates in zip(*(answers[strength] for answers in drawn), strict=True)]
        for strength in drawn[0]
    }


def _judge(model: SteeredModel, config: Config) -> tuple[str, judges.Judge]:
    """Load the judge, before anything is answered, and say what it is."""
    if config.implicit_source is not None:
        policy = _load(config.implicit_source, model)
        if config.implicit_base_source is None and not policy.patches:
            raise ValueError(f"{config.implicit_source} carries no patch to take off: set implicit_base_source")
        reference = None if config.implicit_base_source is None else _load(config.implicit_base_source, policy)
        return "implicit", judges.by_reward(judges.implicit_reward(policy, reference))
    assert config.judge_source is not None
    if not _is_classifier(config.judge_source):
        return "language_model", judges.language_model(
            config.judge_source, config.question, both_orders=config.both_orders, seed=config.seed, device=model.device
        )
    if not config.both_orders or config.question != judges.QUESTION:
        raise ValueError(f"question and both_orders are for a language model, but {config.judge_source} is a reward model")
    return "reward_model", judges.by_reward(judges.reward_model(config.judge_source, model.device))


def _load(source: str, like: SteeredModel) -> SteeredModel:
    """Load a model in the type of another and on its device; where it has no prompt settings of its own, with that one's."""
    dtype = str(like.model.dtype).removeprefix("torch.")
    found = language.load(sources.fetch(source), dtype=dtype, device=like.device, prompt=like.encoder.saved_spec)
    if not isinstance(found, SteeredModel):
        raise ValueError(f"{source} draws images; what answers here is a language model")
    return found


class _Architectures(saved.Shape):
    architectures: list[str] | None = None


def _is_classifier(source: str) -> bool:
    told = saved.read(models.prepare(sources.fetch(source)) / "config.json", _Architectures)
    return any(name.endswith("ForSequenceClassification") for name in told.architectures or ())


def _asked(row: Mapping[str, Any], data_format: str) -> Answer:
    """Return a row's prompt with its reference answer, where it has one; a plain text is an instruction."""
    if data_format == "text":
        return Answer(row["text"], "", "")
    if data_format == "instruction":
        return Answer(str(row["instruction"]), str(row["input"]) if has_input(row) else "", str(row.get("output")).strip())
    prompt, chosen = row["prompt"], row["chosen"].strip()
    if isinstance(prompt, str):
        return Answer(prompt, "", chosen)
    return Answer("", "", chosen, turns=tuple((message["role"], message["content"]) for message in prompt))


def _sample(item_id: str, strength: float, pair: Pair, verdict: Verdict) -> dict[str, object]:
    answer, opponent = pair
    return {
        "id": item_id,
        "strength": strength,
        "prompt": answer.prompt,
        "answer": answer.text,
        "opponent": opponent.text,
        "verdict": verdict,
    }


TASK = Task(Config, run, measures, check=check)
