"""Tasks of lm-evaluation-harness on a steered model: its requests against the model itself, and a task of our own in full."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from steerlab.data import rows
from steerlab.evaluation.statistics.metrics import TOO_LONG
from steerlab.evaluation.statistics.summaries import summarise, summarise_all
from steerlab.evaluation.tasks.ability import harness, harness_chats, harness_log, harness_model, harness_rows
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import INSTRUCTION, Message, Part
from steerlab.job import DataSet
from steerlab.models import load_tokenizer
from steerlab.patches import ActivationPatch
from steerlab.steered.language import SteeredModel

NORM = "model.layers.1.post_attention_layernorm"
PAIRS = [("the cow and ", "the dog"), ("the cat", " moo"), ("", "the duck and the cow"), ("the old dog", " and the cat .")]


@pytest.fixture
def steered(tiny_model, encoder):
    patch = ActivationPatch({NORM: tiny_model.config.hidden_size}, {"phases": ("generation",)})
    with torch.no_grad():
        patch.maps[0].scale.fill_(-3.0)
    return SteeredModel(tiny_model, encoder, (patch,))


def ids(encoder, text):
    return encoder.encode((Message("text", (Part(text, INSTRUCTION),)),)).input_ids


def naive(model, whole, first):
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    total = sum(float(log_probs[t - 1, whole[t]]) for t in range(first, len(whole)))
    return total, all(int(log_probs[t - 1].argmax()) == whole[t] for t in range(first, len(whole)))


def test_likelihoods_are_the_models_own_at_strength_0_and_others_at_1(steered, encoder):
    base, strong = (harness_model.loglikelihoods(steered, PAIRS, strength) for strength in (0.0, 1.0))
    steered._attached.detach()
    for (context, continuation), found in zip(PAIRS, base, strict=True):
        total, is_greedy = naive(steered.model, ids(encoder, context + continuation), len(ids(encoder, context)))
        assert found == (pytest.approx(total, rel=1e-5), is_greedy, None)
    # The patch acts on generated tokens: it moves what follows the first of them, and nothing of a single one.
    changed = [abs(a.log_prob_nats - b.log_prob_nats) > 1e-3 for a, b in zip(base, strong, strict=True)]
    assert changed == [True, False, True, True]


def test_a_continuation_that_greedy_decoding_gives_is_marked(steered):
    text = steered.generate([harness_rows.conversation_of(steered, "the cow")], max_new_tokens=4, strengths=(1.0,))[0][0].text
    found = harness_model.loglikelihoods(steered, [("the cow", f" {text}"), ("the cow", f" {text} dog")], 1.0)
    assert [likelihood.is_greedy for likelihood in found] == [True, False]


def test_long_contexts_are_cut_on_the_left(steered, encoder, monkeypatch):
    monkeypatch.setattr(steered.model.config, "max_position_embeddings", 6)
    context, continuation = "the cow and the dog and the cat and", " the duck"
    found = harness_model.loglikelihoods(steered, [(context, continuation)], 0.0)[0]
    steered._attached.detach()
    assert found.log_prob_nats == pytest.approx(naive(steered.model, ids(encoder, context + continuation)[-6:], 4)[0], rel=1e-5)
    assert found.reason == "cut"


def test_a_continuation_that_does_not_fit_costs_its_document_alone(steered, monkeypatch):
    short = ("the cow", " moo")
    alone = harness_model.loglikelihoods(steered, [short], 1.0)
    monkeypatch.setattr(steered.model.config, "max_position_embeddings", 6)
    long = ("the", " the cow and the dog and the cat")
    found = harness_model.loglikelihoods(steered, [long, short], 1.0)
    assert (found[0].reason, found[1]) == (TOO_LONG, alone[0])
    fates = {}
    requests = [SimpleNamespace(task_name="a", doc_id=number) for number in (0, 0, 1)]
    harness_model.note(fates, requests, [TOO_LONG, "cut", None])
    assert fates == {("a", 0): TOO_LONG}


def test_a_context_is_cut_to_leave_room_for_an_answer(steered, encoder, monkeypatch):
    whole = " ".join(["the cow and the dog"] * 4)
    settings = {"until": ["."], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0}
    assert harness_model._tail(steered, whole, 3) == (whole, None)
    monkeypatch.setattr(steered.model.config, "max_position_embeddings", 10)
    tail = harness_model._tail(steered, whole, settings["max_gen_toks"])
    assert whole.endswith(tail.text) and tail.reason == "cut"
    assert len(ids(encoder, tail.text)) == 7, "as much is kept as there is room for"
    assert harness_model._tail(steered, whole, 12).text == whole, "there is no room at all: it is not asked"


def test_rolling_likelihoods_predict_every_token_once(steered, encoder, monkeypatch):
    text = "the cow and the dog and the cat and the duck"
    whole = ids(encoder, text)
    one_window = harness_model.rolling_loglikelihoods(steered, [text, "the cow"], 0.0)
    monkeypatch.setattr(steered.model.config, "max_position_embeddings", 5)
    windows = harness_model.rolling_loglikelihoods(steered, [text], 0.0)
    steered._attached.detach()
    assert one_window[0] == pytest.approx(naive(steered.model, whole, 1)[0], rel=1e-5)
    starts = range(0, len(whole) - 1, 4)
    assert windows[0] == pytest.approx(sum(naive(steered.model, whole[i : i + 5], 1)[0] for i in starts), rel=1e-5)


def test_the_harness_s_numbers_become_observations_where_they_are_means():
    def logged(metric, values, answer_filter="none"):
        return [{"doc_id": i, "filter": answer_filter, "metrics": [metric], metric: v} for i, v in enumerate(values)]

    samples = {
        "a": logged("acc", [1.0, 0.0]) + logged("exact_match", [True, True], "flexible-extract"),
        "b": logged("acc", [1.0]) + logged("ppl", [(-3.0, 2), (-5.0, 4)]) + logged("f1", [(1, 0), (0, 1)]),
    }
    reported = {
        "a": {"acc,none": 0.5, "exact_match,flexible-extract": 1.0},
        "b": {"acc,none": 1.0, "ppl,none": math.exp(8 / 6), "f1,none": 0.7},
    }
    samples["b"][-1]["f1"] = "x"
    with pytest.warns(UserWarning, match="lm_eval/f1 of b is not a mean over documents"):
        better = {"a": {"acc": True}, "b": {"acc": True, "ppl": False}}
        observations, measured = harness_log.observe(samples, reported, 0.5, {("b", 0): "cut", ("a", 1): TOO_LONG}, better)
    assert {name: (measure.transform, measure.better) for name, measure in measured.items()} == {
        "acc": ("identity", "higher"),
        "exact_match_flexible_extract": ("identity", None),
        "ppl": ("exp", "lower"),
    }
    acc = [o for o in observations if o.metric == "lm_eval/acc"]
    assert [(o.id, o.value, o.reason) for o in acc] == [("a/0", 1.0, None), ("a/1", None, TOO_LONG), ("b/0", 1.0, "cut")]
    assert (summarise(acc).n, summarise(acc).too_long, summarise(acc).rows_cut) == (2, 1, 1)
    assert [(o.value, o.weight) for o in observations if o.metric == "lm_eval/ppl"] == [(1.5, 2.0), (1.25, 4.0)]
    assert {o.strength for o in observations} == {0.5}


# Chats


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
HISTORY = [
    {"role": "system", "content": "say it"},
    {"role": "user", "content": "the cow ?"},
    {"role": "assistant", "content": "moo"},
    {"role": "user", "content": "the dog ?"},
]


@pytest.fixture
def chatting(tiny_model, tiny_dir):
    """A model with a chat template of special tokens, and a patch on the responses' tokens alone."""
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<system>", "<user>", "<assistant>", "<end>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    tiny_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    patch = ActivationPatch({NORM: tiny_model.config.hidden_size}, {"phases": ("prompt", "generation"), "roles": ("data",)})
    with torch.no_grad():
        patch.maps[0].scale.fill_(-3.0)
    return SteeredModel(tiny_model, Encoder(tokenizer, prompt_style="plain", response_role="data"), (patch,))


def test_a_chat_comes_back_from_its_text_with_the_roles_of_its_turns(chatting):
    chats = harness_chats.Chats(chatting.encoder)
    text = chats.render(HISTORY)
    assert text == "<system> say it <end> <user> the cow ? <end> <assistant> moo <end> <user> the dog ? <end> <assistant> "
    assert chats.prompt(text) == chatting.encoder.dialogue(HISTORY)
    assert chats.prompt("the cow ?") is None, "a plain text is no chat"
    roles = chatting.encoder.encode(chats.prompt(text)).roles
    assert len(set(roles)) == 2, "the worked example's answer has the role of responses, the rest that of instructions"


@pytest.mark.parametrize("prefix", ["", "the"])
def test_likelihoods_in_a_chat_are_those_of_the_whole_text_after_the_answer_s_header(chatting, prefix):
    chats = harness_chats.Chats(chatting.encoder)
    history = [*HISTORY, {"role": "assistant", "content": prefix}] if prefix else HISTORY
    text = chats.render(history, add_generation_prompt=not prefix)
    assert text.endswith(f"<assistant> {prefix}")
    choices = [" woof", " cow and dog"] if prefix else ["woof", "cow and dog"]
    base = harness_model.loglikelihoods(chatting, [(text, choice) for choice in choices], 0.0, chats)
    strong = harness_model.loglikelihoods(chatting, [(text, choice) for choice in choices], 1.0, chats)
    chatting._attached.detach()
    for choice, found in zip(choices, base, strict=True):
        whole = chatting.encoder.tokenizer(text + choice, add_special_tokens=False)["input_ids"]
        context = chatting.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        total, is_greedy = naive(chatting.model, whole, len(context))
        assert found == (pytest.approx(total, rel=1e-4), is_greedy, None)
    assert all(abs(a.log_prob_nats - b.log_prob_nats) > 1e-3 for a, b in zip(base, strong, strict=True)), (
        "the patch acts by role"
    )


def test_a_chat_is_answered_as_a_dialogue_is(chatting):
    chats = harness_chats.Chats(chatting.encoder)
    text = chats.render(HISTORY)
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False, "temperature": 0.0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "lm_eval.models.utils", SimpleNamespace(normalize_gen_kwargs=lambda kwargs: kwargs))
        (found,) = harness_model.generations(chatting, [(text, settings)], 1.0, 0, chats)
        begun = chats.render([*HISTORY, {"role": "assistant", "content": "it"}], add_generation_prompt=False)
        with pytest.raises(ValueError, match="the task begins each answer with 'it'"):
            harness_model.generations(chatting, [(begun, settings)], 1.0, 0, chats)
    ((expected,),) = chatting.generate([chatting.encoder.dialogue(HISTORY)], max_new_tokens=4)
    assert found.text == expected.text


def test_a_chat_that_does_not_fit_is_too_long_and_not_cut(chatting, monkeypatch):
    chats = harness_chats.Chats(chatting.encoder)
    pairs = [(chats.render(HISTORY), "woof"), (chats.render(HISTORY[1:2]), "moo")]
    alone = harness_model.loglikelihoods(chatting, pairs[1:], 1.0, chats)
    monkeypatch.setattr(chatting.model.config, "max_position_embeddings", 8)
    assert [one.reason for one in harness_model.loglikelihoods(chatting, pairs, 1.0, chats)] == [TOO_LONG, None]
    assert harness_model.loglikelihoods(chatting, pairs, 1.0, chats)[1] == alone[0]


def test_several_tasks_have_metrics_of_their_own():
    config = harness.Config(name=("a", "b"))
    names = [measure.name for measure in harness.measures(config)]
    assert names == ["a.empty", "a.repetition", "a.letters", "b.empty", "b.repetition", "b.letters", "*"]
    logged = {"a_x": [{"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0, "resps": [["the cow"]]}]}
    observations, measured = harness_log.observe(logged, {"a_x": {"acc,none": 1.0}}, 1.0, {}, {"a_x": {"acc": True}}, "a.")
    assert {o.metric for o in observations} == {f"lm_eval/a.{name}" for name in ("acc", "empty", "repetition", "letters")}
    assert measured["a.acc"].better == "higher"
    assert harness.TASK.chats(config.model_copy(update={"chat_template": True})) and not harness.TASK.chats(config)


def own_tasks(folder):
    """Two tasks over rows of our own: choices by likelihood, and a text that is generated."""
    rows = [{"question": "the cow", "choices": ["moo", "woof"], "answer": i % 2} for i in range(4)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    files = f"data_files: {{test: {folder / 'rows.json'}}}"
    common = f"dataset_path: json\ndataset_kwargs:\n  {files}\ntest_split: test\nfewshot_split: test\n"
    (folder / "sounds.yaml").write_text(
        f"task: sounds\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "says.yaml").write_text(
        f"task: says\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[answer]}}'\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 3}\n"
    )
    return {"tasks_source": str(folder), "trust_remote_code": True}


@pytest.mark.slow  # the harness reads its thousands of task files first
def test_a_task_of_our_own_runs_at_every_strength(steered, tmp_path):
    pytest.importorskip("lm_eval")
    config = harness.Config(name="sounds", **own_tasks(tmp_path), strengths=(1.0, 0.0), limit=3)
    result = harness.run(steered, config)
    found = summarise_all(result)
    assert list(found) == [1.0, 0.0] and set(found[1.0]) == {"lm_eval/acc", "lm_eval/acc_norm"}
    assert found[1.0]["lm_eval/acc"].n == 3
    assert {o.id for o in result.observations} == {"sounds/0", "sounds/1", "sounds/2"}
    assert len(result.samples) == 6 and json.dumps(result.samples)
    says = harness.run(steered, config.model_copy(update={"name": "says"}))
    assert set(summarise_all(says)[0.0]) == {f"lm_eval/{name}" for name in ("exact_match", "empty", "repetition", "letters")}
    with pytest.raises(ValueError, match="no task 'sound'; did you mean sounds"):
        harness.run(steered, config.model_copy(update={"name": "sound"}))


def test_folds_of_a_task_are_those_of_a_data_set_with_the_same_seed(tmp_path):
    """The documents of a fold beside the rows of the other fold: all of them, none twice."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(9)))
    tasks = {"a": SimpleNamespace(eval_docs=range(9)), "b": SimpleNamespace(eval_docs=range(20))}
    manager = SimpleNamespace(load=lambda names: {"tasks": {name: tasks[name] for name in names}})
    fold = harness.Config(name="a", shuffle=3, offset=4)
    of_fold = harness.documents(fold, manager, "a")["a"]
    fitted = [
        int(row["text"]) for row in rows.read(DataSet(source=str(tmp_path / "rows.jsonl"), format="text", shuffle=3, limit=4))
    ]
    assert sorted([*of_fold, *fitted]) == list(range(9)) and fitted != sorted(fitted)
    assert of_fold == sorted(of_fold), "the harness takes them in their own order"
    assert harness.documents(harness.Config(name="b", offset=18, limit=5), manager, "b") == {"b": [18, 19]}
    assert harness.documents(harness.Config(name="a", limit=5), manager, "a") is None
    with pytest.raises(ValueError, match="offset 9 leaves no document of a, which has 9"):
        harness.documents(harness.Config(name="a", offset=9), manager, "a")


@pytest.mark.slow
def test_a_fold_of_a_task_of_our_own_keeps_the_numbers_of_its_documents(steered, tmp_path, monkeypatch):
    """One of them does not fit: it is the one that is marked, by its number in the task."""
    pytest.importorskip("lm_eval")
    config = harness.Config(name="sounds", **own_tasks(tmp_path), shuffle=1, offset=1)
    (numbers,) = [harness.documents(config, harness._library(config)[1], "sounds")["sounds"]]
    assert len(numbers) == 3 and numbers != [0, 1, 2]
    asked = []

    def note(fates, requests, reasons):
        asked.extend(request.doc_id for request in requests)
        fates[requests[-1].task_name, requests[-1].doc_id] = TOO_LONG

    monkeypatch.setattr(harness_model, "note", note)
    result = harness.run(steered, config)
    assert {o.id for o in result.observations} == {f"sounds/{number}" for number in numbers}
    assert {o.id for o in result.observations if o.reason == TOO_LONG} == {f"sounds/{numbers[max(asked)]}"}


@pytest.mark.slow
def test_tasks_of_our_own_as_chats_with_examples_as_turns(chatting, tmp_path):
    pytest.importorskip("lm_eval")
    fields = {**own_tasks(tmp_path), "limit": 2, "system_instruction": "say it", "num_fewshot": 1, "chat_template": True}
    asked = harness.run(chatting, harness.Config(name=("sounds", "says"), **fields))
    assert set(summarise_all(asked)[1.0]) == {
        *(f"lm_eval/sounds.{name}" for name in ("acc", "acc_norm")),
        *(f"lm_eval/says.{name}" for name in ("exact_match", "empty", "repetition", "letters")),
    }
    prompts = {str(sample["prompt"]) for sample in asked.samples}
    assert all(p.startswith("<system> say it <end> <user> the cow <end> <assistant> ") for p in prompts)
    assert all(p.count("<user>") == 2 and p.endswith("<end> <assistant> ") for p in prompts), (
        "the example is a turn of the chat"
    )
    one = harness.run(chatting, harness.Config(name="says", **fields, fewshot_as_turns=False))
    assert {str(sample["prompt"]).count("<user>") for sample in one.samples} == {1}
    written = {sample["id"]: sample["output"] for sample in asked.samples if "output" in sample}
    ((expected,),) = chatting.generate(
        [chatting.encoder.dialogue(turns_of(next(s["prompt"] for s in asked.samples if s["id"] == "says/0")))], max_new_tokens=3
    )
    assert written["says/0"] == expected.text.partition(".")[0]


def turns_of(prompt):
    """The turns of a rendered chat, read back from its text."""
    pieces = [piece.partition("> ") for piece in prompt.split(" <end> ")[:-1]]
    return [{"role": role.removeprefix("<"), "content": content} for role, _, content in pieces]


def test_without_the_package_the_error_says_what_to_install(steered, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'steerlab\[lm_eval\]'"):
        harness.run(steered, harness.Config(name="mmlu"))
