"""The steered model as lm-evaluation-harness wants it: log-likelihoods of continuations and of texts, and continuations.

Departures from the harness's own Hugging Face model: a text starts with a beginning-of-sequence token where the tokenizer
itself puts one, and context and continuation are tokenised as one text, a token across the seam counting as continuation. The
context has the role of instructions, a continuation that of responses and the phase of generation, as if the model had written
it; whole texts (perplexities) are a prompt.

As there, a context that does not fit is cut on the left; a continuation that does not fit by itself is not scored. Both are
noted for each document.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from steerlab.evaluation.statistics.metrics import TOO_LONG, Reason
from steerlab.inputs.tokens import INSTRUCTION, Conversation, Encoded, Message, Part, collate
from steerlab.steered.language import SteeredModel

_MAX_LENGTH = 2048
"""Context of a model whose config names none (the harness's default)."""
Fates = dict[tuple[str, int], Reason]
"""Which documents, by task and number, did not fit or were cut."""


class Request(Protocol):
    """What the harness asks of a model about one document."""

    args: tuple[Any, ...]
    """Context and continuation, a whole text, or context and settings of generation."""
    task_name: str
    doc_id: int


class Row(NamedTuple):
    """Tokens of which the last ones are scored."""

    tokens: Encoded
    num_scored: int
    reason: Reason | None = None


class Likelihood(NamedTuple):
    """What the harness asks about a continuation."""

    log_prob_nats: float
    is_greedy: bool
    """Greedy decoding would give it."""
    reason: Reason | None = None


class Continued(NamedTuple):
    """A continuation for the harness."""

    text: str
    reason: Reason | None = None


def adapter(model: SteeredModel, strength: float, seed: int, fates: Fates) -> Any:
    """Wrap the model at one strength, noting `fates`; the class is made here because its base is of the optional package."""
    from lm_eval.api.model import LM  # type: ignore[import-not-found]

    class Steered(LM):
        def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
            found = loglikelihoods(model, [request.args for request in requests], strength)
            note(fates, requests, [one.reason for one in found])
            return [(one.log_prob_nats, one.is_greedy) for one in found]

        def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
            return rolling_loglikelihoods(model, [request.args[0] for request in requests], strength)

        def generate_until(self, requests: Sequence[Request]) -> list[str]:
            found = generations(model, [request.args for request in requests], strength, seed)
            note(fates, requests, [one.reason for one in found])
            return [one.text for one in found]

    return Steered()


def note(fates: Fates, requests: Sequence[Request], reasons: Sequence[Reason | None]) -> None:
    """Note what became of the requests' documents; one that was not scored stays so whatever its other requests give."""
    for request, reason in zip(requests, reasons, strict=True):
        document = (request.task_name, request.doc_id)
        if reason is not None and fates.get(document) != TOO_LONG:
            fates[document] = reason


def loglikelihoods(model: SteeredModel, pairs: Sequence[tuple[str, str]], strength: float) -> list[Likelihood]:
    """Score continuations given their contexts; what does not fit into the model's context is cut from the left.

    A continuation that does not fit gets 0 nats, which the harness can count with, and the reason why that says nothing.
    """
    texts = [_text(model, context, continuation) for context, continuation in pairs]
    rows = [_pair_row(model, encoded) for encoded in model.encoder.encode_all(texts, continued=True)]
    fitting = [i for i, row in enumerate(rows) if row.reason != TOO_LONG]
    found = dict(zip(fitting, score(model, [rows[i] for i in fitting], strength), strict=True))
    unread = Likelihood(0.0, False, TOO_LONG)
    return [found[i]._replace(reason=row.reason) if i in found else unread for i, row in enumerate(rows)]


def rolling_loglikelihoods(model: SteeredModel, texts: Sequence[str], strength: float) -> list[float]:
    """Score whole texts, in windows as long as the model's context that overlap by one token."""
    size = _max_length(model)
    windows: list[tuple[int, Row]] = []
    for number, row in enumerate(model.encoder.encode_all([_text(model, text) for text in texts])):
        own = [i for i, part in zip(row.input_ids, row.parts, strict=True) if part >= 0]
        ids = [_prefix_id(model), *own]
        for start in range(0, len(own), size - 1):
            window = ids[start : start + size]
            windows.append((number, Row(_encoded(window, INSTRUCTION), len(window) - 1)))
    totals = [0.0] * len(texts)
    for (number, _), found in zip(windows, score(model, [row for _, row in windows], strength), strict=True):
        totals[number] += found.log_prob_nats
    return totals


def generations(
    model: SteeredModel, requests: Sequence[tuple[str, Mapping[str, object]]], strength: float, seed: int
) -> list[Continued]:
    """Continue contexts, those with the same settings in one call; contexts that do not fit are cut from the left."""
    from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-not-found]

    groups: dict[str, list[int]] = defaultdict(list)
    for number, (_, settings) in enumerate(requests):
        groups[json.dumps(settings, sort_keys=True)].append(number)
    found = [Continued("")] * len(requests)
    for encoded, numbers in groups.items():
        settings = normalize_gen_kwargs(json.loads(encoded))
        ignored = set(settings) - {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
        if ignored:
            warnings.warn(f"lm_eval: settings of generation that are ignored: {', '.join(sorted(ignored))}", stacklevel=2)
        contexts = [_tail(model, requests[number][0], settings["max_gen_toks"]) for number in numbers]
        outputs = model.generate(
            [_text(model, context.text) for context in contexts],
            max_new_tokens=settings["max_gen_toks"],
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            seed=seed,
            strengths=(strength,),
            stop=settings["until"],
            skip_long=True,
        )[0]
        for number, context, output in zip(numbers, contexts, outputs, strict=True):
            found[number] = Continued(output.text, TOO_LONG if output.too_long else context.reason)
    return found


def _tail(model: SteeredModel, context: str, num_new: int) -> Continued:
    """Return the end of a context that leaves room for `num_new` tokens; the whole of it where none would."""
    room = model.max_tokens - num_new
    if len(model.encoder.encode(_text(model, context))) <= room or room < 2:
        return Continued(context)
    starts = [start for start, _ in model.encoder.tokenizer(context, return_offsets_mapping=True)["offset_mapping"]]
    # The tokens of a text's end need not be the end of its tokens: it is cut further until it fits.
    tails = (context[start:] for start in starts[-int(room) :])
    fitting = (tail for tail in tails if len(model.encoder.encode(_text(model, tail))) <= room)
    return Continued(next(fitting, context), "cut")


@torch.inference_mode()
def score(model: SteeredModel, rows: Sequence[Row], strength: float) -> list[Likelihood]:
    """Sum the log-probabilities (nats) of the scored tokens of each row, which must not begin with one."""
    found: dict[int, Likelihood] = {}
    for chunk in _chunks(rows, model.batch_tokens):
        batch = collate([rows[i].tokens for i in chunk], model.encoder.pad_id).to(model.device)
        logits_BTV = model.logits(batch, strength)
        for i, logits_TV, ids_T in zip(chunk, logits_BTV, batch.input_ids, strict=True):
            # Padding is behind a row's own tokens, each of which is predicted by the one before it.
            end = len(rows[i].tokens)
            start = end - rows[i].num_scored
            log_probs_SV = logits_TV[start - 1 : end - 1].float().log_softmax(-1)
            ids_S = ids_T[start:end]
            total = float(log_probs_SV.gather(-1, ids_S[:, None]).sum())
            found[i] = Likelihood(total, bool((log_probs_SV.argmax(-1) == ids_S).all()))
        model.progress(len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def _chunks(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length so that a padded batch stays within `batch_tokens`; longest first."""
    chunk: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True):
        if chunk and (len(chunk) + 1) * len(rows[chunk[0]].tokens) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _text(model: SteeredModel, context: str, continuation: str | None = None) -> Conversation:
    """Make a plain text; spaces at the end of the context go to the continuation, where tokens have theirs."""
    if continuation is None:
        return (Message("text", (Part(context, INSTRUCTION),)),)
    kept = context.rstrip()
    parts = (Part(kept, INSTRUCTION), Part(context[len(kept) :] + continuation, model.encoder.response_role_id))
    return (Message("text", parts),)


def _pair_row(model: SteeredModel, row: Encoded) -> Row:
    inside = [part == 1 for part in row.parts]
    num_scored = sum(inside)
    if num_scored == len(row):
        # No context and no beginning-of-sequence token: the first token needs one to be predicted from.
        prefix = _encoded([_prefix_id(model)], INSTRUCTION)
        row, inside = _joined(prefix, row), [False, *inside]
    size = _max_length(model)
    if num_scored >= size:
        return Row(row, num_scored, TOO_LONG)
    kept = Encoded(row.input_ids[-size:], row.roles[-size:], inside[-size:], row.parts[-size:])
    return Row(kept, num_scored, "cut" if len(row) > size else None)


def _encoded(ids: list[int], role: int) -> Encoded:
    return Encoded(ids, [role] * len(ids), [False] * len(ids), [0] * len(ids))


def _joined(a: Encoded, b: Encoded) -> Encoded:
    return Encoded(a.input_ids + b.input_ids, a.roles + b.roles, a.in_response + b.in_response, a.parts + b.parts)


def _prefix_id(model: SteeredModel) -> int:
    """Return the token that stands before a text: the beginning of a sequence, or its end where there is no such token."""
    encoder = model.encoder
    candidates: Any = (encoder.tokenizer.bos_token_id, encoder.eos_id, encoder.pad_id)
    return next(int(candidate) for candidate in candidates if candidate is not None)


def _max_length(model: SteeredModel) -> int:
    return _MAX_LENGTH if model.max_tokens == math.inf else int(model.max_tokens)
