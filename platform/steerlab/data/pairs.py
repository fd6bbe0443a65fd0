"""Read preference pairs (a preferred and a rejected response to one prompt) in the forms that data sets store them in.

The form of a row is recognised by its fields, never by the name of its file:

| form | prompt | chosen, rejected |
|---|---|---|
| texts | `prompt` or `instruction`, a text | texts |
| dialogues (HH-RLHF) | text before the last "\\n\\nAssistant:" | texts "\\n\\nHuman: ... \\n\\nAssistant: ..." |
| texts after a dialogue | `prompt`, a dialogue that ends in "\\n\\nAssistant:" | texts |
| conversations (UltraFeedback binarised) | no field, messages or a text | messages {role, content}, the same up to the last |
| LLaMA-Factory | `conversations`, messages {from, value} | one message |
| scored (UltraFeedback) | `instruction` or `prompt` | the best and the worst of `completions`, each a `response` with a score |
| judged alone (KTO) | `prompt`, or `messages` but the last | from two rows: `completion` with `label` true, and with false |

All become {"prompt": a text, or messages {role, content}; "chosen": a text; "rejected": a text}. A prompt that is a text may
come with `input` (its data) and `system`; if the prompt is messages, a system text becomes the first of them. Earlier turns in
`history` turn a text prompt into messages. A null field counts as absent.
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
"""Further fields of a pair whose prompt is a text."""

KNOWN_BY = ("chosen", "completions", "completion", "label")
"""Fields that identify an object as a row in one of these forms."""

# The names are in order of preference, because a completion of UltraFeedback has more than one of them.
_SCORES = ("overall_score", "fine-grained_score", "score", "rating")
_RESPONSES = ("response", "completion", "text")
# TRL's KTO format has booleans; tables saved as CSV have the texts of booleans, or 0 and 1.
_LABELS = {True: ("true", "1"), False: ("false", "0")}


class Prompt(NamedTuple):
    """The prompt that both responses of a pair answer."""

    content: str | Messages
    beside: Mapping[str, str]
    """Fields `input` and `system` of a prompt that is a text; empty for messages."""

    @property
    def fields(self) -> dict[str, object]:
        """The prompt as fields of a row."""
        return {"prompt": self.content, **self.beside}


class Judged(NamedTuple):
    """One response labelled good or bad (KTO); `matched` pairs it with a response of the other label to the same prompt."""

    prompt: Prompt
    response: str
    good: bool


def pair(row: Row) -> dict[str, object]:
    """Return the fields `prompt`, `chosen` and `rejected` of a row, and `input` and `system` where it has them.

    Raises:
        ValueError: the row has none of the forms, a response is empty, or both responses are equal.
    """
    fields = _without_nulls(row)
    if "chosen" not in fields and "completions" in fields:
        fields |= _best_and_worst(fields["completions"])
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise ValueError(f"has no field '{name}' (it has: {values.names(fields)})")
    prompt = _prompt(fields)
    chosen, rejected = (_response(fields[name], name, prompt) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _parted(prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError("chosen and rejected are of two forms: one is a text, the other holds messages")
    return _checked(_with_beside(prompt, fields), chosen, rejected)


def _without_nulls(row: Row) -> dict[str, object]:
    # Data sets merged from several sources have the columns of every source, null in the rows of all others.
    return {name: value for name, value in row.items() if not values.is_null(value)}


def _checked(prompt: Prompt, chosen: str, rejected: str) -> dict[str, object]:
    if not prompt.content:
        raise ValueError("the pair has no prompt: neither a field prompt nor a dialogue before the responses")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"the response in {name} is empty")
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same text, so neither is preferred")
    if not isinstance(prompt.content, str) and prompt.content[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with the assistant's turn, so that no response can follow")
    return {**prompt.fields, "chosen": chosen, "rejected": rejected}


def unused(row: Row, pair_of_row: Row) -> list[str]:
    """List the non-empty fields of a row that its pair does not use; `pair_of_row` is the result of `pair` for it."""
    filled = {name for name, value in row.items() if not values.is_null(value) and value not in ("", [])}
    used = {name for name in BESIDE if name in pair_of_row}
    if isinstance(pair_of_row["prompt"], list):
        first = pair_of_row["prompt"][0]
        if first["role"] == "system" and first["content"] == row.get("system"):
            used.add("system")
        if _is_plain(_prompt(_without_nulls(row))):
            used.add("history")
    return [name for name in ("input", "system", "history", "system_prompt", "tools") if name in filled - used]


def _prompt(fields: Row) -> str | Messages:
    """Return the content of the prompt field; empty if the responses contain the prompt."""
    name = next((name for name in ("conversations", "prompt", "instruction") if fields.get(name)), None)
    if name is None and (conversation := fields.get("messages")):
        # UltraFeedback binarised repeats the chosen conversation in `messages`; a conversation that ends in an answer is not a
        # prompt.
        messages = turns.messages(conversation, "messages")
        # The prompt is empty here and is later taken from the beginning that both responses share.
        return [] if messages[-1]["role"] == "assistant" else messages
    if name is None:
        return ""
    if not isinstance(fields[name], str):
        return turns.messages(fields[name], name)
    text = values.text(fields[name], name)
    # A prompt that is a dialogue ends with the header of the response that follows.
    return turns.dialogue(text.removesuffix("\n\nAssistant:")) if turns.is_dialogue(text) else text


def _is_plain(prompt: str | Messages) -> bool:
    return isinstance(prompt, str) and bool(prompt)


def _with_beside(prompt: str | Messages, fields: Row) -> Prompt:
    """Return a prompt together with its data, system text and earlier turns."""
    beside = {name: text for name in BESIDE if name in fields and (text := values.text(fields[name], name))}
    earlier = turns.history(fields["history"]) if "history" in fields else []
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
    """Split two conversations into the prompt that both share and the one response that each ends with."""
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same text, so neither is preferred")
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    prompt_turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt)
    shared, texts = chosen[:common], []
    for name, rest in (("chosen", chosen[common:]), ("rejected", rejected[common:])):
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            spoken = f" (the speaker {rest[0]['role']!r} is first)" if rest else ""
            raise ValueError(
                f"after the beginning that both share, {name} holds {len(rest)} turns, not one of the assistant{spoken}"
            )
        texts.append(rest[0]["content"])
    # Some sets repeat the prompt inside both conversations, others do not; it must occur only once.
    includes_prompt = all(message in shared for message in prompt_turns)
    return (shared if includes_prompt else [*prompt_turns, *shared]), texts[0], texts[1]  # type: ignore[list-item]


def _best_and_worst(completions: object) -> dict[str, str]:
    """Choose the responses with the highest and the lowest score; of equal scores, the first response."""
    if not isinstance(completions, list) or not all(isinstance(entry, Mapping) for entry in completions):
        raise ValueError(f"completions is {values.kind(completions)}, not a list of responses with scores")
    scored = next((scores for name in _SCORES if len(scores := _scored(completions, name)) > 1), [])
    if not scored:
        raise ValueError(f"no two of its completions have a score ({' or '.join(_SCORES)})")
    (_, best), (_, worst) = max(scored, key=lambda entry: entry[0]), min(scored, key=lambda entry: entry[0])
    # Best and worst are the same if all scores are equal.
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
        except ValueError:  # UltraFeedback writes "N/A" for a missing score
            continue
        if score is not None:
            scores.append((float(score), entry))
    return scores


def judged(row: Row) -> Judged | None:
    """Return the response and label of a row that judges one response; None for a row in another form.

    Raises:
        ValueError: the row has no response, or its label is neither true nor false.
    """
    fields = _without_nulls(row)
    if "label" not in fields or {"chosen", "rejected", "completions"} & set(fields):
        return None
    if (conversation := fields.get("messages") or fields.get("conversations")) and "completion" not in fields:
        *earlier, last = turns.messages(conversation, "messages")
        if last["role"] != "assistant":
            raise ValueError("the last of its messages is not the assistant's, so there is no response that its label judges")
        prompt, response = _with_beside(earlier, fields), last["content"]
    elif "completion" in fields:
        prompt, response = _with_beside(_prompt(fields), fields), _single_turn(fields["completion"])
    else:
        return None
    return Judged(prompt, response, _label(fields["label"]))


def _single_turn(completion: object) -> str:
    # Any non-empty prompt here prevents a completion that looks like a dialogue from being split; the prompt has its own field.
    response = _response(completion, "completion", "a prompt")
    if isinstance(response, str):
        return response
    if len(response) != 1:
        raise ValueError(f"its completion holds {len(response)} turns, not one")
    return response[0]["content"]


def _label(value: object) -> bool:
    for good, spellings in _LABELS.items():
        if not isinstance(value, list | dict) and str(value).strip().lower() in spellings:
            return good
    raise ValueError(f"label is {values.kind(value)}, neither true nor false")


def matched(judged: Sequence[Judged]) -> list[dict[str, object] | ValueError]:
    """Pair good with bad responses to the same prompt; a response without a partner gives a ValueError in the list instead.

    Every response is in at least one pair: if a prompt has more of one kind, those of the other kind are used again.
    """
    groups: dict[str, list[Judged]] = {}
    for entry in judged:
        # Messages are lists, which cannot be keys of a dict, but their JSON can.
        groups.setdefault(json.dumps(entry.prompt.fields, sort_keys=True), []).append(entry)
    results: list[dict[str, object] | ValueError] = []
    for group in groups.values():
        good, bad = ([entry for entry in group if entry.good is kind] for kind in (True, False))
        if not good or not bad:
            reason = f"a prompt has {len(group)} {'good' if good else 'bad'} and no {'bad' if good else 'good'} completion"
            results += [ValueError(f"{reason}, so it gives no pair")] * len(group)
            continue
        # The shorter list is repeated, so that no labelled response is lost.
        for i in range(max(len(good), len(bad))):
            results.append(_checked_or_error(group[0].prompt, good[i % len(good)].response, bad[i % len(bad)].response))
    return results


def _checked_or_error(prompt: Prompt, chosen: str, rejected: str) -> dict[str, object] | ValueError:
    try:
        return _checked(prompt, chosen, rejected)
    except ValueError as error:
        return error
