"""The steered model behind the interface of lm-evaluation-harness: log-likelihoods and continuations.

Departures from the harness's own Hugging Face model: a text starts with a beginning-of-sequence token if the tokenizer adds
one, and context and continuation are tokenised as one text; a token that spans both counts as continuation. The context has the
role of instructions. A continuation has the role of responses and the phase of generation, as if the model had written it. A
whole text (perplexity) is a prompt.

A chat (`chat_template`) keeps the roles of its turns: see `harness_chats`. It is never cut: one that does not fit is counted as
too long.

As in the harness's model, a context of plain text that does not fit is cut on the left. A continuation that does not fit by
itself is not scored. Both cases are recorded for each document.

Axis legend: B rows, T tokens, S scored tokens of a row, V vocabulary.
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
from steerlab.evaluation.tasks.ability.harness_chats import Chats, Turns
from steerlab.inputs.tokens import INSTRUCTION, Conversation, Encoded, Message, Part, collate
from steerlab.steered.language import SteeredModel

_MAX_LENGTH = 2048
"""Context length in tokens of a model whose config names none (the harness's default)."""
Fates = dict[tuple[str, int], Reason]
"""(task, document number) -> why the document was not scored or was cut; documents that fit are not listed."""


class Request(Protocol):
    """A request of the harness about one document."""

    args: tuple[Any, ...]
    """(context, continuation), (text,), or (context, settings of generation)."""
    task_name: str
    doc_id: int


class Row(NamedTuple):
    """A tokenised text whose last tokens are scored."""

    tokens: Encoded
    num_scored: int
    """Number of tokens at the end that are scored."""
    reason: Reason | None = None


class Likelihood(NamedTuple):
    """The likelihood of a continuation given its context."""

    log_prob_nats: float
    """Log-probability in nats, summed over the continuation's tokens."""
    is_greedy: bool
    """Whether greedy decoding gives the continuation."""
    reason: Reason | None = None


class Continued(NamedTuple):
    """A continuation for the harness."""

    text: str
    reason: Reason | None = None


def adapter(model: SteeredModel, strength: float, seed: int, fates: Fates) -> Any:
    """Return the model at one strength as an `LM` of the harness; it records into `fates` what did not fit."""
    chats = Chats(model.encoder)
    # Imported, and the class defined, inside the function: lm_eval is an optional dependency.
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

        # The harness calls these three with a chat template only. The name is that of its cache of requests, which is off.
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
        # A document has one request for each choice. If one choice was not scored, the document's metric means nothing.
        document = (request.task_name, request.doc_id)
        if reason is not None and fates.get(document) != TOO_LONG:
            fates[document] = reason


def loglikelihoods(
    model: SteeredModel, pairs: Sequence[tuple[str, str]], strength: float, chats: Chats | None = None
) -> list[Likelihood]:
    """Score continuations given their contexts, texts or chats; a context of plain text that does not fit is cut on the left.

    A continuation that does not fit by itself gets 0 nats and the reason `TOO_LONG`: the harness needs a number for every
    request, and the reason keeps that number out of the metrics.
    """
    answered = [None if chats is None else chats.answered(*pair) for pair in pairs]
    texts = [chat or _text(model, *pair) for chat, pair in zip(answered, pairs, strict=True)]
    encoded = model.encoder.encode_all(texts, continued=True)
    rows = [
        _pair_row(model, row) if chat is None else _chat_row(model, row, sum(len(message.parts) for message in chat) - 1)
        for chat, row in zip(answered, encoded, strict=True)
    ]
    fitting = [i for i, row in enumerate(rows) if row.reason != TOO_LONG]
    scores = dict(zip(fitting, score(model, [rows[i] for i in fitting], strength), strict=True))
    unread = Likelihood(0.0, False, TOO_LONG)
    return [scores[i]._replace(reason=row.reason) if i in scores else unread for i, row in enumerate(rows)]


def rolling_loglikelihoods(model: SteeredModel, texts: Sequence[str], strength: float) -> list[float]:
    """Return the log-probability in nats of each text, scored in windows of the model's context length."""
    size = _max_length(model)
    # One list of windows for all texts, so that windows of short and long texts share batches.
    windows: list[tuple[int, Row]] = []
    # Without the preamble: these texts are scored from their first token on, and not continued.
    plain: list[Conversation] = [(Message("text", (Part(text, INSTRUCTION),)),) for text in texts]
    for number, row in enumerate(model.encoder.encode_all(plain)):
        # Part -1 is the beginning-of-sequence token that the tokenizer added; `_prefix_id` takes its place for every text.
        own = [i for i, part in zip(row.input_ids, row.parts, strict=True) if part >= 0]
        ids = [_prefix_id(model), *own]
        # Windows overlap by one token, the one that the first scored token of a window is predicted from.
        for start in range(0, len(own), size - 1):
            window = ids[start : start + size]
            windows.append((number, Row(_encoded(window, INSTRUCTION), len(window) - 1)))
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
        # Settings are dictionaries, which cannot be keys; as JSON they can.
        groups[json.dumps(settings, sort_keys=True)].append(number)
    continued = [Continued("")] * len(requests)
    for encoded, numbers in groups.items():
        settings = normalize_gen_kwargs(json.loads(encoded))
        ignored = set(settings) - {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "max_gen_toks"}
        if ignored:
            warnings.warn(f"lm_eval: settings of generation that are ignored: {', '.join(sorted(ignored))}", stacklevel=2)
        prompts, reasons = [], []
        for number in numbers:
            prompt = None if chats is None else chats.prompt(requests[number][0])
            tail = Continued("") if prompt else _tail(model, requests[number][0], settings["max_gen_toks"])
            prompts.append(prompt or _text(model, tail.text))
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
    if len(model.encoder.encode(_text(model, context))) <= room or room < 2:
        return Continued(context)
    starts = [start for start, _ in model.encoder.tokenizer(context, return_offsets_mapping=True)["offset_mapping"]]
    # Tokenised alone, the end of a text may have more tokens than it had within the text, so it is shortened until it fits.
    tails = (context[start:] for start in starts[-int(room) :])
    fitting = (tail for tail in tails if len(model.encoder.encode(_text(model, tail))) <= room)
    return Continued(next(fitting, context), "cut")


@torch.inference_mode()
def score(model: SteeredModel, rows: Sequence[Row], strength: float) -> list[Likelihood]:
    """Sum the log-probabilities (nats) of the scored tokens of each row. A row's first token cannot be scored."""
    likelihoods: dict[int, Likelihood] = {}
    for chunk in _chunks(rows, model.batch_tokens):
        batch = collate([rows[i].tokens for i in chunk], model.encoder.pad_id).to(model.device)
        logits_BTV = model.logits(batch, strength)
        for i, logits_TV, ids_T in zip(chunk, logits_BTV, batch.input_ids, strict=True):
            # Padding follows a row's own tokens. The token at position t is predicted by the logits at t - 1.
            end = len(rows[i].tokens)
            start = end - rows[i].num_scored
            # Only the scored positions become float32: over the whole batch that would double the memory of the logits.
            log_probs_SV = logits_TV[start - 1 : end - 1].float().log_softmax(-1)
            ids_S = ids_T[start:end]
            # Padding is on the right here, so a row's own positions begin at 0 whatever the length of its batch.
            total = float(log_probs_SV.gather(-1, ids_S[:, None]).sum())
            likelihoods[i] = Likelihood(total, bool((log_probs_SV.argmax(-1) == ids_S).all()))
        model.progress(len(likelihoods), len(rows))
    return [likelihoods[i] for i in range(len(rows))]


def _chunks(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of at most `batch_tokens` padded tokens, longest rows first."""
    # Sorted, so that the first row of a batch is its longest one, to which the others are padded.
    chunk: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True):
        if chunk and (len(chunk) + 1) * len(rows[chunk[0]].tokens) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _text(model: SteeredModel, context: str, continuation: str | None = None) -> Conversation:
    """Return a plain text as a conversation: the context, and the continuation as a second part if there is one."""
    context = model.encoder.continued(context)
    if continuation is None:
        return (Message("text", (Part(context, INSTRUCTION),)),)
    # Tokens carry the space before them, so spaces at the end of the context belong to the continuation's first token.
    stripped = context.rstrip()
    parts = (Part(stripped, INSTRUCTION), Part(context[len(stripped) :] + continuation, model.encoder.response_role_id))
    return (Message("text", parts),)


def _pair_row(model: SteeredModel, row: Encoded) -> Row:
    inside = [part == 1 for part in row.parts]
    num_scored = sum(inside)
    if num_scored == len(row):
        # No context and no beginning-of-sequence token: the first token needs one to be predicted from.
        prefix = _encoded([_prefix_id(model)], INSTRUCTION)
        row, inside = _joined(prefix, row), [False, *inside]
    size = _max_length(model)
    # One token of context has to remain, since the first scored token is predicted from it.
    if num_scored >= size:
        return Row(row, num_scored, TOO_LONG)
    tail = Encoded(row.input_ids[-size:], row.roles[-size:], inside[-size:], row.parts[-size:])
    return Row(tail, num_scored, "cut" if len(row) > size else None)


def _chat_row(model: SteeredModel, row: Encoded, last_part: int) -> Row:
    """Return the row of a chat up to the end of its last part, which is scored, without what the template prints after it."""
    scored = [i for i, part in enumerate(row.parts) if part == last_part]
    if not scored:
        return Row(row, 0, TOO_LONG)
    end = scored[-1] + 1
    own = Encoded(row.input_ids[:end], row.roles[:end], row.in_response[:end], row.parts[:end])
    # From the first scored token on: a template may print tokens of its own between two of them.
    return Row(own, end - scored[0], TOO_LONG if end > _max_length(model) else None)


def _encoded(ids: list[int], role: int) -> Encoded:
    return Encoded(ids, [role] * len(ids), [False] * len(ids), [0] * len(ids))


def _joined(a: Encoded, b: Encoded) -> Encoded:
    return Encoded(a.input_ids + b.input_ids, a.roles + b.roles, a.in_response + b.in_response, a.parts + b.parts)


def _prefix_id(model: SteeredModel) -> int:
    """Return the token to put before a text: beginning of sequence, else end of sequence, else padding."""
    encoder = model.encoder
    candidates: Any = (encoder.tokenizer.bos_token_id, encoder.eos_id, encoder.pad_id)
    return next(int(candidate) for candidate in candidates if candidate is not None)


def _max_length(model: SteeredModel) -> int:
    return _MAX_LENGTH if model.max_tokens == math.inf else int(model.max_tokens)
