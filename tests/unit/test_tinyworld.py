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

from steerlab.data.worlds import tiny, tiny_checkpoint, tiny_pieces, tiny_words
from steerlab.data.worlds.tiny import KINDS, SPLITS, rows
from steerlab.data.worlds.tiny_words import VOCABULARY, WITNESSES, WORD_KINDS

VERSION, DIGEST = "3", "1897cd7b372d9b34"
"""Whoever changes the rows raises the version and writes both here."""

ORDER = re.compile(
    r"(you must : )?(what (sound|colour|capital|is opposite)|make the sound|name the (colour|capital|opposite)).*?[?!]"
)


def texts(value: object) -> list[str]:
    """Return every string a model may read or write in a row; SEP's `info` is not text."""
    if isinstance(value, str):
        return [value]
    return [text for key, part in value.items() if key != "info" for text in texts(part)] if isinstance(value, dict) else []


def content(row: dict) -> str:
    """Return the part of a row that decides its split."""
    if "text" in row:
        return row["text"]
    if "prompt_clean" in row:
        return row["prompt_clean"]
    if row.get("input"):
        return ORDER.sub("", row["input"]).strip()
    request = row.get("prompt") or row["instruction"]
    if "how many" in request:
        return " ".join(re.findall(r"\d+|gets|loses", request))
    deed = re.search(r"(\w+) the (\w+) of (tom|mia|leo|ana)", request)
    if deed:
        return " ".join(deed.groups())
    if request.startswith("write"):
        return row["output"]
    assert ORDER.fullmatch(request), request
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_are_the_beginning_of_more(kind: str) -> None:
    for split in SPLITS:
        assert rows(f"{kind}/{split}", 150)[:40] == rows(f"{kind}/{split}", 40)


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
    drawn = json.dumps([rows(f"{kind}/{split}", 60) for kind in KINDS for split in SPLITS])
    assert (tiny.VERSION, hashlib.sha256(drawn.encode()).hexdigest()[:16]) == (VERSION, DIGEST)


def test_nothing_that_differs_between_pythons_is_drawn_with() -> None:
    for module in (tiny, tiny_pieces):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert {node.attr for node in attributes if getattr(node.value, "id", "") == "rng"} == {"random"}


def test_splits_share_no_content_in_any_kind() -> None:
    found = {split: {content(row) for kind in KINDS for row in rows(f"{kind}/{split}", 500)} - {""} for split in SPLITS}
    assert min(len(contents) for contents in found.values()) > 500
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"pretrain"}))
def test_rows_do_not_repeat(kind: str) -> None:
    for split in SPLITS:
        drawn = [json.dumps(row) for row in rows(f"{kind}/{split}", 2_000)]
        assert len(drawn) == len(set(drawn)) >= 60


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_in_the_vocabulary_and_rows_are_short(kind: str) -> None:
    for split in SPLITS:
        for row in rows(f"{kind}/{split}", 1_000):
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
