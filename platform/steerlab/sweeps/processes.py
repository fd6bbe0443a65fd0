"""Keep the processes of a sweep's trials alive until the sweep ends, and kill those that cannot stop by themselves.

Ray Tune reuses processes (`reuse_actors`), but it drops all idle ones except one, and a trial whose process is still starting
takes over an idle process and kills its own in the middle of its imports. With trials that are shorter than the imports
(seconds), that starts and kills one process for each trial, which costs hundreds of megabytes and a core each. Here all idle
processes are retained; a sweep never has more processes than trials that run at the same time.

Two kinds of process do not notice that their trial was stopped, and are killed instead of kept: one that W&B stopped and that
did not stop within `stops.GRACE_S` (Ray Tune would wait for its next report), and one whose training runs in separate workers,
which continue after the trial. If such a process were reused, it would still be busy, and the next trial would fail.
"""

from __future__ import annotations

from collections.abc import Generator

from ray.tune.experiment import Trial

from steerlab.guards.private_parts import tune_parts

_TuneController, _ObjectCache, _put = tune_parts()

_to_end: set[str] = set()
"""Ray Tune's ids of the trials whose processes are to be killed."""


class _KeepAll(_ObjectCache):
    """Ray Tune's cache of idle processes, without its upper limit."""

    def cache_object(self, key: object, obj: object) -> bool:
        # Ray Tune's own method drops the object when the cache holds as many as there are trials waiting to start.
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[object, None, None]:
        # Without `force_all`, Ray Tune wants to drop the idle processes beyond its limit; with it, the experiment has ended.
        if force_all:
            yield from super().flush_cached_objects(force_all=True)


class _Controller(_TuneController):
    """Ray Tune's event loop, with the rules of this file for its processes."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # This replaces the cache that the base class has just made, before any process exists.
        self._actor_cache = _KeepAll()

    def on_step_begin(self) -> None:
        super().on_step_begin()
        # Trials are stopped in the loop's own step, because Ray Tune's data structures may change only there.
        for trial in [trial for trial in self._running_trials if trial.trial_id in _to_end]:
            self.stop_trial(trial)

    def _maybe_cache_trial_actor(self, trial: Trial) -> bool:
        return not _is_deaf(trial) and super()._maybe_cache_trial_actor(trial)

    def _schedule_trial_stop(self, trial: Trial, exception: Exception | None = None) -> None:
        # The process is looked up first, since the base class removes the entry.
        process = self._trial_to_actor.get(trial)
        super()._schedule_trial_stop(trial, exception)
        if process is not None and _is_deaf(trial) and self._actor_manager.is_actor_started(process):
            # The base class only asked the process to stop, which it would do after its next report.
            self._actor_manager.remove_actor(tracked_actor=process, kill=True)
            self._stopping_actors.pop(process, None)

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        """Give an idle process to a trial, unless a process is already starting for it."""
        return trial not in self._trial_to_actor and super()._maybe_reuse_cached_actor(trial)


def _is_deaf(trial: Trial) -> bool:
    """Return whether the process of an ending trial is still busy and will not notice the end."""
    # The outcome is a unit's last report: after it, the process is idle. A warm process runs the training itself, so Ray Tune
    # ends the training at its next report.
    is_over = "outcome" in (trial.last_result or {})
    return trial.trial_id in _to_end or not (is_over or trial.config["warm"])


def keep() -> None:
    """Make the sweeps of this Python process retain the processes of their trials; Ray Tune has no setting for that."""
    _put(_Controller)


def end(trial_id: str) -> None:
    """Stop a running trial and kill its process at once; Ray Tune starts a new process for the next trial."""
    _to_end.add(trial_id)
