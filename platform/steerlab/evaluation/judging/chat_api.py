"""One call of a chat completions API, with limited retries.

A try fails temporarily (and is repeated) on HTTP 408, 409, 425, 429 and 5xx, on a timeout, on a refused or broken connection,
and on an answer that is not JSON of the API. Every other status ends the call at once: a wrong key or model stays wrong.
"""

from __future__ import annotations

import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pydantic import ValidationError

from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.guards import saved, texts
from steerlab.guards.json_values import JsonObject

if TYPE_CHECKING:
    import requests

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A question: the turns of a chat as {role, content}."""
_AGAIN = (408, 409, 425, 429)
_LONGEST_ANSWER = 2**24
"""Largest size of an answer in bytes."""
_CONNECT_S = 30.0


class EndpointError(ValueError):
    """An endpoint did not answer; the message names it and contains its response."""


class Reply(NamedTuple):
    """The answer to a question."""

    text: str
    """Empty if the model declined to answer."""
    input_tokens: int
    output_tokens: int
    tries: int = 1
    """Number of requests until the answer came."""


class _Message(saved.Shape):
    content: str | None = None


class _Choice(saved.Shape):
    message: _Message


class _Usage(saved.Shape):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(saved.Shape):
    """The fields of an answer that are used; servers send more."""

    choices: list[_Choice]
    usage: _Usage | None = None


class _Failed(Exception):
    """A try failed; `wait_s` is the wait that the server requests, None if it requests none."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def body(endpoint: Endpoint, question: Messages) -> JsonObject:
    """Return the body of a request."""
    limits = {"max_tokens": endpoint.max_tokens, "temperature": endpoint.temperature}
    known = {name: value for name, value in limits.items() if value is not None}
    return {"model": endpoint.model, "messages": [dict(turn) for turn in question], **known, **endpoint.options}


def call(endpoint: Endpoint, question: Messages, sleep: Callable[[float], None] = time.sleep) -> Reply:
    """Ask one question.

    Raises:
        EndpointError: the endpoint refused, or failed `retries` + 1 times.
    """
    key, reason = endpoint.key(), ""
    for number in range(endpoint.retries + 1):
        try:
            return _try(endpoint, question, key)._replace(tries=number + 1)
        except _Failed as error:
            reason = str(error)
            if number < endpoint.retries:
                sleep(_wait_s(endpoint, number, error.wait_s))
    raise EndpointError(f"{_name(endpoint)} failed {endpoint.retries + 1} times, last with {reason}")


def _wait_s(endpoint: Endpoint, number: int, wanted_s: float | None) -> float:
    # With jitter, calls that met one limit do not all retry at the same time.
    grown_s = endpoint.wait_s * 2.0 ** min(number, 32) * (1 + random.random() / 4)
    return min(grown_s if wanted_s is None else max(wanted_s, 0.0), endpoint.longest_wait_s)


def _try(endpoint: Endpoint, question: Messages, key: str | None) -> Reply:
    import requests

    def authorised(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    try:
        # Without `auth`, requests would use a password of ~/.netrc in its place. A redirect could take the key elsewhere.
        with requests.post(
            f"{endpoint.base_url}/chat/completions",
            json=body(endpoint, question),
            auth=authorised,
            timeout=(min(_CONNECT_S, endpoint.timeout_s), endpoint.timeout_s),
            allow_redirects=False,
            stream=True,
        ) as answer:
            content = _content(answer, time.monotonic() + endpoint.timeout_s)
            status, headers = answer.status_code, answer.headers
    except requests.RequestException as error:
        raise _Failed(type(error).__name__) from None
    if status in _AGAIN or status >= 500:
        raise _Failed(f"HTTP {status}", _retry_after_s(headers.get("Retry-After")))
    if status != 200:
        said = content.decode(errors="replace")
        raise EndpointError(f"{_name(endpoint)} refuses with HTTP {status}: {_shown(said, key)}")
    return _reply(content, question)


def _content(answer: requests.Response, deadline_s: float) -> bytes:
    """Read an answer. The library's timeout applies to each read, so a server that sends single bytes would never reach it."""
    content = b""
    for chunk in answer.iter_content(2**16):
        content += chunk
        if time.monotonic() > deadline_s:
            raise _Failed("an answer that did not end in time")
        if len(content) > _LONGEST_ANSWER:
            raise _Failed(f"an answer of more than {_LONGEST_ANSWER:,} bytes")
    return content


def _reply(content: bytes, question: Messages) -> Reply:
    try:
        completion = _Completion.model_validate(json.loads(content))
    except (ValidationError, ValueError, RecursionError):
        raise _Failed("an answer that is not JSON of the API") from None
    if not completion.choices:
        raise _Failed("an answer without choices")
    text = completion.choices[0].message.content or ""
    if completion.usage is not None:
        return Reply(text, completion.usage.prompt_tokens, completion.usage.completion_tokens)
    # Some local servers do not count tokens; then the estimate of the announcement is used.
    return Reply(text, tokens_in(question), math.ceil(len(text) / CHARS_PER_TOKEN))


CHARS_PER_TOKEN = 4
"""Mean number of characters of a token in English text, for estimates."""


def tokens_in(question: Messages) -> int:
    """Estimate the tokens of a question by its characters."""
    return math.ceil(sum(len(turn["content"]) for turn in question) / CHARS_PER_TOKEN)


def _retry_after_s(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which contains seconds or a date; None if it contains neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return seconds if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return None


def _name(endpoint: Endpoint) -> str:
    return f"{endpoint.model} at {endpoint.base_url}"


def _shown(said: str, key: str | None) -> str:
    # A server's message may contain the refused key.
    return texts.plain(" ".join((said if key is None else said.replace(key, "***")).split()))[:300] or "(no text)"
