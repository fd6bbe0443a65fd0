"""The HTTP server: `/v1/models`, `/v1/chat/completions` and `/v1/completions` on the loopback interface of this machine.

It has neither a key nor encryption, so it listens on the loopback interface only. It answers only requests whose host is a name
of this machine: otherwise a web page opened here could reach the model through a domain name that leads to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from steerlab.guards.json_values import JsonObject
from steerlab.serving import asked, replies
from steerlab.serving.asked import Chat, Completion, RefusedError
from steerlab.serving.batches import Batches, Row, Ticket
from steerlab.serving.replies import Answer, Text
from steerlab.steered.language import SteeredModel

HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_MOST_BYTES = 2**20
"""Largest size of the body of a request."""
WAIT_S = 600.0
"""Longest time for an answer, including the time that its request waits."""
_CLOSE_S = 10.0
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Served:
    """A model with the settings under which it is served."""

    model: SteeredModel
    name: str
    """Name of the model in the API; NAME@STRENGTH is the same model at another strength."""
    strength: float
    """Strength of a request that does not set one."""
    batches: Batches
    wait_s: float = WAIT_S

    def names(self) -> list[str]:
        """Return the names that `/v1/models` lists: the model, and the model without its patch."""
        return [self.name, *([f"{self.name}@0"] if self.model.patches else [])]


def app(served: Served) -> web.Application:
    """Return the application."""
    made = web.Application(client_max_size=_MOST_BYTES, middlewares=[_in_shape])
    made[_SERVED] = served
    made.router.add_get("/v1/models", _models)
    made.router.add_get("/v1/models/{name:.+}", _model)
    made.router.add_post("/v1/chat/completions", _chat)
    made.router.add_post("/v1/completions", _completions)

    async def start(_: web.Application) -> None:
        served.batches.start()

    async def close(_: web.Application) -> None:
        served.batches.close()
        served.batches.join(_CLOSE_S)

    made.on_startup.append(start)
    made.on_shutdown.append(close)
    return made


_SERVED = web.AppKey("served", Served)


async def serve(served: Served, port: int, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        served: The model.
        port: The port; 0 takes a free one.
        ready: Called with the port when the server listens.

    Raises:
        OSError: The port is taken.
    """
    runner = web.AppRunner(app(served), access_log=None, shutdown_timeout=_CLOSE_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port)
        await site.start()
        ready(runner.addresses[0][1])
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await ended.wait()
    finally:
        await runner.cleanup()


@web.middleware
async def _in_shape(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer all errors in OpenAI's shape, and refuse requests that name another host."""
    try:
        if request.host.rpartition(":")[0] not in _NAMES and request.host not in _NAMES:
            raise RefusedError(f"this server answers to {', '.join(_NAMES)} only, not to {request.host:.80}", status=403)
        return await handler(request)
    except RefusedError as refusal:
        return web.json_response(replies.error(refusal), status=refusal.status)
    except web.HTTPException as error:
        reason = {
            404: f"{request.path:.120} does not exist; the paths are /v1/models, /v1/chat/completions and /v1/completions",
            413: f"the body of a request has {_MOST_BYTES:,} bytes at most",
        }.get(error.status, f"{request.method} {request.path:.120}: {error.reason}")
        return web.json_response(replies.error(RefusedError(reason, status=error.status)), status=error.status)
    except Exception as error:  # a bug of this server is reported in the shape that clients understand
        traceback.print_exc()
        refusal = RefusedError(f"a bug of the server: {type(error).__name__}; its output has the traceback", status=500)
        return web.json_response(replies.error(refusal), status=500)


async def _models(request: web.Request) -> web.Response:
    served = request.app[_SERVED]
    return web.json_response({"object": "list", "data": [_described(name) for name in served.names()]})


async def _model(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    _strength_of(request.app[_SERVED], name, None)
    return web.json_response(_described(name))


def _described(name: str) -> JsonObject:
    return {"id": name, "object": "model", "created": 0, "owned_by": "steerlab"}


def _strength_of(served: Served, name: str, wanted: float | None) -> float:
    """Return the strength of a request. Raises RefusedError for an unknown model or two strengths."""
    own, at, said = name.rpartition("@")
    if name == served.name:
        strength = served.strength if wanted is None else wanted
    elif at and own == served.name and _is_number(said):
        strength = float(said)
        if wanted is not None and wanted != strength:
            raise RefusedError(f"model {name:.200} and strength {wanted:g} contradict each other", param="strength")
    else:
        there = f"the models are {', '.join(served.names())} and {served.name}@STRENGTH"
        raise RefusedError(f"unknown model {name!r:.200}; {there}", status=404, param="model", code="model_not_found")
    if not served.model.patches and strength != 1:
        raise RefusedError("this model has no patch, and so no strength", param="strength")
    return strength


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


async def _chat(request: web.Request) -> web.StreamResponse:
    return await _answer(request, Chat)


async def _completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, Completion)


async def _answer(request: web.Request, kind: type[Chat] | type[Completion]) -> web.StreamResponse:
    served = request.app[_SERVED]
    # Any web page may send texts and forms to this server without the browser's check of origins, but not JSON.
    if request.content_type != "application/json":
        raise RefusedError("the body of a request must be JSON: Content-Type: application/json", status=415)
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON: {error}"[:300]) from None
    wanted = asked.read(body, kind)
    strength = _strength_of(served, wanted.model, wanted.strength)
    texts = list(_rows(served.model, wanted, strength))
    answer = Answer(kind is Chat, wanted.model, strength, texts)
    ticket = Ticket([text.row for text in texts])
    served.batches.put(ticket)
    try:
        if wanted.stream:
            return await _stream(request, served, answer, ticket, wanted.includes_usage)
        async for _ in _progress(served, answer, ticket):
            pass
        return web.json_response(answer.whole())
    finally:
        # This also runs when the client disconnects, since aiohttp then cancels this function.
        ticket.cancel()


def _rows(model: SteeredModel, wanted: Chat | Completion, strength: float) -> Iterator[Text]:
    """Yield a row for each prompt and choice of a request. Raises RefusedError for a prompt that cannot be read."""
    try:
        conversations = wanted.conversations(model.encoder)
        encoded = list(model.encoder.encode_all(conversations, continued=True))
    except ValueError as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(str(error)[:500]) from None
    num_tokens = [_num_tokens(model, len(prompt), wanted.num_tokens) for prompt in encoded]
    seed = random.getrandbits(31) if wanted.seed is None else wanted.seed % 2**31
    for number, prompt in enumerate(encoded):
        for choice in range(wanted.n):
            # Prompts of one request have different random numbers too, as in `SteeredModel.generate`.
            row = Row(prompt, strength, num_tokens[number], wanted.sampling, seed, number + choice * len(encoded))
            yield Text(row, number * wanted.n + choice, wanted.stops)


def _num_tokens(model: SteeredModel, num_read: int, wanted: int | None) -> int:
    """Return how long an answer may become. Raises RefusedError if the context has no room for it."""
    room = model.max_tokens - num_read
    if room < (wanted or 1):
        raise RefusedError(
            f"the prompt has {num_read} tokens and the answer up to {wanted or 1}; the model's context holds "
            f"{model.max_tokens:g}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return wanted or int(min(room, asked.DEFAULT_TOKENS))


async def _progress(served: Served, answer: Answer, ticket: Ticket) -> AsyncIterator[tuple[Text, str]]:
    """Yield (text, new characters) for each token of an answer, until all its texts have ended.

    Raises:
        RefusedError: the model failed, the server ends, or the answer takes too long.
    """
    of_row = {id(text.row): text for text in answer.texts}
    tokens: dict[int, list[int]] = {key: [] for key in of_row}
    end_s = asyncio.get_running_loop().time() + served.wait_s
    while any(text.reason is None for text in answer.texts):
        try:
            async with asyncio.timeout_at(end_s):
                event = await ticket.events.get()
        except TimeoutError:
            said = f"the answer took longer than {served.wait_s:g} s including the time that it waited; request fewer tokens"
            raise RefusedError(said, status=504, code="timeout") from None
        if isinstance(event, RefusedError):
            raise event
        if isinstance(event, Exception):
            # The request was valid, so this is an error of the model or of the machine.
            said = f"the model failed: {type(event).__name__}: {' '.join(str(event).split())[:300]}"
            raise RefusedError(said, status=500, code="model_failed")
        row, token, last = event
        text = of_row[id(row)]
        tokens[id(row)].append(token)
        yield text, text.take(served.model, tokens[id(row)], last)


async def _stream(
    request: web.Request, served: Served, answer: Answer, ticket: Ticket, includes_usage: bool
) -> web.StreamResponse:
    """Send an answer while it is generated, as server-sent events. An error becomes a part of the stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    begun: set[int] = set()
    ended: set[int] = set()
    # The client may disconnect at any time; `_answer` then cancels the rows.
    with suppress(ConnectionError):
        await response.prepare(request)
        try:
            async for text, new in _progress(served, answer, ticket):
                is_last = text.reason is not None and text.index not in ended
                if new or (is_last and text.index not in begun):
                    await response.write(replies.event(answer.chunk(text, new, first=text.index not in begun)))
                    begun.add(text.index)
                if is_last:
                    ended.add(text.index)
                    await response.write(replies.event(answer.chunk(text, "", last=True)))
            if includes_usage:
                await response.write(replies.event(answer.last_chunk()))
        except RefusedError as refusal:
            await response.write(replies.event(replies.error(refusal)))
        await response.write(replies.event("[DONE]"))
        await response.write_eof()
    return response
