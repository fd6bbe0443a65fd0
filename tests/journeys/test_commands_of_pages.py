"""The commands of the pages, typed in a fresh clone in the order of the pages: those of the tiny world run as they stand there.

pytest -m slow tests/journeys/test_commands_of_pages.py      (about half an hour)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence

import pytest
import yaml
from test_journeys import Shell
from test_pages import ROOT, commands, snippets

from steerlab.data.worlds import tiny

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ELSEWHERE = {
    "submit": "tests/ray/test_submit_sweep.py, with a cluster",
    "serve": "tests/unit/test_serving.py, with OpenAI's client",
    "dashboards": "tests/tracking/test_wandb_server.py, with a server",
    "wandb-sweep": "tests/ray/test_sweeps_in_wandb.py, with a server",
    "wandb-send": "tests/tracking/test_wandb_server.py, with a server",
    "--backend": "tests/ray/test_sweeps_in_wandb.py, with a server",
}
"""Words of commands that need a server -> the test that runs them with one."""
STANDS_FOR = {
    "RUN": "first", "RUN_A": "first", "RUN_B": "first-vanilla", "second": "first-vanilla", "A": "first.yaml", "B": "first.yaml",
    "ROOT": "root", "MODEL": "tiny:model", "N": "2",
}  # fmt: skip
"""Words of a page that stand for something of the reader's own."""
OF_PIPELINES, OF_MAPS, OF_STRENGTHS = "tiny-diffusion-lineas", "maps", ("tiny-dpo", "tiny-iav")
"""Runs that commands about images, about control vectors and about strengths of two runs are typed for."""


def typed() -> list[tuple[str, tuple[str, ...]]]:
    """Return the page and the words of each command that runs here, once, in the order of the pages; README.md comes first."""
    order = {"README.md": 0, "jobs/CATALOGUE.md": 1}
    chosen: dict[tuple[str, ...], str] = {}
    for snippet, words in sorted(commands(), key=lambda pair: order.get(pair[0].page, 2)):
        if words[0] == "steerlab" and is_whole(words) and not is_large(words) and not set(words) & ELSEWHERE.keys():
            chosen.setdefault(tuple(words[1:]), snippet.page)
    return [(page, words) for words, page in chosen.items()]


def is_whole(words: Sequence[str]) -> bool:
    """Return whether a command names all that it needs; a page also speaks of `steerlab run` alone."""
    return len(words) > 2 and not set(words) & {"NAME", "JOB", "SPACE", "FOLDER", "FILE", "half-way.yaml"}


def is_large(words: Sequence[str]) -> bool:
    """Return whether a command names a job on a published model, which is downloaded and takes hours."""
    return any(re.fullmatch(r"jobs/[\w.]+\.yaml", word) for word in words)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A clone with the files that the pages speak of."""
    shell = Shell(tmp_path_factory.mktemp("pages"))
    shell.environment["STEERLAB_ROOT"] = str(shell.clone / "root")
    (first,) = [one for one in snippets("yaml") if one.page == "README.md"]
    (shell.clone / "first.yaml").write_text(first.text)
    for snippet in snippets("python"):
        if name := re.match(r"# (\w+\.py)\n", snippet.text):
            (shell.clone / name[1]).write_text(snippet.text)
    asked = [row for row in tiny.rows("instructions/train", 24)]
    (shell.clone / "rows.csv").write_text(
        "question,answer\n" + "".join(f'"{row["instruction"]}","{row["output"]}"\n' for row in asked)
    )
    prompts = [{"prompt": "Translate to French.", "data": "Good morning."}]
    (shell.clone / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    answers = [{"prompt": "Say hello.", "reply": reply} for reply in ("Hello.", "I cannot help with that.")]
    (shell.clone / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    told = {"name": "told", "model": {"source": "tiny:model"}, "method": {"name": "none"}, "evaluate": [TOXICITY]}
    (shell.clone / "told.yaml").write_text(yaml.safe_dump(told))
    shell.steerlab("run", "told.yaml")
    # A control vector is added to the outputs of decoder layers; the jobs of the folder act on their norms.
    settings = (
        "name=maps",
        "method={name: mean_act, incremental: false}",
        "choose=null",
        "extract.select.modules=.*layers\\.[1-9]\\d*",
    )
    shell.steerlab("run", "jobs/tiny/act.yaml", *(word for setting in settings for word in ("--set", setting)))
    (samples,) = (shell.clone / "root/runs/told").glob("*/samples/toxicity.parquet")
    shutil.copy(samples, shell.clone)
    return shell


TOXICITY = {"task": "toxicity", "prompts": {"source": "tiny:texts/test", "format": "text", "limit": 4}, "max_new_tokens": 4}


@pytest.mark.parametrize(("page", "words"), typed(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else value)
def test_a_command_of_a_page_runs(page: str, words: tuple[str, ...], shell: Shell) -> None:
    own = {**STANDS_FOR}
    if "--guidance" in words or ("export" in words and page == "jobs/README.md" and "0.5" in words):
        own["RUN"] = OF_PIPELINES
    if "gguf" in words:
        own["RUN"] = OF_MAPS
    if "compare" in words and "--strength" in words:
        own["RUN_A"], own["RUN_B"] = OF_STRENGTHS
    arguments = [own.get(word, word) for word in words]
    if "export" in words:
        arguments[arguments.index("folder")] = f"folder{shell.typed}"
    for number, word in enumerate(arguments):
        if matched := re.fullmatch(r"ROOT/(\w+)/([\w-]+)/ID(/[\w.]+)?", word):
            kind, name, rest = matched.groups()
            newest = max((shell.clone / "root" / kind / ("first" if name == "NAME" else name)).iterdir())
            arguments[number] = f"{newest}{rest or ''}"
    assert shell.steerlab(*arguments) or "export" in words


def test_commands_that_need_a_server_are_run_where_one_is() -> None:
    named = {word for _, words in commands() for word in words}
    for word, where in ELSEWHERE.items():
        assert word in named
        assert (ROOT / where.partition(",")[0]).is_file()
    assert len(typed()) > 50
