"""Ask a judge many questions: an API, with several calls at a time, or a local language model that generates its answer."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from steerlab import models
from steerlab.evaluation.judging import chat_api, kept_answers, scorers
from steerlab.evaluation.judging.chat_api import Messages, Reply
from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.evaluation.statistics.metrics import TOO_LONG
from steerlab.inputs.encoding import Encoder
from steerlab.job import TaskConfig
from steerlab.steered.language import SteeredModel
from steerlab.storage.store import Store

Said: TypeAlias = str | Literal["too_long"]
"""Text of a judge's answer, or `TOO_LONG` if the question does not fit into its context."""
Ask: TypeAlias = Callable[[Sequence[Messages]], list[Said]]
"""Function that asks questions and returns the answers in their order."""
Say: TypeAlias = Callable[[str], None]


def say_to_stderr(line: str) -> None:
    """Print a line where it does not mix with results. Ray forwards it from a worker to the terminal."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Account:
    """Numbers and cost of a judge's calls."""

    calls: int = 0
    """Questions that the endpoint answered."""
    kept: int = 0
    """Questions whose answer was stored earlier, or that occurred twice."""
    retries: int = 0
    """Tries that failed and were repeated."""
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, reply: Reply) -> None:
        """Count an answer of the endpoint."""
        self.calls += 1
        self.retries += reply.tries - 1
        self.input_tokens += reply.input_tokens
        self.output_tokens += reply.output_tokens

    def numbers(self, endpoint: Endpoint) -> dict[str, float | str]:
        """Return the account as a dict for the record, with the price if the job gives prices."""
        counts = {name: getattr(self, name) for name in ("calls", "kept", "retries", "input_tokens", "output_tokens")}
        if endpoint.price is None:
            return counts
        price = endpoint.price.of(self.input_tokens, self.output_tokens)
        return {**counts, "price": round(price, 6), "currency": endpoint.price.currency}


@dataclass
class Session:
    """Store and accounts of the questions that a block of code asks."""

    store: Store | None
    say: Say
    accounts: list[tuple[Endpoint, Account]] = field(default_factory=list)

    def numbers(self) -> dict[str, float | str]:
        """Return the sum of all accounts of the block; empty if no endpoint was asked."""
        total: dict[str, float | str] = {}
        for endpoint, account in self.accounts:
            for name, value in account.numbers(endpoint).items():
                before = total.get(name, 0)
                total[name] = value if isinstance(value, str) or isinstance(before, str) else before + value
        return total


_SESSION: ContextVar[Session | None] = ContextVar("session of judges", default=None)


@contextmanager
def session(store: Store | None, say: Say = say_to_stderr) -> Iterator[Session]:
    """Store the answers of questions within the block, reuse stored ones, and count the calls.

    The session is a context variable instead of an argument: tasks are functions of model and config, which do not know ROOT,
    and the location of stored answers does not change results.
    """
    opened = Session(store, say)
    token = _SESSION.set(opened)
    try:
        yield opened
    finally:
        _SESSION.reset(token)


@dataclass
class Asker:
    """Ask an endpoint. Outside of a session, answers are not stored."""

    endpoint: Endpoint
    account: Account = field(default_factory=Account)

    def __post_init__(self) -> None:
        self._session = _SESSION.get() or Session(None, say_to_stderr)
        self._session.accounts.append((self.endpoint, self.account))

    def __call__(self, questions: Sequence[Messages]) -> list[Said]:
        """Ask questions; equal ones are asked once, and those with stored answers are not asked.

        Raises:
            EndpointError: the endpoint refused or kept failing. Earlier answers are stored.
        """
        store = self._session.store
        keys = [kept_answers.key(self.endpoint, question) for question in questions]
        different = dict(zip(keys, questions, strict=True))
        replies = {key: reply for key in different if (reply := kept_answers.read(store, key)) is not None}
        missing = {key: question for key, question in different.items() if key not in replies}
        self.account.kept += len(questions) - len(missing)
        if missing:
            self._session.say(announcement(self.endpoint, list(missing.values()), len(questions)))

        def asked(key: str) -> Reply:
            reply = chat_api.call(self.endpoint, missing[key])
            # Stored in the thread that asked, so that each answer is safe before the others arrive.
            kept_answers.write(store, key, self.endpoint, missing[key], reply)
            return reply

        for key, reply in _in_parallel(asked, list(missing), self.endpoint.parallel):
            self.account.add(reply)
            replies[key] = reply
        return [replies[key].text for key in keys]


def _in_parallel(ask: Callable[[str], Reply], keys: Sequence[str], parallel: int) -> Iterator[tuple[str, Reply]]:
    """Yield the replies to all keys; after a permanently failed call, those received so far, then raise its error."""
    stopped = threading.Event()

    def unless_stopped(key: str) -> Reply | None:
        # Checked here in addition to cancelling, since the thread of a failed call takes the next one at once.
        if stopped.is_set():
            return None
        try:
            return ask(key)
        except BaseException:
            stopped.set()
            raise

    pool = ThreadPoolExecutor(parallel)
    futures = {pool.submit(unless_stopped, key): key for key in keys}
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        # Also after Ctrl-C, no further calls are paid for: waiting ones are cancelled, running ones are awaited and stored.
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    finished = [future for future in futures if not future.cancelled()]
    failed = [future for future in finished if future.exception() is not None]
    for future in finished:
        if future not in failed and (reply := future.result()) is not None:
            yield futures[future], reply
    if failed:
        failed[0].result()


def announce(endpoint: Endpoint, config: TaskConfig, input_tokens: Sequence[int]) -> None:
    """Warn before the start of a job how many questions a task will ask, and refuse an endpoint whose key is missing.

    Args:
        endpoint: the judge.
        config: config of the task.
        input_tokens: estimated tokens of each question at one strength.

    Raises:
        ValueError: the environment variable of the key is not set.
    """
    endpoint.key()
    # The checks before a start report by warnings. Strengths are not counted, since `choose` and a job's own strength
    # change them.
    warnings.warn(
        f"{config.label or config.task} asks {endpoint.model} at {endpoint.base_url}; for each strength "
        f"{cost(endpoint, len(input_tokens), sum(input_tokens))}; stored answers cost nothing",
        stacklevel=2,
    )


def announcement(endpoint: Endpoint, questions: Sequence[Messages], of: int | None = None) -> str:
    """Return a line with the number of questions that will be asked and their largest possible cost."""
    read = sum(chat_api.tokens_in(question) for question in questions)
    return f"{endpoint.model} at {endpoint.base_url}: {cost(endpoint, len(questions), read)}" + (
        "" if of is None or of == len(questions) else f"; {of - len(questions):,} of {of:,} answers are stored already"
    )


def cost(endpoint: Endpoint, num_calls: int, input_tokens: int) -> str:
    """Describe the number of calls, their tokens (estimated by characters) and the price at most."""
    write = None if endpoint.max_tokens is None else num_calls * endpoint.max_tokens
    words = f"{num_calls:,} calls, about {input_tokens:,} tokens to read"
    words += "" if write is None else f" and at most {write:,} to write"
    if endpoint.price is None:
        return f"{words}; the job sets no price"
    price = endpoint.price.of(input_tokens, write or 0)
    amount = f"{price:.2f}" if price >= 0.005 or price == 0 else f"{price:.2g}"
    return f"{words}, {'from' if write is None else 'at most about'} {amount} {endpoint.price.currency}"


def local(source: str, max_tokens: int, device: torch.device | str = "cpu") -> Ask:
    """Load a causal language model that answers questions in writing, greedily.

    Args:
        source: the model; its chat template formats the question.
        max_tokens: longest answer in tokens.
        device: where the model runs.
    """
    directory = scorers.check_model(source)
    encoder = Encoder(models.load_tokenizer(directory), prompt_style="plain")
    model = SteeredModel(models.load_model(directory, dtype=scorers.dtype_of(directory)).to(device), encoder)

    def ask(questions: Sequence[Messages]) -> list[Said]:
        prompts = [encoder.dialogue([dict(turn) for turn in question], None) for question in questions]
        (answers,) = model.generate(prompts, max_new_tokens=max_tokens, skip_long=True)
        return [TOO_LONG if answer.too_long else answer.text for answer in answers]

    return ask
