"""The steered model with the interface of lm-evaluation-harness: log-likelihoods and continuations.

Departures from the harness's own Hugging Face model: a text starts with a beginning-of-sequence token if the tokenizer adds
one, and context and continuation are tokenised as one text; a token that spans both counts as continuation. The context has the
role of instructions. A continuation has the role of responses and the phase of generation, as if the model had written it. A
whole text (perplexity) is a prompt.

A chat (`chat_template`) has the roles of its turns: see `harness_chats`. It is never cut: a chat that does not fit counts as
too long.

As in the harness's model, a context of plain text that does not fit is cut on the left. A continuation that does not fit even
alone is not scored. Both cases are recorded for each document.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from steerlab.evaluation.statistics.metrics import TOO_LONG, Reason
from steerlab.evaluation.tasks.ability.harness_chats import Chats, Turns
from steerlab.evaluation.tasks.ability.harness_rows import (
    Likelihood,
    Row,
    chat_row,
    conversation_of,
    max_length,
    of_ids,
    pair_row,
    prefix_id,
    score,
)
from steerlab.inputs.tokens import INSTRUCTION, Conversation, Message, Part
from steerlab.steered.language import SteeredModel

Fates = dict[tuple[str, int], Reason]
"""(task, document number) -> why the document was not scored or was cut. Documents that fit have no entry."""


class Request(Protocol):
    """A request of the harness about one document."""

    args: tuple[Any, ...]
    """(context, continuation), (text,), or (context, settings of generation)."""
    task_name: str
    doc_id: int


class Continued(NamedTuple):
    """A continuation for the harness."""

    text: str
    reason: Reason | None = None


def adapter(model: SteeredModel, strength: float, seed: int, fates: Fates) -> Any:
    """Return the model at one strength as an `LM` of the harness; it records in `fates` the documents that did not fit."""
    chats = Chats(model.encoder)
    # The class is defined inside the function, since lm_eval is an optional dependency.
    from lm_eval.api.model import LM  # type: ignore[import-not-found]

    class Steered(LM):
        def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
            scores = loglikelihoods(model, [request.args for request in requests], strength, chats)
            note(fates, requests, [score.reason for score in scores])
            return [(score.log_prob_nats, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
            return rolling_loglikelihoods(model, [request.args[0] for request in requests], strength)

        def generate_until(self, requests: Sequence[Request]) -> list[str]:
            outputs = generations(model, [request.args for request in requests], strength, seed, chats)
            note(fates, requests, [output.reason for output in outputs])
            return [output.text for output in outputs]

        # The harness calls these three only with a chat template. The name is for its cache of requests, which is off.
        def apply_chat_template(self, chat_history: Turns, add_generation_prompt: bool = True) -> str:
            return chats.render(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(model.encoder.tokenizer.chat_template or "")

        @property
        def tokenizer_name(self) -> str:
            return model.encoder.identity

    return Steered()


def note(fates: Fates, requests: Sequence[Request], reasons: Sequence[Reason | None]) -> None:
    """Record in `fates` which documents of the requests did not fit or were cut."""
    for request, reason in zip(requests, reasons, strict=True):
        # A document has one request for each choice. If one choice was not scored, the document's metric is meaningless.
        document = (request.task_name, request.doc_id)
        if reason is not None and fates.get(document) != TOO_LONG:
            fates[document] = reason


def loglikelihoods(
    model: SteeredModel, pairs: Sequence[tuple[str, str]], strength: float, chats: Chats | None = None
) -> list[Likelihood]:
    """Score continuations given their contexts, texts or chats; a context of plain text that does not fit is cut on the left.

    A continuation that does not fit even alone gets 0 nats and the reason `TOO_LONG`: the harness needs a number for every
    request, and the reason excludes that number from the metrics.
    """
    answered = [None if chats is None else chats.answered(*pair) for pair in pairs]
    texts = [chat or conversation_of(model, *pair) for chat, pair in zip(answered, pairs, strict=True)]
    encoded = model.encoder.encode_all(texts, continued=True)
    rows = [
        pair_row(model, row) if chat is None else chat_row(model, row, sum(len(message.parts) for message in chat) - 1)
        for chat, row in zip(answered, encoded, strict=True)
    ]
    fitting = [i for i, row in enumerate(rows) if row.reason != TOO_LONG]
    scores = dict(zip(fitting, score(model, [rows[i] for i in fitting], strength), strict=True))
    unread = Likelihood(0.0, False, TOO_LONG)
    return [scores[i]._replace(reason=row.reason) if i in scores else unread for i, row in enumerate(rows)]


def rolling_loglikelihoods(model: SteeredModel, texts: Sequence[str], strength: float) -> list[float]:
    """Return the log-probability in nats of each text, scored in windows of the model's context length."""
    size = max_length(model)
    # One list of windows for all texts, so that windows of short and long texts share batches.
    windows: list[tuple[int, Row]] = []
    # The preamble is omitted, since these texts are scored from their first token on.
    plain: list[Conversation] = [(Message("text", (Part(text, INSTRUCTION),)),) for text in texts]
    for number, row in enumerate(model.encoder.encode_all(plain)):
        # Part -1 is the beginning-of-sequence token that the tokenizer added; `prefix_id` replaces it for every text.
        own = [i for i, part in zip(row.input_ids, row.parts, strict=True) if part >= 0]
        ids = [prefix_id(model), *own]
        # Windows overlap by one token, from which the first scored token of a window is predicted.
        for start in range(0, len(own), size - 1):
            window = ids[start : start + size]
            windows.append((number, Row(of_ids(window, INSTRUCTION), len(window) - 1)))
    totals = [0.0] * len(texts)
    for (number, _), likelihood in zip(windows, score(model, [row for _, row in windows], strength), strict=True):
        totals[number] += likelihood.log_prob_nats
    return totals


def generations(
    model: SteeredModel,
    requests: Sequence[tuple[str, Mapping[str, object]]],
    strength: float,
    seed: int,
    chats: Chats | None = None,
) -> list[Continued]:
    """Continue contexts, texts or chats; a context of plain text that does not fit is cut on the left.

    Requests with the same settings share a call.
    """
    from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-not-found]

    groups: dict[str, list[int]] = defaultdict(list)
    for number, (_, settings) in enumerate(requests):
        # Settings are dictionaries, which cannot be keys, so their JSON is the key.
        groups[json.dumps(settings, sort_keys=True)].append(number)
    continued = [Continued("")] * len(requests)
    for encoded, numbers in groups.items():
        settings = normalize_gen_kwargs(json.loads(encoded))
        ignored = set(settings) - {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "max_gen_toks"}
        if ignored:
            warnings.warn(f"lm_eval: these settings of generation are ignored: {', '.join(sorted(ignored))}", stacklevel=2)
        prompts, reasons = [], []
        for number in numbers:
            prompt = None if chats is None else chats.prompt(requests[number][0])
            tail = Continued("") if prompt else _tail(model, requests[number][0], settings["max_gen_toks"])
            prompts.append(prompt or conversation_of(model, tail.text))
            reasons.append(tail.reason)
        outputs = model.generate(
            prompts,
            max_new_tokens=settings["max_gen_toks"],
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            top_k=settings.get("top_k", 0),
            min_p=settings.get("min_p", 0.0),
            seed=seed,
            strengths=(strength,),
            stop=settings["until"],
            skip_long=True,
        )[0]
        for number, reason, output in zip(numbers, reasons, outputs, strict=True):
            continued[number] = Continued(output.text, TOO_LONG if output.too_long else reason)
    return continued


def _tail(model: SteeredModel, context: str, num_new: int) -> Continued:
    """Return the end of a context that leaves room for `num_new` tokens, or all of it if it fits or no end would fit."""
    room = model.max_tokens - num_new
    if len(model.encoder.encode(conversation_of(model, context))) <= room or room < 2:
        return Continued(context)
    starts = [start for start, _ in model.encoder.tokenizer(context, return_offsets_mapping=True)["offset_mapping"]]
    # Tokenised alone, the end of a text may have more tokens than within the text, so it is shortened until it fits.
    tails = (context[start:] for start in starts[-int(room) :])
    fitting = (tail for tail in tails if len(model.encoder.encode(conversation_of(model, tail))) <= room)
    return Continued(next(fitting, context), "cut")
