"""The pages of the repository: their lines, links, paths, commands and snippets are those of the code beside them."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

import steerlab
from steerlab import cli, evaluation, job, methods, models, patches, run
from steerlab.cli import catalogue
from steerlab.data import sources
from steerlab.data.worlds import tiny
from steerlab.evaluation.statistics import generations
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.methods.contract import Inputs, language_modelling_loss
from steerlab.patches.foreign import control_vectors
from steerlab.stages import JobType, Plan
from steerlab.steered.language import SteeredModel
from steerlab.sweeps import space

ROOT = Path(__file__).parents[2]
TOP = ("jobs", "search_spaces", "cluster", "dashboards", "platform", "tests")
PAGES = sorted({*ROOT.glob("*.md"), *(page for top in TOP for page in (ROOT / top).rglob("*.md"))})
TEXTS = [*PAGES, *(file for top in ("jobs", "search_spaces", "cluster", "dashboards") for file in (ROOT / top).rglob("*"))]
"""Files whose words name other files."""
WIDTH, README_LINES = 120, 150
OTHERS = {"bash", "cluster/local.sh", "eval", "prometheus", "source"}
"""First words of commands that are not steerlab's."""


class Snippet(NamedTuple):
    page: str
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(language: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^( *)```(\w+)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
            indent, kind, body = match.groups()
            if kind == language:
                body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
                found.append(Snippet(page.relative_to(ROOT).as_posix(), kind, body, text.count("\n", 0, match.start()) + 1))
    return found


def commands() -> Iterator[tuple[Snippet, list[str]]]:
    """Yield every command of every page, as words."""
    for snippet in snippets("bash"):
        for line in snippet.text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&", line):
                if words := list(itertools.takewhile(lambda word: word not in ("|", ">"), shlex.split(part, comments=True))):
                    yield snippet, words
    for page in PAGES:
        for match in re.finditer(r"`(steerlab [^`]+)`", page.read_text()):
            name, *rest = shlex.split(match[1])[0:]
            if rest and not rest[0][0].isupper():
                yield Snippet(page.relative_to(ROOT).as_posix(), "bash", match[1], 0), [name, *rest]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_are_short(page: Path) -> None:
    if page.name == "CATALOGUE.md":
        return  # made of docstrings, which have the width of code
    lines = page.read_text().splitlines()
    long = [f"{number}: {line[:60]}" for number, line in enumerate(lines, 1) if len(line) > WIDTH and not line.startswith("|")]
    assert not long
    assert page != ROOT / "README.md" or len(lines) <= README_LINES


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_paths_that_files_name_exist() -> None:
    """In pages, in comments of jobs and spaces, in the files of cluster and dashboards."""
    pattern = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(TOP)})/[\w./*-]*\w")
    missing = set()
    for file in TEXTS:
        if file.suffix in (".md", ".yaml", ".py", ".sh", ".sbatch", ".json") or file.name == "Dockerfile":
            for path in pattern.findall(file.read_text()):
                if not any(ROOT.glob(path)) and not any(ROOT.glob(f"platform/{path}")):
                    missing.add(f"{file.relative_to(ROOT)}: {path}")
    assert not missing - {"platform/README.md: platform/__init__.py"}


def parsed(words: Sequence[str]) -> Any:
    """Parse a command of steerlab without running it."""
    command: Any = typer.main.get_command(cli.app)
    rest = cli.repeated(["2" if word == "N" else word for word in words], "--strength")
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context(command.name, list(rest))


def test_commands_are_those_that_there_are() -> None:
    seen = set()
    for snippet, words in commands():
        if words[:3] == ["python", "-m", "steerlab"]:
            words = ["steerlab", *words[3:]]
        seen.add(words[0])
        if words[0] == "steerlab":
            if any(mark in words for mark in ("JOB", "…")) or len(words) == 2:
                assert words[1] in {one.name or one.callback.__name__ for one in cli.app.registered_commands} | {"dashboards"}  # type: ignore[union-attr]
                continue
            try:
                parsed(words[1:])
            except Exception as error:
                raise AssertionError(f"{snippet}: {' '.join(words)}: {error}") from error
        elif words[0] == "python":
            script = ROOT / words[1]
            assert script.is_file(), f"{snippet}: {words}"
            options = {word.lstrip("-").replace("-", "_") for word in words[2:] if word.startswith("--")} - {"set"}
            assert all(option in script.read_text() for option in options), f"{snippet}: {words}"
        else:
            assert words[0] in OTHERS, f"{snippet}: {words}"
    assert {"steerlab", "python", "bash"} <= seen


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who follows the pages: the repository's jobs, the files of all snippets, some rows."""
    for top in ("jobs", "search_spaces"):
        os.symlink(ROOT / top, tmp_path / top)
    for snippet in snippets("python"):
        if name := re.match(r"# (\w+\.py)\n", snippet.text):
            (tmp_path / name[1]).write_text(snippet.text)
    rows = [{"question": f"Add {n} and 1.", "reply": str(n + 1)} for n in range(8)]
    (tmp_path / "my_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mmlu").mkdir()
    choices = [{"question": "Which?", "choices": ["a", "b"], "answer": n % 2} for n in range(8)]
    (tmp_path / "mmlu/test-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(choices), tmp_path / "mmlu/test-0.parquet")
    with gzip.open(tmp_path / "sst.csv.gz", "wt") as file:
        file.write("sentence,label\n" + "a film,0\nthe film,1\n" * 4)
    prompts = [{"prompt": {"text": "the old man", "toxicity": n / 8}} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    told = [{"id": "0", "strength": s, "prompt": "a", "continuation": "b"} for s in (0.0, 1.0)]
    verdicts = [Observation("toxicity/share", "0", 1.0 - s, 1.0, s) for s in (0.0, 1.0)]
    (tmp_path / "toxicity.parquet").write_bytes(generations.dumped(generations.table(told, verdicts, {})))
    width = models.facts(sources.fetch("tiny:model")).hidden_size
    control_vectors.write(tmp_path / "happy.gguf", {1: torch.ones(width)}, "llama")
    monkeypatch.setenv("JUDGE_KEY", "a key")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(*beginning: str) -> list[list[str]]:
    """Return the commands of the pages that begin with these words, without those that stand for others."""
    found = [words for _, words in commands() if tuple(words[: len(beginning)]) == beginning]
    return [words[1:] for words in found if not {"NAME", "JOB", "SPACE"} & {*words}]


def called(words: Sequence[str]) -> Result:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, f"{words}: {result.output}"
    return result


def test_what_the_pages_describe_is_described(folder: Path) -> None:
    printed = {words[-1]: called(words).output for words in asked("steerlab", "describe")}
    assert set(methods.METHODS) | set(evaluation.TASKS) <= {*re.split(r"[\s,]+", printed["describe"])}
    for name, told in {"aside": "angle_rad", "my_method.py": "Share of the way between the means.", "source": "hf:"}.items():
        assert told in printed[name]


SMALL = {
    "name": "small",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:instructions/train", "limit": 8},
        "safety": {"source": "tiny:instructions/test", "limit": 8, "loss_on": "response"},
    },
    "method": {"name": "warp", "target_layers": ["last"]},
    "train": {"steps": 2, "micro_batch": 4, "max_tokens": 64},
    "evaluate": [
        {
            "task": "refusal",
            "prompts": {"source": "tiny:refusals/test", "limit": 2},
            "harmless": {"source": "tiny:harmless/test", "limit": 2},
        }
    ],
}


def test_the_estimate_of_a_page_counts_shared_stages_once(folder: Path) -> None:
    """The page's command, on a smaller job over the same space."""
    (words,) = [words for words in asked("steerlab", "sweep") if "--dry-run" in words]
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    lines = called([words[0], "small.yaml", *words[2:], "--root", str(folder / "root")]).output.splitlines()
    distinct = {cells[1]: int(cells[3]) for line in lines if (cells := line.split()) and cells[0] == "\u2502"}
    keep_ratios = len(space.load(ROOT / words[2]).entries["method.keep_ratio"]["grid_search"])  # type: ignore[call-overload, index]
    assert distinct["mask"] == distinct["train"] == keep_ratios > 1
    assert distinct["moments"] == distinct["basis"] == distinct["importance"] == 1
    assert not (folder / "root" / "artifacts").exists()


@pytest.mark.filterwarnings("ignore:.* asks .* for each strength:UserWarning")  # a job with a judge behind an API says so
@pytest.mark.parametrize("snippet", snippets("yaml"), ids=str)
def test_a_job_of_a_page_is_a_whole_job(snippet: Snippet, folder: Path) -> None:
    (folder / "page.yaml").write_text(snippet.text)
    planned = Plan.of(job.read(folder / "page.yaml", JobType))
    assert planned.stages
    run.check(planned)


@pytest.mark.parametrize("snippet", [one for one in snippets("python") if "SPACE" in one.text], ids=str)
def test_a_search_space_of_a_page_goes_with_a_job(snippet: Snippet, folder: Path) -> None:
    (folder / "page.py").write_text(snippet.text)
    read = space.load(folder / "page.py")
    assert read.entries


@pytest.mark.parametrize(
    "snippet", [one for one in snippets("python") if "load(" in one.text or "read_parquet(" in one.text], ids=str
)
def test_python_of_a_page_runs(
    snippet: Snippet, folder: Path, tiny_model: Any, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    SteeredModel(tiny_model, encoder).save_model(folder / "folder")
    exec(compile(snippet.text, str(snippet), "exec"), {})
    assert capsys.readouterr().out


def test_the_training_of_a_page_trains(folder: Path, tiny_model: Any, encoder: Encoder) -> None:
    method = methods.TABLE.of_file(str(folder / "my_training.py"))
    assert isinstance(method, methods.Trained)
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in tiny.rows("instructions/train", 4)]
    trainee = method.module(tiny_model, method.Config.model_validate({"file": "my_training.py", "smoothing": 0.0}), Inputs())
    batch = collate(rows, encoder.pad_id)
    loss = trainee(batch).total
    torch.testing.assert_close(loss, language_modelling_loss(tiny_model(**batch.model_inputs).logits, batch.labels))
    loss.backward()
    trainee.check()
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())


def test_the_closed_form_and_the_task_of_a_page_run(folder: Path, tiny_model: Any, encoder: Encoder) -> None:
    method = methods.TABLE.of_file(str(folder / "my_method.py"))
    assert isinstance(method, methods.Fitted)
    source, target = torch.zeros(4, 128), torch.ones(4, 128)
    config = method.Config.model_validate({"file": "my_method.py", "share": 0.25})
    maps = method.fit(config, {"model.norm": source}, {"model.norm": target})
    assert torch.equal(maps["model.norm"](source), torch.full((4, 128), 0.25))
    task = evaluation.TABLE.of_file(str(folder / "my_task.py"))
    asked = task.Config.model_validate({"file": "my_task.py", "word": "the", "texts": ["the old", "a"], "strengths": [1, 0]})
    patch = patches.ActivationPatch.from_maps(maps, job.Selection(modules="model.norm"))
    result = task.run(SteeredModel(tiny_model, encoder, (patch,)), asked)
    assert [(one.metric, one.strength) for one in result.observations] == [("said/rate", s) for s in (1, 1, 0, 0)]
    assert "1" in result.samples[1]["id"] and result.measures[0].name == "rate"


def test_the_catalogue_is_what_the_command_prints() -> None:
    assert (ROOT / "jobs/CATALOGUE.md").read_text() == catalogue.catalogue(), (
        "python -m steerlab describe --all > jobs/CATALOGUE.md"
    )


@pytest.mark.parametrize("name", [name for name in methods.METHODS if catalogue.method_example(name)])
def test_the_job_of_a_method_in_the_catalogue_is_one(name: str) -> None:
    file, *override = catalogue.method_example(name) or ()
    read = job.read(ROOT / file, JobType, override[1:])
    assert read.method.name == name


@pytest.mark.parametrize("name", evaluation.TASKS)
def test_the_entry_of_a_task_in_the_catalogue_is_one(name: str) -> None:
    read = job.read(ROOT / "jobs/tiny/base.yaml", JobType, [f"evaluate=[{catalogue.example(_entry(name))}]"])
    assert read.evaluate[0].task == name
    assert yaml.safe_load(catalogue.example(_entry(name)))["task"] == name


def _entry(name: str) -> catalogue.Entry:
    return next(entry for entry in catalogue.entries() if entry.name == name and entry.kind == "task")


def test_every_field_of_the_catalogue_says_what_it_means() -> None:
    for entry in catalogue.entries():
        for name, kind, default, meaning in entry.fields():
            assert kind and default and meaning, f"{entry.name}.{name}"
            assert "steerlab__" not in kind, f"{entry.name}.{name}: {kind}"


def test_the_package_says_its_version_where_it_is_cited() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == steerlab.__version__
