"""Any task of EleutherAI's lm-evaluation-harness, at every strength.

Needs an extra: `pip install steerlab[lm_eval]`. Prompts, few-shot examples, answer parsing and metrics are the harness's own;
the steered model provides log-likelihoods and continuations. The data set of a task is downloaded from the hub, or taken from
its cache (HF_HOME). To run your own tasks, put their YAML files into a folder and set `tasks_source`.

    lm_eval/<metric>            `acc`, `acc_norm`, `exact_match`, ...; of a group such as mmlu, over all its questions
    lm_eval/<metric>_<filter>   if the task parses answers in several ways (gsm8k: strict_match, flexible_extract)
    lm_eval/empty, lm_eval/repetition, lm_eval/letters        see `legibility`, for tasks that generate text

With several names each task's metrics begin with its own: `lm_eval/arc_easy.acc`. `chat_template` asks through the model's chat
template, with the worked examples as turns of the chat and the roles of its tokens; published numbers of instruction-tuned
models are usually of this kind, those of base models are not.

A metric is reported if the harness's number is a mean over documents, or the exponential of one (perplexity); the mean is
compared with that number. Other metrics (F1 over a corpus, BLEU) are skipped with a warning.
"""

from __future__ import annotations

import difflib
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from steerlab.data import sources
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.statistics.measures import Better, Measure, Transform, empty
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Task, about, too_long
from steerlab.evaluation.tasks.ability.harness_model import Fates, adapter
from steerlab.job import Seed, Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

Logged: TypeAlias = Mapping[str, Any]
"""The harness's log of one document: its prompt, answers and metrics, with types that depend on the harness's task."""


Name = Annotated[str, Field(min_length=1)]


class Config(TaskConfig):
    """A task of lm-evaluation-harness; `limit` takes the first documents of each of its tasks, as in the harness."""

    task: Literal["lm_eval"] = "lm_eval"
    """This task."""
    name: Name | Annotated[tuple[Name, ...], Field(min_length=1)]
    """Name of a task or a group in the harness, or several: `mmlu`, [arc_easy, truthfulqa_mc2]."""
    chat_template: bool = Field(False, exclude_if=lambda chats: not chats)
    """Ask through the model's chat template, with the question as the user's turn."""
    system_instruction: str | None = Field(None, exclude_if=lambda text: text is None)
    """System text before the question and its examples; null sends only the task's own description."""
    fewshot_as_turns: bool = Field(True, exclude_if=lambda turns: turns)
    """With a chat template: worked examples as turns of the chat; false writes them into the user's turn."""
    num_fewshot: int | None = Field(None, ge=0)
    """Number of worked examples before each question; null takes the task's default."""
    tasks_source: Source | None = None
    """Folder with your own task files; null uses the harness's tasks only."""
    trust_remote_code: bool = False
    """Allow the task files of `tasks_source` to run code: they name Python functions, and their templates are programs."""
    seed: Seed = 1234
    """Seed of the few-shot examples and of sampling (the harness's default)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the harness's tasks."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def trusted_source(self) -> str | None:
        """The folder of task files whose Python may run; None if there is none or it is not trusted."""
        return self.tasks_source if self.trust_remote_code else None


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures that are known before the task runs; other names depend on the harness's task."""
    own = (empty(), *legibility.texts_measures())
    named = [measure._replace(name=f"{_prefix(config, name)}{measure.name}") for name in config.names for measure in own]
    return (*named, Measure("*", None))


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a task that the harness does not know, or any task if the harness is not installed. Raises ValueError."""
    _library(config)


def run(model: SteeredModel, config: Config) -> Result:
    """Run the task at every strength."""
    simple_evaluate, manager = _library(config)
    observations, samples = [], []
    measured: dict[str, Measure] = {}
    # The harness does not know strengths, so it runs once for each strength, and once for each task to separate their numbers.
    for strength, task in itertools.product(config.strengths, config.names):
        fates: Fates = {}
        # The harness's bootstrap is switched off: the platform computes intervals from the observations itself.
        results = simple_evaluate(
            model=adapter(model, strength, config.seed, fates),
            tasks=[task],
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            fewshot_random_seed=config.seed,
            system_instruction=config.system_instruction,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template and config.fewshot_as_turns,
        )
        better = results.get("higher_is_better") or {}
        new, own = observe(results["samples"], results["results"], strength, fates, better, _prefix(config, task))
        observations += new
        measured |= own
        samples += [_sample(name, logged, strength) for name, rows in results["samples"].items() for logged in rows]
    return Result(observations, samples, (*measured.values(), *measures(config)))


def _library(config: Config) -> tuple[Callable[..., Any], Any]:
    """Return the harness's evaluation function and its table of tasks."""
    # The harness itself runs such code without permission (`!function` in YAML, Jinja templates), so it is required here.
    if config.tasks_source is not None and not config.trust_remote_code:
        raise ValueError(
            "tasks_source: the harness runs the Python that task files name, and their templates without a sandbox; if you "
            "trust them, set trust_remote_code: true beside it"
        )
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ValueError(f"task: lm_eval needs a package ({error.name}): pip install 'steerlab[lm_eval]'") from None
    with about("tasks_source"):
        folder = None if config.tasks_source is None else str(sources.fetch(config.tasks_source))
    manager = TaskManager(include_path=folder)
    # The harness knows thousands of names, so the nearest ones are offered.
    for name in (name for name in config.names if name not in manager.all_tasks):
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise ValueError(
            f"name: lm_eval has no task {name!r}"
            + (f"; did you mean {', '.join(near)}?" if near else ": see `lm_eval ls tasks`")
        )
    return simple_evaluate, manager


def _prefix(config: Config, name: str) -> str:
    """Return the beginning of a task's metrics: empty for a single task, whose metrics need no name."""
    return "" if len(config.names) == 1 else f"{name}."


def observe(
    logged: Mapping[str, Sequence[Logged]],
    reported: Mapping[str, Mapping[str, object]],
    strength: float,
    fates: Fates,
    higher_is_better: Mapping[str, Mapping[str, bool | None]],
    prefix: str = "",
) -> tuple[list[Observation], dict[str, Measure]]:
    """Turn the harness's logged samples into observations.

    Args:
        logged: task -> its logged documents.
        reported: task -> `metric,filter` -> the harness's number.
        strength: strength of the patch.
        fates: documents that did not fit or were cut.
        higher_is_better: task -> metric -> direction.
        prefix: beginning of the metrics' names.

    Returns:
        The observations, and metric -> its measure.
    """
    observations: list[Observation] = []
    measured: dict[str, Measure] = {}
    for task, samples in logged.items():
        legible = _legible(task, samples, strength, prefix)
        observations += [_fated(o, task, int(o.id.rpartition("/")[2]), fates) for o in legible]
        for (metric, answer_filter), group in _by_metric(samples).items():
            number = reported[task].get(f"{metric},{answer_filter}")
            means = _as_means([sample[metric] for sample in group], number)
            # Hyphens become underscores, as in the names of all other metrics.
            name = prefix + metric + ("" if answer_filter == "none" else f"_{answer_filter.replace('-', '_')}")
            if means is None:
                warnings.warn(f"lm_eval/{name} of {task} is not a mean over documents and is skipped ({number})", stacklevel=2)
                continue
            # If several tasks of a group report the same metric, the direction of the last one counts.
            pairs, transform = means
            measured[name] = Measure(name, _better(higher_is_better.get(task, {}).get(metric)), transform=transform)
            for number, (value, weight) in zip([sample["doc_id"] for sample in group], pairs, strict=True):
                observation = Observation(f"lm_eval/{name}", f"{task}/{number}", value, weight, strength)
                observations.append(_fated(observation, task, number, fates))
    return observations, measured


def _better(higher_is_better: bool | None) -> Better | None:
    return None if higher_is_better is None else "higher" if higher_is_better else "lower"


def _fated(observation: Observation, task: str, number: int, fates: Fates) -> Observation:
    """Mark an observation whose document did not fit or was cut."""
    fate = fates.get((task, number))
    return too_long(observation) if fate == TOO_LONG else observation._replace(reason=fate)


def _legible(task: str, samples: Iterable[Logged], strength: float, prefix: str) -> list[Observation]:
    """Return the legibility of the answers of each document whose answers are texts."""
    # A document is logged once per filter, with the same answers; keyed by its id, it counts once.
    answered = {sample["doc_id"]: [text for answers in sample.get("resps", ()) for text in answers] for sample in samples}
    return [
        observation
        for number, texts in answered.items()
        # Answers of multiple-choice tasks are pairs (log-likelihood, is greedy), not texts.
        if texts and all(isinstance(text, str) for text in texts)
        for o in legibility.observe_texts("lm_eval", f"{task}/{number}", texts, strength)
        for observation in [o._replace(metric=f"lm_eval/{prefix}{o.metric.partition('/')[2]}")]
    ]


def _by_metric(samples: Iterable[Logged]) -> dict[tuple[str, str], list[Logged]]:
    groups: dict[tuple[str, str], list[Logged]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            groups[metric, sample["filter"]].append(sample)
    return groups


def _as_means(values: Sequence[object], number: object) -> tuple[list[tuple[float, float]], Transform] | None:
    """Return ([(value, weight)], transform) whose weighted mean is the harness's number; None if no candidate gives it."""
    if not isinstance(number, int | float):
        return None
    # The harness does not report how it aggregates, so each known way is tried and compared with its number.
    for pairs, transform in _candidates(values):
        mean = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
        # exp(710) overflows a double.
        value = math.exp(min(mean, 709.0)) if transform == "exp" else mean
        if math.isclose(value, number, rel_tol=1e-6, abs_tol=1e-9):
            return pairs, transform
    return None


def _candidates(values: Sequence[Any]) -> Iterator[tuple[list[tuple[float, float]], Transform]]:
    if all(isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0 for value in values):
        yield [(float(value), 1.0) for value in values], "identity"
        yield [(-float(value), 1.0) for value in values], "exp"
    elif all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        # (log-likelihood in nats, number of words or bytes): a perplexity, or bits per byte.
        yield [(-float(ll) / size, float(size)) for ll, size in values], "exp"
        yield [(-float(ll) / size / math.log(2), float(size)) for ll, size in values], "identity"


def _sample(task: str, logged: Logged, strength: float) -> dict[str, object]:
    texts = [text for answers in logged.get("resps", ()) for text in answers]
    written = {"output": texts[0]} if texts and all(isinstance(text, str) for text in texts) else {}
    return {
        "id": f"{task}/{logged['doc_id']}",
        "strength": strength,
        "prompt": str(logged["arguments"][0][0]),
        "target": str(logged["target"]),
        **written,
        "responses": str(logged["filtered_resps"]),
        "filter": str(logged["filter"]),
        # A document's metric is a number, or the input of the aggregation, such as a pair or a text.
        **{metric: _number_or_text(logged[metric]) for metric in logged["metrics"]},
    }


def _number_or_text(value: object) -> float | str:
    return float(value) if isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0 else str(value)  # type: ignore[arg-type]


def chats(config: Config) -> bool:
    """Return whether the task's prompts are conversations."""
    return config.chat_template


TASK = Task(Config, run, measures, check=check, chats=chats, example={"name": "arc_easy"})
