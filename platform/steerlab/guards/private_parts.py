"""All uses of private parts of libraries: each function documents why it needs one, and which test fails when the part changes.

No other module may use private parts (`tests/unit/test_private_parts.py`). Each function imports its library when it is called,
so that importing this module costs nothing.
"""

from __future__ import annotations

import socket
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

_CONNECT_S = 2.0
"""Longest wait for a connection to a cluster of this machine."""

# --- Ray (2.60) --------------------------------------------------------------------------------------------------------


def most_resources() -> dict[str, float]:
    """Return the resources (name -> amount) that a cluster has after the autoscaler has started all nodes it may start.

    Without them, a job that has to wait for new nodes would be refused as too large. Ray 2.60 has no public function for them,
    only its own dashboard reads them. Test: tests/ray/test_requests.py::test_more_workers_than_the_cluster_has
    """
    from ray._private.state import state

    return dict(state.get_max_resources_from_cluster_config() or {})


def running_cluster() -> str | None:
    """Return the address of a Ray cluster that runs on this machine; None if no cluster runs.

    `ray.init` would join it without a warning, even if another user started it; a command names it instead. Test:
    tests/ray/test_listening.py::test_a_commands_own_cluster_listens_on_loopback_and_its_files_are_the_users
    """
    from ray._private import services

    address = services.find_bootstrap_address(None)
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:
        # Ray stores the address in a file, which remains when the cluster is killed.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return None
    return address


@contextmanager
def no_clusters_of_several_nodes() -> Iterator[str]:
    """Let `ray.init` in this block start a cluster of one node that listens on 127.0.0.1 only.

    Yields the name of the environment variable that has the same effect in Ray's child processes. On Linux Ray binds every port
    but the dashboard's to all addresses, and replaces the node address 127.0.0.1 by the machine's own. Ray's switch for Windows
    and macOS, where clusters have a single node, prevents both. Test: tests/ray/test_listening.py
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def walk_upload(folder: Path, note: Callable[[Path], None], logger: logging.Logger, *, obeys_gitignore: bool) -> None:
    """Call `note` for each path of a folder that Ray would upload, by Ray's own rules of ignore files and exclusions.

    Test: tests/unit/test_submit.py::test_upload_is_what_ray_packs
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, note, include_gitignore=obeys_gitignore, logger=logger)


def local_trainer() -> type[DataParallelTrainer]:
    """Return the trainer of Ray Train V2 that does not set up torch's process group.

    `TorchTrainer` destroys the group at its end, but DeepSpeed keeps using it in processes that remain for the next training.
    The class of this name that Ray exports is that of V1. Test: tests/ray/test_sweeps.py, in warm processes.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def tune_parts() -> tuple[type[TuneController], type[_ObjectCache], Callable[[type[TuneController]], None]]:
    """Return Ray Tune's controller, its cache of idle actors, and a function that makes Tune use another controller class.

    Tune has no setting for the number of idle actors that it keeps (sweeps/processes.py explains why they have to stay).
    Test: tests/ray/test_sweeps.py::test_two_hundred_trials_leave_the_driver_flat_and_the_report_fast
    """
    from ray.tune import tune
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.utils.object_cache import _ObjectCache

    def put(controller: type[TuneController]) -> None:
        tune.__dict__["TuneController"] = controller

    return TuneController, _ObjectCache, put


def time_attribute(scheduler: TrialScheduler) -> str:
    """Return the result key by which a scheduler of Ray Tune measures progress. Test: tests/unit/test_sweep_spaces.py"""
    return getattr(scheduler, "_time_attr", "step")


def metric_of(scheduler: TrialScheduler) -> str | None:
    """Return the metric by which a scheduler of Ray Tune compares trials; None if it has none.

    Test: tests/ray/test_sweeps.py::test_asha_stops_trainings_that_fall_behind
    """
    return getattr(scheduler, "_metric", None)


def optuna_settings(searcher: OptunaSearch) -> tuple[int, BaseSampler | None]:
    """Return the seed and sampler with which an `OptunaSearch` was constructed. Test: tests/unit/test_sweep_history.py"""
    return searcher._seed or 0, searcher._sampler


def last_step(asha: AsyncHyperBandScheduler) -> float:
    """Return the step at which ASHA ends a trial. Test: tests/unit/test_sweep_spaces.py"""
    return asha._max_t


def let_last_trials_end(asha: AsyncHyperBandScheduler) -> None:
    """Let trials go on after ASHA's last step, to be evaluated.

    Ray Tune (2.60) stops a trial at `max_t` before its last report is handled, so it would never be evaluated.
    Test: tests/ray/test_sweeps.py::test_asha_stops_trainings_that_fall_behind
    """
    # The brackets hold copies of the setting, made in the constructor.
    for part in (asha, *asha._brackets):
        part._stop_last_trials = False


# --- DeepSpeed (0.19) --------------------------------------------------------------------------------------------------


def without_shared_memory() -> None:
    """Make DeepSpeed reduce over gloo only: its shared-memory reduction needs a C++ compiler on every node.

    Test: tests/training/test_engine.py, on machines without one.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def checkpoint_engine() -> tuple[type[TorchCheckpointEngine], list[type]]:
    """Return DeepSpeed's reader and writer of checkpoints, and the classes that checkpoints may contain.

    DeepSpeed (0.19) unpickles any class, and so would run the code of a hostile checkpoint. Test:
    tests/unit/test_strangers_models.py, whose payload would write a marker.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return TorchCheckpointEngine, [LossScaler, ZeroStageEnum, fragment_address]


# --- wandb (0.31) ------------------------------------------------------------------------------------------------------


def sweep_of(api: wandb.Api, sweep_id: str) -> dict[str, Any]:
    """Return a sweep from W&B's server. The public `wandb.agent` would run its trials itself, outside of Ray.

    Test: tests/ray/test_sweeps_in_wandb.py
    """
    from wandb.apis.public.sweeps import _sweep_with_runs

    return _sweep_with_runs(api, sweep_id, "{}")


def registered_agent(api: wandb.Api, host: str, sweep_id: str) -> str:
    """Register an agent with a sweep and return its id. Test: tests/ray/test_sweeps_in_wandb.py"""
    from wandb.apis.public.sweeps import _register_agent

    return _register_agent(api, host, sweep_id=sweep_id)["id"]


class SweepGoneError(Exception):
    """The sweep was deleted on W&B's server."""


def heartbeat(api: wandb.Api, agent: str, alive: dict[str, bool]) -> list[dict[str, Any]]:
    """Report which runs of an agent are alive, and return the server's commands. Raises SweepGoneError for a deleted sweep.

    Test: tests/ray/test_sweeps_in_wandb.py
    """
    from wandb.apis.public.sweeps import _agent_heartbeat
    from wandb.sdk.sweeps import SweepNotFoundError

    try:
        return _agent_heartbeat(api, agent, {}, alive)
    except SweepNotFoundError:
        raise SweepGoneError from None
