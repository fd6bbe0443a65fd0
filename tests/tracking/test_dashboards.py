"""What dashboards serialise to: names by which W&B finds configs and metrics, and Grafana what is exported."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import standin
import yaml

from steerlab.evaluation.statistics.measures import find
from steerlab.tracking import prometheus
from steerlab.tracking.wandb_client import workspaces

FOLDER = Path(__file__).parents[2] / "dashboards"
pytest.importorskip("wandb_workspaces", reason="wandb-workspaces (the extra `dashboards`) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def spec_of(board: workspaces.Board) -> dict[str, Any]:
    model = workspaces.workspace(board, "me", "tests")._to_model()
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def test_names_of_columns() -> None:
    assert workspaces.column("method.angle_rad") == "config:method.value.angle_rad"
    assert workspaces.column("snapshot") == "config:snapshot.value"


def test_every_board_serialises_to_names_that_wandb_knows() -> None:
    boards = workspaces.load(FOLDER)
    assert next(iter(boards)) == "overview" and {"aside", "warp", "steering", "iav", "diffusion"} <= set(boards)
    for board in boards.values():
        spec = spec_of(board)
        sections = {s["name"]: s["panels"] for s in spec["section"]["panelBankConfig"]["sections"]}
        parallel, importance, comparer = sections["Results"]
        accessors = [column["accessor"] for column in parallel["config"]["columns"]]
        assert accessors[: len(board.parameters)] == [workspaces.column(path) for path in board.parameters]
        assert accessors[len(board.parameters) :] == [f"summary:{name}" for name in board.metrics]
        assert importance["config"]["targetKey"] == board.metrics[0] and comparer["viewType"] == "Run Comparer"
        axes = [panel["config"]["xAxis"] for panel in sections["Metric against parameter"]]
        assert axes == [workspaces.column(path) for path in board.parameters]
        assert [panel["config"]["xAxis"] for panel in sections["Pareto"]] == [f"summary:{name}" for name in board.metrics[1:]]
        for panel, curve in zip(sections["Training"], board.curves, strict=True):
            assert panel["config"]["xAxis"] == "train/step" and panel["config"]["metrics"] == [curve]
        runs = spec["section"]["runSets"][0]
        assert set(accessors) < set(runs["runFeed"]["columnPinned"])
        picked = runs["filters"]["filters"]
        assert not board.methods or (picked[0]["key"], picked[0]["value"]) == (
            {"section": "run", "name": "tags"},
            [*board.methods],
        )


def test_parameters_are_fields_of_jobs() -> None:
    from steerlab.methods import METHODS
    from steerlab.stages import JobType

    for board in workspaces.load(FOLDER).values():
        for path in board.parameters:
            first, _, rest = path.partition(".")
            assert first in JobType.model_fields, path
            if first == "method":
                names = board.methods or tuple(METHODS)
                assert any(rest in METHODS[name].Config.model_fields for name in names), path
        assert set(board.methods) <= set(METHODS)


def test_boards_show_what_tasks_measure_and_trainings_report() -> None:
    """A panel of a name that nothing reports stays empty for ever."""
    from steerlab.evaluation import TASKS
    from steerlab.methods import METHODS, contract
    from steerlab.methods.math import pair_losses

    fields = {"concept": "three", "classifier": {"source": "pixels:digits/train", "format": "image"}}
    for board in workspaces.load(FOLDER).values():
        for metric in board.metrics:
            task, _, name = metric.partition("/")
            drawn = {"data": {"source": "tiny:topics/test", "format": "text"}} if "diffusion" in TASKS[task].kinds else {}
            known = (
                {key: value for key, value in (fields | drawn).items() if key in TASKS[task].Config.model_fields}
                if drawn
                else {}
            )
            refusal = {"harmless": {"source": "tiny:topics/test", "format": "text"}} if task == "refusal" else {}
            pairs = {"pairs": {"source": "tiny:preferences/test", "format": "preference"}} if task == "preference" else {}
            config = TASKS[task].Config.model_validate({**known, **refusal, **pairs})
            assert find(TASKS[task].measures(config), name) is not None, metric
        methods = [METHODS[name] for name in board.methods or METHODS]
        # What the methods' files report, with the shared functions that make a loss.
        sources = "".join(inspect.getsource(inspect.getmodule(method.Config)) for method in methods)  # type: ignore[arg-type]
        sources += inspect.getsource(contract) + inspect.getsource(pair_losses)
        for curve in board.curves:
            name = curve.removeprefix("train/")
            assert name in ("loss", "lr", "grad_norm") or f'"{name}"' in sources, curve


def test_every_method_has_a_board_for_each_kind_of_model() -> None:
    from steerlab.methods import METHODS

    boards = workspaces.load(FOLDER)
    # The model as it is belongs to no method's board; the overview has all runs.
    for name in METHODS.keys() - {"none"}:
        shown = {board for board, found in boards.items() if name in found.methods}
        kinds = {"diffusion" if board == "diffusion" else "causal_lm" for board in shown}
        assert kinds >= set(METHODS[name].kinds), f"{name} is on {shown or 'no board'}"
    for found in boards.values():
        assert "strength" in found.parameters, "what varies without another run is a column as well"


def test_samples_are_tables_with_a_column_of_strengths() -> None:
    for board in workspaces.load(FOLDER).values():
        sections = {s["name"]: s["panels"] for s in spec_of(board)["section"]["panelBankConfig"]["sections"]}
        shown = json.dumps(sections["Samples"])
        assert all(f'"{key}"' in shown for key in board.media) and "Weave" in shown
        assert all(key == "images" or key.startswith("samples/") for key in board.media)
        # The gallery's axis is the step, so that it has a slider; each strength's images are a step (`Tracker.gallery`).
        assert ('"by_strength/images"' in shown and '"axis": "step"' in shown) == ("images" in board.media)


def test_push_writes_views_and_a_report(server: standin.Standin) -> None:
    boards = workspaces.load(FOLDER, ["overview", "aside"])
    urls = workspaces.push(boards, "me/tests")
    assert list(urls) == ["overview", "aside", "report"] and not server.unknown
    assert [view.get("displayName") for view in server.views] == ["Overview", "ASIDE", "steerlab"]
    report = json.loads(server.views[-1]["spec"])
    assert sum(block["type"] == "panel-grid" for block in report["blocks"]) == 6


def test_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected ENTITY/PROJECT"):
        workspaces.push({}, "tests")
    with pytest.raises(ValueError, match="has no definition asid; it has overview"):
        workspaces.load(FOLDER, ["asid"])
    with pytest.raises(ValueError, match="has no definition at all"):
        workspaces.load(tmp_path)


def test_grafana_asks_for_what_is_exported() -> None:
    text = (FOLDER / "grafana" / "steerlab.json").read_text()
    asked = set(re.findall(r"ray_(steerlab_\w+?)(?:_total|_bucket)?[\[{) ]", text))
    known = set(re.findall(r"^    (steerlab_\w+?)(?:_total)?\{", prometheus.__doc__ or "", re.MULTILINE))
    assert asked and asked == known
    config = yaml.safe_load((FOLDER / "grafana" / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["file_sd_configs"]
