"""The processes of a sweep's trials stay until the sweep ends.

Ray Tune lets go of all but one idle process, and a trial whose process is still starting takes an idle one over and ends its
own in the middle of its imports. With trials that are shorter than these imports (seconds), that starts and ends a process a
trial: hundreds of megabytes and both cores for nothing. A sweep never has more processes than trials that run at once.

A process that would not hear of its trial's end is ended. That is one that was to stop and did not come to it, for whose next
report Ray Tune itself would wait; and one whose training runs in workers of its own, where nothing stops it: the next trial
would be given a process that is still at work, and fail.
"""

from __future__ import annotations

from collections.abc import Generator

from ray.tune.experiment import Trial

from steerlab.guards.private_parts import tune_parts

_TuneController, _ObjectCache, _put = tune_parts()

_to_end: set[str] = set()
"""Ray Tune's names of the trials whose processes are to be ended."""


class _Kept(_ObjectCache):
    """Idle processes, all of which are kept until there is nothing left to run."""

    def cache_object(self, key: object, obj: object) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[object, None, None]:
        if force_all:
            yield from super().flush_cached_objects(force_all=True)


class _Controller(_TuneController):
    """Ray Tune's loop, with these processes."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._actor_cache = _Kept()

    def on_step_begin(self) -> None:
        super().on_step_begin()
        for trial in [trial for trial in self._running_trials if trial.trial_id in _to_end]:
            self.stop_trial(trial)

    def _maybe_cache_trial_actor(self, trial: Trial) -> bool:
        return not _is_deaf(trial) and super()._maybe_cache_trial_actor(trial)

    def _schedule_trial_stop(self, trial: Trial, exception: Exception | None = None) -> None:
        process = self._trial_to_actor.get(trial)
        super()._schedule_trial_stop(trial, exception)
        if process is not None and _is_deaf(trial) and self._actor_manager.is_actor_started(process):
            self._actor_manager.remove_actor(tracked_actor=process, kill=True)
            self._stopping_actors.pop(process, None)

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        """Give an idle process to a trial that has none on its way."""
        return trial not in self._trial_to_actor and super()._maybe_reuse_cached_actor(trial)


def _is_deaf(trial: Trial) -> bool:
    """Say whether the process of a trial that ends is at work without hearing of that."""
    is_over = "outcome" in (trial.last_result or {})
    return trial.trial_id in _to_end or not (is_over or trial.config["warm"])


def keep() -> None:
    """Let the sweeps of this process keep their processes; Ray Tune has no setting for that."""
    _put(_Controller)


def end(trial_id: str) -> None:
    """End a trial as soon as it runs, and its process with it, whatever that is doing; Ray Tune starts another one."""
    _to_end.add(trial_id)
