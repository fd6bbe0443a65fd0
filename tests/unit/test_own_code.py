"""Methods and tasks of one's own: files that a job names, and packages that register them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from ray import tune

from steerlab import evaluation, job, methods, run
from steerlab.evaluation.statistics.metrics import Task
from steerlab.guards.faults import is_for_people
from steerlab.job import Table, foreign_code, own_code
from steerlab.methods.contract import Fitted
from steerlab.stages import JobType, Plan
from steerlab.stages.fit import checked_maps
from steerlab.sweeps.agent import point_of
from steerlab.sweeps.space import Space
from steerlab.tracking.wandb_client.parameters import parameter_name

METHOD = '''
from typing import Literal

from pydantic import Field

from steerlab.methods.contract import Fitted, SteeringConfig
from steerlab.patches.maps import AffineMap


class Config(SteeringConfig):
    """Hyperparameters."""

    name: Literal["half_way"] = "half_way"
    """The method."""
    share: float = Field(0.5, ge=0, le=1)
    """Share of the way between the means."""


def fit(config, source, target):
    shifts = {name: config.share * (target[name].mean(0) - source[name].mean(0)) for name in source}
    return {name: AffineMap(shift.new_ones(len(shift)), shift) for name, shift in shifts.items()}


METHOD = Fitted(Config, fit)
'''
TASK = '''
from typing import Literal

from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation, Result, Task
from steerlab.job import TaskConfig


class Config(TaskConfig):
    """How often a word occurs."""

    task: Literal["said"] = "said"
    """This task."""
    word: str
    """The word."""


def run(model, config):
    return Result([Observation("said/rate", "0", 1.0, 1.0, s) for s in config.strengths], [])


TASK = Task(Config, run, lambda config: (Measure("rate", "lower"),))
'''
PERPLEXITY = {"task": "perplexity", "data": {"source": "tiny:topics/test", "format": "text", "limit": 8}}
TREE: dict[str, Any] = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {
        "source": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "farm"}, "limit": 8},
        "target": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "sea"}, "limit": 8},
    },
    "extract": {"select": {"modules": "model.layers.1$"}},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A function (name, text) -> path of a file."""

    def write(name: str, text: str = METHOD) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def valid(method: Any, tasks: Any = ()) -> Any:
    return job.validate({**TREE, "method": method, "evaluate": list(tasks)}, JobType, Path("a.yaml"))


def refusal(method: Any, tasks: Any = ()) -> str:
    with pytest.raises(job.JobError) as error:
        valid(method, tasks)
    return str(error.value)


def test_a_file_is_a_method_with_fields_of_its_own(write: Callable[..., str]) -> None:
    file = write("mine.py")
    found = valid({"file": file, "share": 0.25})
    assert (found.method.name, found.method.share, found.method.file) == ("half_way", 0.25, file)
    method = methods.TABLE.of(found.method)
    assert isinstance(method, Fitted) and "half_way" not in methods.METHODS
    source, target = {"a": torch.zeros(4, 3)}, {"a": torch.full((4, 3), 8.0)}
    assert torch.equal(method.fit(found.method, source, target)["a"](source["a"]), torch.full((4, 3), 2.0))
    run.check(Plan.of(found))
    assert valid({"name": "half_way", "file": file}) == valid({"name": f"file:{file}"}) == valid({"file": file})


def test_a_job_reads_back_what_it_writes(write: Callable[..., str], tmp_path: Path) -> None:
    found = valid({"file": write("mine.py"), "share": 0.25}, [{"task": f"file:{write('task.py', TASK)}", "word": "sea"}])
    (tmp_path / "a.yaml").write_text(job.dump(found))
    assert job.read(tmp_path / "a.yaml", JobType) == found
    assert job.read(tmp_path / "a.yaml", JobType, ["method.share=0.5"]).method.share == 0.5  # type: ignore[attr-defined]
    assert found.evaluate[0].task == "said" and found.evaluate[0].word == "sea"


def test_a_relative_path_starts_where_the_command_runs(write: Callable[..., str], monkeypatch: Any, tmp_path: Path) -> None:
    file = write("mine.py")
    monkeypatch.chdir(tmp_path)
    assert valid({"file": "mine.py"}) == valid({"file": file})


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("shift", "fit must return a Map for each place; a.b got a Tensor"),
        ("0.5", "fit must return a Map for each place; a.b got a float"),
    ],
)
def test_a_fit_that_returns_something_else_than_maps(write: Callable[..., str], result: str, reason: str) -> None:
    """The message names the method, its file and the place."""
    file = write("mine.py", METHOD.replace("AffineMap(shift.new_ones(len(shift)), shift)", result))
    config = valid({"file": file}).method
    maps = methods.fitted(config).fit(config, {"a.b": torch.zeros(2, 3)}, {"a.b": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=f"^method half_way of {re.escape(file)} .*: {reason}$"):
        checked_maps(config, maps)


def test_a_fit_that_returns_no_mapping(write: Callable[..., str]) -> None:
    config = valid({"file": write("mine.py")}).method
    with pytest.raises(ValueError, match=r"fit must return a Map for each place; it returned a list$"):
        checked_maps(config, [])  # type: ignore[arg-type]
    maps = methods.fitted(config).fit(config, {"a.b": torch.zeros(2, 3)}, {"a.b": torch.ones(2, 3)})
    assert checked_maps(config, maps) is maps


def test_the_key_is_the_content_of_the_file(write: Callable[..., str]) -> None:
    """Neither its name nor its place; a byte more is another method."""
    keys = {}
    for name, text in [("a.py", METHOD), ("below/b.py", METHOD), ("c.py", METHOD + "\n")]:
        found = valid({"file": write(name, text)}, [PERPLEXITY])
        keys[name] = [stage.key for stage in Plan.of(found).stages]
    assert keys["a.py"] == keys["below/b.py"]
    assert [a == c for a, c in zip(keys["a.py"], keys["c.py"], strict=True)] == [True, True, False, False]


def test_the_key_of_a_task_is_its_content(write: Callable[..., str]) -> None:
    def key(text: str, **fields: Any) -> str:
        found = valid({"name": "none"}, [{"file": write("task.py", text), "word": "sea", **fields}])
        return Plan.of(found).evaluations[0].stage.key

    assert key(TASK) == key(TASK, label="other") != key(TASK + "\n") != key(TASK, word="farm")


def test_a_file_that_changes_is_read_again_and_one_that_is_held_is_not(write: Callable[..., str]) -> None:
    first = valid({"file": write("mine.py")})
    with own_code.held():
        again = valid({"file": write("mine.py", METHOD.replace("0.5", "0.75"))})
        assert again.method.share == 0.5 and again == first
    assert valid({"file": first.method.file}).method.share == 0.75


def test_code_goes_to_another_process_by_its_content(write: Callable[..., str], tmp_path: Path) -> None:
    """The other process has no such file; what it is sent are the parameters of the stage, and the text."""
    found = valid({"file": write("mine.py")}, [{"file": write("task.py", TASK), "word": "sea"}])
    plan = Plan.of(found)
    fit, measured = plan.model.params["method"], plan.evaluations[0].stage.params["task"]  # type: ignore[union-attr]
    sent = ray.cloudpickle.dumps((fit, measured, own_code.codes_in([fit, measured])))
    for file in tmp_path.glob("*.py"):
        file.unlink()
    (tmp_path / "sent").write_bytes(sent)
    code = (
        "import pickle, sys; from steerlab import evaluation, methods; from steerlab.job import own_code\n"
        f"fit, task, codes = pickle.load(open({str(tmp_path / 'sent')!r}, 'rb'))\n"
        "own_code.receive(codes)\n"
        "config = methods.TABLE.config(fit); print(config.share, methods.fitted(fit).fit.__name__)\n"
        "own = evaluation.TABLE.config(task)\nprint(own.word, evaluation.TABLE.of(task).run(None, own).observations)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.5 fit\nsea [Observation(metric='said/rate'")


def test_a_process_that_was_not_sent_the_code_says_so() -> None:
    with pytest.raises(job.JobError, match="names code by its content"):
        methods.TABLE.of({"name": "half_way", "file": f"sha256:{'0' * 64}"})


def test_misspelt_fields_are_told_with_those_of_the_file(write: Callable[..., str]) -> None:
    file = write("mine.py")
    said = refusal({"file": file, "shar": 0.25})
    keys = "file, inverse, name, pixels, pooling, share, steer"
    assert f"{file}: shar: unknown key; did you mean 'share'? valid keys: {keys}" in said
    assert "less than or equal to 1" in refusal({"file": file, "share": 2})
    assert "word: this key is required" in refusal({"name": "none"}, [{"file": write("task.py", TASK)}])
    assert "half_way" in refusal({"file": file, "name": "caa"})
    assert "for a file write name: file:mine.py" in refusal({"name": "mine.py"})
    assert "for a file write task: file:task.py" in refusal({"name": "none"}, [{"task": "task.py"}])
    assert "another one" in refusal({"file": file, "name": "file:other.py"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = (", "mine.py:1: x = (\n  SyntaxError: '(' was never closed"),
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("x = 1\nraise SystemExit(3)", "mine.py:2: raise SystemExit(3)\n  SystemExit: 3"),
        ("import helper", "helper.py is beside it, but only this file is sent to the workers"),
        ("x = 1", "the file of a method defines METHOD, made by steerlab's Method; it has none"),
        ("METHOD = 3", "it has a int of that name"),
        (METHOD.replace("METHOD = Fitted", "Method = Fitted"), "it has a Method"),
        (METHOD.replace("half_way", "caa"), "the name 'caa', which another method has already"),
        (METHOD.replace('Literal["half_way"]', "str"), 'its Config has no name: name: Literal["my_method"]'),
        (METHOD.replace("half_way", "Half-Way!"), "small letters, digits and underscores"),
        (METHOD.replace("    share:", "    file:"), "its Config has a field 'file'"),
        (METHOD.replace("(SteeringConfig)", ""), "derive it from SteeringConfig"),
        (METHOD.replace("METHOD = Fitted(Config, fit)", "METHOD = Fitted(Config)"), "mine.py:24: METHOD = Fitted(Config)"),
        ("\0", "SyntaxError"),
        ("x" * (2**20 + 1), "1,048,577 bytes; the maximum is 1,048,576"),
    ],
)
def test_a_file_that_leaves_no_method(write: Callable[..., str], text: str, reason: str) -> None:
    write("helper.py", "")
    file = write("mine.py", text)
    said = refusal({"file": file})
    assert said.startswith("a.yaml: method: ") and reason in said, said


def test_what_a_file_raises_is_its_owners_to_read_and_no_fault_of_the_platform(write: Callable[..., str]) -> None:
    """Its `check` refuses as any does; its annotations are its own; a text that no terminal takes is written out."""
    checked = METHOD.replace("Fitted(Config, fit)", "Fitted(Config, fit, check=check)").replace(
        "METHOD =", "def check(config, facts, job):\n    raise ValueError('method.share: not with this model')\n\n\nMETHOD ="
    )
    with pytest.raises(ValueError, match="not with this model") as caught:
        run.check(Plan.of(valid({"file": write("mine.py", checked)})))
    assert is_for_people(caught.value)
    typed = METHOD + "\n\nclass Plain:\n    x: int\n\n\nassert Plain.__annotations__ == {'x': int}\n"
    assert valid({"file": write("typed.py", typed)}).method.share == 0.5
    assert "\\ud800" in refusal({"file": write("odd.py", "raise ValueError('\\ud800')")})


PREPARING = '''
from functools import partial
from typing import Literal

from torch import nn

from steerlab.job import MethodConfig
from steerlab.methods.contract import Trained, WholeModel


class Config(MethodConfig):
    """Hyperparameters."""

    name: Literal["prepares"] = "prepares"
    """The method."""


class Module(WholeModel):
    def __init__(self, model, config, inputs):
        super().__init__(model)


def make(source, part, path):
    return {}


class Makes:
    def make(self, source, part, path):
        return {}


def prepares(config, skeleton, prepare):
    READ


METHOD = Trained(Config, Module, preparations=prepares)
'''


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("prepare.map_parts('a', 1, {}, ('p',), make); return ('b',)", "reads b, which was not declared before; declared: a"),
        ("prepare.map_parts('a', 1, {}, ('p',), make, needs=('b',)); return ()", "preparation a needs b"),
        (
            "prepare.map_parts('a', 1, {}, ('p',), make); prepare.map_parts('a', 1, {}, ('p',), make); return ()",
            "two preparations",
        ),
        ("prepare.map_parts('a', 1, {'data': 1}, ('p',), make); return ()", "its parameter data would be that of the platform"),
        ("prepare.map_parts('../b', 1, {}, ('p',), make); return ()", "a preparation is called '../b'"),
        ("prepare.map_parts('model', 1, {}, ('p',), make); return ()", "a preparation is called 'model'"),
        ("prepare.sum_over_rows('a', 1, 'trian', {}, make); return ()", "the job has no data.trian; it has train"),
        ("prepare.sum_over_rows('a', 1, 'train', {}, make); return ()", "rows_per_batch is missing among its parameters"),
        (
            "prepare.keep_of_rows('a', 1, 'train', {'max_tokens': 8}, make, 1); return ()",
            "max_tokens would be that of the training",
        ),
        ("prepare.map_parts('a', 1, {}, ('p',), lambda *a: {}); return ()", "at the top of the file"),
        ("prepare.map_parts('a', 1, {}, ('p',), partial(make)); return ()", "at the top of the file"),
        ("prepare.map_parts('a', 1, {}, ('p',), Makes().make); return ()", "at the top of the file"),
    ],
)
def test_preparations_that_cannot_be_made_are_refused_before_anything_starts(
    write: Callable[..., str], body: str, reason: str
) -> None:
    tree = {
        "name": "a", "model": {"source": "tiny:model"}, "data": {"train": {"source": "tiny:instructions/train", "limit": 8}},
        "method": {"file": write("mine.py", PREPARING.replace("READ", body))},
        "train": {"steps": 1, "max_tokens": 64, "micro_batch": 2},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r".") as caught:
        planned = Plan.of(job.validate(tree, JobType, Path("a.yaml")))
        run.check(planned)
        assert planned.stages
    assert reason in str(caught.value) and is_for_people(caught.value)


def test_a_value_that_is_set_makes_up_no_default_for_a_file(write: Callable[..., str], tmp_path: Path) -> None:
    """The fields of an own config are nobody else's: `limit` alone is no data set."""
    tree = {**TREE, "method": {"name": "none"}, "evaluate": [{"file": write("task.py", TASK), "word": "sea"}]}
    (tmp_path / "a.yaml").write_text(json.dumps(tree))
    with pytest.raises(job.JobError, match="prompts"):
        job.read(tmp_path / "a.yaml", JobType, ["evaluate.0.prompts.limit=4"])
    read = job.read_tree(tmp_path / "a.yaml", JobType, ["evaluate.0.prompts.limit=4"])
    assert read["evaluate"][0]["prompts"] == {"limit": 4}


def test_values_from_elsewhere_name_no_file(tmp_path: Path) -> None:
    """W&B's server, and whoever writes into ROOT, choose among the values of SPACE."""
    space = Space(tmp_path / "s.py", {"method.name": {"grid_search": ["caa", "mean_act"]}, "train.lr": tune.uniform(0, 1)})
    space.check({"method.name": "caa", "train.lr": 2.5}, "W&B")
    for wrong in ("file:/tmp/evil.py", {"file": "/tmp/evil.py"}, ["caa"]):
        with pytest.raises(job.JobError, match="is not a value of"):
            space.check({"method.name": wrong}, "W&B")
    with pytest.raises(job.JobError, match="is not a value of"):
        point_of(space, {parameter_name("method.name"): "file:/tmp/evil.py"})
    with pytest.raises(job.JobError, match="is not a value of"):
        space.check({"train.lr": "file:/tmp/evil.py"}, "W&B")


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    for path, reason in [
        (tmp_path / "none.py", "the file does not exist"), (tmp_path, "a folder, not a file"), (tmp_path / "pipe.py", "pipe"),
        ("a\0b", "null"), (tmp_path / "latin.py", "not UTF-8 text"), ("~nobody_here/x.py", "not a path"),
    ]:  # fmt: skip
        assert reason in refusal({"file": str(path)}), path
    for wrong in (5, None, "", ["a.py"], {"a": 1}):
        assert "the path of a Python file" in refusal({"file": wrong})
    assert "this key is required" in refusal({"files": "mine.py"})


def test_a_task_of_a_file_is_no_method(write: Callable[..., str]) -> None:
    assert "defines METHOD, made by steerlab's Method; it has a TASK" in refusal({"file": write("task.py", TASK)})
    assert "defines TASK, made by steerlab's Task; it has a METHOD" in refusal({"name": "none"}, [{"file": write("mine.py")}])


def test_a_metric_of_a_task_of_ones_own_can_be_chosen_by(write: Callable[..., str]) -> None:
    """What a task measures is known of a file as of any: the check of names, and controllability over it."""
    task = {"file": write("task.py", TASK), "word": "sea"}
    tree = {**TREE, "method": {"name": "mean_act", "incremental": False}, "evaluate": [task]}
    grid = {"task": "controllability", "metric": "said/rate", "of": task, "label": "grid"}
    chosen = {**tree, "evaluate": [task, grid], "choose": {"metric": "said/rate", "tasks": [task]}}
    run.check(Plan.of(job.validate(chosen, JobType, Path("a.yaml"))))
    for section, metric in [("choose", "said/rat"), ("of", "said/rat")]:
        wrong = json.loads(json.dumps(chosen))
        (wrong["choose"] if section == "choose" else wrong["evaluate"][1])["metric"] = metric
        with pytest.raises(ValueError, match="did you mean said/rate"):
            run.check(Plan.of(job.validate(wrong, JobType, Path("a.yaml"))))


def test_the_plan_says_whose_code_runs(write: Callable[..., str]) -> None:
    file, task = write("mine.py"), write("task.py", TASK)
    digest = own_code.read(file).sha256
    below = {**TREE, "name": "below", "method": {"file": file}}
    found = job.validate(
        {
            **TREE,
            "model": {"source": below},
            "method": {"name": "caa"},
            "evaluate": [
                {"file": task, "word": "sea"},
                {"task": "controllability", "metric": "said/rate", "of": {"file": task, "word": "farm"}},
            ],
        },
        JobType,
        Path("a.yaml"),
    )
    said = Plan.of(found).own_code
    assert said == (
        f"method half_way: {file} (SHA-256 {digest})", f"task said: {task} (SHA-256 {own_code.read(task).sha256})",
    )  # fmt: skip
    assert Plan.of(valid({"name": "caa"}, [PERPLEXITY])).own_code == ()


PACKAGE = {
    "their_code.py": METHOD
    + "\nTASK_ = 1\n"
    + TASK.replace("class Config", "class TaskOwn").replace("Task(Config", "Task(TaskOwn"),
    "their_code-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: their-code\nVersion: 1.2\n",
    "their_code-1.2.dist-info/entry_points.txt": (
        "[steerlab.methods]\nhalf_way = their_code:METHOD\nother_name = their_code:METHOD\nlost = nowhere:METHOD\n"
        "wrong = their_code:TASK_\ncaa = their_code:METHOD\n\n[steerlab.tasks]\nsaid = their_code:TASK\n"
    ),
}


def test_packages_register_methods_and_tasks(tmp_path: Path) -> None:
    """One that cannot be used is told where a job names it, and hinders nobody else."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tree = {**TREE, "method": {"name": "half_way", "share": 0.25}, "evaluate": [{"task": "said", "word": "sea"}]}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    code = (
        "import json; from pathlib import Path; from steerlab import job; from steerlab.stages import JobType, Plan\n"
        f"tree = json.loads(Path({str(tmp_path / 'a.json')!r}).read_text())\n"
        "plan = Plan.of(job.validate(tree, JobType, Path('a.yaml')))\n"
        "print(json.dumps([plan.own_code, plan.model.params['method'], plan.evaluations[0].stage.params['task']]))\n"
        "for name in ('other_name', 'lost', 'wrong'):\n"
        "    try: job.validate({**tree, 'method': {'name': name}}, JobType, Path('a.yaml'))\n"
        "    except job.JobError as error: print(error)\n"
        "print(job.validate({**tree, 'method': {'name': 'caa'}}, JobType, Path('a.yaml')).method.at)\n"
        "try: job.validate({**tree, 'method': {**tree['method'], 'package': 'their-code==1.1'}}, JobType, Path('a.yaml'))\n"
        "except job.JobError as error: print(error)"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    own, *lines = done.stdout.splitlines()
    said, method, task = json.loads(own)
    assert [line.partition("+")[0] for line in said] == ["method half_way: their-code==1.2", "task said: their-code==1.2"]
    assert method["package"] == task["package"] == said[0].removeprefix("method half_way: ") and method["share"] == 0.25
    assert "their-code==1.2: their_code:METHOD has the name half_way; register it under that name" in lines[0]
    assert "nowhere:METHOD fails: ModuleNotFoundError" in lines[1]
    assert "their_code:TASK_ is a int, not a Method" in lines[2]
    assert "their-code==1.2" in lines[4]


def test_every_entry_of_the_platform_has_a_name_of_its_own() -> None:
    """The rules for strangers hold here too: one name, no field that says whose code it is."""
    for table, kind in ((methods.TABLE, methods.Method), (evaluation.TABLE, Task)):
        assert isinstance(table, Table)
        for name, entry in table.entries.items():
            strange: foreign_code.Kind[Any] = foreign_code.Kind(kind, table.tag, lambda entry, config: entry)
            assert foreign_code.name_of(strange, entry) == name and foreign_code.refusal(strange, entry, ()) is None
