"""Method `prompt`: what stands before each prompt, over tokenizers and chat templates of many families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_families import FAMILIES, family

from steerlab import job, models, run
from steerlab.data import sources
from steerlab.evaluation.asking import continuation
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, Encoded
from steerlab.job import Example, Preamble
from steerlab.stages import JobType, Plan
from steerlab.steered import language, stacks
from steerlab.storage import plan
from steerlab.storage.store import Store

QUESTION = ("name the colour", "a red lamp")
EXAMPLES = (
    Example(instruction="name the thing", input="a green tree", output="tree"),
    Example(instruction="say hello", output="hello"),
)
FULL = Preamble(system="answer in one word", examples=EXAMPLES, prefix="be kind : ")
BASE: dict[str, Any] = {
    "name": "worded",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain"},
    "method": {"name": "prompt", "system": "answer in one word", "prefix": "be kind : "},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 2}],
}
FEW = {"source": "tiny:instructions/train", "limit": 2}


def made(tree: dict[str, Any]) -> Plan:
    return Plan.of(job.validate(tree, JobType, Path("worded.yaml")))


def run_of(encoder: Encoder, row: Encoded, role: int) -> str:
    return str(encoder.tokenizer.decode([i for i, own in zip(row.input_ids, row.roles, strict=True) if own == role]))


@pytest.mark.parametrize("style", ["plain", "aside"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_prints_the_system_text_and_the_examples_before_the_question(name: str, style: Any) -> None:
    encoder = Encoder(family(name).tokenizer, prompt_style=style, preamble=FULL)
    row = encoder.encode(encoder.conversation(*QUESTION))
    text, at = "".join(str(encoder.tokenizer.decode(row.input_ids)).split()), -1
    assert "oneword" in text, "the system text, which some templates (Mistral's) print in the last user turn"
    for piece in ("greentree", "tree", "sayhello", "hello", "namethecolour", "redlamp"):
        at = text.find(piece, at + 1)
        assert at >= 0, f"{piece!r} is missing after the pieces before it in {text!r}"
    data = "".join(run_of(encoder, row, DATA).split())
    assert "greentree" in data and "redlamp" in data, "the data of examples and of the question have the role of data"
    assert "namethe" not in data and "oneword" not in data, "instructions and the system text do not"


@pytest.mark.parametrize("style", ["plain", "aside"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_assistants_header_keeps_its_role_and_an_answer_its_place(name: str, style: Any) -> None:
    bare = Encoder(family(name).tokenizer, prompt_style=style)
    worded = bare.preceded_by(FULL)
    last = [encoder.encode(encoder.conversation(*QUESTION)).roles[-1] for encoder in (bare, worded)]
    assert last[0] == last[1]
    answers = []
    for encoder in (bare, worded):
        row = encoder.encode(encoder.conversation(*QUESTION, "red"))
        ids = [i for i, inside in zip(row.input_ids, row.in_response, strict=True) if inside]
        # Stripped: models without a template get turns with names, after which an answer begins with a space.
        answers.append(encoder.tokenizer.decode(ids).strip())
    assert answers[0] == answers[1], "only the last answer is the response, and the examples are not"


def test_without_a_preamble_every_prompt_is_as_it_was(encoder: Encoder) -> None:
    same = encoder.preceded_by(Preamble())
    for conversation in (encoder.conversation(*QUESTION), encoder.dialogue([{"role": "user", "content": "say hello"}])):
        assert same.encode(conversation).input_ids == encoder.encode(conversation).input_ids
    assert "preamble" not in encoder.spec


def test_messages_keep_their_turns_after_the_preamble(encoder: Encoder) -> None:
    worded = encoder.preceded_by(FULL)
    own = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say hello"}]
    speakers = [(m.speaker, "".join(part.text for part in m.parts)) for m in worded.dialogue(own, "hello")]
    assert speakers[0] == ("system", "answer in one word\n\nbe brief")
    assert [speaker for speaker, _ in speakers[1:]] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert speakers[-2:] == [("user", "say hello"), ("assistant", "hello")]
    only_prefix = encoder.preceded_by(Preamble(prefix="be kind : "))
    assert only_prefix.dialogue(own) == encoder.dialogue(own), "a prefix is for plain texts"


def test_a_text_that_is_continued_gets_the_prefix_and_a_text_that_is_scored_does_not(encoder: Encoder) -> None:
    worded = encoder.preceded_by(FULL)
    (message,) = continuation.conversation(worded, "the lamp")
    assert message.parts[0].text == "be kind : the lamp"
    assert continuation.conversation(worded, "the lamp", "shines") == continuation.conversation(encoder, "the lamp", "shines")
    assert worded.from_row({"text": "the lamp"}, "text") == encoder.from_row({"text": "the lamp"}, "text")


@pytest.fixture
def worded(tmp_path: Path) -> tuple[Plan, Store, plan.Stage]:
    """The stage of a prompting job on a model from a source, which runs without Ray."""
    planned = made({**BASE, "data": {**BASE["data"], "examples": FEW}})
    store, stage = Store.open(str(tmp_path / "root")), planned.model
    assert stage is not None
    plan.run([stage], store, planned.job.scale, plan.Listener(), [])
    return planned, store, stage


def test_the_artifact_is_the_model_with_its_preamble(worded: tuple[Plan, Store, plan.Stage]) -> None:
    planned, store, stage = worded
    loaded = stacks.load(store.local(stage.name, stage.key))
    preamble = loaded.encoder.preamble
    assert preamble == planned.preamble and len(preamble.examples) == 2 and preamble.prefix == "be kind : "
    assert loaded.patches == () and loaded.encoder.prompt_style == "plain"
    plain = models.load_model(sources.fetch("tiny:model"), seed=0)
    by_hand = language.SteeredModel(plain, loaded.encoder, ())
    answers = [model.answer("give the topic", "lamp", max_new_tokens=4) for model in (loaded, by_hand)]
    assert answers[0] == answers[1]


def test_a_prompt_on_a_prompt_keeps_both(worded: tuple[Plan, Store, plan.Stage]) -> None:
    planned, store, _ = worded
    above = {**BASE, "name": "above", "model": {"source": planned.job.model_dump(mode="json", exclude_unset=True)}}
    above["method"] = {"name": "prompt", "system": "in capitals", "prefix": "and brief : "}
    second = made(above)
    assert second.model is not None
    plan.run(list(plan.ordered([second.model])), store, second.job.scale, plan.Listener(), [])
    preamble = stacks.load(store.local(second.model.name, second.model.key)).encoder.preamble
    assert preamble == second.preamble
    assert (preamble.system, preamble.prefix) == ("answer in one word\n\nin capitals", "be kind : and brief : ")
    assert len(preamble.examples) == 2


def test_the_key_holds_the_texts_and_the_examples() -> None:
    trees = [
        BASE,
        {**BASE, "method": {**BASE["method"], "system": "answer in two words"}},
        {**BASE, "method": {**BASE["method"], "prefix": "be brief : "}},
        {**BASE, "data": {**BASE["data"], "examples": FEW}},
        {**BASE, "data": {**BASE["data"], "examples": {**FEW, "limit": 3}}},
        {**BASE, "data": {"prompt_style": "aside"}},
    ]
    keys = [[stage.key for stage in made(tree).stages] for tree in trees]
    assert len({key for both in keys for key in both}) == 2 * len(trees)


def test_a_patch_below_keeps_its_strengths() -> None:
    """The text is added to a patch; it does not take its place."""
    steered = {
        "name": "steered",
        "model": {"source": "tiny:model"},
        "data": {
            "prompt_style": "plain",
            "source": {"source": "tiny:topics/train", "format": "text", "limit": 8},
            "target": {"source": "tiny:topics/train", "format": "text", "offset": 8, "limit": 8},
        },
        "method": {"name": "caa"},
        "extract": {"max_tokens": 16},
    }
    above = {**BASE, "model": {"source": steered}, "strength": 0.5}
    assert made(above).leaves_patch and made(above).leaves_maps
    assert not made(BASE).leaves_patch
    with pytest.raises(ValueError, match="strength"):
        run.check(made({**BASE, "strength": 0.5}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"name": "prompt"}}, "method.system: this key is required by method prompt"),
        ({"data": {"examples": {**FEW, "limit": None}}}, "examples.limit: give the number"),
        ({"data": {"examples": {**FEW, "limit": 101}}}, "100 or fewer"),
        ({"data": {"examples": {"source": "tiny:topics/train", "format": "text", "limit": 2}}}, "rows of format instruction"),
        ({"train": {"steps": 1, "lr": 1e-3, "micro_batch": 1, "max_tokens": 8}}, "method prompt trains nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run.check(made({**BASE, **change}))


@pytest.mark.parametrize("preamble", [{"system": 3}, {"examples": [{"instruction": "a"}]}, {"other": "x"}, "text", None])
def test_a_damaged_preamble_is_named(worded: tuple[Plan, Store, plan.Stage], tmp_path: Path, preamble: Any) -> None:
    _, store, stage = worded
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("base.json", "prompt.json"):
        (folder / name).write_text((store.local(stage.name, stage.key) / name).read_text())
    prompt = json.loads((folder / "prompt.json").read_text())
    (folder / "prompt.json").write_text(json.dumps({**prompt, "preamble": preamble}))
    with pytest.raises(ValueError, match=r"prompt\.json"):
        stacks.load(folder)


def test_the_job_of_the_repository_passes_its_checks() -> None:
    path = Path(__file__).parents[2] / "jobs/tiny/prompt.yaml"
    assert yaml.safe_load(path.read_text())["method"]["name"] == "prompt"
    run.check(Plan.of(job.read(path, JobType)))
