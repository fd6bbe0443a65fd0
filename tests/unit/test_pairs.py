"""The forms of preference rows, what is refused, and what becomes of pairs as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from steerlab import models
from steerlab.data import rows
from steerlab.data.pairs import pair
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import IGNORED, Pair, collate
from steerlab.job import DataConfig, DataSet
from steerlab.steered import explain
from steerlab.steered.language import SteeredModel

LLAMAFACTORY = "sdist:llamafactory==0.9.5#data/dpo_en_demo.json"


def says(speaker: str, text: str, names: tuple[str, str] = ("role", "content")) -> dict[str, str]:
    return dict(zip(names, (speaker, text), strict=True))


USER, GOOD, BAD = says("user", "Hi?"), says("assistant", "Hello."), says("assistant", "Go.")
TURNS = [USER, says("assistant", "Yes."), says("user", "And?")]
OLD = ("from", "value")
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "texts": ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}, "Hi?"),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant: Go.",
        },
        TURNS,
    ),
    "texts after a dialogue": ({"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": "Hello.", "rejected": "Go."}, [USER]),
    "conversations": ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
    "a prompt of messages": ({"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}, TURNS),
    "UltraFeedback": ({"prompt": "Hi?", "prompt_id": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    "a prompt beside bare answers": ({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    "LLaMA-Factory": (
        {
            "conversations": [says("system", "Be kind.", OLD), says("human", "Hi?", OLD)],
            "chosen": says("gpt", "Hello.", OLD),
            "rejected": says("gpt", "Go.", OLD),
        },
        [says("system", "Be kind."), USER],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_the_same(name: str) -> None:
    row, prompt = FORMS[name]
    found = pair(row)
    assert found == {"prompt": prompt, "chosen": "Hello.", "rejected": "Go."}
    assert pair(found) == found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi?", "chosen": "Same ", "rejected": "Same"}, "the same text, so neither is preferred"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "the same text, so neither is preferred"),
        ({"prompt": "Hi?", "chosen": " \n", "rejected": "Go."}, "the response in chosen is empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [says("assistant", "")]}, "the response in rejected is empty"),
        ({"chosen": "Hello.", "rejected": "Go."}, "the pair has no prompt"),
        ({"prompt": "", "chosen": [GOOD], "rejected": [BAD]}, "the pair has no prompt"),
        ({"prompt": "Hi?", "chosen": "Hello.", "rejected": [BAD]}, "of two forms"),
        ({"prompt": [USER, GOOD], "chosen": "Hello.", "rejected": "Go."}, "the prompt ends with the assistant's turn"),
        ({"chosen": [USER, GOOD], "rejected": [says("user", "Ho?"), BAD]}, "chosen holds 2 turns, not one of the assistant"),
        ({"chosen": [USER, GOOD], "rejected": [USER, says("user", "?")]}, "rejected holds 1 turns, not one of the assistant"),
        ({"prompt": "Hi?", "chosen": [says("tool", "x")], "rejected": [BAD]}, "the speaker 'tool'"),
        ({"prompt": "Hi?", "chosen": 3, "rejected": "Go."}, "chosen is neither a text nor a list of messages but a int"),
    ],
)
def test_bad_pairs_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair(row)


def test_rows_are_read_filtered_and_named_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    good = [{**FORMS["texts"][0], "source": name} for name in "aab"]
    bad = {"prompt": "Hi?", "chosen": "x", "rejected": "x", "source": "c"}
    path.write_text(json.dumps([*good, bad]))

    def read(**settings: Any) -> list[dict[str, Any]]:
        return rows.read(DataSet.model_validate({"source": str(path), "format": "preference", **settings}))

    assert len(read(equals={"source": "a"})) == 2
    assert len(read(equals={"source": "a"}, distinct=True)) == 1
    with pytest.raises(ValueError, match=r"pairs\.json row 4: chosen and rejected are the same text"):
        read()
    with pytest.warns(UserWarning, match=r"pairs\.json: 1 of 4 rows are no pairs and were skipped"):
        assert len(read(skip_bad=True, limit=4)) == 3
    path.write_text(json.dumps([bad]))
    with pytest.raises(ValueError, match="row 1: chosen and rejected are the same text"):
        rows.check(DataSet.model_validate({"source": str(path), "format": "preference"}))


def test_the_loss_of_pairs_is_that_of_their_responses() -> None:
    data = DataSet.model_validate({"source": "tiny:preferences/train", "format": "preference"})
    assert data.loss_on == "response"
    with pytest.raises(ValidationError, match="format preference needs loss_on response"):
        DataSet.model_validate({"source": "a", "format": "preference", "loss_on": "all"})
    with pytest.raises(ValidationError, match=r"pairs belong in data\.preference"):
        DataConfig(train=data)
    with pytest.raises(ValidationError, match="rows of format instruction are not valid here"):
        DataConfig(preference=DataSet(source="a"))


def test_the_embedded_pairs_are_read() -> None:
    found = rows.read(DataSet(source=LLAMAFACTORY, format="preference", loss_on="response"))
    assert len(found) == 300
    assert {message["role"] for row in found for message in row["prompt"]} == {"system", "user", "assistant"}


def test_only_the_last_turn_is_the_response(encoder: Encoder) -> None:
    row = {"prompt": [says("user", "the sky ?"), says("assistant", "blue"), says("user", "the snow ?")]}
    (found,) = encode_data(encoder, [{**row, "chosen": "white", "rejected": "red"}], "preference", 64).rows
    assert isinstance(found, Pair)
    text = [
        [encoder.decode([t]) for t, inside in zip(s.input_ids, s.in_response, strict=True) if inside] for s in found.sequences
    ]
    assert text == [["white", ""], ["red", ""]], "the words and the end of the turn"


def test_a_text_is_asked_as_an_instruction_is(encoder: Encoder) -> None:
    row = tiny.rows("preferences/train", 1)[0]
    (found,) = encode_data(encoder, [row], "preference", 64).rows
    assert isinstance(found, Pair)
    for sequence, name in zip(found.sequences, ("chosen", "rejected"), strict=True):
        assert sequence == encoder.encode(encoder.conversation(row["prompt"], response=row[name]))


def test_pairs_are_collated_one_behind_the_other(encoder: Encoder) -> None:
    found = encode_data(encoder, tiny.rows("preferences/train", 3), "preference", 64)
    batch = collate(found.rows, encoder.pad_id, loss_on="response", numbers=[7, 8, 9])
    assert batch.numbers.tolist() == [7, 7, 8, 8, 9, 9]
    flat = [sequence for row in found.rows for sequence in row.sequences]
    for line, sequence in zip(batch.labels, flat, strict=True):
        assert int((line != IGNORED).sum()) == sum(sequence.targets("response"))
    assert [sum(row.targets("response")) for row in found.rows] == (batch.labels != IGNORED).sum(1).view(3, 2).sum(1).tolist()
    assert len(found.rows[0]) == max(map(len, flat[:2]))
    alone = collate(flat, encoder.pad_id, loss_on="response")
    assert torch.equal(alone.input_ids, batch.input_ids) and not len(alone.numbers)


def test_cut_responses_are_counted_and_prompts_without_room_dropped(encoder: Encoder) -> None:
    pairs = [
        {"prompt": "the sky ?", "chosen": "blue", "rejected": "red"},
        {"prompt": "the sky ?", "chosen": "blue " * 30, "rejected": "red"},
        {"prompt": "the sky " * 30, "chosen": "blue", "rejected": "red"},
        {"prompt": "the sky ?", "chosen": "blue " * 30 + "red", "rejected": "blue " * 30},
    ]
    found = encode_data(encoder, pairs, "preference", 20)
    assert (found.numbers, found.num_cut, found.num_dropped) == ([0, 1], 1, 2), "the last two say nothing within 20 tokens"
    assert [len(row) for row in found.rows] == [max(map(len, found.rows[0].sequences)), 20]
    with pytest.raises(ValueError, match="no row fits into 4 tokens: 4 prompts are longer"):
        encode_data(encoder, pairs, "preference", 4).check(4)


def test_pairs_cannot_be_read_as_texts(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="pairs of conversations"):
        encoder.from_row(tiny.rows("preferences/train", 1)[0], "preference")


def test_a_response_without_tokens_is_no_pair(tiny_dir: Path, tiny_model: PreTrainedModel) -> None:
    """Blanks, where the template puts nothing after an answer: no mean over tokens exists, and a sum is 0."""
    tokenizer = models.load_tokenizer(tiny_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    encoder = Encoder(tokenizer, "plain")
    rows = [{"prompt": "the sky", "chosen": chosen, "rejected": "ship"} for chosen in ("blue", "\t", "red")]
    encoded = encode_data(encoder, rows, "preference", 20)
    assert (encoded.numbers, encoded.num_dropped) == ([0, 2], 1)
    blank = encoder.encode(encoder.from_pair({"prompt": "the sky", "chosen": "\t", "rejected": "ship"})[0])
    assert not any(blank.in_response)
    full = encoded.rows[0]
    assert isinstance(full, Pair)
    steered = SteeredModel(tiny_model, encoder)
    (scores,) = explain.score(steered, [full, Pair(full.rejected, blank)], [1.0])
    assert [score.rejected.log_prob for score in scores][1] == 0.0
    assert scores[1].chosen.log_prob == pytest.approx(scores[0].rejected.log_prob, rel=1e-5)
