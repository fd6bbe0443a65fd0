"""The page about sweeps: written folders in, one self-contained page out, looked at by a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from steerlab import report
from steerlab.report import figures, predictions, samples, sweep_figures, tables
from steerlab.run import folder
from steerlab.storage.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian package chromium)")
EVIL = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def metric(value: float, half: float = 0.05) -> dict[str, Any]:
    return {"value": value, "stderr": half / 1.96, "n": 100, "unparsable": 0, "low": value - half, "high": value + half}


MEASURES = {
    "separation/sep": {"better": "higher", "unit": "share", "low": 0, "high": 1, "transform": "identity"},
    "perplexity/value": {"better": "lower", "unit": "nats <3", "low": 1, "high": None, "transform": "exp"},
}


def write_run(store: Store, name: str, alpha: float, seed: int, *, pictures: bool = False) -> str:
    """Write a run folder as `run.execute` leaves it: three strengths, generations, a training, probes by layer."""
    folder = f"runs/{name}/{name}-{alpha:g}-{seed}"
    found = {"separation/sep": metric(alpha - alpha**2), "perplexity/value": metric(20 + 10 * alpha)}
    found |= {f"probing/layer_{layer:02d}": metric(0.5 + 0.4 * layer / 8) for layer in range(9)}
    strengths = {s: found for s in (1.0, 0.5)} | {0.0: {n: metric(m["value"] / 2) for n, m in found.items()}}
    store.write_text(f"{folder}/job.yaml", yaml.safe_dump({"name": name, "method": {"name": "aside", "alpha": alpha}}))
    stages = [("extract", "cached", 0.0), ("train", "ran", 12.5), ("evaluate", "ran", 3.0)]
    listed = [
        {
            "name": n,
            "label": f"{n} of {name}",
            "key": f"{n}{alpha}".ljust(64, "0"),
            "status": status,
            "seconds": s,
            "inputs": [],
        }
        for n, status, s in stages
    ]
    store.write_json(f"{folder}/plan.json", {"stages": listed})
    summary = {"metrics": found, "strengths": strengths, "choice": None, "model": None, "evaluations": {}, "schema": 1}
    summary["measures"] = MEASURES
    store.write_json(f"{folder}/summary.json", summary)
    where = {"command": "steerlab sweep j.yaml s.py", "git": "c0ffee", "git_changes": "", "created": "2026-11-21T12:00:00+0000"}
    store.write_json(
        f"{folder}/environment.json", {**where, "versions": {"torch": "2.13"}, "cluster": {"CPU": 2.0}, "nodes": 1}
    )
    told = [
        {"id": "1", "strength": s, "prompt": f"a {EVIL} prompt", "continuation": f"at {s}: {EVIL}", "toxic_probability": 0.25}
        for s in (1.0, 0.5, 0.0)
    ]
    store.write_json(f"{folder}/samples/toxicity.json", told)
    for step in range(1, 41):
        line = {"stage": "train", "key": "k" * 12, "step": step, "train/loss": 3 / step, "train/lr": 1e-3}
        store.append_line(f"{folder}/metrics.jsonl", line)
    for strength in (0.0, 0.5, 1.0) if pictures else ():
        for number in range(6):
            path = Path(store.root) / folder / "samples" / "images" / f"{strength:.3f}_1.000" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (int(255 * strength), 40 * number, 120)).save(path)
    if pictures:  # a contact sheet lies beside the folders
        Image.new("RGB", (48, 16)).save(Path(store.root) / folder / "samples/images/sheet_1.000.png")
    return folder


def write_sweep(store: Store, num_alphas: int, num_seeds: int = 2, pictures: bool = False) -> str:
    """Write a sweep folder: trials over alpha and a method, one failed, one running."""
    folder = "sweeps/alpha/20261121-120000-abcdef"
    rows = []
    for number in range(num_alphas):
        for seed in range(num_seeds):
            alpha = (number + 1) / num_alphas
            sep, cost = metric(alpha - alpha**2 + 0.003 * seed), metric(20 + 10 * alpha, 1)
            row = {
                "trial_id": f"t{number:03d}",
                "seed": seed,
                "param.method.alpha": alpha,
                "param.train.lr": 10.0 ** -(number % 4),
            }
            row["param.method.pooling"] = ("mean", "last")[number % 2]
            for name, found in {"separation/sep": sep, "perplexity/value": cost}.items():
                row |= {f"metric.{name}": found["value"], f"stderr.{name}": found["stderr"], f"low.{name}": found["low"]}
                row |= {f"high.{name}": found["high"], f"n.{name}": 100}
            row |= {"seconds.train": 12.5, "cached.train": number > 0, "key.train": "k", "seconds.evaluate": 3.0}
            row |= {"cached.evaluate": False, "key.evaluate": "e", "status": "finished", "reason": ""}
            row["run"] = write_run(store, "alpha", alpha, seed, pictures=pictures) if number < 12 else None
            rows.append(row)
    rows[-1] |= {"status": "failed", "reason": f"metric is NaN {EVIL}", "metric.separation/sep": math.nan}
    rows[-2] |= {"status": "running", "metric.separation/sep": None, "metric.perplexity/value": None}
    target = Path(store.root) / folder
    target.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), target / "trials.parquet")
    store.write_text(f"{folder}/job.yaml", yaml.safe_dump({"name": "alpha", "method": {"name": "aside"}}))
    store.write_json(f"{folder}/space.json", {"space": {"method.alpha": {"kind": "grid_search", "values": [0.5]}}})
    best = {"trial_id": f"t{num_alphas // 2 - 1:03d}", "value": 0.25}
    summary = {"schema": 1, "metric": "separation/sep", "mode": "max", "best": best}
    summary |= {"seconds": {"train": 301.0, "evaluate": 20.0}, "indistinguishable": None, "development": None, "test": None}
    summary |= {"indistinguishable": [f"t{num_alphas // 2:03d}"], "development": {"separation/sep": metric(0.26)}}
    store.write_json(f"{folder}/summary.json", {**summary, "test": {"separation/sep": metric(0.24)}})
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def written(store: Store, path: Path, num_alphas: int = 6, pictures: bool = False) -> str:
    sweep = report.read_sweep(store, write_sweep(store, num_alphas, pictures=pictures))
    other = report.read(store, write_run(store, "aside-other", 0.7, 9))
    report.write([other], path, [sweep])
    return path.read_text(encoding="utf-8")


def drawn_on(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_every_figure_is_valid_plotly(store: Store, tmp_path: Path) -> None:
    figures_drawn = drawn_on(written(store, tmp_path / "page.html"))
    assert len(figures_drawn) == 9, "three parameters, parallel, Pareto, costs, training, stages, layers"
    for figure in figures_drawn:
        colours = json.loads(re.sub(r'"@\w+"', '"#123456"', json.dumps(figure)))
        go.Figure(colours["data"], colours["layout"])
        assert all(trace.get("meta", {}).get("metric", None) in (None, *figure["metrics"]) for trace in figure["data"])


def test_a_figure_shows_every_scored_trial_with_its_interval(store: Store) -> None:
    sweep = report.read_sweep(store, write_sweep(store, 6))
    figure = sweep_figures.against(sweep, "method.alpha")
    assert figure is not None
    shown = [t for t in figure["data"] if t["mode"] == "markers" and t["meta"]["metric"] == "separation/sep"]
    assert [(t["name"], len(t["x"])) for t in shown] == [
        ("other trials", 6), ("not distinguishable from the best", 2), ("best", 2)
    ]  # fmt: skip
    assert {round(e, 6) for t in shown for e in (*t["error_y"]["array"], *t["error_y"]["arrayminus"])} == {0.05}
    lr = sweep_figures.against(sweep, "train.lr")
    assert lr is not None and lr["layout"]["xaxis"]["type"] == "log"
    pooling = sweep_figures.against(sweep, "method.pooling")
    assert pooling is not None and pooling["layout"]["xaxis"]["type"] == "category"


def test_the_pareto_front_is_the_naive_one(store: Store) -> None:
    sweep = report.read_sweep(store, write_sweep(store, 8))
    figure = sweep_figures.pareto(sweep)
    assert figure is not None and figure["axis"] == "x"
    points = [(t["metric.perplexity/value"], t["metric.separation/sep"]) for t in sweep.finished]
    naive = {p for p in points if not any(a <= p[0] and b >= p[1] and (a, b) != p for a, b in points)}
    (line,) = [trace for trace in figure["data"] if trace["name"] == "Pareto front"]
    assert set(zip(line["x"], line["y"], strict=True)) == naive
    (chosen,) = [trace for trace in figure["data"] if trace["name"] == "chosen"]
    assert len(chosen["x"]) == 2


def test_axes_have_units_and_a_metric_without_a_direction_has_no_front(store: Store) -> None:
    sweep = report.read_sweep(store, write_sweep(store, 8))
    drawn, against = sweep_figures.pareto(sweep), sweep_figures.against(sweep, "method.alpha")
    assert drawn is not None and against is not None
    assert dict(zip(against["metrics"], against["titles"], strict=True))["separation/sep"] == "separation/sep (share)"
    assert drawn["layout"]["yaxis"]["title"]["text"] == "separation/sep (share)"
    assert drawn["titles"] == ["perplexity/value (nats <3)"]
    runs = tuple(replace(run, measures={}) for run in sweep.runs)
    blind = sweep_figures.pareto(replace(sweep, runs=runs))
    assert blind is not None and not any(trace["name"] == "Pareto front" for trace in blind["data"])
    higher = {"perplexity/value": {**MEASURES["perplexity/value"], "better": "higher"}}
    turned = tuple(replace(run, measures=folder.measures({"measures": higher})) for run in sweep.runs)
    other = sweep_figures.pareto(replace(sweep, runs=turned))
    assert other is not None and front_of(other) != front_of(drawn)


def front_of(figure: dict[str, Any]) -> set[tuple[float, float]]:
    (line,) = [trace for trace in figure["data"] if trace["name"] == "Pareto front"]
    return set(zip(line["x"], line["y"], strict=True))


def test_the_best_of_a_column_goes_by_what_the_task_says(store: Store) -> None:
    """Less perplexity is better, more separation; nobody asks how they are called."""
    entries = [report.read(store, write_run(store, name, alpha, 0)) for name, alpha in (("one", 0.5), ("two", 0.75))]
    names = ["separation/sep", "perplexity/value"]

    def best(entries: list[Any]) -> list[list[bool]]:
        return [[cell["best"] for cell in line[2:4]] for line in tables.overview(entries, names)[1:]]

    assert best(entries) == [[True, True], [False, False]]
    higher = {**entries[0].measures, "perplexity/value": entries[0].measures["perplexity/value"]._replace(better="higher")}
    assert best([replace(entry, measures=higher) for entry in entries]) == [[True, False], [False, True]]
    assert best([replace(entry, measures={}) for entry in entries]) == [[False, False], [False, False]]


def test_the_table_starts_with_the_best_and_ends_with_what_failed(store: Store) -> None:
    sweep = report.read_sweep(store, write_sweep(store, 6))
    header, body = tables.trials(sweep)
    assert header[:4] == ["trial", "seed", "method.alpha", "train.lr"] and header[-2:] == ["ran, s", "state"]
    assert [line[0]["value"] for line in body[:2]] == ["\u2605 t002", "\u2605 t002"]
    assert [line[-1]["value"] for line in body[-2:]] == ["running", "failed"] and "NaN" in body[-1][-1]["interval"]
    facts = dict(tables.facts(sweep))
    assert facts["stages taken from the store"] == "10 of 24"
    cells = {row["trial_id"]: tables.cell(sweep_figures.measured(row, "separation/sep")) for row in reversed(sweep.finished)}
    assert facts["best separation/sep"] == cells.pop("t002") and facts["best separation/sep"] not in cells.values()
    texts = [tables._plain(value)["value"] for value in (0.123456, 3, True, None, "x")]
    assert texts == ["0.1235", "3", "True", tables.DASH, "x"]
    assert sweep.space["space"]["method.alpha"] == {"kind": "grid_search", "values": [0.5]}


def test_a_sweep_that_goes_on_has_a_page_too(store: Store, tmp_path: Path) -> None:
    folder = write_sweep(store, 4)
    (Path(store.root) / folder / "summary.json").unlink()
    sweep = report.read_sweep(store, folder)
    assert sweep.metric == "separation/sep" and sweep.best is not None
    report.write([], tmp_path / "page.html", [sweep])
    with pytest.raises(ValueError, match="sweeps/none/1 is not a sweep folder"):
        report.read_sweep(store, "sweeps/none/1")


def test_texts_are_text_and_nothing_is_loaded(store: Store, tmp_path: Path) -> None:
    page = written(store, tmp_path / "page.html")
    assert EVIL not in page and html.escape(EVIL, quote=True) in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    outside = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside) and "@import" not in outside
    assert page.count("plotly.js v") == 1 and "default-src 'none'" in page
    assert "steerlab run" in page and "/best.yaml" in page


def test_runs_that_measured_other_rows_have_no_best_and_a_baseline_each(store: Store) -> None:
    entries = [report.read(store, write_run(store, name, alpha, 0)) for name, alpha in (("one", 0.5), ("two", 0.75))]
    column = 2 + (names := report.metrics(entries)).index("perplexity/value")

    def with_jobs(*limits: int, sources: tuple[str, str] = ("a", "a")) -> list[Any]:
        tasks = [{"task": "perplexity", "limit": limit, "strengths": [1.0]} for limit in limits]
        jobs = [{**e.job, "model": {"source": s}, "evaluate": [t]} for e, s, t in zip(entries, sources, tasks, strict=True)]
        return [replace(entry, job=job) for entry, job in zip(entries, jobs, strict=True)]

    alike = tables.overview(with_jobs(8, 8), names)
    assert [line[0]["value"] for line in alike] == ["strength 0 (no patch)", "aside (one)", "aside (two)"]
    assert [line[column]["best"] for line in alike] == [False, True, False]
    other = tables.overview(with_jobs(8, 9, sources=("a", "b")), names)
    assert [line[0]["value"] for line in other[:2]] == ["strength 0 of aside (one)", "strength 0 of aside (two)"]
    assert not any(line[column]["best"] for line in other)


def test_losses_of_another_size_are_drawn_on_a_logarithmic_axis(store: Store) -> None:
    one = report.read(store, write_run(store, "one", 0.5, 0))
    big = replace(one, curves={"train/loss": [(1, 500.0), (2, 300.0)]})
    alone, both = figures.training([one]), figures.training([one, big])
    assert alone is not None and both is not None
    assert "type" not in alone["layout"]["yaxis"] and both["layout"]["yaxis"]["type"] == "log"


def test_what_single_places_measure_in_training_is_drawn_over_the_places(store: Store) -> None:
    one = report.read(store, write_run(store, "one", 0.5, 0))
    assert figures.by_place([one]) is None
    places = {f"train/loss_at/model.layers.{i}": [(1, 10.0 - i), (2, 1.0 * i)] for i in range(3)}
    run = replace(one, curves={"train/loss": [(1, 500.0), (2, 300.0)], **places})
    curves, drawn = figures.training([run]), figures.by_place([run])
    assert curves is not None and drawn is not None
    assert {trace["meta"]["metric"] for trace in curves["data"]} == {"train/loss"}, "hundreds of places are no menu"
    first, last = drawn["data"]
    assert first["x"] == [f"model.layers.{i}" for i in range(3)] == last["x"]
    assert (first["y"], last["y"]) == ([10.0, 9.0, 8.0], [0.0, 1.0, 2.0])
    assert "Loss of every measured place" in report.page([run])


def test_images_stay_within_the_budget(store: Store) -> None:
    run = report.read(store, write_run(store, "flowers", 0.5, 0, pictures=True))
    (whole,) = samples.galleries([run])
    assert whole["strengths"] == ["0", "0.5", "1"] and whole["left_out"] == 0
    assert [len(frame["images"]) for frame in whole["frames"]] == [6, 6, 6]
    size = sum(len(image["uri"]) for frame in whole["frames"] for image in frame["images"])
    (some,) = samples.galleries([run], budget_bytes=size // 2)
    assert some["left_out"] == 3 and [len(frame["images"]) for frame in some["frames"]] == [3, 3, 3]


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    from steerlab.report.contents import MAX_POINTS, thinned

    points = [(float(step), 1.0) for step in range(100_000)]
    assert len(thinned(points)) == MAX_POINTS and thinned(points)[0] == points[0] and thinned(points)[-1] == points[-1]


def browsed(page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=15000",
        *options,
        f"file://{page}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_chromium
@pytest.mark.slow
def test_a_browser_draws_it_and_runs_nothing_that_a_model_wrote(store: Store, tmp_path: Path) -> None:
    written(store, tmp_path / "page.html", pictures=True)
    dom = browsed(tmp_path / "page.html", "--dump-dom", "--window-size=1300,900")
    assert "<title>page</title>" in dom
    assert dom.count('class="main-svg"') >= 9 and dom.count('class="plot js-plotly-plot"') == 9
    assert "t002 (alpha 0.5" in dom and "&lt;script&gt;document.title" in dom


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1300])
def test_nothing_is_wider_than_the_window(store: Store, tmp_path: Path, width: int) -> None:
    page = written(store, tmp_path / "page.html", pictures=True)
    # An inner frame has the wished width; a headless window has at least 500 pixels.
    probe = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    page = page.replace(
        "</body>", f"<script>setTimeout(() => {{ {probe}; parent.postMessage(document.title, '*') }}, 6000)</script></body>"
    )
    (tmp_path / "inner.html").write_text(page, encoding="utf-8")
    listen = "<script>addEventListener('message', (event) => { document.title = event.data })</script>"
    (tmp_path / "outer.html").write_text(
        f'{listen}<iframe src="inner.html" width="{width}" height="800" style="border:0"></iframe>'
    )
    found = re.search(
        r"<title>(\d+) of (\d+)</title>", browsed(tmp_path / "outer.html", "--dump-dom", "--window-size=1400,900")
    )
    assert found is not None and int(found.group(2)) == width and int(found.group(1)) <= width, found


def test_two_hundred_trials_are_quick(store: Store, tmp_path: Path) -> None:
    folder = write_sweep(store, 100)
    began_s = time.process_time()
    report.write([], tmp_path / "page.html", [report.read_sweep(store, folder)])
    assert time.process_time() - began_s < 10
    assert (tmp_path / "page.html").stat().st_size < 8e6


def predicted(**more: object) -> dict[str, object]:
    outcome = {
        "metric": "separation/sep",
        "over": "method.alpha",
        "expected": "rises",
        "where": {},
        "because": "theory says so",
    }
    outcome |= {"ends": [0.0, 1.0], "values": [0.25, 0.5], "difference": 0.25, "low": 0.125, "high": 0.375, "held": True}
    return {**outcome, **more}


def test_predictions_stand_before_the_trials_with_their_verdict(store: Store, tmp_path: Path) -> None:
    folder = write_sweep(store, 6)
    summary = store.read_json(f"{folder}/summary.json")
    outcomes = [
        predicted(),
        predicted(expected="falls", held=False, where={"train.lr": 0.1, "note": EVIL}),
        predicted(expected="flat", because="", difference=None, low=None, high=None, held=None, values=[0.25, None]),
        predicted(ends=[], values=[], difference=None, low=None, high=None, held=None),
        predicted(ends=["mean", "pixel"]),
        predicted(expected="flat", margin=0.1),
    ]
    store.write_json(
        f"{folder}/summary.json",
        {
            **summary,
            "predictions": outcomes,
            "bounds": ["u/use at least 0.9"],
            "prices": ["c/cost"],
            "warnings": ["the 3 seeds <i>changed</i> nothing"],
        },
    )
    sweep = report.read_sweep(store, folder)
    lines = predictions.lines(sweep)
    assert [line.verdict for line in lines] == ["holds", "does not hold", "not shown", "not shown", "holds", "holds"]
    assert lines[0].statement == "separation/sep rises as method.alpha goes from 0 to 1"
    assert lines[0].values == "0.25 → 0.5" and lines[0].difference == "+0.250 [+0.125, +0.375] share"
    assert (
        lines[2].statement.startswith("separation/sep does not change as") and lines[2].values == f"0.25 → {predictions.DASH}"
    )
    assert lines[3].statement == "separation/sep rises over method.alpha" and lines[3].values == predictions.DASH
    assert lines[5].statement == (
        "separation/sep does not change (less than 0.1 counts as none) as method.alpha goes from 0 to 1"
    )
    assert lines[4].statement == "separation/sep rises as method.alpha goes from mean to pixel"
    report.write([], tmp_path / "page.html", [sweep])
    page = (tmp_path / "page.html").read_text()
    assert page.index("Predicted and measured") < page.index("Metrics against parameters")
    assert "theory says so" in page
    assert (
        "The best trial satisfies u/use at least 0.9. Between trials that cannot be distinguished from it, c/cost decides. "
        "Warning: the 3 seeds &lt;i&gt;changed&lt;/i&gt; nothing." in page
    )
    assert EVIL not in page
    assert html.escape(EVIL, quote=True) in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


def test_a_control_has_a_line_of_its_own(store: Store) -> None:
    folder = write_sweep(store, 6)
    sweep = report.read_sweep(store, folder)
    rows = [
        {
            **row,
            "param.method.alpha": number % 3 / 2,
            "param.train.lr": 1e-3,
            "param.method.pooling": ("mean", "last")[number // 3],
            "param.rows": ("train", "other")[number // 3],
            "metric.separation/sep": number / 10,
            "status": "finished",
        }
        for number, row in enumerate(sweep.trials[:6])
    ]
    sweep = replace(sweep, trials=rows)
    # `rows` changes with `method.pooling` only, so one of the two says all.
    assert sweep.varied == ["method.alpha", "method.pooling"]
    figure = sweep_figures.against(sweep, "method.alpha")
    assert figure is not None
    drawn = [trace for trace in figure["data"] if trace["mode"] == "lines" and trace["meta"]["metric"] == "separation/sep"]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in drawn] == [
        ("mean", [0.0, 0.5, 1.0], [0.0, 0.1, 0.2]),
        ("last", [0.0, 0.5, 1.0], [0.3, 0.4, 0.5]),
    ]
    assert all(trace["showlegend"] for trace in drawn)


def test_a_sweep_of_one_parameter_has_one_line(store: Store) -> None:
    sweep = report.read_sweep(store, write_sweep(store, 6))
    rows = [{**row, "param.method.pooling": "mean", "param.train.lr": 1e-3} for row in sweep.trials]
    figure = sweep_figures.against(replace(sweep, trials=rows), "method.alpha")
    assert figure is not None
    names = {trace["name"] for trace in figure["data"] if trace["mode"] == "lines"}
    assert names == {"mean"}


def test_a_sweep_in_which_no_trial_keeps_the_bounds_has_no_best_one(store: Store) -> None:
    folder = write_sweep(store, 6)
    running = report.read_sweep(store, folder)
    assert replace(running, summary={}).best == running.finished[0]["trial_id"]
    assert replace(running, summary={**running.summary, "best": None}).best is None
