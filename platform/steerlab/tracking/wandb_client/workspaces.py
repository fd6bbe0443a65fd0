"""Create W&B workspaces and a report from the definitions in `dashboards/`: one file for each method, and an overview.

A definition is a Python file with a `Board` named BOARD. It lists which runs to show (every run has the tag of its method), and
which parameters and metrics. `steerlab dashboards push` writes them with wandb-workspaces (the `dashboards` extra).

wandb-workspaces does not document the names of nested fields (its issue 46). W&B stores a job as nested config, so the field
`method.angle_rad` is the column `config:method.value.angle_rad`, with `.value` after the first part; `wr.Config` writes a path
this way. Items of lists have no columns. Filters add no `.value`, so runs are selected by tag and never by config.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from steerlab.guards import files
from steerlab.tracking import BY_STRENGTH, IMAGES

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

_MISSING = "this needs wandb-workspaces: pip install 'steerlab[dashboards]'"


@dataclass(frozen=True)
class Board:
    """Definition of one workspace, in a file of `dashboards/`."""

    title: str
    about: str
    """One or two sentences for the report."""
    metrics: tuple[str, ...]
    """Summary metrics. The first one is the goal, whose parameter importance is shown; the others are plotted against it."""
    parameters: tuple[str, ...]
    """Paths of fields of the job, for the parallel coordinates and the plots of the goal against a parameter."""
    methods: tuple[str, ...] = ()
    """Methods whose runs are shown, by tag; empty shows all runs."""
    curves: tuple[str, ...] = ("train/loss",)
    """Training metrics over `train/step`."""
    log: frozenset[str] = frozenset()
    """Parameters and metrics on logarithmic axes."""
    media: tuple[str, ...] = ()
    """Keys of tables to show: `samples/LABEL` for the texts of a task, `images`; each has a column `strength`."""
    in_report: bool = True
    """Whether the common report has a chapter about this board."""

    @property
    def filters(self) -> str:
        """W&B's filter expression for the runs to show; empty for all runs."""
        return f"Tags in {list(self.methods)}" if self.methods else ""


def column(parameter: str) -> str:
    """Return the name of the W&B column for a field of the job."""
    first, dot, rest = parameter.partition(".")
    return f"config:{first}.value{dot}{rest}"


def panels(board: Board) -> dict[str, list[wr.PanelTypes]]:
    """Return the panels of a board, by the name of the section."""
    wr = _reports()
    goal, *costs = board.metrics
    return {
        "Results": [
            wr.ParallelCoordinatesPlot(columns=_columns(board), layout=wr.Layout(w=24, h=9)),
            wr.ParameterImportancePlot(with_respect_to=goal, layout=wr.Layout(y=9, w=12, h=7)),
            wr.RunComparer(diff_only="split", layout=wr.Layout(x=12, y=9, w=12, h=7)),
        ],
        "Metric against parameter": [
            _scatter(board, wr.Config(parameter), goal, parameter in board.log, number)
            for number, parameter in enumerate(board.parameters)
        ],
        "Pareto": [
            _scatter(board, wr.SummaryMetric(cost), goal, cost in board.log, number, title=f"{goal} against {cost}")
            for number, cost in enumerate(costs)
        ],
        "Training": [
            wr.LinePlot(x=_axis_of(curve), y=[curve], layout=_place(number), smoothing_factor=0)
            for number, curve in enumerate(board.curves)
        ],
        "Samples": [
            *(
                wr.WeavePanelSummaryTable(table_name=key, layout=wr.Layout(y=8 * number, w=24, h=8))
                for number, key in enumerate(board.media)
            ),
            *([_by_strength(8 * len(board.media))] if IMAGES in board.media else []),
        ],
    }


def _columns(board: Board) -> list[wr.ParallelCoordinatesPlotColumn]:
    wr = _reports()
    axes = [(wr.Config(path), path) for path in board.parameters] + [(wr.SummaryMetric(name), name) for name in board.metrics]
    return [
        wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=name, log=name in board.log or None)
        for metric, name in axes
    ]


def _scatter(
    board: Board, x: wr.Config | wr.SummaryMetric, metric: str, log_x: bool, number: int, title: str | None = None
) -> wr.ScatterPlot:
    wr = _reports()
    log_y = metric in board.log or None
    return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(metric), log_x=log_x or None, log_y=log_y, layout=_place(number))


def _by_strength(y: int) -> wr.MediaBrowser:
    """Return a panel of the images of one strength at a time, which a slider chooses."""
    wr = _reports()
    key = f"{BY_STRENGTH}/images"
    layout = wr.Layout(y=y, w=24, h=8)
    return wr.MediaBrowser(title="Images by strength", media_keys=[key], mode="gallery", gallery_axis="step", layout=layout)


def _axis_of(curve: str) -> str:
    """Return the step axis of a training metric: `train/step` for `train/loss`."""
    return f"{curve.rpartition('/')[0]}/step"


def _place(number: int) -> wr.Layout:
    """Place a panel on a grid of three columns; W&B's grid is 24 units wide."""
    return _reports().Layout(x=8 * (number % 3), y=6 * (number // 3), w=8, h=6)


def workspace(board: Board, entity: str, project: str) -> ws.Workspace:
    """Return a board as a saved view of a project."""
    ws = _workspaces()
    pinned = [column(path) for path in board.parameters] + [f"summary:{name}" for name in board.metrics]
    sections = [ws.Section(name=name, panels=shown, is_open=True) for name, shown in panels(board).items() if shown]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=board.title,
        sections=sections,
        runset_settings=ws.RunsetSettings(
            filters=board.filters, order=[ws.Ordering(ws.Summary(board.metrics[0]), ascending=False)], pinned_columns=pinned
        ),
        auto_generate_panels=False,
    )


def report(boards: Sequence[Board], entity: str, project: str) -> wr.Report:
    """Return a report with one chapter for each board, which shows the runs of that board only."""
    wr = _reports()
    blocks: list[wr.BlockTypes] = [wr.TableOfContents()]
    for board in boards:
        runs = wr.Runset(entity=entity, project=project, name=board.title, filters=board.filters)
        shown = panels(board)
        blocks += [wr.H1(board.title), wr.P(board.about)]
        for name in ("Results", "Metric against parameter", "Pareto"):
            if shown[name]:
                blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=shown[name])]
    return wr.Report(entity=entity, project=project, title="steerlab", description="All methods, side by side", blocks=blocks,
                     width="fluid")  # fmt: skip


def load(folder: Path, only: Sequence[str] = ()) -> dict[str, Board]:
    """Run the definition files of a folder and return their boards by name, `overview` first.

    Args:
        folder: the folder.
        only: names of the definitions to load; empty for all.

    Raises:
        ValueError: the folder or a name does not exist, or a file defines no BOARD.
    """
    # `overview` first, because the report has its chapters in this order.
    files = {path.stem: path for path in sorted(folder.glob("*.py"), key=lambda path: (path.stem != "overview", path.stem))}
    unknown = [name for name in only if name not in files]
    if not files or unknown:
        raise ValueError(
            f"{folder} has no definition {unknown[0] if unknown else 'at all'}; it has {', '.join(files) or 'none'}"
        )
    boards = {}
    for name, path in files.items():
        if only and name not in only:
            continue
        board = getattr(_module(path), "BOARD", None)
        if not isinstance(board, Board):
            raise ValueError(f"{path} defines no BOARD = Board(...)")
        boards[name] = board
    return boards


def _module(path: Path) -> ModuleType:
    # Loaded by path: the folder is not a package, and names such as `overview` may be those of other packages.
    spec = importlib.util.spec_from_file_location(f"dashboards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def push(boards: Mapping[str, Board], path: str) -> dict[str, str]:
    """Write boards, and a report about those with `in_report`, to a W&B project.

    Args:
        boards: boards by name.
        path: ENTITY/PROJECT.

    Returns:
        URL of each board by its name, and of the report as `report`.

    Raises:
        ValueError: `path` has another form, wandb-workspaces is not installed, or W&B refuses.
    """
    import wandb

    entity, slash, project = path.partition("/")
    if not slash or not entity or not project:
        raise ValueError(f"--project {path}: expected ENTITY/PROJECT")
    # Called first, so that a missing package is reported before W&B is contacted.
    _workspaces()
    try:
        # W&B's client reads `wandb/settings` in the current folder, which could name another server that would receive the key.
        with chdir(files.OWN_FOLDER):
            urls = {name: workspace(board, entity, project).save().url for name, board in boards.items()}
            chapters = [board for board in boards.values() if board.in_report]
            return urls | ({"report": report(chapters, entity, project).save().url} if chapters else {})
    except wandb.Error as error:
        raise ValueError(f"W&B refused: {' '.join(str(error).split())[:300]}") from None


def _reports() -> ModuleType:
    try:
        # Imported only here, since wandb-workspaces is an optional dependency (the `dashboards` extra).
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise ValueError(_MISSING) from None
    return wr


def _workspaces() -> ModuleType:
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ValueError(_MISSING) from None
    return ws
