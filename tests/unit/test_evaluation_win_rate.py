"""Pairwise comparison: verdicts by hand, judges that are real small models, and the task on the tiny world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from steerlab import models, patches
from steerlab.evaluation import TASKS
from steerlab.evaluation.judging import answer_rewards, judges
from steerlab.evaluation.judging.judges import Answer, Compared, Pair
from steerlab.evaluation.judging.pair_judges import PairJudge
from steerlab.evaluation.statistics.metrics import TOO_LONG, Score
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.preferences import opponents, win_rate
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataSet
from steerlab.patches import LogitPatch
from steerlab.steered.language import SteeredModel

PROMPTS = DataSet(source="tiny:harmless/test")
WORDS = ["[UNK]", "[PAD]", "moo", "woof", "quack", "1", "2", "is", "it", "?"]
IMPLICIT = PairJudge("implicit", judges.once(lambda pairs: [None] * len(pairs)))


def answer(text: str, finished: bool = True) -> Answer:
    return Answer("who is it ?", "", text, finished)


def random_head(model: PreTrainedModel, seed: int) -> LogitPatch:
    patch = LogitPatch(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        patch.up.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return patch.eval()


@pytest.fixture
def steered(tiny_model: PreTrainedModel, encoder: Encoder) -> SteeredModel:
    return SteeredModel(tiny_model, encoder, (random_head(tiny_model, 1),))


@pytest.fixture
def exported(tiny_model: PreTrainedModel, encoder: Encoder, tmp_path: Path) -> str:
    """A folder with the model and a patch that adds the same head as `steered`'s: what `steerlab export` writes."""
    folder = tmp_path / "policy"
    models.save_model(tiny_model, encoder.tokenizer, folder / "model")
    patches.save(random_head(tiny_model, 1), folder / "patch", models.fingerprint(tiny_model))
    (folder / "prompt.json").write_text(json.dumps(encoder.spec))
    return str(folder)


@pytest.fixture
def words_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64)


def config(**fields: object) -> win_rate.Config:
    return win_rate.Config.model_validate({"prompts": PROMPTS, "limit": 6, "max_new_tokens": 6} | fields)


# Verdicts


def test_equal_texts_tie_and_are_never_shown_to_a_judge() -> None:
    shown: list[Pair] = []

    def judge(pairs: Sequence[Pair]) -> list[float | None]:
        shown.extend(pairs)
        return [1.0, None]

    pairs = [(answer("a"), answer("a")), (answer("a"), answer("b")), (answer(""), answer("")), (answer("b"), answer("a"))]
    assert judges.decide(judge, pairs) == [0.5, 1.0, 0.5, None]
    assert shown == [pairs[1], pairs[3]]
    assert judges.decide(judge, pairs[:1]) == [0.5]


def test_the_higher_reward_wins_and_each_answer_is_rewarded_once() -> None:
    rewarded: list[str] = []

    def lengths(answers: Sequence[Answer]) -> list[float | None]:
        rewarded.extend(a.text for a in answers)
        return [None if a.text == "?" else float(len(a.text)) for a in answers]

    texts = [("bb", "a"), ("a", "bb"), ("b", "a"), ("?", "a"), ("a", "?")]
    found = judges.by_reward(lengths)([(answer(first), answer(second)) for first, second in texts])
    assert found == [1.0, 0.0, 0.5, None, None]
    assert rewarded == ["bb", "a", "b", "?"]


@pytest.mark.parametrize(
    ("forward", "backward", "verdict"),
    [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.0, 0.0, 0.5), (None, 1.0, None), (TOO_LONG, None, TOO_LONG)],
)
def test_a_winner_wins_in_both_orders(forward: Score, backward: Score, verdict: Score) -> None:
    assert judges.combined(forward, backward) == verdict


def test_texts_that_look_like_places_stay_as_they_are() -> None:
    first, second = Answer("say {second}", "{first}", "{prompt}"), Answer("say {second}", "{first}", "b")
    assert judges.filled("{prompt}|{first}|{second}", first, second) == "say {second}\n\n{first}|{prompt}|b"
    assert "Response 1: a\n\nResponse 2: b\n\nWhich" in judges.filled(judges.QUESTION, answer("a"), answer("b"))


def test_one_verdict_becomes_numbers() -> None:
    pair = (answer("a", finished=False), answer("b"))

    def values(verdict: float | None, lengths: tuple[int, int]) -> dict[str, float | None]:
        return {o.metric.partition("/")[2]: o.value for o in win_rate.observe(IMPLICIT, "3", pair, Compared(verdict), lengths)}

    assert values(1.0, (3, 2)) == {
        "implicit": 1.0, "ties": 0.0, "longer": 1.0, "answer_tokens": 3.0, "opponent_tokens": 2.0, "unfinished": 1.0,
        "empty": 0.0, "repetition": 0.0, "letters": 1.0,
    }  # fmt: skip
    assert [values(0.5, (2, 2))[name] for name in ("ties", "longer")] == [1.0, 0.5]
    assert [values(None, (1, 2))[name] for name in ("implicit", "ties", "longer")] == [None, None, 0.0]


# The implicit reward


def naive_log_likelihood(model: SteeredModel, given: Answer, strength: float) -> float:
    """Sum log p of the answer's tokens, and of its end if it has one, one full forward pass."""
    row = model.encoder.encode(model.encoder.conversation(given.instruction, given.data, given.text))
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        strengths = torch.full((1,), strength)
        log_probs = model.model(ids, roles=torch.tensor([row.roles]), strengths=strengths).logits[0].log_softmax(-1)
    inside = [t for t, own in enumerate(row.in_response) if own]
    assert model.encoder.decode([row.input_ids[t] for t in inside]) == given.text
    assert row.input_ids[inside[-1]] == model.encoder.eos_id
    return sum(float(log_probs[t - 1, row.input_ids[t]]) for t in (inside if given.finished else inside[:-1]))


def test_the_implicit_reward_is_a_log_likelihood_ratio(steered: SteeredModel) -> None:
    answers = [answer("the cow"), answer("the old dog and the cat", finished=False), Answer("copy it", "box key", "box")]
    found = answer_rewards.implicit_reward(steered)(answers)
    for given, reward in zip(answers, found, strict=True):
        expected = naive_log_likelihood(steered, given, 1.0) - naive_log_likelihood(steered, given, 0.0)
        assert reward == pytest.approx(expected, abs=1e-4)


def test_the_implicit_reward_relative_to_another_model(steered: SteeredModel, tiny_dir: Path, encoder: Encoder) -> None:
    other = SteeredModel(models.load_model(tiny_dir, seed=1), encoder)
    (found,) = answer_rewards.implicit_reward(steered, other)([answer("the cow")])
    policy, reference = (
        naive_log_likelihood(steered, answer("the cow"), 1.0),
        naive_log_likelihood(other, answer("the cow"), 1.0),
    )
    assert found == pytest.approx(policy - reference, abs=1e-4)


def test_an_answer_beyond_the_context_has_no_likelihood(steered: SteeredModel) -> None:
    long = answer("cow " * 256)
    short = answer_rewards.log_likelihoods(steered, [answer("the cow")], 1.0)
    assert answer_rewards.log_likelihoods(steered, [long, answer("the cow")], 1.0) == [TOO_LONG, *short]
    assert answer_rewards.log_likelihoods(steered, [long], 1.0) == [TOO_LONG]


# Judges from outside


def save_reward_model(folder: Path, tokenizer: PreTrainedTokenizerFast, num_labels: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    made = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=1, num_labels=num_labels, **sizes)
    model = BertForSequenceClassification(made).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} it {% endfor %}"])
def test_a_reward_model_reads_the_prompt_with_its_answer(
    template: str | None, words_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    words_tokenizer.chat_template = template
    model = save_reward_model(tmp_path, words_tokenizer)
    answers = [Answer("is it ?", "", "moo"), Answer("is it ?", "quack", "woof woof"), Answer("is it ?", "", "")]
    found = answer_rewards.reward_model(str(tmp_path))([*answers, Answer("is it ?", "", "moo " * 64)])
    for given, reward in zip(answers, found[:-1], strict=True):
        if template is None:
            inputs = words_tokenizer(given.prompt, given.text, return_tensors="pt")
        else:
            inputs = words_tokenizer(f"user {given.prompt} it assistant {given.text} it", return_tensors="pt")
        with torch.no_grad():
            assert reward == pytest.approx(float(model(**inputs).logits[0, 0]), rel=1e-5)
    assert len(set(found[:-1])) == 3 and found[-1] == TOO_LONG, "cut, it would be another answer"


def test_a_classifier_with_classes_is_no_reward_model(words_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_reward_model(tmp_path, words_tokenizer, num_labels=2)
    with pytest.raises(ValueError, match="is not a reward model: it has the classes LABEL_0, LABEL_1 instead of one"):
        answer_rewards.reward_model(str(tmp_path))


@pytest.fixture
def judge_source(words_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """A model made by hand whose next token depends on the last one alone: it likes moo behind it, not woof, and quack is 1."""
    made = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=len(WORDS), intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=len(WORDS), max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(made)
    head = torch.zeros(len(WORDS), len(WORDS))
    for last, said in (("moo", "2"), ("woof", "1"), ("quack", "1"), ("it", "is")):
        head[WORDS.index(said), WORDS.index(last)] = 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name or "mlp" in name:
                parameter.zero_()  # no layer adds anything: the head sees the last token
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS)))
        model.lm_head.weight.copy_(head)
    folder = tmp_path / "judge"
    model.save_pretrained(folder)
    words_tokenizer.save_pretrained(folder)
    return str(folder)


QUESTION = "{prompt} {first} {second}"


def test_a_language_model_is_asked_in_both_orders(judge_source: str) -> None:
    judge = judges.language_model(judge_source, QUESTION)
    texts = [("moo", "woof"), ("woof", "moo"), ("quack", "woof"), ("it", "moo"), ("moo " * 16, "woof"), ("woof", "it")]
    verdicts = judge([(answer(first), answer(second)) for first, second in texts])
    # The third always says 1, whichever stands there; the fourth and the last say neither once; the fifth is too long.
    assert verdicts == [1.0, 0.0, 0.5, None, TOO_LONG, None]


def test_a_language_model_asked_once_sees_orders_drawn_by_the_seed(judge_source: str) -> None:
    judge = judges.language_model(judge_source, QUESTION, both_orders=False, seed=1)
    assert judge([(answer("moo"), answer("woof"))] * 8) == [1.0] * 8, "a judge without a favourite place"
    biased = judge([(answer("quack"), answer("woof"))] * 40)
    assert set(biased) == {0.0, 1.0} and biased == judge([(answer("quack"), answer("woof"))] * 40)
    other = judges.language_model(judge_source, QUESTION, both_orders=False, seed=2)
    assert biased != other([(answer("quack"), answer("woof"))] * 40)


def test_a_judge_without_the_words_is_refused(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges.scorers, "answer_ids", lambda encoder, word: [] if word == "2" else [3])
    with pytest.raises(ValueError, match="cannot judge: its vocabulary has no single token for 2"):
        judges.language_model(str(tiny_dir))


# The task


def test_a_model_wins_by_its_own_implicit_reward(steered: SteeredModel, exported: str) -> None:
    result = win_rate.run(steered, config(implicit_source=exported, limit=20, strengths=(1.0, 0.0, 0.5)))
    found = summarise_all(result)
    assert list(found) == [1.0, 0.0, 0.5]
    names = ["implicit", "ties", "longer", "answer_tokens", "opponent_tokens", "unfinished", "empty", "repetition", "letters"]
    assert all(list(metrics) == [f"win_rate/{name}" for name in names] for metrics in found.values())
    strong = found[1.0]["win_rate/implicit"]
    assert strong.n == 20 and strong.low is not None and strong.low > 0.5
    nothing = found[0.0]
    assert (nothing["win_rate/implicit"].value, nothing["win_rate/ties"].value, nothing["win_rate/longer"].value) == (
        0.5,
        1,
        0.5,
    )
    assert nothing["win_rate/answer_tokens"].value == nothing["win_rate/opponent_tokens"].value
    assert {metrics["win_rate/opponent_tokens"].value for metrics in found.values()} == {
        nothing["win_rate/answer_tokens"].value
    }
    assert nothing["win_rate/implicit"].low < 0.4, "twenty ties are no certainty"  # type: ignore[operator]
    assert json.dumps(result.samples) and {"prompt", "answer", "opponent", "verdict"} <= set(result.samples[0])
    assert win_rate.run(steered, config(implicit_source=exported, limit=20, strengths=(1.0, 0.0, 0.5))) == result


def test_answers_are_those_of_generation_and_opponents_those_of_strength_0(steered: SteeredModel, exported: str) -> None:
    result = TASKS["win_rate"].run(steered, config(implicit_source=exported, temperature=0.8, seed=3))
    prompts = [steered.encoder.conversation(sample["prompt"]) for sample in result.samples]
    strong, base = steered.generate(prompts, max_new_tokens=6, temperature=0.8, seed=3, strengths=(1.0, 0.0))
    assert [sample["answer"] for sample in result.samples] == [output.text.strip() for output in strong]
    assert [sample["opponent"] for sample in result.samples] == [output.text.strip() for output in base]


def test_a_model_without_a_patch_ties_with_itself(tiny_model: PreTrainedModel, encoder: Encoder, exported: str) -> None:
    found = summarise_all(win_rate.run(SteeredModel(tiny_model, encoder), config(implicit_source=exported)))[1.0]
    assert (found["win_rate/implicit"].value, found["win_rate/ties"].value) == (0.5, 1.0)


def test_references_are_the_rows_outputs(tiny_model: PreTrainedModel, encoder: Encoder, exported: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "who is it ?", "input": "cow dog", "output": " the old cow\n"}]))
    plain = SteeredModel(tiny_model, encoder)
    result = win_rate.run(plain, config(prompts={"source": str(path)}, against="reference", implicit_source=exported))
    (sample,) = result.samples
    assert (sample["prompt"], sample["opponent"]) == ("who is it ?\n\ncow dog", "the old cow")
    assert summarise_all(result)[1.0]["win_rate/opponent_tokens"].value == 3


def test_pairs_are_prompts_whose_chosen_response_is_the_reference(steered: SteeredModel, exported: str, tmp_path: Path) -> None:
    """Of a dialogue every turn is asked, and judged: not the last one alone."""
    said = [{"role": "user", "content": "the cow"}, {"role": "assistant", "content": "the dog"}]
    said.append({"role": "user", "content": "who is it ?"})
    rows = [{"prompt": prompt, "chosen": "the old cow", "rejected": "cat"} for prompt in ("who is it ?", said)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    pairs = {"source": str(path), "format": "preference"}
    result = win_rate.run(steered, config(prompts=pairs, against="reference", implicit_source=exported, max_new_tokens=12))
    dialogue = "User: the cow\n\nAssistant: the dog\n\nUser: who is it ?"
    assert [sample["prompt"] for sample in result.samples] == ["who is it ?", dialogue]
    assert {sample["opponent"] for sample in result.samples} == {"the old cow"}
    prompts = [steered.encoder.conversation("who is it ?"), steered.encoder.dialogue(said)]
    expected = [found.text.strip() for found in steered.generate(prompts, max_new_tokens=12)[0]]
    assert [sample["answer"] for sample in result.samples] == expected and expected[0] != expected[1]


def test_the_best_of_several_answers_is_the_one_that_the_reward_ranks_first(
    steered: SteeredModel, tiny_model: PreTrainedModel, encoder: Encoder, exported: str
) -> None:
    steered.detach()
    plain = SteeredModel(tiny_model, encoder)
    drawing = {"temperature": 1.0, "best_of": 4, "best_by_source": exported, "implicit_source": exported, "limit": 10}
    result = win_rate.run(plain, config(**drawing))
    prompts = [encoder.conversation(sample["prompt"]) for sample in result.samples]
    drawn = [[o.text.strip() for o in plain.generate(prompts, max_new_tokens=6, temperature=1.0, seed=n)[0]] for n in range(4)]
    reward = answer_rewards.implicit_reward(opponents.load_like(exported, plain))
    for number, sample in enumerate(result.samples):
        candidates = [Answer(sample["prompt"], "", texts[number], False) for texts in drawn]
        rewards = reward(candidates)
        assert reward([Answer(sample["prompt"], "", sample["answer"], False)]) == [max(rewards)]  # type: ignore[type-var]
        assert sample["opponent"] == drawn[0][number]
    found = summarise_all(result)[1.0]["win_rate/implicit"]
    assert found.value is not None and found.value > 0.7, "it is judged by what chose it"


def test_the_implicit_judge_may_be_two_models(steered: SteeredModel, exported: str, tiny_dir: Path) -> None:
    plain = str(Path(exported) / "model")
    with pytest.raises(ValueError, match="has no patch to remove: set implicit_base_source"):
        win_rate.run(steered, config(implicit_source=plain))
    alone = win_rate.run(steered, config(implicit_source=exported, limit=10))
    apart = win_rate.run(steered, config(implicit_source=exported, implicit_base_source=plain, limit=10))
    assert [o.value for o in apart.observations] == [o.value for o in alone.observations]


def test_a_reward_model_and_a_language_model_are_told_apart(
    steered: SteeredModel, judge_source: str, words_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_reward_model(tmp_path / "reward", words_tokenizer)
    rewarded = win_rate.run(steered, config(judge_source=str(tmp_path / "reward")))
    assert summarise_all(rewarded)[1.0]["win_rate/reward_model"].n == 6
    asked = win_rate.run(steered, config(judge_source=judge_source))
    assert summarise_all(asked)[1.0]["win_rate/language_model"].too_long == 6, "the question is longer than its context"
    with pytest.raises(ValueError, match=r"both_orders are for a language model, but .*reward is a reward model"):
        win_rate.run(steered, config(judge_source=str(tmp_path / "reward"), both_orders=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one judge is needed: set one of implicit_source, judge_source and api"),
        ({"implicit_source": "a", "judge_source": "b"}, "exactly one judge is needed"),
        ({"judge_source": "a", "implicit_base_source": "b"}, "needs implicit_source, which is missing"),
        ({"judge_source": "a", "question": "{prompt}: {first}?"}, r"question lacks \{second\}"),
        ({"implicit_source": "a", "both_orders": False}, "are for a language model: set judge_source"),
        (
            {"judge_source": "a", "against": "reference", "prompts": {"source": "tiny:topics/test", "format": "text"}},
            "against reference needs answers: set prompts.format to instruction or preference",
        ),
        ({"judge_source": "a", "best_of": 4}, "best_of above 1 and best_by_source"),
        ({"judge_source": "a", "best_of": 4, "best_by_source": "b"}, "best_of samples answers: set a temperature"),
    ],
)
def test_what_cannot_be_judged_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_wilsons_interval_at_the_ends(steered: SteeredModel, exported: str) -> None:
    """Twelve wins of twelve are no certainty either."""
    pair = (answer("a"), answer("b"))
    won = [o for i in range(12) for o in win_rate.observe(IMPLICIT, str(i), pair, Compared(1.0), (1, 1))]
    result = win_rate.run(steered, config(implicit_source=exported, limit=1))
    metric = summarise_all(type(result)(won, [], result.measures))[1.0]["win_rate/implicit"]
    assert metric.value == 1.0 and metric.low == pytest.approx(0.757506, abs=1e-6)
