"""Pairs of a preferred and another response to one prompt, in the forms in which data sets hold them.

A form is known by the shape of a row, never by a file's name:

| form | prompt | chosen, rejected |
|---|---|---|
| texts | `prompt` or `instruction`, a text | texts |
| dialogues (HH-RLHF) | none: all before the last "\\n\\nAssistant:" | texts "\\n\\nHuman: ... \\n\\nAssistant: ..." |
| texts after a dialogue | `prompt`, a dialogue that ends in "\\n\\nAssistant:" | texts |
| conversations | none, messages, or a text (UltraFeedback binarised) | messages {role, content} with the same beginning |
| LLaMA-Factory | `conversations`, messages {from, value} | one message |
| scored (UltraFeedback) | `instruction` or `prompt` | the best and the worst of `completions`, each a `response` with a score |
| judged alone (KTO) | `prompt`, or `messages` but the last | of two rows: a `completion` with `label` true, one with false |

All become {"prompt": a text, or messages {role, content}; "chosen": a text; "rejected": a text}. Beside a prompt that is a
text there may be `input` (its data) and `system`; beside messages a system text becomes the first of them. Earlier turns in
`history` make messages of a text. What holds nothing (null) counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steerlab.data import turns, values
from steerlab.data.turns import Messages
from steerlab.data.values import Row

FIELDS = ("prompt", "chosen", "rejected")
BESIDE = ("input", "system")
"""What a pair may hold beside them, where its prompt is a text."""

KNOWN_BY = ("chosen", "completions", "completion", "label")
"""Fields by which an object is known to be a row of one of the forms."""

_SCORES = ("overall_score", "fine-grained_score", "score", "rating")
_RESPONSES = ("response", "completion", "text")
_LABELS = {True: ("true", "1"), False: ("false", "0")}


class Prompt(NamedTuple):
    """What both responses of a pair answer."""

    asked: str | Messages
    beside: Mapping[str, str]
    """The data and the system text of a prompt that is a text, by their fields in a row."""

    @property
    def fields(self) -> dict[str, object]:
        """The prompt as fields of a row."""
        return {"prompt": self.asked, **self.beside}


class Judged(NamedTuple):
    """One response that somebody found good or bad; with one of the other kind to the same prompt it makes a pair."""

    prompt: Prompt
    response: str
    good: bool


def pair(row: Row) -> dict[str, object]:
    """Return a row in the one form.

    Raises:
        ValueError: the row is of none of the forms, a response is empty, or both are equal.
    """
    held = _held(row)
    if "chosen" not in held and "completions" in held:
        held |= _best_and_worst(held["completions"])
    for name in ("chosen", "rejected"):
        if name not in held:
            raise ValueError(f"has no field '{name}' (it has: {values.names(held)})")
    prompt = _prompt(held)
    chosen, rejected = (_response(held[name], name, prompt) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _parted(prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError("chosen and rejected are of two forms: one is a text, the other holds messages")
    return _checked(_with_beside(prompt, held), chosen, rejected)


def _held(row: Row) -> dict[str, object]:
    return {name: value for name, value in row.items() if not values.is_null(value)}


def _checked(prompt: Prompt, chosen: str, rejected: str) -> dict[str, object]:
    asked = prompt.asked
    if not asked:
        raise ValueError("the pair has no prompt: neither a field prompt nor a dialogue before the responses")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"the response in {name} is empty")
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same text, so neither is preferred")
    if not isinstance(asked, str) and asked[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant's turn, so that no response can follow")
    return {**prompt.fields, "chosen": chosen, "rejected": rejected}


def unused(row: Row, found: Row) -> list[str]:
    """Name the fields of the known forms that a row holds and its pair does not."""
    held = {name for name, value in row.items() if not values.is_null(value) and value not in ("", [])}
    taken = {name for name in BESIDE if name in found}
    if isinstance(found["prompt"], list):
        begins = found["prompt"][0]
        if begins["role"] == "system" and begins["content"] == row.get("system"):
            taken.add("system")
        if _is_plain(_prompt(_held(row))):
            taken.add("history")
    return [name for name in ("input", "system", "history", "system_prompt", "tools") if name in held - taken]


def _prompt(held: Row) -> str | Messages:
    """Return what stands in a prompt field; nothing where the responses hold it."""
    name = next((name for name in ("conversations", "prompt", "instruction") if held.get(name)), None)
    if name is None and (conversation := held.get("messages")):
        # Where the responses are whole conversations, messages are a copy of one of them.
        given = turns.messages(conversation, "messages")
        return [] if given[-1]["role"] == "assistant" else given
    if name is None:
        return ""
    if not isinstance(held[name], str):
        return turns.messages(held[name], name)
    text = values.text(held[name], name)
    # A prompt that is a dialogue ends with the header of the response that follows.
    return turns.dialogue(text.removesuffix("\n\nAssistant:")) if turns.is_dialogue(text) else text


def _is_plain(prompt: str | Messages) -> bool:
    return isinstance(prompt, str) and bool(prompt)


def _with_beside(prompt: str | Messages, held: Row) -> Prompt:
    """Return a prompt with its data, its system text and its earlier turns."""
    beside = {name: text for name in BESIDE if name in held and (text := values.text(held[name], name))}
    earlier = turns.history(held["history"]) if "history" in held else []
    if earlier and _is_plain(prompt):
        prompt = [*turns.of_history(earlier), {"role": "user", "content": str(prompt)}]
    if isinstance(prompt, str):
        return Prompt(prompt, beside)
    return Prompt(turns.with_system(prompt, beside.get("system", "")) if prompt else prompt, {})


def _response(value: object, name: str, prompt: str | Messages) -> str | Messages:
    if not isinstance(value, str):
        return turns.messages([value] if isinstance(value, Mapping) else value, name)
    text = values.text(value, name)
    return turns.dialogue(text) if not prompt and turns.is_dialogue(text) else text


def _parted(prompt: str | Messages, chosen: Messages, rejected: Messages) -> tuple[str | Messages, str, str]:
    """Cut what two conversations begin with from the response that each ends with."""
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same text, so neither is preferred")
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt)
    begin, texts = chosen[:common], []
    for name, rest in (("chosen", chosen[common:]), ("rejected", rejected[common:])):
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            spoken = f" (the speaker {rest[0]['role']!r} is first)" if rest else ""
            raise ValueError(
                f"behind the beginning that both share, {name} holds {len(rest)} turns, not one of the assistant{spoken}"
            )
        texts.append(rest[0]["content"])
    held = all(message in begin for message in given)
    return (begin if held else [*given, *begin]), texts[0], texts[1]  # type: ignore[list-item]


def _best_and_worst(completions: object) -> dict[str, str]:
    """Choose the responses with the highest and the lowest score, of equal ones the first."""
    if not isinstance(completions, list) or not all(isinstance(entry, Mapping) for entry in completions):
        raise ValueError(f"completions is {values.kind(completions)}, not a list of responses with scores")
    scored = next((scores for name in _SCORES if len(scores := _scored(completions, name)) > 1), [])
    if not scored:
        raise ValueError(f"no two of its completions have a score ({' or '.join(_SCORES)})")
    (_, best), (_, worst) = max(scored, key=lambda entry: entry[0]), min(scored, key=lambda entry: entry[0])
    if best is worst:
        raise ValueError(f"all of its completions have the score {scored[0][0]:g}, so none is preferred")
    names = [next((name for name in _RESPONSES if name in entry), "response") for entry in (best, worst)]
    return {
        field: values.text(entry.get(name), f"a completion's {name}")
        for field, entry, name in zip(("chosen", "rejected"), (best, worst), names, strict=True)
    }


def _scored(completions: Sequence[Row], name: str) -> list[tuple[float, Row]]:
    scores = []
    for entry in completions:
        try:
            score = values.number(entry.get(name))
        except ValueError:  # "N/A"
            continue
        if score is not None:
            scores.append((float(score), entry))
    return scores


def judged(row: Row) -> Judged | None:
    """Return the one response of a row with a label; None for a row of another form.

    Raises:
        ValueError: there is no response, or the label is neither true nor false.
    """
    held = _held(row)
    if "label" not in held or {"chosen", "rejected", "completions"} & set(held):
        return None
    if (conversation := held.get("messages") or held.get("conversations")) and "completion" not in held:
        *asked, last = turns.messages(conversation, "messages")
        if last["role"] != "assistant":
            raise ValueError("the last of its messages is not the assistant's, so there is no response that its label judges")
        prompt, response = _with_beside(asked, held), last["content"]
    elif "completion" in held:
        prompt, response = _with_beside(_prompt(held), held), _only(held["completion"])
    else:
        return None
    return Judged(prompt, response, _label(held["label"]))


def _only(completion: object) -> str:
    response = _response(completion, "completion", "given")
    if isinstance(response, str):
        return response
    if len(response) != 1:
        raise ValueError(f"its completion holds {len(response)} turns, not one")
    return response[0]["content"]


def _label(value: object) -> bool:
    for meant, spellings in _LABELS.items():
        if not isinstance(value, list | dict) and str(value).strip().lower() in spellings:
            return meant
    raise ValueError(f"label is {values.kind(value)}, neither true nor false")


def matched(judged: Sequence[Judged]) -> list[dict[str, object] | ValueError]:
    """Make pairs of responses to the same prompt, a good and a bad one; the reason in place of each that finds none.

    All of a prompt's responses are in some pair: where there are more of one kind, those of the other are taken again.
    """
    groups: dict[str, list[Judged]] = {}
    for entry in judged:
        groups.setdefault(json.dumps(entry.prompt.fields, sort_keys=True), []).append(entry)
    results: list[dict[str, object] | ValueError] = []
    for group in groups.values():
        good, bad = ([entry for entry in group if entry.good is kind] for kind in (True, False))
        if not good or not bad:
            reason = f"a prompt has {len(group)} {'good' if good else 'bad'} and no {'bad' if good else 'good'} completion"
            results += [ValueError(f"{reason}, which makes no pair")] * len(group)
            continue
        for i in range(max(len(good), len(bad))):
            results.append(_caught(group[0].prompt, good[i % len(good)].response, bad[i % len(bad)].response))
    return results


def _caught(prompt: Prompt, chosen: str, rejected: str) -> dict[str, object] | ValueError:
    try:
        return _checked(prompt, chosen, rejected)
    except ValueError as error:
        return error
