"""Replace the scheduler of a diffusion pipeline by the one that a job names."""

from __future__ import annotations

import inspect
from typing import Any

from steerlab.job import SamplerConfig


def set_scheduler(pipeline: Any, sampler: SamplerConfig) -> None:
    """Replace the pipeline's scheduler by the sampler's, built with the settings of the one that it replaces.

    Raises:
        ValueError: diffusers has no scheduler of this name, the pipeline cannot take it, or it lacks one of the sampler's
            settings.
    """
    pipeline.scheduler = scheduler_like(pipeline.scheduler, sampler)


def scheduler_like(own: Any, sampler: SamplerConfig) -> Any:
    """Return the sampler's scheduler, with the settings of the pipeline's scheduler `own`. Raises as `set_scheduler` does."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    kind: Any = type(own) if sampler.scheduler is None else getattr(diffusers, sampler.scheduler, None)
    if not _is_a(kind, SchedulerMixin):
        raise ValueError(
            f"sampler.scheduler {sampler.scheduler!r} is not a scheduler of diffusers; the pipeline's is {type(own).__name__}"
        )
    # `_compatibles` holds the names of schedulers whose configs can replace one another (diffusers 0.42); only one of the two
    # may list the other.
    mine, others = {type(own).__name__, *own._compatibles}, {kind.__name__, *kind._compatibles}
    listed = type(own).__name__ in others or kind.__name__ in mine
    # Schedulers without a list (LCM, TCD) fit if the noise schedule is of the same kind: diffusion betas, or flow matching.
    if not listed and _follows_betas(type(own)) != _follows_betas(kind):
        raise ValueError(
            f"sampler.scheduler {kind.__name__}: the pipeline cannot use it instead of its {type(own).__name__}; it can use "
            f"{', '.join(sorted(mine))}"
        )
    # `from_config` ignores settings that the class does not have, so they are checked here.
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
