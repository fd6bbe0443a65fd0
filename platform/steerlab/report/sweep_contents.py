"""Read the folder of a sweep into the values that the page shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steerlab.report.contents import Document, Entry, is_number, read
from steerlab.run import folder as folders
from steerlab.storage.store import Store

MAX_CURVES = 8
"""Number of a sweep's best trials whose runs are read."""


@dataclass(frozen=True)
class Sweep:
    """The content of one sweep on the page."""

    name: str
    folder: str
    job: Document
    space: Document
    trials: Sequence[Document]
    """Rows of trials.parquet, one for each trial and seed."""
    summary: Document
    """summary.json of the sweep; empty while it is running."""
    root: str = "ROOT"
    runs: tuple[Entry, ...] = ()
    """The runs of the best trials."""

    @property
    def metric(self) -> str | None:
        """The metric that the sweep optimises; None if nothing was measured yet."""
        return self.summary.get("metric") or self.space.get("metric") or next(iter(self.metrics), None)

    @property
    def maximises(self) -> bool:
        """Whether a higher metric is better."""
        return (self.summary.get("mode") or self.space.get("mode") or "max") == "max"

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters; those with the same value in all trials come last."""
        # Values are compared as texts, since they may be lists, which cannot be members of a set.
        names = _named(self.trials, "param.")
        return sorted(names, key=lambda name: len({str(trial.get(f"param.{name}")) for trial in self.trials}) < 2)

    @property
    def varied(self) -> list[str]:
        """Paths of the parameters that vary; of parameters that always change together, only the first."""
        # A space may set two parameters together, such as the rows for training and for evaluation; one of them is enough.
        patterns: dict[tuple[int, ...], str] = {}
        for name in self.parameters:
            texts = [str(trial.get(f"param.{name}")) for trial in self.trials]
            pattern = tuple(texts.index(text) for text in texts)
            if any(pattern):
                patterns.setdefault(pattern, name)
        return list(patterns.values())

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, the optimised one first."""
        own = self.summary.get("metric") or self.space.get("metric")
        return sorted(_named(self.trials, "metric."), key=lambda name: name != own)

    @property
    def finished(self) -> list[Document]:
        """The rows of trials.parquet with a value of the optimised metric, the best first."""
        key = f"metric.{self.metric}"
        scored = [trial for trial in self.trials if is_number(trial.get(key))]
        return sorted(scored, key=lambda trial: trial[key], reverse=self.maximises)

    @property
    def paid(self) -> list[bool]:
        """For each row, whether the seconds of its run count for this row."""
        # Trials that differ only in strength share a run, whose seconds count for the first of them.
        seen: set[str] = set()
        return [trial.get("run") is None or not (trial["run"] in seen or seen.add(trial["run"])) for trial in self.trials]

    @property
    def best(self) -> str | None:
        """The id of the best trial: the one in the sweep's summary; while the sweep runs, that of the best row so far."""
        # In a summary, `best: null` means that no trial satisfies the bounds.
        if "best" in self.summary:
            return (self.summary["best"] or {}).get("trial_id")
        return self.finished[0]["trial_id"] if self.finished else None


def read_sweep(store: Store, folder: str) -> Sweep:
    """Read the folder of a sweep, finished or running, and the runs of its best trials.

    Args:
        store: the store.
        folder: path below ROOT, `sweeps/NAME/ID`.

    Raises:
        ValueError: the folder is not that of a sweep with at least one trial, or a file in it is damaged.
    """
    try:
        job = folders.job(store, folder)
        trials = folders.trials(store, folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a sweep folder (sweeps/NAME/ID) of {store.root}, or no trial began") from None
    sweep = Sweep(
        name=job["name"],
        folder=folder,
        job=job,
        space=_or_nothing(folders.space, store, folder),
        trials=trials,
        summary=_or_nothing(folders.sweep_summary, store, folder),
        root=store.root,
    )
    return replace(sweep, runs=tuple(_best_runs(store, sweep)))


def _best_runs(store: Store, sweep: Sweep) -> list[Entry]:
    """Read the runs of a sweep's best trials, one for each trial, named by the parameters that vary."""
    varied = sweep.varied
    first: dict[str, Document] = {}
    # The sort is stable: the sweep's best trial comes first, and the others stay in the order of their metric.
    for trial in sorted(sweep.finished, key=lambda trial: trial["trial_id"] != sweep.best):
        # Trials that differ only in strength share a run, which is shown once; of several seeds, only the best is shown.
        if trial.get("run") and trial["run"] not in (other["run"] for other in first.values()):
            first.setdefault(trial["trial_id"], trial)
    runs = []
    for trial in list(first.values())[:MAX_CURVES]:
        if "summary.json" in store.list(trial["run"]):  # a trial may still be running
            values = ", ".join(f"{name.rpartition('.')[2]} {_short(trial.get(f'param.{name}'))}" for name in varied[:2])
            runs.append(
                replace(read(store, trial["run"]), name=f"{trial['trial_id']} ({values})" if values else trial["trial_id"])
            )
    return runs


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _named(trials: Sequence[Document], prefix: str) -> list[str]:
    # A dict keeps the order of the columns; a set would lose it.
    return list(dict.fromkeys(name.removeprefix(prefix) for trial in trials for name in trial if name.startswith(prefix)))


def _or_nothing(read: Callable[[Store, str], Document], store: Store, folder: str) -> Document:
    """Read a file of a sweep; return {} if it is not written yet."""
    try:
        return read(store, folder)
    except FileNotFoundError:
        return {}
