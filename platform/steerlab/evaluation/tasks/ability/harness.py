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
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from steerlab.data import row_order, sources
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.statistics.measures import Measure, empty
from steerlab.evaluation.statistics.metrics import Result, Task, about
from steerlab.evaluation.tasks.ability import harness_log
from steerlab.evaluation.tasks.ability.harness_model import Fates, adapter
from steerlab.job import Seed, Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

Name = Annotated[str, Field(min_length=1)]


class Config(TaskConfig):
    """A task of lm-evaluation-harness; `limit` takes the first documents of each of its tasks, as in the harness, or those
    from `offset` on in the order of `shuffle`."""

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
    shuffle: Seed | None = Field(None, exclude_if=lambda seed: seed is None)
    """Seed by which the documents of each task are shuffled; null does not shuffle. A data set that reads the same file with
    the same `shuffle` and no filter has its rows in the same order, so that `offset` and `limit` divide both into folds."""
    offset: int = Field(0, ge=0, exclude_if=lambda number: number == 0)
    """Number of documents of each task that are skipped, after the shuffle."""
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
    """Refuse a task that the harness does not know, an offset beyond its documents, or a missing harness. Raises ValueError."""
    _, manager = _library(config)
    for name in config.names:
        documents(config, manager, name)


def run(model: SteeredModel, config: Config) -> Result:
    """Run the task at every strength."""
    simple_evaluate, manager = _library(config)
    observations, samples = [], []
    measured: dict[str, Measure] = {}
    # The harness does not know strengths, so it runs once for each strength, and once for each task to separate their numbers.
    chosen_of = {name: documents(config, manager, name) for name in config.names}
    for strength, task in itertools.product(config.strengths, config.names):
        fates: Fates = {}
        chosen = chosen_of[task]
        # The harness's bootstrap is switched off: the platform computes intervals from the observations itself.
        results = simple_evaluate(
            model=adapter(model, strength, config.seed, fates),
            tasks=[task],
            num_fewshot=config.num_fewshot,
            limit=config.limit if chosen is None else None,
            samples=chosen,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            fewshot_random_seed=config.seed,
            system_instruction=config.system_instruction,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template and config.fewshot_as_turns,
        )
        if chosen is not None:
            # The harness numbers the chosen documents from 0 in its requests, but by their places in the task in its log.
            fates = {(name, chosen[name][number]): reason for (name, number), reason in fates.items()}
        better = results.get("higher_is_better") or {}
        new, own = harness_log.observe(results["samples"], results["results"], strength, fates, better, _prefix(config, task))
        observations += new
        measured |= own
        samples += [harness_log.sample(name, logged, strength) for name, rows in results["samples"].items() for logged in rows]
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


def documents(config: Config, manager: Any, name: str) -> dict[str, list[int]] | None:
    """Return the documents of a task, or of each task of a group, that `shuffle`, `offset` and `limit` choose; ascending.

    Returns:
        Task -> numbers of its documents; None if no choice is needed but the first `limit`.

    Raises:
        ValueError: `offset` leaves no document of a task.
    """
    if config.shuffle is None and config.offset == 0:
        return None
    chosen = {}
    for task, loaded in manager.load([name])["tasks"].items():
        num_documents = len(loaded.eval_docs)
        if config.offset >= num_documents:
            raise ValueError(f"offset {config.offset} leaves no document of {task}, which has {num_documents}")
        end = None if config.limit is None else config.offset + config.limit
        # The harness evaluates documents in ascending order, whatever the order of their numbers.
        chosen[task] = sorted(row_order.order(num_documents, config.shuffle)[config.offset : end])
    return chosen


def _prefix(config: Config, name: str) -> str:
    """Return the beginning of a task's metrics: empty for a single task, whose metrics need no name."""
    return "" if len(config.names) == 1 else f"{name}."


def chats(config: Config) -> bool:
    """Return whether the task's prompts are conversations."""
    return config.chat_template


TASK = Task(Config, run, measures, check=check, chats=chats, example={"name": "arc_easy"})
