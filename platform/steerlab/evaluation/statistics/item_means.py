"""One observation for each item, metric and strength, where an item was observed several times.

An item has several observations if a task runs with several seeds, or samples several answers to one prompt. Treating them as
independent items would shorten the interval without reason, since all of them share the item.

Axis legend: K observations of one item.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation


def merged(observations: Sequence[Observation]) -> list[Observation]:
    """Return the mean observation of each item, metric and strength, in the order of their first observations."""
    groups: dict[tuple[float, str, str], list[Observation]] = defaultdict(list)
    for observation in observations:
        groups[observation.strength, observation.metric, observation.id].append(observation)
    return [group[0] if len(group) == 1 else mean(group) for group in groups.values()]


def mean(observed_K: Sequence[Observation]) -> Observation:
    """Return the mean of an item's observations: sum w v / sum w, with the mean weight of those that could be judged."""
    scored = [o for o in observed_K if o.value is not None]
    if not scored:
        # An item that is too long once is always so, unless prompts are random (an attack at a random place).
        return next((o for o in observed_K if o.reason == TOO_LONG), observed_K[0])
    weight = sum(o.weight for o in scored)
    # In a conditional share (SEP) the item is weighted by how often its condition held, so numerator and denominator add up.
    value = sum(o.weight * (o.value or 0.0) for o in scored) / weight if weight else scored[0].value
    reason = next((o.reason for o in scored if o.reason is not None), None)
    return scored[0]._replace(value=value, weight=weight / len(scored), reason=reason)
