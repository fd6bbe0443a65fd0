"""Draw what stages store about the modules of a model: curves such as spectra, and numbers such as shares.

A stage stores them in small JSON files beside its tensors, under the names `curves` and `by_module` (contents.py). The figures
depend neither on the stage nor on the method. A function returns None if the runs have nothing to draw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from steerlab.report.contents import Entry
from steerlab.report.plotting import MAX_METRICS, Drawing, Figure, label

_BLOCK = re.compile(r"\.(\d{1,4})\.")
_SHADES = 5
"""Number of shades, `@s0` to `@s4`, from the first layer to the last one."""


def layer_of(module: str) -> int | None:
    """Return the number of the block in a module's path; None if the path has none."""
    block = _BLOCK.search(module)
    return None if block is None else int(block.group(1))


def kind_of(module: str) -> str:
    """Return a module's path within its block: `self_attn.q_proj`; the whole path if it has no block."""
    block = _BLOCK.search(module)
    return module if block is None else module[block.end() :]


def spectra(entries: Sequence[Entry]) -> Figure | None:
    """Draw curves by module, such as the eigenvalues of a basis: a line for each layer, a menu of the kinds of module."""
    drawn = Drawing()
    menu: dict[str, str] = {}
    for entry in entries:
        for name, curves in entry.kept.curves.items():
            last = max((layer_of(module) or 0 for module in curves), default=0)
            for module, points in curves.items():
                layer = layer_of(module) or 0
                metric = f"{name}, {kind_of(module)}"
                menu.setdefault(metric, metric)
                # A logarithmic axis has no 0, and rounding makes the smallest eigenvalues of a singular matrix negative.
                shown = [(x, y) for x, y in points if x > 0 and y > 0]
                drawn.add_scatter(
                    x=[x for x, _ in shown], y=[y for _, y in shown], mode="lines", meta={"metric": metric},
                    name=_named(entry, entries, f"layer {layer}"),
                    line={"color": f"@s{layer * (_SHADES - 1) // max(1, last)}", "width": 1.4},
                    hovertemplate=f"%{{x}}: %{{y:.3g}}<extra>{label(module)}</extra>",
                )  # fmt: skip
    if not menu:
        return None
    drawn.axis("xaxis", "number, the largest first", type="log")
    drawn.axis("yaxis", type="log")
    return _done(drawn, menu)


def numbers(entries: Sequence[Entry]) -> Figure | None:
    """Draw numbers by module over the layers, such as the share of a mask: a line for each kind of module."""
    drawn = Drawing()
    menu: dict[str, str] = {}
    for entry in entries:
        for name, values in entry.kept.by_module.items():
            menu.setdefault(name, name)
            for number, kind in enumerate(_kinds(values)):
                points = sorted((layer_of(module) or 0, value) for module, value in values.items() if kind_of(module) == kind)
                drawn.add_scatter(
                    x=[layer for layer, _ in points], y=[value for _, value in points], mode="lines+markers",
                    meta={"metric": name}, name=_named(entry, entries, kind),
                    marker={"size": 6, "color": f"@{number % 10}"}, line={"color": f"@{number % 10}", "width": 1.4},
                    hovertemplate=f"layer %{{x}}: %{{y:.3g}}<extra>{label(kind)}</extra>",
                )  # fmt: skip
    if not menu:
        return None
    drawn.axis("xaxis", "layer")
    return _done(drawn, menu)


def _done(drawn: Drawing, menu: dict[str, str]) -> Figure:
    shown = dict(list(menu.items())[:MAX_METRICS])
    drawn.data = [trace for trace in drawn.data if trace["meta"]["metric"] in shown]
    return drawn.done(380, shown)


def _named(entry: Entry, entries: Sequence[Entry], name: str) -> str:
    return label(name if len(entries) == 1 else f"{entry.name}, {name}")


def _kinds(modules: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(kind_of(module) for module in modules))
