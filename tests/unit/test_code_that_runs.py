"""A scan of all sources for calls that can run a stranger's code or write anywhere: each stands here with its reason."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICKLES = ("pickle", "cloudpickle", "joblib", "marshal", "shelve", "dill")
CALLS = (
    "exec", "eval", "compile", "__import__", "input", "importlib.import_module", "importlib.util.spec_from_file_location",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "torch.load", "joblib.load", "np.load",
)  # fmt: skip
METHODS = ("extractall", "exec_module", "load_module", "unpack_archive", "read_pickle")

ALLOWED: dict[str, dict[str, str]] = {
    "platform/steerlab/guards/python_files.py": {
        "exec": "a search space, or a file of a job's `method` or task: a Python program that its owner names to be run",
        "compile": "the same",
    },
    "platform/steerlab/tracking/wandb_client/workspaces.py": {
        "importlib.util.spec_from_file_location": "a board is a Python file that its owner names on the command line",
        ".exec_module": "the same",
    },
    "platform/steerlab/guards/torch_devices.py": {"subprocess.run": "this Python, with lines that stand in the file itself"},
    "platform/steerlab/guards/called_package.py": {"importlib.import_module": "the package's own Python interface"},
    "platform/steerlab/guards/late.py": {
        "importlib.import_module": "names of libraries that stand in the files that import them"
    },
    "platform/steerlab/job/entries.py": {"importlib.import_module": "files of this package that stand in the two tables"},
    "platform/steerlab/run/doctor.py": {"importlib.import_module": "names of packages that stand in the file itself"},
    "platform/steerlab/evaluation/judging/scorers.py": {
        "import joblib": "the toxicity model of a wheel",
        "joblib.load": "of bytes whose SHA-256 the file pins, compared just before",
    },
    "platform/steerlab/guards/faults.py": {"import pickle": "the name of its error"},
    "platform/steerlab/models/language/weights.py": {
        "torch.load": "weights_only=True, onto no device, to see that the file is whole"
    },
    "platform/steerlab/models/diffusion/saved_pipelines.py": {
        "importlib.import_module": "one of the three names in pipeline_index.LIBRARIES"
    },
    "platform/steerlab/run/record.py": {"subprocess.run": "git, with arguments that stand in the file"},
    "platform/steerlab/data/sources/generated.py": {
        "subprocess.run": "the pinned generator, its unpacked files compared just before"
    },
    "platform/steerlab/data/sources/indexes.py": {
        "subprocess.run": "pip config list, with no name of a stranger and no module of the current folder (-P)"
    },
    "platform/steerlab/data/sources/packages.py": {
        ".extractall": "after every name was checked; tar archives as data",
        "subprocess.run": "apt-get download and dpkg-deb -x of a name that a pattern allows; no script of the package runs",
    },
    "platform/steerlab/run/upload.py": {"subprocess.run": "git, with arguments that stand in the file"},
    "platform/steerlab/tracking/writer_process.py": {"subprocess.Popen": "this package's own writer of W&B runs"},
    "platform/steerlab/tracking/wandb_client/sweep_page.py": {"subprocess.run": "this package's own helper of W&B sweeps"},
    "platform/steerlab/tracking/writer.py": {"subprocess.Popen": "this package's own writer of W&B runs"},
    "platform/steerlab/training/safe_loading.py": {
        "torch.load": "weights_only=True, with three classes of DeepSpeed",
    },
}
"""Every risky use in the sources, by file, and why it is none."""


def uses(path: Path) -> Iterator[str]:
    """Yield the risky uses in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if name in CALLS or name.startswith("subprocess."):
                yield name
            elif last in METHODS:
                yield f".{last}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if keywords.get("shell", "False") != "False":
                yield f"{name}(shell=...)"
            if keywords.get("trust_remote_code") == "True":
                yield f"{name}(trust_remote_code=True)"
            if name == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load of more than weights"


def sources() -> list[Path]:
    found = [
        path for top in ("platform", "jobs", "cluster", "dashboards", "search_spaces") for path in (ROOT / top).rglob("*.py")
    ]
    assert len(found) > 150
    return sorted(found)


def test_every_risky_call_is_known_and_has_a_reason() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        for use in uses(path):
            seen[path.relative_to(ROOT).as_posix()].add(use)
    assert {file: sorted(names) for file, names in seen.items()} == {file: sorted(names) for file, names in ALLOWED.items()}


def test_transformers_is_never_left_to_ask_whether_it_may_run_code() -> None:
    """Where nothing is said it asks on standard input, and waits."""
    unsaid = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr != "from_pretrained"
            ):
                continue
            says = any(keyword.arg == "trust_remote_code" or keyword.arg is None for keyword in node.keywords)
            if not says:
                unsaid.append(f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}")
    assert unsaid == []


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    lines = (
        "import pickle", "from joblib import load", "exec('1')", "torch.load(f)", "yaml.load(t, L)", "t.extractall(d)",
        "subprocess.run('ls', shell=True)", "M.from_pretrained(d, trust_remote_code=True)", "importlib.import_module(n)",
    )  # fmt: skip
    for number, line in enumerate(lines):
        path = tmp_path / f"a{number}.py"
        path.write_text(line)
        assert list(uses(path)), line
