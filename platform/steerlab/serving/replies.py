"""Answers, chunks of a stream and errors in the shape of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from steerlab.guards.json_values import JsonObject
from steerlab.serving.asked import RefusedError
from steerlab.serving.batches import Row
from steerlab.steered.language import SteeredModel

_UNFINISHED = "\ufffd"
"""Character that a decoder writes for the bytes of a character whose other bytes are in the next token."""


@dataclass
class Text:
    """The text of a row so far, without the stop text that ended it."""

    row: Row
    index: int
    """Number of the choice in its answer."""
    stops: Sequence[str]
    text: str = ""
    sent: int = 0
    """Characters that were sent already."""
    reason: str | None = None
    """Why the row ended: `stop` or `length`; None while it continues."""
    num_tokens: int = 0
    """Number of tokens until the row ended, of which the last may be one that ends a turn."""

    def take(self, model: SteeredModel, ids: Sequence[int], last: bool) -> str:
        """Decode the tokens so far, and return the text that can be sent now.

        Args:
            model: The model whose tokens they are.
            ids: All tokens of the row so far.
            last: Whether these are all tokens of the row.
        """
        if self.reason is not None:
            return ""
        self.num_tokens = len(ids)
        text = model.encoder.decode(ids)
        # The text ends at the first of the stop texts, which may begin within a token and be followed by more text in one.
        ends = [text.find(stop) for stop in self.stops if stop in text]
        if ends:
            self.text, self.reason, self.row.cancelled = text[: min(ends)], "stop", True
            return self._send(len(self.text))
        self.text = text
        if last:
            self.reason = "stop" if ids and ids[-1] in model.end_ids else "length"
            return self._send(len(text))
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        return self._send(len(text.rstrip(_UNFINISHED)) if text.endswith(_UNFINISHED) else len(text) - held)

    def _send(self, end: int) -> str:
        new, self.sent = self.text[self.sent : end], max(self.sent, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Answer:
    """Fields that all parts of an answer share."""

    is_chat: bool
    model: str
    strength: float
    texts: list[Text]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> JsonObject:
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}"
        # `strength` is added to OpenAI's fields, so that a log of answers records it.
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "strength": self.strength}

    def usage(self) -> JsonObject:
        """Return the numbers of tokens; a prompt that several choices share counts once."""
        read = sum(len(prompt) for prompt in {id(text.row.prompt): text.row.prompt for text in self.texts}.values())
        written = sum(text.num_tokens for text in self.texts)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self) -> JsonObject:
        """Return the answer, after its last token."""
        choices = []
        for text in self.texts:
            said = {"message": {"role": "assistant", "content": text.text}} if self.is_chat else {"text": text.text}
            choices.append({"index": text.index, **said, "logprobs": None, "finish_reason": text.reason})
        head = self._head("chat.completion" if self.is_chat else "text_completion")
        return {**head, "choices": choices, "usage": self.usage()}

    def chunk(self, text: Text, new: str, *, first: bool = False, last: bool = False) -> JsonObject:
        """Return a part of a stream: the text of one choice since its last part."""
        reason = text.reason if last else None
        if self.is_chat:
            delta: JsonObject = {} if last and not new else {"content": new}
            said: JsonObject = {"delta": {"role": "assistant", **delta} if first else delta}
        else:
            said = {"text": new}
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return {**head, "choices": [{"index": text.index, **said, "logprobs": None, "finish_reason": reason}]}

    def last_chunk(self) -> JsonObject:
        """Return the part of a stream that reports the numbers of tokens."""
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return {**head, "choices": [], "usage": self.usage()}


def event(content: JsonObject | str) -> bytes:
    """Return one event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def error(refusal: RefusedError) -> JsonObject:
    """Return the body of a refusal."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error"
    )
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}
