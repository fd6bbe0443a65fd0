"""Answers of endpoints, stored as artifacts under a hash of their questions: ROOT/artifacts/answers/KEY/answer.json.

The key is the SHA-256 of the endpoint's URL and of the whole request (model, messages, temperature, limits), so every change
that could affect an answer leads to a new question. Each answer is a separate artifact, written as soon as it arrives: if a
judge is killed after a thousand calls, their answers are not paid for again.
"""

from __future__ import annotations

import hashlib
import json

from steerlab.evaluation.judging.chat_api import Messages, Reply, body
from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.storage.store import Store

STAGE = "answers"
_FILE = "answer.json"


class _Answer(saved.Shape):
    text: str
    input_tokens: int
    output_tokens: int


def key(endpoint: Endpoint, question: Messages) -> str:
    """Return the key of a question: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(_request(endpoint, question), sort_keys=True, allow_nan=False).encode()).hexdigest()


def read(kept: Store | None, answer_key: str) -> Reply | None:
    """Return a stored answer; None if it is missing."""
    if kept is None or not kept.has(STAGE, answer_key):
        return None
    answer = saved.read(kept.local(STAGE, answer_key) / _FILE, _Answer)
    return Reply(answer.text, answer.input_tokens, answer.output_tokens)


def write(kept: Store | None, answer_key: str, endpoint: Endpoint, question: Messages, reply: Reply) -> None:
    """Store an answer. If another process has stored an answer to the same question meanwhile, that one stays."""
    if kept is None:
        return
    answer = {"text": reply.text, "input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens}
    with kept.temporary(STAGE, answer_key) as directory:
        (directory / _FILE).write_text(json.dumps(answer))
        meta: JsonObject = {"params": _request(endpoint, question), "version": 1, "inputs": [], "seconds": 0.0}
        kept.commit(STAGE, answer_key, directory, meta)


def _request(endpoint: Endpoint, question: Messages) -> JsonObject:
    return {"base_url": endpoint.base_url, "request": body(endpoint, question)}
