"""Choose modules by regular expression and read what they compute."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def select(model: nn.Module, pattern: str) -> list[str]:
    """Return the paths of the modules that `pattern` matches whole, in the model's order.

    Raises:
        ValueError: when the pattern is no regular expression or matches nothing; near misses are listed.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"module pattern {pattern!r} is not a regular expression: {error}") from None
    names = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if expression.fullmatch(name)]
    if not found:
        partial = [name for name in names if expression.search(name)]
        near = partial or difflib.get_close_matches(pattern, names, n=5, cutoff=0.2)
        raise ValueError(f"no module path matches {pattern!r} as a whole; near: {', '.join(near[:5])}")
    return found


def tensor_of(output: object) -> Tensor:
    """Return the hidden states of a module's output: the tensor itself, or the first element of a tuple."""
    value = output[0] if isinstance(output, tuple) else output
    if not isinstance(value, Tensor):
        raise ValueError(f"expected a tensor or a tuple that starts with one, got {type(value).__name__}")
    return value


@contextmanager
def reading(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of modules during forward passes; the newest forward overwrites the one before."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            outputs[name] = tensor_of(output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
