"""The card of an exported folder, and its upload to a stand-in for the hub."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
import zoo
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_export_language_models import left
from test_foreign_patches import shifts
from typer.testing import CliRunner

from steerlab import cli, load
from steerlab.run import card
from steerlab.steered import publishing
from steerlab.storage.store import Store

JOB = {
    "name": "calm",
    "model": {"source": "hf:owner/model", "dtype": "float32"},
    "data": {
        "source": {"source": "/home/somebody/secret project/rude.jsonl", "format": "text", "limit": 32, "field": "text"},
        "target": {"source": "https://me:hunter2@example.org/a|b.jsonl", "format": "text"},
        "prompt_style": "plain",
    },
    "method": {"name": "caa", "pooling": "last"},
}


def metric(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "stderr": 0.012, "n": 64, "unparsable": 0, "low": value - 0.02, "high": value + 0.02, **more}


@pytest.fixture
def run(tmp_path: Path, tiny_dir: Path) -> tuple[Store, str]:
    """A finished run of CAA, whose patch adds vectors to two layers."""
    store = Store.open(str(tmp_path / "root"))
    zoo.write("llama", tmp_path / "base", tiny_dir, num_hidden_layers=3)
    made = left(tmp_path / "made", tmp_path / "base", shifts(tmp_path / "base", 1, 2))
    with store.temporary("fit", "ab12") as folder:
        made.rename(folder / "inside")
        for path in (folder / "inside").iterdir():
            path.rename(folder / path.name)
        (folder / "inside").rmdir()
        store.commit("fit", "ab12", folder, {"params": {}, "seconds": 1.0})
    folder = "runs/calm/1"
    store.write_text(f"{folder}/job.yaml", yaml.safe_dump(JOB))
    numbers = {"toxicity/share": metric(0.125), "perplexity/value": metric(51.5, stderr=None)}
    plain = {"toxicity/share": metric(0.25)}
    store.write_json(
        f"{folder}/summary.json",
        {
            "metrics": numbers, "strengths": {"0.5": numbers, "0": plain}, "choice": None, "reported": {"toxicity": 0.5},
            "model": {"stage": "fit", "key": "ab12", "snapshot": None}, "evaluations": {}, "unsteered": {}, "schema": 2,
        },
    )  # fmt: skip
    store.write_json(f"{folder}/environment.json", {"git": "0123456789abcdef", "versions": {"torch": "2.13.0"}})
    return store, folder


def exported(run: tuple[Store, str], out: Path, *options: str, code: int = 0) -> str:
    store, folder = run
    result = CliRunner().invoke(cli.app, ["export", f"{store.root}/{folder}", str(out), *options])
    assert result.exit_code == code, result.output
    return result.output


def sections(text: str) -> dict[str, str]:
    """The parts of a card by their headings."""
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in text.split("\n## ")[1:]}


def test_a_card_says_method_data_numbers_and_use(run: tuple[Store, str], tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "--format", "gguf")
    text = (tmp_path / "out/README.md").read_text()
    found = ModelCard(text)
    assert found.data.to_dict() == {"library_name": "gguf", "tags": ["steerlab", "caa"]}
    parts = sections(text)
    assert list(parts) == ["Method", "Use", "Data", "Numbers"]
    assert "https://arxiv.org/abs/2312.06681" in parts["Method"] and "pooling: last" in parts["Method"]
    assert "Exported as gguf at strength 0.5." in parts["Method"]
    assert "| toxicity/share | 0.125 ± 0.012 | 0.25 ± 0.012 | 64 |" in parts["Numbers"]
    assert "| perplexity/value | 51.5 | - | 64 |" in parts["Numbers"]
    assert "| source | rude.jsonl | format text, field text, limit 32 |" in parts["Data"]
    assert "commit 0123456789ab" in text and "torch 2.13.0" in text
    # What is whose is nobody else's business: folders of this machine, and passwords.
    assert not any(word in text for word in ("somebody", "secret project", "hunter2", str(tmp_path)))
    assert "load('MODEL', patch='out/vector.gguf')" in parts["Use"]


def test_a_card_is_rendered_as_it_is_meant(run: tuple[Store, str], tmp_path: Path) -> None:
    """Tables are tables, code is code, and a name cannot put HTML or another column into the page."""
    store, folder = run
    store.write_text(f"{folder}/job.yaml", yaml.safe_dump({**JOB, "name": "<script>alert(1)</script>\n# no"}))
    text = card.written("```python\nx = 1\n```", "peft", 0.5, run=run, base="owner/model", note="off by <b>1</b>")
    html = MarkdownIt("gfm-like", {"linkify": False}).render(ModelCard(text).text)
    assert html.count("<table>") == 2 and html.count("<h1>") == 1 and html.count("<h2>") == 4
    rows = [line for line in html.splitlines() if line.startswith("<td>") or line.startswith("<th>")]
    assert "<script" not in html.replace("&lt;script", "") and '<code class="language-python">x = 1' in html
    assert len(rows) == 3 * 3 + 3 * 4, "no cell is split by a bar in a name"
    assert ModelCard(text).data.to_dict()["base_model"] == "owner/model"


def test_a_strength_that_was_not_measured_has_no_numbers(run: tuple[Store, str], tmp_path: Path) -> None:
    exported(run, tmp_path / "out", "--format", "gguf", "--strength", "0.7")
    text = (tmp_path / "out/README.md").read_text()
    assert "Nothing was measured at strength 0.7; the run measured 0, 0.5." in text and "0.125" not in text


def test_a_checkpoint_has_a_card_and_still_loads(run: tuple[Store, str], tmp_path: Path) -> None:
    output = exported(run, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "library_name: transformers" in text and "Exported as checkpoint at strength 0.5" in text
    assert "load('out')" in text and f"load('{tmp_path / 'out'}')" in output.replace("\n", "")
    assert len(load(tmp_path / "out").patches) == 1
    # What is exported again says nothing of a run.
    again = CliRunner().invoke(cli.app, ["export", str(tmp_path / "out"), str(tmp_path / "two"), "--format", "easysteer"])
    assert again.exit_code == 0, again.output
    assert list(sections((tmp_path / "two/README.md").read_text())) == ["Use"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--approximate"], "--approximate is about vectors"),
        (["--format", "peft", "--approximate"], "only the vectors of gguf and easysteer can approximate"),
        (["--format", "peft"], "a patch of kind activation does not change weights"),
        (["--push", "noowner"], "a repository of the hub is called OWNER/NAME"),
        (["--push", "../../etc/passwd"], "a repository of the hub is called OWNER/NAME"),
    ],
)
def test_wrong_requests_write_nothing(run: tuple[Store, str], tmp_path: Path, options: list[str], message: str) -> None:
    output = exported(run, tmp_path / "out", *options, code=2)
    assert message in " ".join(output.split()) and not (tmp_path / "out").exists()


class Hub:
    """What a stand-in for the hub has received."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.keys: set[str | None] = set()
        self.status = 200
        self.url = ""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            state.keys.add(self.headers["Authorization"])
            answer: dict[str, Any] = {}
            if self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                answer = {"url": f"{state.url}/owner/calm", "id": "owner/calm", "name": "owner/calm"}
            elif "/preupload/" in self.path:
                wanted = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{state.url}/owner/calm/commit/1", "commitOid": "1", "success": True}
            self.answer(answer)

        def do_GET(self) -> None:
            self.answer({"id": "owner/calm", "modelId": "owner/calm", "siblings": [], "tags": [], "private": True})

        def answer(self, content: dict[str, Any]) -> None:
            sent = json.dumps(content if state.status == 200 else {"error": "no write access"}).encode()
            self.send_response(state.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", state.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    yield state
    server.shutdown()
    server.server_close()


def test_a_folder_is_pushed_where_the_user_asks(run: tuple[Store, str], tmp_path: Path, stand_in: Hub) -> None:
    output = exported(run, tmp_path / "out", "--format", "gguf", "--push", "owner/calm")
    assert "uploaded to" in output and "owner/calm" in output
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert stand_in.files == written and set(written) == {"vector.gguf", "README.md"}
    assert stand_in.created[0]["name"] == "calm" and stand_in.created[0]["visibility"] == "private"
    assert stand_in.keys == {"Bearer hf_standin"} and b"hf_standin" not in b"".join(written.values())
    exported(run, tmp_path / "two", "--format", "gguf", "--push", "owner/calm", "--public")
    assert stand_in.created[1]["visibility"] == "public"


def test_nothing_is_sent_without_the_option(run: tuple[Store, str], tmp_path: Path, stand_in: Hub) -> None:
    exported(run, tmp_path / "out", "--format", "gguf")
    assert not stand_in.created and not stand_in.files


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_leaves_the_folder(run: tuple[Store, str], tmp_path: Path, stand_in: Hub, status: int) -> None:
    stand_in.status = status
    output = exported(run, tmp_path / "out", "--format", "gguf", "--push", "owner/calm", code=2)
    assert f"the hub at {stand_in.url} did not accept it" in output.replace("\n", " ")
    assert (tmp_path / "out/vector.gguf").is_file()


def test_a_hub_that_is_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"is written, but the hub at http://127\.0\.0\.1:9 did not accept it"):
        publishing.push(tmp_path / "out", "owner/calm")
