"""Commands that a newcomer meets first: `init`, `describe`, `show`, `--version`, and `run` of several jobs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import steerlab
import steerlab as sl
from steerlab import cli
from steerlab.cli import running
from steerlab.data import guessing
from steerlab.methods import METHODS
from steerlab.run import capacity
from steerlab.stages.spread import alone

BASE = """\
name: base
model: {source: "tiny:model"}
method: {name: mean_act}
data:
  prompt_style: plain
  source: {source: "tiny:texts/train", format: text, equals: {label: farm}, limit: 4}
  target: {source: "tiny:texts/train", format: text, equals: {label: sea}, limit: 4}
extract: {select: {modules: ".*post_attention_layernorm"}}
"""
ABOVE = """\
name: above
model: {source: "job:base.yaml"}
method: {name: none}
evaluate: [{task: perplexity, data: {source: "tiny:texts/test", format: text, limit: 2}}]
"""
ASKED = [{"question": f"what is {n} ?", "answer": f"it is {n} ."} for n in range(6)]


def steer(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLAB_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)


# Methods that mend what other jobs have trained need a chain of jobs, which a first job is not; the digits' pipeline and
# reward models are models of other kinds.
STARTED = sorted(name for name in METHODS if name not in ("none", "resta", "safe_lora", "safe_delta", "denoise", "args"))
# One of each kind in every run: a whole model, a closed form, maps that are trained, preparations, pairs.
EACH_TIME = ("aside", "caa", "lineas", "warp", "iav")
METHODS_STARTED = [pytest.param(m, marks=() if m in EACH_TIME else pytest.mark.slow) for m in STARTED]


@pytest.mark.parametrize("method", METHODS_STARTED)
def test_a_first_job_of_each_method_passes_the_checks(method: str) -> None:
    done = steer("init", method)
    assert done.exit_code == 0, done.output
    assert f"wrote {method}.yaml" in done.output and "next: steerlab plan" in done.output
    # `init` has read job and space as `plan` and `sweep` do; what it wrote says so to people too.
    text = Path(f"{method}.yaml").read_text()
    assert all(len(line) <= 240 for line in text.splitlines()) and "stand-in" in text
    compile(Path(f"{method}_space.py").read_text(), "space", "exec")


def test_a_pipeline_gets_a_job_that_draws(digits_dir: Path) -> None:
    for method in ("lineas", "denoise"):
        done = steer("init", method, "--model", str(digits_dir))
        assert done.exit_code == 0, done.output
        assert "kind: diffusion" in Path(f"{method}.yaml").read_text()


def _write(name: str, rows: list[dict[str, Any]]) -> str:
    path = Path(name)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


CHAT = [{"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yes"}]} for n in range(6)]
SHARED = [{"conversations": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": "yes"}]} for n in range(6)]
RENAMED = {"question": "instruction", "answer": "output"}


@pytest.mark.parametrize(
    ("name", "rows", "role", "settings"),
    [
        ("a.jsonl", ASKED, "train", {"format": "instruction", "rename": RENAMED}),
        ("a.parquet", ASKED, "train", {"format": "instruction", "rename": RENAMED}),
        ("a.csv", ASKED, "train", {"format": "instruction", "rename": RENAMED}),
        ("a.tsv", ASKED, "train", {"format": "instruction", "rename": RENAMED}),
        ("a.json", ASKED, "train", {"format": "instruction", "rename": RENAMED}),
        ("a.jsonl", [{"instruction": "do", "input": "x", "output": "y"}] * 4, "train", {"format": "instruction"}),
        ("a.jsonl", [{"Prompt": "do", "Response": "y"}] * 4, "train",
         {"format": "instruction", "rename": {"Prompt": "instruction", "Response": "output"}}),
        ("a.jsonl", CHAT, "train", {"format": "conversation"}),
        ("a.jsonl", SHARED, "train", {"format": "conversation"}),
        ("a.jsonl", [{"prompt": "hi", "completion": "yes"}] * 4, "train", {"format": "conversation"}),
        ("a.txt", [{"text": "one"}, {"text": "two"}], "source", {"format": "text"}),
        ("a.csv", [{"tweet": "one", "label": 1}] * 4, "source", {"format": "text", "field": "tweet"}),
        ("a.jsonl", [{"odd": "one", "n": 1}] * 4, "source", {"format": "text", "field": "odd"}),
        ("a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4, "preference", {"format": "preference"}),
        ("a.jsonl", [{"question": "p", "better": "a", "worse": "b"}] * 4, "preference",
         {"format": "preference", "rename": {"question": "prompt", "better": "chosen", "worse": "rejected"}}),
    ],
)  # fmt: skip
def test_the_format_of_a_file_is_found(name: str, rows: list[dict[str, Any]], role: str, settings: dict[str, Any]) -> None:
    assert guessing.settings_of(_write(name, rows), role) == settings


def test_init_fills_in_how_files_are_read() -> None:
    done = steer(
        "init", "warp", "--data", _write("a.csv", ASKED), "--data", f"safety={_write('b.jsonl', CHAT)}", "-o", "x.yaml"
    )
    assert done.exit_code == 0, done.output
    assert "data.train: a.csv is read as format instruction" in done.output and "stand-ins" not in done.output
    text = Path("x.yaml").read_text()
    assert "train: {source: a.csv, format: instruction, rename: {question: instruction, answer: output}}" in text
    assert "safety: {source: b.jsonl, format: conversation, loss_on: response}" in text and Path("x_space.py").is_file()
    again = steer("init", "warp", "-o", "x.yaml")
    assert again.exit_code == 2 and "exists already" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["asides"], "'asides' is not known; did you mean 'aside'?"),
        (["aside", "--data", "missing.csv"], "missing.csv"),
        (["aside", "--model", "no/such/folder"], "no/such/folder"),
        (["aside", "--data", "odd.jsonl"], "no format fits its rows, which have the fields x (a number (1)), y (a list"),
        (["aside", "--data", "empty.jsonl"], "empty.jsonl has no rows"),
        (["aside", "--data", "trian=odd.jsonl"], "--data trian=...: there are train, validation"),
        (["resta"], "method resta changes what another job has trained"),
    ],
)
def test_init_says_what_is_wrong_and_writes_nothing(arguments: list[str], said: str) -> None:
    Path("odd.jsonl").write_text('{"x": 1, "y": [2]}\n' * 4)
    Path("empty.jsonl").write_text("")
    done = steer("init", *arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert not list(Path().glob("*.yaml")) and not list(Path().glob("*.py"))


def test_a_job_is_read_where_it_lies(tmp_path: Path) -> None:
    """A job at a URI, with the jobs of its folder that it names."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "above.yaml").write_text(ABOVE)
    (tmp_path / "others").mkdir()
    from_disk, from_uri = steer("plan", "above.yaml", "--json"), steer("plan", f"file://{tmp_path}/above.yaml", "--json")
    assert from_uri.exit_code == 0, from_uri.output
    assert json.loads(from_uri.stdout)["stages"] == json.loads(from_disk.stdout)["stages"]
    jobs = Path(steerlab.__file__).parents[2] / "jobs/tiny"
    asked = steer("wandb-sweep", f"file://{jobs}/iav.yaml", str(jobs.parents[1] / "search_spaces/alpha.py"))
    assert asked.exit_code == 0 and f"# run by: steerlab sweep file://{jobs}/iav.yaml" in asked.output, asked.output
    for name, said in {"nothing.yaml": "no such file", "others": "no such file"}.items():
        missing = steer("plan", f"file://{tmp_path}/{name}")
        assert missing.exit_code == 2 and said in missing.output
    (tmp_path / "long.yaml").write_text(f"name: {'x' * 2**20}")
    assert "more than 1,048,576 bytes" in " ".join(steer("run", f"file://{tmp_path}/long.yaml").output.split())
    assert "ftp:// is not read here" in " ".join(steer("run", "ftp://host/a.yaml").output.split())


def test_a_root_that_is_typed_starts_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every path that is typed does; one in the environment or in a file has no folder to start from."""
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for typed, meant in {"here": "here", "./a/../b": "a/../b", "~/runs": "home/runs"}.items():
        done = steer("plan", "base.yaml", "--root", typed)
        # Without spaces: the line of a long path is folded in its middle.
        assert done.exit_code == 0 and f"ROOT{tmp_path}/{meant};" in "".join(done.output.split()), done.output
        (tmp_path / meant).mkdir(parents=True, exist_ok=True)
        assert steer("ls", typed).exit_code == 0
    wrong = steer("plan", "base.yaml", "--root", "~nobody-here/runs")
    assert wrong.exit_code == 2 and "nobody-here" in wrong.output
    monkeypatch.setenv("STEERLAB_ROOT", "here")
    assert "is a relative path: give an absolute path" in " ".join(steer("plan", "base.yaml").output.split())


def test_fields_are_described_wherever_they_occur() -> None:
    one = steer("describe", "train.lr").output
    assert one.count("Peak learning rate") == 1 and "`train`" in one and "2e-05" in one
    several = steer("describe", "head").output
    assert several.count("\n") > 2 and "`iav`" in several
    assert "`aside`" in steer("describe", "methods").output and "`separation`" in steer("describe", "tasks").output
    wrong = steer("describe", "keep_ration")
    assert wrong.exit_code == 2 and "there are keep_ratio" in wrong.output


def test_the_version_is_printed_alone() -> None:
    assert steer("--version").output == f"steerlab {steerlab.__version__}\n"
    shell = steer("--show-completion")
    assert shell.exit_code in (0, 1) and "No such option" not in shell.output


JOB: dict[str, Any] = {
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "source": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "farm"}, "limit": 8},
        "target": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "sea"}, "limit": 8},
    },
    "method": {"name": "mean_act"},
    "extract": {"max_tokens": 64},
    "evaluate": [{"task": "perplexity", "source": "tiny:topics/test", "format": "text", "limit": 4, "strengths": [1, 0]}],
}


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the jobs of `steerlab run` in this process: these tests are about what comes after a failure."""

    @contextmanager
    def joined() -> Iterator[None]:
        with alone.stages():
            yield

    monkeypatch.setattr(running, "joined_ray", joined)
    monkeypatch.setattr(capacity, "check_cluster", lambda *some: None)


def test_jobs_after_a_failed_one_run_and_the_end_says_so(_here: None) -> None:
    beyond = {**JOB["data"], "target": {**JOB["data"]["target"], "limit": None, "offset": 10**6}}
    for name, data in (("first", beyond), ("second", JOB["data"])):
        Path(f"{name}.yaml").write_text(json.dumps({**JOB, "name": name, "data": data}))
    done = steer("run", "first.yaml", "second.yaml")
    said = " ".join(done.output.split())
    assert done.exit_code == 1, done.output
    assert "perplexity/value" in said, "the table of the job that ran"
    assert said.rstrip().endswith("error.txt") and "failed 1 of 2 jobs: first: stage" in said, done.output
    assert said.index("failed first:") < said.index("evaluate (perplexity): ran") < said.index("failed 1 of 2 jobs")
    single = steer("run", "first.yaml")
    assert single.exit_code == 1 and "jobs:" not in single.output

    shown = steer("show", "second")
    assert shown.exit_code == 0 and "mean_act" in shown.output and "perplexity/value" in shown.output, shown.output
    assert "cached" in shown.output or "ran" in shown.output
    facts = json.loads(steer("show", sl.read_run("second").folder, "--json").output)
    assert facts["job"]["name"] == "second" and facts["summary"]["metrics"] and facts["error"] is None
    of_failed = steer("show", str(max(Path("root/runs/first").iterdir())))
    assert of_failed.exit_code == 0 and "failed:" in of_failed.output, of_failed.output
    missing = steer("show", "third")
    assert missing.exit_code == 2 and "no finished run" in missing.output
