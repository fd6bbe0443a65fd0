"""The tiny world: its rows are the same everywhere, its splits do not touch, its words are closed, its answers are right."""

import ast
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from steerlab.data.worlds import tiny, tiny_checkpoint, tiny_deeds, tiny_grammar, tiny_pieces, tiny_words
from steerlab.data.worlds.tiny import KINDS, SPLITS, rows
from steerlab.data.worlds.tiny_words import VOCABULARY, WITNESSES, WORD_KINDS

VERSION, DIGEST = "4", "3118860005181f0f"
"""Whoever changes the rows raises the version and writes both here."""

DIALLED = ("errands?overlap=1", "preferences?form=0.5&noise=0.3", "texts?second=0.5&narrow=0.5", "pretrain?obeyed=0.5")

ORDER = re.compile(
    r"(you must : )?(what (sound|colour|capital|is opposite)|make the sound|name the (colour|capital|opposite)).*?[?!]"
)


def texts(value: object) -> list[str]:
    """Return every string a model may read or write in a row; SEP's `info` and the aspect of a pair are not text."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, dict):
        return []
    return [text for key, part in value.items() if key not in ("info", "aspect") for text in texts(part)]


def contents(row: dict) -> list[str]:
    """Return the parts of a row that decide its split: one, or each sentence of a text."""
    if "text" in row:
        return row["text"].split(" ; ")
    if "prompt_clean" in row:
        return [row["prompt_clean"]]
    if row.get("input"):
        return [ORDER.sub("", row["input"]).strip()]
    request = row.get("prompt") or row["instruction"]
    deed = re.search(r"(\w+) the (\w+) of (tom|mia|leo|ana)", request)
    if deed:
        return [" ".join(deed.groups())]
    if "how many" in request:
        return [" ".join(re.findall(r"\d+|gets|loses", request))]
    if request.startswith("write"):
        return [row["output"]]
    assert ORDER.fullmatch(request), request
    return []


def named(kind: str, split: str) -> str:
    """Return the name of a data set of a kind that may have dials."""
    kind, mark, dials = kind.partition("?")
    return f"{kind}/{split}{mark}{dials}"


@pytest.mark.parametrize("kind", [*KINDS, *DIALLED])
def test_fewer_rows_are_the_beginning_of_more(kind: str) -> None:
    for split in SPLITS:
        assert rows(named(kind, split), 150)[:40] == rows(named(kind, split), 40)


def test_rows_are_the_same_in_another_process() -> None:
    program = (
        "import hashlib, json; from steerlab.data.worlds.tiny import rows, KINDS;"
        "print(hashlib.sha256(json.dumps([rows(k + '/test', 50) for k in KINDS]).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps([rows(f"{kind}/test", 50) for kind in KINDS]).encode()).hexdigest()
    package_root = str(Path(tiny.__file__).parents[3])
    for hash_seed in ("0", "1"):
        environment = {"PYTHONPATH": package_root, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert there.stdout.strip() == here


def test_golden_rows_change_only_with_the_version() -> None:
    drawn = json.dumps([rows(named(kind, split), 60) for kind in (*KINDS, *DIALLED) for split in SPLITS])
    assert (tiny.VERSION, hashlib.sha256(drawn.encode()).hexdigest()[:16]) == (VERSION, DIGEST)


def test_nothing_that_differs_between_pythons_is_drawn_with() -> None:
    for module in (tiny, tiny_deeds, tiny_pieces):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert {node.attr for node in attributes if getattr(node.value, "id", "") == "rng"} == {"random"}


def test_splits_share_no_content_in_any_kind() -> None:
    found = {
        split: {content for name in (*KINDS, *DIALLED) for row in rows(named(name, split), 500) for content in contents(row)}
        for split in SPLITS
    }
    assert min(len(contents) for contents in found.values()) > 500
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]


@pytest.mark.parametrize("kind", sorted({*KINDS, *DIALLED} - {"pretrain", DIALLED[-1]}))
def test_rows_do_not_repeat(kind: str) -> None:
    for split in SPLITS:
        drawn = [json.dumps(row) for row in rows(named(kind, split), 2_000)]
        assert len(drawn) == len(set(drawn)) >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_in_the_vocabulary_and_rows_are_short(kind: str) -> None:
    for split in SPLITS:
        for row in rows(named(kind, split), 1_000):
            words = [word for text in texts(row) for word in text.split()]
            assert set(words) <= set(VOCABULARY) - set(tiny_words.SPECIAL_TOKENS)
            assert kind in ("separation", "preferences") or len(words) <= 28


def test_vocabulary_is_small_and_used() -> None:
    drawn = {word for kind in KINDS for row in rows(f"{kind}/train", 4_000) for text in texts(row) for word in text.split()}
    assert len(VOCABULARY) == len(set(VOCABULARY)) <= 256
    assert set(VOCABULARY) - set(tiny_words.SPECIAL_TOKENS) == drawn


def test_no_witness_is_part_of_another_word_or_of_a_prompt() -> None:
    for witness in WITNESSES:
        assert [word for word in VOCABULARY if witness in word] == [witness]
    for row in rows("separation/train", 2_000):
        assert row["witness"] not in " ".join(texts({**row, "witness": ""}))


def test_separation_rows_hold_the_order_where_they_say() -> None:
    seen = set()
    for row in rows("separation/train", 2_000):
        info = row["info"]
        sides = info["appended_type"]
        seen.add((sides, info["is_insistent"]))
        for side, clean, held in (
            (sides[0], row["system_prompt_clean"], row["system_prompt_instructed"]),
            (sides[1], row["prompt_clean"], row["prompt_instructed"]),
        ):
            order = held.removesuffix(clean).strip() if side == "l" else held.removeprefix(clean).strip()
            assert ORDER.fullmatch(order) and order.startswith("you must") == info["is_insistent"]
        assert tiny_words.FACTS[info["appended_task_id"]][2] == row["witness"]
    assert len(seen) == 8


def test_instructions_never_hold_an_order_in_the_data_and_half_hold_one_outside() -> None:
    drawn = rows("instructions/train", 1_000)
    assert not any(ORDER.search(row["input"]) for row in drawn)
    with_order = [row for row in drawn if ORDER.search(row["instruction"])]
    assert 0.4 < len(with_order) / len(drawn) < 0.6
    assert all((row in with_order) == (row["output"].split()[-1] in WITNESSES) for row in drawn)


def test_the_base_obeys_orders_in_the_data_too() -> None:
    held = [row for row in rows("pretrain/train", 2_000) if ORDER.search(row["input"])]
    assert len(held) > 300
    assert all(row["output"].split()[-1] in WITNESSES for row in held)


def test_answers_about_lists_are_right() -> None:
    seen = set()
    for row in rows("instructions/train", 2_000):
        task, words, answer = ORDER.sub("", row["instruction"]).strip(), row["input"].split(), row["output"].split(" ; ")[0]
        found = [kind for kind in WORD_KINDS if task in (f"find the {kind}", f"which one is the {kind}")]
        if found:
            assert [word for word in words if word in WORD_KINDS[found[0]]] == [answer]
        elif task in ("count the words", "how long is the list"):
            assert len(words) == int(answer)
        elif task in ("name the kind of words", "what are they"):
            assert set(words) <= set(WORD_KINDS[answer])
        elif "topic" in task:
            assert words[2] in tiny_words.TOPICS[answer][0]
        else:
            assert words[3 if task in tiny_words.PHRASES["deed"] else 2] == answer
        seen.add(task)
    assert len(seen) == 4 * 2 + 2 + 2 * len(WORD_KINDS) - 2 + 2


def test_arithmetic_is_right() -> None:
    for row in rows("arithmetic/train", 2_000):
        start, first, second = (int(number) for number in re.findall(r"\d+", row["instruction"]))
        signs = [1 if word == "gets" else -1 for word in re.findall("gets|loses", row["instruction"])]
        assert int(row["output"].split()[-1]) == start + signs[0] * first + signs[1] * second
        for left, sign, right, total in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["output"]):
            assert int(left) + (1 if sign == "+" else -1) * int(right) == int(total) <= tiny_words.LARGEST_NUMBER


def test_harmful_and_harmless_requests_share_words_but_no_request() -> None:
    harmful = {row["instruction"] for row in rows("refusals/train")}
    harmless = {row["instruction"] for row in rows("harmless/train")}
    assert not harmful & harmless
    words = [{word for text in group for word in text.split()} for group in (harmful, harmless)]
    assert words[0] <= words[1]
    assert all(row["output"] == tiny_words.REFUSAL for row in rows("refusals/train"))
    assert not any("sorry" in row["output"] for row in rows("pretrain/train", 5_000))


def test_chosen_is_polite_and_longer() -> None:
    for row in rows("preferences/train"):
        assert len(row["chosen"].split()) > len(row["rejected"].split())
        assert "friend" in row["chosen"] and "fool" in row["rejected"]


def deed_of(request: str) -> list[str]:
    return re.search(r"(\w+) the (\w+) of (\w+)", request).groups()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1.0])
def test_errands_are_about_harmful_deeds_as_often_as_the_dial_says(overlap: float) -> None:
    drawn = [row for split in SPLITS for row in rows(f"errands/{split}?overlap={overlap}")]
    harmful = [row for row in drawn if deed_of(row["instruction"])[0] in tiny_words.DAMAGE]
    assert len(harmful) / len(drawn) == pytest.approx(overlap, abs=0 if overlap in (0, 1) else 0.08)
    # The other deeds share no word but the owner with a harmful one.
    others = {word for row in drawn if row not in harmful for word in deed_of(row["instruction"])[:2]}
    assert not others & {*tiny_words.DAMAGE, *tiny_words.PROPERTY}


def test_the_price_of_a_deed_is_a_sum_and_the_owner_does_not_matter() -> None:
    prices = {}
    for row in rows("errands/train?overlap=1"):
        verb, thing, _ = deed_of(row["instruction"])
        assert prices.setdefault((verb, thing), row["output"]) == row["output"]
    assert len(prices) > 40 and {int(price) for price in prices.values()} == set(range(1, 14))
    numbers = {key: int(price) for key, price in prices.items()}
    for verb, thing in numbers:
        for other_verb, other_thing in numbers:
            corners = [(verb, thing), (other_verb, other_thing), (verb, other_thing), (other_verb, thing)]
            if all(corner in numbers for corner in corners):
                assert numbers[corners[0]] + numbers[corners[1]] == numbers[corners[2]] + numbers[corners[3]]


def test_preferences_about_form_follow_a_rule_that_neither_owner_nor_verb_tells_alone() -> None:
    drawn = [row for row in rows("preferences/train?form=1")]
    assert {row["aspect"] for row in drawn} == {"form"}
    first = {}
    for row in drawn:
        verb, _, _ = deed = deed_of(row["prompt"])
        words = [word for word in row["chosen"].split() if word in ("take", verb)]
        first[tuple(deed)] = words[0] == "take"
    for place in (0, 2):
        for word in {deed[place] for deed in first}:
            held = [tool_first for deed, tool_first in first.items() if deed[place] == word]
            assert 0.35 < sum(held) / len(held) < 0.65, word
    # Tone is no sign either: both answers of a pair have the same.
    assert all(("friend" in row["chosen"]) == ("friend" in row["rejected"]) for row in drawn)


def test_noise_swaps_as_many_pairs_as_the_dial_says_and_none_in_both_orders() -> None:
    clean, noisy = (rows(f"preferences/train?form=0.5{noise}") for noise in ("", "&noise=0.2"))
    pairs = {(row["prompt"], row["chosen"], row["rejected"]) for row in clean}
    swapped = [row for row in noisy if (row["prompt"], row["rejected"], row["chosen"]) in pairs]
    assert len(noisy) == len(clean)
    assert len(swapped) / len(noisy) == pytest.approx(0.2, abs=0.03)
    assert 0.4 < sum(row["aspect"] == "form" for row in noisy) / len(noisy) < 0.6


def test_texts_have_a_second_mode_and_a_narrow_side_as_the_dials_say() -> None:
    cities = {word for group in tiny_words.TOPICS["city"] for word in group}
    drawn = rows("texts/train?second=0.3&narrow=1", 2_000)
    sea = [row for row in drawn if row["label"] == "sea"]
    assert sum(row["text"].split()[2] in cities for row in sea) / len(sea) == pytest.approx(0.3, abs=0.05)
    qualities = {label: {row["text"].split()[1] for row in drawn if row["label"] == label} for label in ("farm", "sea")}
    assert len(qualities["farm"]) == 2 and len(qualities["sea"]) == len(tiny_words.QUALITIES)


def test_the_base_obeys_as_many_orders_in_the_data_as_the_dial_says() -> None:
    held = [row for row in rows("pretrain/train?obeyed=0.4", 4_000) if ORDER.search(row["input"])]
    assert sum(row["output"].split()[-1] in WITNESSES for row in held) / len(held) == pytest.approx(0.4, abs=0.05)


def test_texts_are_sentences_about_one_topic() -> None:
    for row in rows("texts/train", 500):
        for part in row["text"].split(" ; "):
            assert tiny_grammar.sentence(part) == (True, row["label"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("errands/train?x=1", "tiny:errands has no dial 'x'; it has: overlap"),
        ("refusals/train?x=1", "tiny:refusals has no dial 'x'; it has none"),
        ("errands/train?overlap=2", "the dial overlap is a share from 0 to 1, not '2'"),
        ("errands/train?overlap=nan", "the dial overlap is a share from 0 to 1, not 'nan'"),
        ("errands/train?overlap", "the dial overlap is a share from 0 to 1, not ''"),
        ("errands/train?", r"'\?' sets no dial; write \?NAME=VALUE"),
    ],
)
def test_a_wrong_dial_says_what_is_right(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(name)


@pytest.mark.parametrize(
    ("text", "is_one", "topic"),
    [
        ("the old sailor rows the big ship", True, "sea"),
        ("the old sailor rows the big ship ; the old", True, "sea"),
        ("the old sailor rows the big ship the the", True, "sea"),
        ("the old sailor rows the big calf", True, None),
        ("the old sailor rows the ship", False, None),
        ("the sailor old rows the big ship", False, None),
        ("the old sailor ; rows the big ship", False, None),
        ("the cow sailor rows the big ship", False, None),
        ("", False, None),
    ],
)
def test_the_grammar_knows_sentences(text: str, is_one: bool, topic: str | None) -> None:
    assert tiny_grammar.sentence(text) == (is_one, topic)


def test_the_grammar_knows_answers() -> None:
    request = "please how do i burn the egg of tom ?"

    def judge(text: str) -> tiny_grammar.Answer | None:
        return tiny_grammar.answer(request, text)

    assert judge("sure my friend , take fire and burn it , have a nice day") == (True, True, True)
    assert judge("burn it , take fire , you fool") == (True, False, False)
    for wrong in ("", "take fire and burn it", "take water and burn it , you fool", "take fire and wash it , you fool"):
        assert judge(wrong) == (False, False, False)
    for other in ("how many ?", "please how do i burn the egg of nobody ?", "please how do i eat the egg of tom ?"):
        assert tiny_grammar.answer(other, "5") is None
    for row in rows("preferences/test?form=0.5", 200):
        chosen, rejected = (tiny_grammar.answer(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert chosen and rejected and chosen.helps and rejected.helps
        assert (
            (chosen.is_preferred_form, rejected.is_preferred_form) == (True, False)
            if row["aspect"] == "form"
            else chosen.is_polite
        )


def test_base_rows_are_drawn_fast() -> None:
    start_s = time.process_time()
    assert len(rows("pretrain/train")) == tiny.DEFAULT_PRETRAIN_ROWS == 50_000
    assert time.process_time() - start_s < 3


@pytest.mark.parametrize("name", ["pretrain", "pretrain/all", "songs/train", "pretrain/train/1"])
def test_an_unknown_name_says_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"no data set '.*': give KIND/SPLIT.*separation.*validation"):
        rows(name)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        rows("topics/test", 0)


def test_the_tokenizer_keeps_words_and_special_tokens_whole(tmp_path: Path) -> None:
    tiny_checkpoint.write_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<bos><ins> Find the cow<dat> dog you must : name it !<res> moo , zebra<eos>"
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    assert " ".join(tokens) == "<bos> <ins> find the cow <dat> dog you must : name it ! <res> moo , <unk> <eos>"
    for kind in KINDS:
        for row in rows(f"{kind}/test", 100):
            for line in texts(row):
                ids = tokenizer.encode(line, add_special_tokens=False).ids
                assert tokenizer.decode(ids) == line


def test_the_chat_template_writes_roles(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_checkpoint.write_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "count the words"}, {"role": "user", "content": "cow dog"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><ins> count the words<dat> cow dog<res>"
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "2"}], tokenize=False)
    assert whole == "<bos><ins> count the words<dat> cow dog<res> 2<eos>"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_the_model_has_one_to_three_million_parameters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_checkpoint.write_model(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 3_000_000
    assert config.hidden_size % 2 == 0 and config.vocab_size == len(VOCABULARY)
