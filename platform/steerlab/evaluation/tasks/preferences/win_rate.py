"""How often the model's answer is better than that of the same model without the patch, or than a reference answer.

Every prompt is answered at every strength, and each answer is compared with its opponent: the answer at strength 0, or the
reference answer of the row. With `best_of` N, N answers are sampled and the one with the highest implicit reward is compared;
this shows what the reward achieves without any training, at N times the cost. One judge decides and names the metric:

    win_rate/implicit         an implicit reward: how much more likely the answer is under a model that was trained on
                              preferences than under the model before that training (`implicit_source`). It needs no other
                              model, but is only as good as that training, and is biased towards a model that judges itself
    win_rate/reward_model     a reward model: a Hugging Face sequence classifier with one output (`judge_source`)
    win_rate/language_model   a causal language model that is asked which answer is better, in both orders (`judge_source`, or
                              `api` for a judge's API). Additional metrics:
    win_rate/first_shown      how often the answer shown first won; 0.5 over many pairs means no bias for a position
    win_rate/agreement        pairs on which the judge gave the same verdict in both orders

A win counts 1, a loss 0, a tie 0.5; the interval is Wilson's. The task also reports

    win_rate/ties             pairs without a winner: equal texts, equal rewards, orders that disagree, or a tie in both orders
    win_rate/longer           win rate if the longer answer always won: a control, since judges favour long answers
    win_rate/answer_tokens    mean length of the answers in tokens of the model's own tokenizer
    win_rate/opponent_tokens  mean length of the opponents
    win_rate/unfinished       answers cut at `max_new_tokens`
    win_rate/empty, win_rate/repetition, win_rate/letters        see `legibility`

A verdict that cannot be parsed is counted as unparsable. A prompt that does not fit into the model's context, or a pair that
does not fit into the judge's, is counted as too long. At strength 0 the model ties with itself on every prompt. The task is
deterministic for a given seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import SampledConfig
from steerlab.evaluation.asking.items import ALPACA, data_rows
from steerlab.evaluation.judging import answer_rewards, judges, pair_judges, scorers
from steerlab.evaluation.judging.asking import announce
from steerlab.evaluation.judging.chat_api import CHARS_PER_TOKEN
from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.evaluation.judging.judges import Answer, Compared, Pair, Verdict
from steerlab.evaluation.judging.pair_judges import PairJudge
from steerlab.evaluation.statistics.measures import Measure, empty, share
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Scorer, Task, about, observed, too_long
from steerlab.evaluation.statistics.written import Written
from steerlab.evaluation.tasks.preferences.opponents import load_like, pairs_of, reference_of
from steerlab.job import DataSet, Source
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

FORMATS = ("instruction", "text", "preference")


def require_prompts(data: DataSet) -> DataSet:
    """Return the data set if its format is one of FORMATS. Raises ValueError otherwise."""
    if data.format not in FORMATS:
        raise ValueError(f"prompts.format {data.format} is not supported; supported are {', '.join(FORMATS)}")
    return data


class Config(SampledConfig):
    """Pairwise comparison with the model at strength 0, or with reference answers."""

    task: Literal["win_rate"] = "win_rate"
    """This task."""
    prompts: Annotated[DataSet, AfterValidator(require_prompts)] = DataSet.model_validate({"source": ALPACA})
    """Instruction rows (the output is the reference answer), preference pairs (the chosen response is), or plain texts."""
    against: Literal["base", "reference"] = "base"
    """Opponent. base: the same model at strength 0; reference: the row's reference answer."""
    implicit_source: Source | None = None
    """An artifact, an exported folder or a model; its log-likelihood ratio to its base model is the reward."""
    implicit_base_source: Source | None = None
    """The base model of `implicit_source`; null takes `implicit_source` at strength 0, so it must have a patch."""
    judge_source: Source | None = None
    """A reward model (a sequence classifier with one output) or a causal language model; its config.json decides which."""
    api: Endpoint | None = Field(None, exclude_if=lambda endpoint: endpoint is None)
    """The API of a language model that decides."""
    style: Literal["short", "reasoned"] = Field("short", exclude_if=lambda style: style == "short")
    """Question to a judge's API. short: which is better, 1 or 2; reasoned: reason first, then one of five labels from
    [[A>>B]] to [[B>>A]], as in Arena-Hard. Benchmarks such as it compare with a fixed model: `against: reference`."""
    question: str = judges.QUESTION
    """The question to a language model, instead of that of `style`; {prompt}, {first} and {second} are replaced."""
    both_orders: bool = True
    """Ask a language model in both orders, and count a tie if its answers disagree; false asks once, in a random order."""
    best_of: int = Field(1, ge=1)
    """Number of answers sampled for each prompt, the best of which is compared. More than 1 needs a temperature."""
    best_by_source: Source | None = None
    """A patched model whose implicit reward chooses the best answer. The judge should be another model, else it judges its own
    choice."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy. The two answers to a prompt are sampled with the same random numbers."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass of nucleus sampling; 1 samples from all tokens."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if sum(map(bool, (self.judge_source, self.implicit_source, self.api))) != 1:
            raise ValueError("exactly one judge is needed: set one of implicit_source, judge_source and api")
        if self.style != "short" and not self.api:
            raise ValueError(f"style {self.style} is for a judge that reasons in writing: set api")
        if self.api and not self.both_orders:
            raise ValueError("both_orders: a judge behind an API is always asked in both orders")
        if self.implicit_base_source and not self.implicit_source:
            raise ValueError("implicit_base_source needs implicit_source, which is missing")
        if self.against == "reference" and self.prompts.format == "text":
            raise ValueError("against reference needs answers: set prompts.format to instruction or preference")
        if (self.best_of > 1) != bool(self.best_by_source):
            raise ValueError("best_of above 1 and best_by_source, which ranks the answers, need each other")
        if self.best_of > 1 and not self.temperature:
            raise ValueError("best_of samples answers: set a temperature, since greedy answers are all equal")
        missing = [place for place in judges.PLACES if f"{{{place}}}" not in self.question]
        if missing:
            raise ValueError(f"question lacks {', '.join(f'{{{place}}}' for place in missing)}")
        if self.implicit_source and (not self.both_orders or self.question != judges.QUESTION):
            raise ValueError("question and both_orders are for a language model: set judge_source")
        return self


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; the win rate is named after the judge."""
    # Only its config.json, which may not be downloaded yet, tells the kind of `judge_source`, so both names are declared.
    names = ["implicit"] if config.implicit_source else ["language_model", *([] if config.api else ["reward_model"])]
    orders = (share("first_shown", None, "share"), share("agreement", "higher"))
    return (
        *(share(judge, "higher", "share") for judge in names),
        *(orders if config.both_orders and not config.implicit_source else ()),
        share("ties", None),
        share("longer", None, "share"),
        Measure("answer_tokens", None, "tokens", low=0.0),
        Measure("opponent_tokens", None, "tokens", low=0.0),
        share("unfinished", "lower"),
        empty(),
        *legibility.texts_measures(),
    )


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse sources that do not exist or cannot be used as judges. Raises ValueError."""
    for name in ("implicit_source", "implicit_base_source", "best_by_source"):
        source = getattr(config, name)
        if source is not None:
            with about(name):
                scorers.check_model(source)
    if config.api is not None:
        with about("api"):
            announce(config.api, config, _input_tokens(config))
    if config.judge_source is not None:
        with about("judge_source"):
            if pair_judges.is_classifier(config.judge_source):
                answer_rewards.check_reward_model(config.judge_source)
            else:
                scorers.check_judge(config.judge_source, ("1", "2"))


def run(model: SteeredModel, config: Config) -> Result:
    """Answer every prompt at every strength and judge each answer against its opponent."""
    judge = _judge(model, config)
    items = data_rows(config.prompts, config.limit, config.rows_seed)
    pairs = pairs_of(model, items, config)
    # All strengths are judged in one call, with full batches, so that an opponent of several strengths is read only once. A
    # pair without an answer is not shown, since its verdict would not count, but would cost money with an API.
    verdicts = iter(judge.compare([pair for row in pairs for pair in row if not _is_long(pair)]))
    observations, samples = [], []
    for strength, row in zip(config.strengths, pairs, strict=True):
        for item, pair in zip(items, row, strict=True):
            verdict = Compared(TOO_LONG) if _is_long(pair) else next(verdicts)
            lengths = [len(model.encoder.tokenizer.encode(a.text, add_special_tokens=False)) for a in pair]
            judged = observe(judge, item.id, pair, verdict, (lengths[0], lengths[1]), strength)
            observations += list(map(too_long, judged)) if _is_long(pair) else judged
            samples.append(_sample(item.id, strength, pair, verdict.verdict))
    return Result(observations, samples, measures(config))


def _is_long(pair: Pair) -> bool:
    return any(answer.too_long for answer in pair)


def scorer(config: Config, device: torch.device | str) -> Scorer:
    """Return the scorer of answers against those in their column `opponent`. Raises ValueError for an implicit reward."""
    if config.implicit_source is not None:
        raise ValueError("an implicit reward cannot judge the texts of a file: set judge_source or api")
    judge = _text_judge(config, device)

    def judge_texts(written: Sequence[Written]) -> list[list[Observation]]:
        pairs = [(Answer(w.prompt, "", w.text), Answer(w.prompt, "", w.field("opponent"))) for w in written]
        compared = judge.compare(pairs)
        return [
            judge.observations("win_rate", text.id, verdict, text.strength)
            for text, verdict in zip(written, compared, strict=True)
        ]

    return judge_texts


def observe(
    judge: PairJudge, item_id: str, pair: Pair, compared: Compared, num_tokens: tuple[int, int], strength: float = 1.0
) -> list[Observation]:
    """Turn one comparison and the lengths of both answers into observations."""
    own, other = num_tokens
    values = {
        "longer": 0.5 if own == other else float(own > other),
        "answer_tokens": float(own),
        "opponent_tokens": float(other),
        "unfinished": float(not pair[0].finished),
    }
    lengths = [observed(f"win_rate/{name}", item_id, value, strength) for name, value in values.items()]
    return [
        *judge.observations("win_rate", item_id, compared, strength),
        *lengths,
        *legibility.observe_texts("win_rate", item_id, [pair[0].text], strength),
    ]


def _judge(model: SteeredModel, config: Config) -> PairJudge:
    if config.implicit_source is None:
        return _text_judge(config, model.device)
    policy = load_like(config.implicit_source, model)
    if config.implicit_base_source is None and not policy.patches:
        raise ValueError(f"{config.implicit_source} has no patch to remove: set implicit_base_source")
    reference = None if config.implicit_base_source is None else load_like(config.implicit_base_source, policy)
    return PairJudge("implicit", judges.once(judges.by_reward(answer_rewards.implicit_reward(policy, reference))))


def _text_judge(config: Config, device: torch.device | str) -> PairJudge:
    if config.api is not None:
        return pair_judges.behind_api(config.api, _question(config))
    assert config.judge_source is not None
    question, both_orders = config.question, config.both_orders
    return pair_judges.local(config.judge_source, question, both_orders=both_orders, seed=config.seed, device=device)


def _question(config: Config) -> str:
    return judges.REASONED if config.style == "reasoned" and config.question == judges.QUESTION else config.question


def _input_tokens(config: Config) -> list[int]:
    """Estimate the tokens of each question: the prompt and both answers, in both orders."""
    texts = [
        reference_of(item.row, config.prompts.format) for item in data_rows(config.prompts, config.limit, config.rows_seed)
    ]
    frame = len(_question(config))
    return [(frame + len(answer.prompt)) // CHARS_PER_TOKEN + 2 * config.max_new_tokens for answer in texts for _ in range(2)]


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


TASK = Task(Config, run, measures, check=check, scorer=scorer, example={"judge_source": "hf:ORG/NAME"})
