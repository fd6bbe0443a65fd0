"""Schedulers of pipelines in place of their own."""

from __future__ import annotations

import inspect
from typing import Any

from steerlab.job import SamplerConfig


def set_scheduler(pipeline: Any, sampler: SamplerConfig) -> None:
    """Give a pipeline the scheduler of a job, made from the settings of its own.

    Raises:
        ValueError: there is no such scheduler, the pipeline cannot take it, or it knows no such setting or no timesteps.
    """
    pipeline.scheduler = scheduler_like(pipeline.scheduler, sampler)


def scheduler_like(own: Any, sampler: SamplerConfig) -> Any:
    """Return the scheduler that a sampler asks for in place of a pipeline's own; `set_scheduler` says what is refused."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    kind: Any = type(own) if sampler.scheduler is None else getattr(diffusers, sampler.scheduler, None)
    if not _is_a(kind, SchedulerMixin):
        raise ValueError(
            f"sampler.scheduler {sampler.scheduler!r} is no scheduler of diffusers; the pipeline's is {type(own).__name__}"
        )
    mine, others = {type(own).__name__, *own._compatibles}, {kind.__name__, *kind._compatibles}
    listed = type(own).__name__ in others or kind.__name__ in mine
    # Those that diffusers lists nowhere (LCM, TCD) go with schedules of the same sort: of betas, or of flows.
    if not listed and _follows_betas(type(own)) != _follows_betas(kind):
        raise ValueError(
            f"sampler.scheduler {kind.__name__}: the pipeline cannot take it in place of its {type(own).__name__}; it takes "
            f"{', '.join(sorted(mine))}"
        )
    unknown = [name for name in sampler.options if name not in inspect.signature(kind.__init__).parameters]
    if unknown:
        raise ValueError(f"sampler.options.{unknown[0]}: {kind.__name__} has no such setting")
    if sampler.timesteps is not None and "timesteps" not in inspect.signature(kind.set_timesteps).parameters:
        raise ValueError(f"sampler.timesteps: {kind.__name__} takes a number of steps only")
    return kind.from_config(own.config, **sampler.options)


def _is_a(kind: object, parent: type) -> bool:
    return inspect.isclass(kind) and issubclass(kind, parent)


def _follows_betas(kind: type) -> bool:
    return "beta_start" in inspect.signature(kind.__init__).parameters
