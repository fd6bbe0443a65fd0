"""steerlab: a distributed experiment platform on Ray for methods that rotate or steer a model's representations.

import steerlab as sl

model = sl.load("HuggingFaceTB/SmolLM2-135M-Instruct")
patch = sl.fit("linear_act", model, source=rude, target=polite, modules=".*o_proj")
with model.patched(patch, strength=0.5):
    model.generate(["How are you?"])
"""

from typing import TYPE_CHECKING, Any

from steerlab.guards.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from steerlab.interactive import (
        Activations,
        Comparison,
        Images,
        Model,
        Patch,
        Run,
        Sweep,
        Text,
        Texts,
        compare,
        fit,
        load,
        load_patch,
        read_run,
        read_sweep,
    )

__all__ = [
    "Activations",
    "Comparison",
    "Images",
    "Model",
    "Patch",
    "Run",
    "Sweep",
    "Text",
    "Texts",
    "compare",
    "fit",
    "load",
    "load_patch",
    "read_run",
    "read_sweep",
]


def __getattr__(name: str) -> Any:
    """Import torch only when one of the names is asked for; `steerlab --help` should not wait for it."""
    if name in __all__:
        from steerlab import interactive

        return getattr(interactive, name)
    # Functions and subpackages alike: guards/called_package.py.
    if name == "run":
        import steerlab.run

        return steerlab.run
    if name == "report":
        import steerlab.report

        return steerlab.report
    raise AttributeError(f"module 'steerlab' has no attribute {name!r}")
