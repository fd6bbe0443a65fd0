"""Private parts of libraries that this platform cannot do without: what for, and which test notices when one changes.

All of them are here and nowhere else (`tests/unit/test_private_parts.py`). A function imports its part where it is called, so
that nothing else pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging

    import wandb
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from optuna.samplers import BaseSampler
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
    from ray.tune.search.optuna import OptunaSearch
    from ray.tune.utils.object_cache import _ObjectCache

# --- Ray (2.60) --------------------------------------------------------------------------------------------------------


def most_resources() -> dict[str, float]:
    """Return what a cluster can grow to: without it a job that waits for the autoscaler would be refused.

    Ray tells its own status page alone. Test: tests/ray/test_requests.py::test_more_workers_than_the_cluster_has
    """
    from ray._private.state import state

    return dict(state.get_max_resources_from_cluster_config() or {})


def running_cluster() -> str | None:
    """Return the address of a cluster that runs here: `ray.init` would join it without a word, whoever started it.

    Test: tests/ray/test_listening.py::test_a_commands_own_cluster_listens_on_loopback_and_its_files_are_the_users
    """
    from ray._private import services

    return services.find_bootstrap_address(None)


@contextmanager
def no_clusters_of_several_nodes() -> Iterator[str]:
    """Let a cluster that is started in the block be one of a single node; yields the name of the variable that says so.

    On Linux Ray binds everything but the dashboard to all addresses, and takes 127.0.0.1 as a node's address for the machine's
    own. By this switch it is left alone on other systems. Test: tests/ray/test_listening.py
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def walk_upload(folder: Path, note: Callable[[Path], None], logger: logging.Logger, *, obeys_gitignore: bool) -> None:
    """Walk what Ray would upload of a folder: ignore files and default exclusions mean here what they mean to Ray.

    Test: tests/unit/test_submit.py::test_upload_is_what_ray_packs
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, note, include_gitignore=obeys_gitignore, logger=logger)


def local_trainer() -> type[DataParallelTrainer]:
    """Return Ray Train's trainer without torch's process group, which `TorchTrainer` would take down and DeepSpeed keeps.

    Its public name gives that of Ray Train's older version. Test: tests/ray/test_sweeps.py, which trains in warm processes.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def tune_parts() -> tuple[type[TuneController], type[_ObjectCache], Callable[[type[TuneController]], None]]:
    """Return Ray Tune's loop, its store of idle processes, and a function that puts another loop in the place of its own.

    Tune has no setting for how many idle processes it keeps (sweeps/processes.py says why they stay).
    Test: tests/ray/test_sweeps.py::test_two_hundred_trials_leave_the_driver_flat_and_the_report_fast
    """
    from ray.tune import tune
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.utils.object_cache import _ObjectCache

    def put(controller: type[TuneController]) -> None:
        tune.__dict__["TuneController"] = controller

    return TuneController, _ObjectCache, put


def time_attribute(scheduler: TrialScheduler) -> str:
    """Return what a scheduler of Ray Tune counts in. Test: tests/unit/test_sweep_spaces.py"""
    return getattr(scheduler, "_time_attr", "step")


def metric_of(scheduler: TrialScheduler) -> str | None:
    """Return the metric that a scheduler of Ray Tune goes by.

    Test: tests/ray/test_sweeps.py::test_asha_stops_trainings_that_fall_behind
    """
    return getattr(scheduler, "_metric", None)


def optuna_settings(searcher: OptunaSearch) -> tuple[int, BaseSampler | None]:
    """Return the seed and the sampler that an `OptunaSearch` was made with. Test: tests/unit/test_sweep_history.py"""
    return searcher._seed or 0, searcher._sampler


def last_step(asha: AsyncHyperBandScheduler) -> float:
    """Return the step at which ASHA ends a trial. Test: tests/unit/test_sweep_spaces.py"""
    return asha._max_t


def let_last_trials_end(asha: AsyncHyperBandScheduler) -> None:
    """Let a trial that reaches ASHA's last step go on: it is evaluated yet, and Ray Tune's default would stop it there.

    Test: tests/ray/test_sweeps.py::test_asha_stops_trainings_that_fall_behind
    """
    for part in (asha, *asha._brackets):
        part._stop_last_trials = False


# --- DeepSpeed (0.19) --------------------------------------------------------------------------------------------------


def without_shared_memory() -> None:
    """Reduce over gloo alone: DeepSpeed's shared-memory reduction needs a C++ compiler on every node.

    Test: tests/training/test_engine.py, on machines without one.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def checkpoint_engine() -> tuple[type[TorchCheckpointEngine], list[type]]:
    """Return what reads and writes DeepSpeed's checkpoints, and the classes that these hold.

    DeepSpeed's own unpickles anything. Test: tests/unit/test_strangers_models.py, whose payload would leave a marker.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return TorchCheckpointEngine, [LossScaler, ZeroStageEnum, fragment_address]


# --- wandb (0.31) ------------------------------------------------------------------------------------------------------


def sweep_of(api: wandb.Api, sweep_id: str) -> dict[str, Any]:
    """Return a sweep as W&B's server has it. `wandb.agent` asks the server too, but runs what it says in a process of its own.

    Test: tests/ray/test_sweeps_in_wandb.py
    """
    from wandb.apis.public.sweeps import _sweep_with_runs

    return _sweep_with_runs(api, sweep_id, "{}")


def registered_agent(api: wandb.Api, host: str, sweep_id: str) -> str:
    """Register an agent with a sweep and return its id. Test: tests/ray/test_sweeps_in_wandb.py"""
    from wandb.apis.public.sweeps import _register_agent

    return _register_agent(api, host, sweep_id=sweep_id)["id"]


class SweepGoneError(Exception):
    """W&B's server knows no such sweep any more."""


def heartbeat(api: wandb.Api, agent: str, alive: dict[str, bool]) -> list[dict[str, Any]]:
    """Say which runs of an agent are alive and return the server's commands. Raises SweepGoneError when the sweep was deleted.

    Test: tests/ray/test_sweeps_in_wandb.py
    """
    from wandb.apis.public.sweeps import _agent_heartbeat
    from wandb.sdk.sweeps import SweepNotFoundError

    try:
        return _agent_heartbeat(api, agent, {}, alive)
    except SweepNotFoundError:
        raise SweepGoneError from None
