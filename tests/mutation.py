"""How many small faults the tests notice: python tests/mutation.py [PART ...]     (minutes to hours a part)

mutmut changes one expression of one function at a time and runs the tests that reach this function. A mutant that no test
fails on has *survived*. The table says of each part how many mutants were caught; a file shows the change of each survivor.

Left out of the score, since no test should depend on them: changes of the text of a message (in `raise`, `warn`), and the
changes that WITHOUT_EFFECT names with a reason.

mutmut works on a copy of the repository, in which the package lies in `src`: it takes `platform` for a part of a module's name.
A run that is stopped goes on where it was, as long as the copy stays (--keep FOLDER). With --sample N it runs N mutants of a
part, drawn with a fixed seed, and the table gives the interval of the share (Wilson, 95 %).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scipy import stats

ROOT = Path(__file__).parents[1]
COPIED = ("cluster", "dashboards", "jobs", "platform", "search_spaces", "tests")
NEEDED = "not slow and not gpu and not fuzz and not ray"
NO_TESTS, SURVIVED, NOT_RUN = 33, 0, None
"""Exit codes in mutmut's files."""


class Part(NamedTuple):
    """Sources, and the tests that are there for them."""

    sources: tuple[str, ...]
    """Patterns below platform/steerlab."""
    tests: tuple[str, ...]
    """Below tests/."""


PARTS = {
    "mathematics": Part(
        ("methods/math/*", "patches/maps/*"),
        (
            "methods", "unit/test_rotation.py", "unit/test_patches.py", "unit/test_export.py", "unit/test_diffusion.py",
            "unit/test_places.py",
        ),
    ),
    "statistics": Part(
        ("evaluation/statistics/*",),
        (
            "unit/test_evaluation_metrics.py", "unit/test_tasks.py", "unit/test_evaluation_steering.py",
            "unit/test_comparison.py", "unit/test_report.py", "unit/test_report_tokens.py", "unit/test_generations.py",
            "unit/test_evaluation_seeds.py", "unit/test_graded_tasks.py", "unit/test_judging.py",
            "unit/test_evaluation_token_effect.py", "unit/test_statistics_files.py",
        ),
    ),
    "methods": Part(("methods/*.py",), ("methods", "unit/test_keys.py", "unit/test_options.py")),
    "keys": Part(
        # Not stages/spread, which starts processes and is tested on real Ray clusters (tests/ray).
        (
            "stages/__init__.py", "stages/extraction_size.py", "stages/job_plan.py", "stages/assemble.py", "stages/choose.py",
            "stages/edit.py", "stages/evaluate.py", "stages/extract.py", "stages/fit.py", "stages/preambles.py",
            "stages/prepare.py", "stages/reduce.py", "stages/train.py", "stages/spread/subject.py", "storage/plan.py",
        ),
        (
            "unit/test_keys.py", "unit/test_job_plan.py", "unit/test_plan.py", "unit/test_choose.py",
            "unit/test_strength.py", "unit/test_own_code.py", "unit/test_options.py", "unit/test_prompt_method.py",
            "unit/test_inverse.py", "unit/test_steering_requests.py", "methods/test_realigned.py", "unit/test_interactive.py",
        ),
    ),
    "store": Part(
        ("storage/*.py",),
        (
            "unit/test_store.py", "unit/test_plan.py", "unit/test_tensorfile.py", "unit/test_strangers.py",
            "unit/test_storage_parts.py", "unit/test_claims.py", "unit/test_two_users.py", "unit/test_housekeeping.py",
            "unit/test_waits.py", "faults/test_damage.py",
        ),
    ),
    "report": Part(
        # Not the figures, which are looked at.
        (
            "report/__init__.py", "report/contents.py", "report/headline.py", "report/modules.py", "report/predictions.py",
            "report/run_names.py", "report/sweep_contents.py", "report/tables.py",
        ),
        (
            "unit/test_report.py", "unit/test_report_sweeps.py", "unit/test_report_headline.py",
            "unit/test_report_modules.py", "unit/test_report_tokens.py", "unit/test_comparison.py",
        ),
    ),
}  # fmt: skip

WITHOUT_EFFECT = (
    (r"strict=(True|None|False)", "lengths of what is zipped are equal by construction"),
    (r"daemon=", "what a process that ends does with its threads"),
    (r"dtype=(float|None)", "numpy takes a list of floats for float"),
    (r"\.to\(None\)|\.to\(.*device\)", "on one device nothing moves"),
    (r"UTF-8|utf-8", "names of one encoding"),
    (r"indent=", "how JSON is spaced, for people"),
    (r"progress|report\(", "what people are told while it runs"),
    (r"torch\.(no_grad|inference_mode)", "gradients that nobody asks for"),
    (r"use_cache=", "keys and values that a single pass does not read again"),
    (r"^[-+] *message = ", "the text of a message, before it is raised"),
)
"""Pattern of a line that a mutant changed -> why no result can depend on it."""


class Mutant(NamedTuple):
    """A mutant that mutmut has run."""

    name: str
    change: str
    """Lines taken out (-) and put in (+)."""
    code: int | None
    """Exit code of the tests; 0 where none failed, 33 where none reaches the function."""
    is_message: bool

    @property
    def is_meaningful(self) -> bool:
        """Whether a test can be asked to notice it."""
        return not self.is_message and not any(re.search(pattern, self.change) for pattern, _ in WITHOUT_EFFECT)


def prepare(folder: Path, part: Part) -> None:
    """Make the copy in which mutmut works, unless it is there."""
    (folder / "src").mkdir(exist_ok=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOT.glob("*.*"):
        if name.is_file():
            shutil.copy(name, folder)
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(ROOT / "platform/steerlab", folder / "src/steerlab", dirs_exist_ok=True)
    text = (folder / "pyproject.toml").read_text().replace('pythonpath = ["platform", ', "pythonpath = [")
    settings = {
        "source_paths": ["src/"],
        "only_mutate": [f"src/steerlab/{pattern}" for pattern in part.sources],
        "also_copy": [*COPIED, *(path.name for path in folder.iterdir() if path.is_file())],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", NEEDED],
        "pytest_add_cli_args_test_selection": [f"tests/{name}" for name in part.tests],
        "process_isolation": "forkserver",
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (folder / "pyproject.toml").write_text("\n".join([text, "[tool.mutmut]", *lines, ""]))
    tomllib.loads((folder / "pyproject.toml").read_text())


def sample(folder: Path, command: list[str | Path], environment: dict[str, str], number: int) -> list[str]:
    """Return the names of mutants that are drawn from all those of a part, the same ones each time."""
    # mutmut writes the mutants and looks which test reaches which function before it looks for the names that it was given;
    # a name that no mutant has ends it there.
    subprocess.run([*command, "none"], cwd=folder, env=environment, check=False, capture_output=True)
    metas = sorted((folder / "mutants/src").rglob("*.meta"))
    names = [name for meta in metas for name in sorted(json.loads(meta.read_text())["exit_code_by_key"])]
    return random.Random(0).sample(names, min(number, len(names)))


def functions(file: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions of a file of mutants by their names, which are mutmut's."""
    tree = ast.parse(file.read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def read(folder: Path) -> Iterator[Mutant]:
    """Yield the mutants of a run."""
    for meta in sorted((folder / "mutants/src").rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        if not codes:
            continue
        known = functions(meta.with_suffix(""))
        for name, code in codes.items():
            last = name.rpartition(".")[2]
            before, after = known.get(last.rpartition("__mutmut_")[0] + "__mutmut_orig"), known.get(last)
            if before is not None and after is not None:
                yield Mutant(name, changed(before, after), code, in_message(before, after))


def changed(before: ast.AST, after: ast.AST) -> str:
    """Return the lines in which two functions differ; their signatures do where a default was changed."""
    first, second = (re.sub(r"__mutmut_\w+", "", ast.unparse(node), count=1).splitlines() for node in (before, after))
    return "\n".join(
        line for line in difflib.unified_diff(first, second, "", "", n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
    )


def in_message(before: ast.AST, after: ast.AST) -> bool:
    """Say whether two functions differ in a message alone: in what is raised or warned of."""

    def without(node: ast.AST) -> str:
        text = ast.unparse(Messages().visit(ast.parse(ast.unparse(node))))
        return re.sub(r"__mutmut_\w+", "", text, count=1)

    return without(before) == without(after)


class Messages(ast.NodeTransformer):
    """Empties what is raised, and the arguments of warnings."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args = []
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "warn":
            node.args = []
        return node


def main() -> None:
    """Run mutmut on each part, print the table and write the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--keep", type=Path, help="folder for the copy, from which a run goes on")
    parser.add_argument("--survivors", type=Path, default=Path("survivors.txt"), help="file for the mutants that survived")
    parser.add_argument("--sample", type=int, metavar="N", help="run so many mutants of a part; all, if not given")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    mutmut = Path(sys.executable).with_name("mutmut")
    if not mutmut.exists():
        parser.error("mutmut is missing: pip install -c cluster/constraints.txt -e '.[mutation]'")
    lines, survivors = [], []
    for name in asked.parts or PARTS:
        folder = asked.keep / name if asked.keep else Path(tempfile.mkdtemp(prefix=f"mutants-{name}-"))
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, PARTS[name])
        command = [mutmut, "run", "--max-children", str(asked.processes)]
        drawn = sample(folder, command, environment, asked.sample) if asked.sample else []
        subprocess.run([*command, *drawn], cwd=folder, env=environment, check=False)
        lines.append(row(name, mutants := [mutant for mutant in read(folder) if mutant.code is not NOT_RUN]))
        survivors += [one for one in mutants if one.code in (SURVIVED, NO_TESTS) and one.is_meaningful]
    asked.survivors.write_text("\n\n".join(f"{one.name} ({one.code})\n{one.change}" for one in survivors) + "\n")
    print("\n| part | mutants | of messages or without effect | meaningful | caught | not reached by a test |")
    print("\n".join(["|---|---|---|---|---|---|", *lines]))
    print(f"{len(survivors)} survivors: {asked.survivors}")


def row(name: str, mutants: list[Mutant]) -> str:
    """Return the line of a part."""
    meaningful = [mutant for mutant in mutants if mutant.is_meaningful]
    caught = sum(mutant.code not in (SURVIVED, NO_TESTS) for mutant in meaningful)
    missed = sum(mutant.code == NO_TESTS for mutant in meaningful)
    share = "-"
    if meaningful:
        low, high = stats.binomtest(caught, len(meaningful)).proportion_ci(method="wilson")
        share = f"{caught} ({caught / len(meaningful):.1%}; {low:.1%} to {high:.1%})"
    return f"| {name} | {len(mutants)} | {len(mutants) - len(meaningful)} | {len(meaningful)} | {share} | {missed} |"


if __name__ == "__main__":
    main()
