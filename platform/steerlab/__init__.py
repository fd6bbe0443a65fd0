"""steerlab: a distributed experiment platform on Ray for methods that rotate or steer a model's representations."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from steerlab.steered.language import SteeredModel, SteeredPipeline, load

__all__ = ["SteeredModel", "SteeredPipeline", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when a model is asked for; `steerlab --help` should not wait for it."""
    if name in __all__:
        from steerlab.steered import language

        return getattr(language, name)
    raise AttributeError(f"module 'steerlab' has no attribute {name!r}")
