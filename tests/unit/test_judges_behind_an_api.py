"""Judges behind an API, against a server with faults: every verdict once, none lost, cost and calls as they are said."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from judge_server import serving
from typer.testing import CliRunner

from steerlab.cli import app
from steerlab.evaluation import TASKS
from steerlab.evaluation.judging import asking, chat_api, judges, kept_answers
from steerlab.evaluation.judging.asking import Asker
from steerlab.evaluation.judging.chat_api import EndpointError
from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.evaluation.judging.judges import Answer, Compared
from steerlab.evaluation.judging.verdicts import better, rating
from steerlab.evaluation.statistics.metrics import TOO_LONG
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.steered.language import SteeredModel
from steerlab.storage.store import Store

PRICE = {"input": 2.0, "output": 10.0}


def endpoint(url: str, **fields: object) -> Endpoint:
    settings = {"parallel": 4, "retries": 3, "timeout_s": 20, "wait_s": 0.001, "longest_wait_s": 0.05, "max_tokens": 20}
    return Endpoint.model_validate({"base_url": url, "model": "judge-1", **settings, **fields})


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def echo(question: str) -> str:
    return f"said {question}"


# Calls


@pytest.mark.parametrize("faults", [["limit"], ["500", "503"], ["cut"], ["no json"], ["no choices"], ["cut", "limit", "500"]])
def test_a_call_is_tried_again_until_it_is_answered(faults: list[str]) -> None:
    with serving(echo, faults) as server:
        reply = chat_api.call(endpoint(server.url), asked("a")[0])
    assert (reply.text, reply.tries) == ("said a", len(faults) + 1)
    assert (reply.input_tokens, reply.output_tokens) == (10, 3)


def test_a_server_that_does_not_answer_in_time_is_asked_again() -> None:
    with serving(echo, ["slow"]) as server:
        reply = chat_api.call(endpoint(server.url, timeout_s=0.4, retries=20), asked("a")[0])
    # At least, and not exactly: on a busy machine the second try may be late as well.
    assert reply.text == "said a" and reply.tries >= 2


def test_tries_are_bounded_and_the_message_says_who_failed_and_how() -> None:
    with serving(echo, ["500"] * 9) as server:
        with pytest.raises(EndpointError, match=r"judge-1 at http://127.* failed 4 times, last with HTTP 500"):
            chat_api.call(endpoint(server.url), asked("a")[0])
        assert sum(server.tries.values()) == 4


def test_a_request_that_is_wrong_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    with serving(echo, key="other") as server:
        with pytest.raises(EndpointError, match="refuses with HTTP 401") as error:
            chat_api.call(endpoint(server.url, key_env="JUDGE_KEY"), asked("a")[0])
        assert sum(server.tries.values()) == 1
    assert "secret-123" not in str(error.value) and "***" in str(error.value), (
        "the server repeated the key, the message does not"
    )


def test_the_key_comes_from_the_environment_and_not_from_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("JUDGE_KEY", "right")
    with serving(echo, key="right") as server:
        assert chat_api.call(endpoint(server.url, key_env="JUDGE_KEY"), asked("a")[0]).text == "said a"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="key_env: the environment variable JUDGE_KEY"):
        endpoint("http://127.0.0.1:1/v1", key_env="JUDGE_KEY").key()


def test_the_server_says_how_long_to_wait() -> None:
    waits: list[float] = []
    with serving(echo, ["limit", "500", "500"]) as server:
        chat_api.call(endpoint(server.url, wait_s=0.02, longest_wait_s=0.03), asked("a")[0], waits.append)
    assert waits[0] == 0.01, "Retry-After"
    assert waits[1:] == [0.03, 0.03], "doubled, and never longer than the longest wait"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("nan", None), ("soon", None), (None, None), ("Fri, 31 Dec 1999 23:59:59 GMT", -1)],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None) -> None:
    found = chat_api._retry_after_s(header)
    assert found == seconds if seconds != -1 else found is not None and found < 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_url": "judge.example/v1"}, "is not a base URL"),
        ({"base_url": "https://me:password@judge.example/v1"}, "must hold no user, password or option"),
        ({"base_url": "https://judge.example/v1?api_key=x"}, "must hold no user, password or option"),
        ({"key_env": "sk-12345"}, "pattern"),
    ],
)
def test_a_job_holds_no_key(fields: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        endpoint(fields.pop("base_url", "http://a/v1"), **fields)


def test_the_request_has_the_settings_of_the_job() -> None:
    with serving(echo) as server:
        chat_api.call(
            endpoint(server.url, max_tokens=None, temperature=None, options={"max_completion_tokens": 5}), asked("a")[0]
        )
        chat_api.call(endpoint(server.url), asked("a")[0])
    own = {"model": "judge-1", "messages": asked("a")[0]}
    assert server.bodies == [{**own, "max_completion_tokens": 5}, {**own, "max_tokens": 20, "temperature": 0.0}]


# Many questions


def test_every_question_is_answered_once_whatever_fails_and_the_next_time_none_is_asked(tmp_path: Path) -> None:
    questions = asked(*(f"q{number}" for number in range(12)), "q3", "q5")
    said: list[str] = []
    with serving(echo, ["limit", "cut"]) as server:
        server.slow_s = 0.02
        with asking.session(Store.open(str(tmp_path)), said.append) as session:
            answers = Asker(endpoint(server.url, price=PRICE))(questions)
        assert answers == [f"said {question[0]['content']}" for question in questions]
        assert sorted(server.answered) == sorted(json.dumps(question) for question in questions[:12]), "each once"
        assert 2 <= server.most_at_once <= 4, "several at a time, and no more than the job allows"
        assert session.numbers() == {
            "calls": 12, "kept": 2, "retries": 24, "input_tokens": 120, "output_tokens": 36,
            "price": pytest.approx((120 * 2 + 36 * 10) / 1e6), "currency": "USD",
        }  # fmt: skip
        (line,) = said
        assert "judge-1 at http" in line and "12 calls" in line and "at most 240 to write" in line and "USD" in line
        tries = sum(server.tries.values())
        with asking.session(Store.open(str(tmp_path)), said.append) as again:
            assert Asker(endpoint(server.url, price=PRICE, parallel=1, retries=0))(questions) == answers
        assert sum(server.tries.values()) == tries and len(said) == 1, "nothing is asked, so nothing is said"
        assert (again.numbers()["calls"], again.numbers()["kept"], again.numbers()["price"]) == (0, 14, 0)


def test_what_was_answered_before_a_failure_is_paid_for_once(tmp_path: Path) -> None:
    healed = threading.Event()

    def answer(question: str) -> str:
        if question == "bad" and not healed.is_set():
            raise BrokenPipeError
        return echo(question)

    questions = asked("a", "b", "bad", "c")
    with serving(answer) as server:
        with asking.session(Store.open(str(tmp_path))), pytest.raises(EndpointError, match="judge-1"):
            Asker(endpoint(server.url, parallel=1))(questions)
        assert len(server.answered) == 2, "after a call that failed for good nothing more is asked"
        healed.set()
        with asking.session(Store.open(str(tmp_path))) as session:
            assert Asker(endpoint(server.url))(questions) == ["said a", "said b", "said bad", "said c"]
        assert (session.numbers()["calls"], session.numbers()["kept"]) == (2, 2)
    assert len(server.answered) == 4


@pytest.mark.parametrize(
    "change",
    [{"model": "judge-2"}, {"temperature": 0.5}, {"options": {"seed": 1}}, {"max_tokens": 21}, {"base_url": "http://b/v1"}],
)
def test_whatever_may_change_an_answer_is_asked_again(change: dict[str, object]) -> None:
    one = endpoint("http://a/v1")
    other = Endpoint.model_validate(one.model_dump() | change)
    assert kept_answers.key(one, asked("a")[0]) != kept_answers.key(other, asked("a")[0])


def test_how_a_question_is_asked_changes_no_answer() -> None:
    same = endpoint("http://a/v1/", parallel=9, retries=9, timeout_s=9, price=PRICE, key_env="OTHER")
    assert kept_answers.key(endpoint("http://a/v1"), asked("a")[0]) == kept_answers.key(same, asked("a")[0])


# Verdicts


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("1", 1.0), (" 2.", 0.0), ("**Response 2** is better.", 0.0), ("Response 1 is better than 2", None),
        ("", None), ("12", None),
        ("[[A>>B]]", 1.0), ("first I thought [[A>B]], but no: [[B>A]]", 0.0), ("[[A=B]]", 0.5), ("[[C]]", 0.5),
        ("[[b<a]]", 1.0),
        ("[[A<B]]", 0.0), ("[[A]]", 1.0), ("[[A>A]]", None), ("1.5", None), (TOO_LONG, TOO_LONG),
    ],
)  # fmt: skip
def test_a_verdict_is_read_and_never_guessed(said: str, verdict: float | str | None) -> None:
    assert better(said) == verdict


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("Rating: [[7]]", 7.0), ("[[3]] no, rather [[ 8.5 ]]", 8.5), ("**Rating:** 2", 2.0), ("rating 10/10", 10.0),
        ("[[7/10]]", 7.0),
        ("Rating: [[11]]", None), ("Rating: [[-1]]", None), ("seven", None), ("", None), (TOO_LONG, TOO_LONG),
    ],
)  # fmt: skip
def test_a_rating_is_read_within_its_scale(said: str, number: float | str | None) -> None:
    assert rating(said, 1, 10) == number


def pair(first: str, second: str) -> tuple[Answer, Answer]:
    return Answer("p", "", first), Answer("p", "", second)


def test_a_judge_that_prefers_a_position_ties_and_is_found_out() -> None:
    def always_first(questions):
        return [1.0] * len(questions)

    def longer(questions):
        shown = [re.findall("<(.*?)>", question) for question in questions]
        return [float(len(first) > len(second)) for first, second in shown]

    pairs = [pair("aa", "b"), pair("a", "bbb"), pair("c", "c")]
    biased = judges.in_both_orders(always_first)(pairs)
    assert biased == [Compared(0.5, (1.0, 1.0)), Compared(0.5, (1.0, 1.0)), Compared(0.5)]
    assert [judges.first_shown(one) for one in biased] == [1.0, 1.0, None]
    assert [judges.agreement(one) for one in biased] == [0.0, 0.0, None]
    fair = judges.in_both_orders(longer, "<{first}><{second}>")(pairs)
    assert [one.verdict for one in fair] == [1.0, 0.0, 0.5]
    assert [judges.first_shown(one) for one in fair] == [0.5, 0.5, None] and [judges.agreement(one) for one in fair] == [
        1,
        1,
        None,
    ]
    assert judges.combined(1.0, 0.5) == 0.75, "a win and a tie"


# The tasks


def test_a_win_rate_by_a_judge_behind_an_api(tiny_model, encoder, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {word}", "output": word} for word in ("moo", "woof", "meow", "quack")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unclear = iter(["I cannot say"])

    def prefers_the_reference(question: str) -> str:
        first, _ = (text.strip() for text in re.findall(r"Response \d: (.*?)\n", question, re.DOTALL))
        if "say quack" in question:
            return next(unclear, "1 or 2")
        return "1" if first in ("moo", "woof", "meow") else "2"

    model = SteeredModel(tiny_model, encoder)
    with serving(prefers_the_reference) as server:
        fields = {"against": "reference", "prompts": {"source": str(tmp_path / "rows.jsonl")}, "max_new_tokens": 4}
        config = TASKS["win_rate"].Config.model_validate({**fields, "api": endpoint(server.url, price=PRICE).model_dump()})
        facts = None
        with pytest.warns(UserWarning, match=r"win_rate asks judge-1 at http.*for each strength 8 calls.*USD"):
            TASKS["win_rate"].check(config, facts)  # type: ignore[arg-type]
        with asking.session(Store.open(str(tmp_path / "root"))) as session:
            result = TASKS["win_rate"].run(model, config)
        found = summarise_all(result)[1.0]
        rate = found["win_rate/language_model"]
        assert (rate.value, rate.n, rate.unparsable) == (0.0, 3, 1), "what the judge left open is counted, not guessed"
        assert (found["win_rate/first_shown"].value, found["win_rate/agreement"].value) == (0.5, 1.0)
        assert session.numbers()["calls"] == 8 == len(set(server.answered))
        # The file of what was written, judged again: the same verdicts, and nothing is asked.
        table = [{k: v for k, v in sample.items() if k != "verdict"} for sample in result.samples]
        (tmp_path / "kept.jsonl").write_text("\n".join(map(json.dumps, table)))
        options = [f"--set=api.{name}={json.dumps(value)}" for name, value in config.api.model_dump(exclude_unset=True).items()]  # type: ignore[union-attr]
        command = [
            "judge",
            str(tmp_path / "kept.jsonl"),
            "--task",
            "win_rate",
            *options,
            "--root",
            str(tmp_path / "root"),
            "--json",
        ]
        again = CliRunner().invoke(app, command)
        assert again.exit_code == 0, again.output
        printed = json.loads(again.stdout)
        assert printed["strengths"]["1.0"]["win_rate/language_model"]["value"] == 0.0
        assert (printed["asked"]["calls"], printed["asked"]["kept"]) == (0, 8) and len(server.answered) == 8


def test_a_judge_that_thinks_first_has_five_labels(tiny_model, encoder, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "say moo", "output": "moo"}))
    with serving(lambda question: "Both are short.\n\n[[A=B]]") as server:
        fields = {"against": "reference", "prompts": {"source": str(tmp_path / "rows.jsonl")}, "max_new_tokens": 4}
        config = TASKS["win_rate"].Config.model_validate(
            {**fields, "style": "reasoned", "api": endpoint(server.url).model_dump()}
        )
        found = summarise_all(TASKS["win_rate"].run(SteeredModel(tiny_model, encoder), config))[1.0]
    assert (found["win_rate/language_model"].value, found["win_rate/ties"].value) == (0.5, 1.0)
    assert all("[[B>>A]]" in body["messages"][0]["content"] for body in server.bodies)
