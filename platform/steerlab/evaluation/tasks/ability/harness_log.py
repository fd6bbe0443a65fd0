"""The log of lm-evaluation-harness as observations and samples.

The harness logs the metrics of each document, and reports one number for all of them. A metric becomes observations if that
number is their mean, or the exponential of one (`observe`).
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.statistics.measures import Better, Measure, Transform
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, too_long
from steerlab.evaluation.tasks.ability.harness_model import Fates

Logged: TypeAlias = Mapping[str, Any]
"""The harness's log of one document: its prompt, answers and metrics, with types that depend on the harness's task."""


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


def sample(task: str, logged: Logged, strength: float) -> dict[str, object]:
    """Return a readable sample of one logged document."""
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
