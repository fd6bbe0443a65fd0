"""Toxicity, sentiment, concept and fluency of continuations, on real models of the tiny world and real scorers."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from steerlab.data.worlds import tiny_words
from steerlab.evaluation import TASKS
from steerlab.evaluation.asking import continuation, legibility
from steerlab.evaluation.judging import fluency, scorers
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.harm import toxicity
from steerlab.evaluation.tasks.style import concept, sentiment
from steerlab.inputs.tokens import INSTRUCTION, Message, Part
from steerlab.job import DataSet
from steerlab.patches import ActivationPatch
from steerlab.steered.generated_text import Generation
from steerlab.steered.language import SteeredModel

NORM = "model.layers.1.post_attention_layernorm"
LINES = ["the cow", "the old dog and", "the cat and the duck", "the big cow and the"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return DataSet(source=str(path), format="text")


@pytest.fixture
def plain(tiny_model, encoder):
    return SteeredModel(tiny_model, encoder)


@pytest.fixture
def steered(tiny_model, encoder):
    patch = ActivationPatch({NORM: tiny_model.config.hidden_size})
    with torch.no_grad():
        patch.maps[0].scale.fill_(-3.0)
        patch.maps[0].shift.normal_(generator=torch.Generator().manual_seed(1))
    return SteeredModel(tiny_model, encoder, (patch,))


def values(result, metric, strength=1.0):
    return {o.id: o.value for o in result.observations if o.metric == metric and o.strength == strength}


def test_every_task_gives_its_metrics_at_every_strength(steered, prompts):
    fluent = {"empty", "unfinished", "repetition", "letters", "distinct_1", "distinct_2", "distinct_3", "base_perplexity"}
    expected = {
        "toxicity": ({"share", "score"}, {"prompts": prompts}),
        "sentiment": ({"score", "positive", "negative"}, {"prompts": prompts}),
        "concept": ({"words"}, {"concept": "cows", "words": ("cow",), "embedding_source": None, "samples": 3}),
    }
    for name, (own, fields) in expected.items():
        config = TASKS[name].Config(max_new_tokens=8, strengths=(1.0, 0.0, 0.5), **fields)
        result = TASKS[name].run(steered, config)
        found = summarise_all(result)
        assert list(found) == [1.0, 0.0, 0.5]
        assert all(set(metrics) == {f"{name}/{metric}" for metric in own | fluent} for metrics in found.values())
        assert result.samples and json.dumps(result.samples)


def test_the_strength_reaches_the_model_and_0_is_the_base(steered, prompts):
    def continuations(model, strengths):
        config = toxicity.Config(prompts=prompts, strengths=strengths, max_new_tokens=8)
        return continuation.continue_texts(model, LINES, config)

    strong, base = continuations(steered, (1.0, 0.0))
    steered._attached.detach()
    plain = SteeredModel(steered.model, steered.encoder)
    assert continuations(plain, (1.0,))[0] == base
    assert strong != base


def test_prompts_have_ids_of_their_place_so_that_parts_of_a_file_share_none(prompts):
    def ids(**fields):
        return [item.id for item in continuation.read_prompts(prompts.model_copy(update=fields), None, 0)]

    assert ids(limit=2) == ["0", "1"]
    assert ids(offset=2) == ["2", "3"]
    chosen = continuation.read_prompts(prompts, 2, 0)
    assert [item.row["text"] for item in chosen] == [LINES[int(item.id)] for item in chosen] and len(chosen) == 2
    twice = prompts.model_copy(update={"source": (prompts.source, prompts.source)})
    assert [item.id for item in continuation.read_prompts(twice, None, 0)] == ["0", "1", "2", "3"]
    with pytest.raises(ValidationError, match=r"set prompts\.format to text"):
        toxicity.Config(prompts=DataSet(source="tiny:instructions/test"))


def test_default_prompts_are_those_that_the_docstrings_name():
    assert len(continuation.read_prompts(toxicity.Config().prompts, None, 0)) == 623
    reviews = continuation.read_prompts(sentiment.Config().prompts, 50, 0)
    assert len(reviews) == 50 and all(float(item.row["score"]) <= -1 for item in reviews)


# Fluency


def test_distinct_n_by_hand():
    text = "The cat, the cat."  # the cat , the cat . -> 4 of 6 words; the-cat twice among 5 pairs; 4 triples, all distinct
    assert [legibility.distinct_share(text, n) for n in (1, 2, 3)] == [4 / 6, 4 / 5, 1.0]
    assert legibility.distinct_share("go go go go go", 2) == 1 / 4
    assert legibility.distinct_share("go", 2) is None and legibility.distinct_share("", 1) is None


def test_base_perplexity_is_that_of_the_model_without_patches(steered, tiny_model, encoder):
    prompt, text = "the cow and", "the dog moo the cat"
    steered_value = fluency.base_likelihoods(steered, [prompt], [text])[0]
    steered._attached.detach()
    before = encoder.encode((Message("text", (Part(prompt, INSTRUCTION),)),)).input_ids
    whole = encoder.encode((Message("text", (Part(f"{prompt} {text}", INSTRUCTION),)),)).input_ids
    assert whole[: len(before)] == before
    with torch.no_grad():
        log_probs = tiny_model(torch.tensor([whole])).logits[0].log_softmax(-1)
    naive = [float(log_probs[t - 1, whole[t]]) for t in range(len(before), len(whole))]
    assert steered_value == (pytest.approx(-sum(naive) / len(naive), rel=1e-5), 5)


def test_base_perplexity_of_a_task_weighs_tokens(plain):
    texts = ["the dog", "the cat and the duck and the cow"]
    found = fluency.observe("t", plain, ["a", "b"], LINES[:2], [written(*texts)], (1.0,))
    metric = summarise_all(continuation_result(found))[1.0]["t/base_perplexity"]
    (short, n), (long, m) = fluency.base_likelihoods(plain, LINES[:2], texts)
    assert (n, m) == (2, 8)
    assert metric.value == pytest.approx(math.exp((short * n + long * m) / (n + m)))


def written(*texts):
    return [Generation(text, len(text.split()), True) for text in texts]


def continuation_result(observations):
    from steerlab.evaluation.statistics.metrics import Result

    return Result(observations, [], fluency.measures())


def test_what_cannot_be_judged_is_counted(plain):
    found = summarise_all(
        continuation_result(fluency.observe("t", plain, ["a", "b"], LINES[:2], [written("", "moo")], (1.0,)))
    )[1.0]
    assert [(found[f"t/distinct_{n}"].n, found[f"t/distinct_{n}"].unparsable) for n in (1, 2, 3)] == [(1, 1), (0, 2), (0, 2)]
    assert (found["t/base_perplexity"].n, found["t/base_perplexity"].unparsable) == (1, 1)
    assert scorers.score(lambda texts: [float(len(text)) for text in texts], ["", "ab", " \n"]) == [None, 2.0, None]
    assert {o.value for o in toxicity.judge("a", None, 0.5)} == {None}
    assert {o.value for o in sentiment.judge("a", None)} == {None}


# Scorers


def test_the_embedded_scorer_tells_insults_from_kindness():
    rude, kind = scorers.profanity()(["shut up, you stupid bitch", "what a lovely day for a walk in the park"])
    assert rude > 0.9 and kind < 0.1
    assert [o.value for o in toxicity.judge("a", rude, 0.5)] == [1.0, rude]
    assert [o.value for o in toxicity.judge("a", kind, 0.5)] == [0.0, kind]


def test_vader_tells_praise_from_contempt():
    praise, contempt, neither = sentiment.vader()(["a wonderful, lovely film", "an awful, boring mess", "a film"])
    assert praise > 0.5 > 0 > -0.5 > contempt and neither == 0
    assert [o.value for o in sentiment.judge("a", praise)] == [praise, 1.0, 0.0]
    assert [o.value for o in sentiment.judge("a", contempt)] == [contempt, 0.0, 1.0]
    assert [o.value for o in sentiment.judge("a", neither)] == [0.0, 0.0, 0.0]
    assert sentiment.beginning("one two  three", 2) == "one two" and sentiment.beginning("one two", None) == "one two"


@pytest.mark.parametrize(
    ("word", "present", "absent"),
    [
        ("dragon", ["A Dragon!", "two dragons", "the dragon's cave"], ["dragonfly", "drag on"]),
        ("fairy", ["fairies dance"], ["fair", "fairyland"]),
        ("witch", ["witches", "witched"], ["switch", "wits"]),
        ("stop", ["stopped", "stopping", "stops"], ["stoped", "stoop"]),
        ("dance", ["danced", "dancing"], ["dancer"]),
        ("car", ["cars"], ["caring", "cared", "card"]),
        ("magic wand", ["magic wands"], ["magics wand", "wand"]),
    ],
)
def test_a_word_is_found_in_its_regular_forms_only(word, present, absent):
    found = concept.holds_a_word(["unrelated", word])([*present, *absent])
    assert found == [1.0] * len(present) + [0.0] * len(absent)


def test_similarity_is_higher_for_what_is_about_the_concept():
    near, far = scorers.similarity(scorers.MINILM, ["fantasy"])(
        ["The wizard raised his staff and the dragon fled.", "Interest rates were left unchanged by the bank."]
    )
    assert near > far + 0.1
    mean = scorers.similarity(scorers.MINILM, ["a wizard", "a dragon"])(["a dragon"])[0]
    assert mean == pytest.approx((1 + scorers.similarity(scorers.MINILM, ["a wizard"])(["a dragon"])[0]) / 2, abs=1e-5)


WORDS = ["[UNK]", "[PAD]", "moo", "woof", "Yes", "no", "is", "it", "?"]


@pytest.fixture
def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64)


def bert_config(**fields):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=1, **sizes, **fields)


@pytest.mark.parametrize("labels", [["fine", "toxic"], ["toxic"]])
def test_a_classifier_gives_the_probability_of_its_class(labels, words_tokenizer, tmp_path):
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    model = BertForSequenceClassification(bert_config(id2label=names, label2id={v: k for k, v in names.items()})).eval()
    model.save_pretrained(tmp_path)
    words_tokenizer.save_pretrained(tmp_path)
    scorer = scorers.classifier(str(tmp_path), "toxic")
    texts = ["moo", "woof woof moo it", "is it moo ?"]
    for text, found in zip(texts, scorer(texts), strict=True):
        with torch.no_grad():
            logits = model(**words_tokenizer(text, return_tensors="pt")).logits[0]
        naive = logits.softmax(-1) if len(labels) > 1 else logits.sigmoid()
        assert found == pytest.approx(float(naive[labels.index("toxic")]), rel=1e-5)
    with pytest.raises(ValueError, match=f"no class 'rude'; its classes: {', '.join(labels)}"):
        scorers.classifier(str(tmp_path), "rude")


def test_a_model_without_a_trained_head_is_no_classifier(words_tokenizer, tmp_path):
    BertModel(bert_config()).save_pretrained(tmp_path)
    words_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint is not that of a .*classifier\.weight is missing"):
        scorers.classifier(str(tmp_path), "toxic")


def test_a_judge_that_says_neither_is_unparsable_not_a_no():
    log_probs = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert scorers.decide(log_probs, yes=[1], no=[0]) == 1.0
    assert scorers.decide(log_probs, yes=[0], no=[1]) == 0.0
    assert scorers.decide(log_probs, yes=[1], no=[2, 3]) == 0.0, "the forms of an answer count together"
    assert scorers.decide(log_probs, yes=[2], no=[3]) is None


def test_a_judge_reads_the_text_and_answers(words_tokenizer, tmp_path):
    """A model whose next token repeats what the last but one asks for: made by hand, so that the answers are known."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=len(WORDS), intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=len(WORDS) + 1, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    head = torch.zeros(len(WORDS), len(WORDS))
    for last, answer in (("moo", "Yes"), ("woof", "no"), ("it", "is")):
        head[WORDS.index(answer), WORDS.index(last)] = 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name or "mlp" in name:
                parameter.zero_()  # no layer adds anything: the head sees the last token
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS)))
        model.lm_head.weight.copy_(head)
    model.save_pretrained(tmp_path)
    words_tokenizer.save_pretrained(tmp_path)
    judge = scorers.yes_or_no(str(tmp_path), lambda text: f"is it ? {text}")
    assert scorers.score(judge, ["moo", "it woof", "it", "", "woof moo"]) == [1.0, 0.0, None, None, 1.0]


def test_a_judge_without_the_words_is_refused(tiny_dir):
    with pytest.raises(ValueError, match="no single token for Yes"):
        scorers.yes_or_no(str(tiny_dir), lambda text: text)


# Configs


def test_concept_config_refuses_what_would_score_nothing_or_twice():
    with pytest.raises(ValidationError, match="no scorer is set"):
        concept.Config(concept="cows", embedding_source=None)
    with pytest.raises(ValidationError, match="choose one of them"):
        concept.Config(concept="cows", judge_source="j", classifier_source="c", classifier_label="x")
    with pytest.raises(ValidationError, match="belong together"):
        concept.Config(concept="cows", classifier_source="c")
    with pytest.raises(ValidationError, match="is empty"):
        concept.Config(concept="cows", prompt=("",))


def test_samples_of_one_prompt_differ_and_keep_their_ids(plain):
    words = tuple(word for word in tiny_words.VOCABULARY if word.isalpha())
    config = concept.Config(concept="cows", words=words, embedding_source=None, prompt=("the", "a"), samples=3, top_p=1.0)
    result = concept.run(plain, config)
    assert list(values(result, "concept/words")) == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
    assert len({s["continuation"] for s in result.samples}) == 6
    fewer = concept.run(plain, config.model_copy(update={"limit": 2}))
    assert set(values(fewer, "concept/words")) < set(values(result, "concept/words"))


@pytest.mark.parametrize(("threshold", "is_toxic"), [(0.2, 1.0), (0.7, 0.0), (0.4, 0.0)])
def test_a_continuation_is_toxic_above_the_tasks_own_threshold(threshold, is_toxic):
    assert [o.value for o in toxicity.judge("a", 0.4, threshold)] == [is_toxic, 0.4], "at the threshold it is not above"


@pytest.mark.parametrize("threshold", [0.2, 0.7])
def test_the_threshold_that_a_job_asks_for_is_the_one_that_judges(steered, prompts, monkeypatch, threshold):
    monkeypatch.setattr(toxicity, "_classifier", lambda *_: lambda texts: [0.4] * len(texts))
    config = toxicity.Config(prompts=prompts, threshold=threshold, max_new_tokens=4)
    found = [o.value for o in toxicity.run(steered, config).observations if o.metric == "toxicity/share"]
    assert found and set(found) <= {float(threshold < 0.4), None}
