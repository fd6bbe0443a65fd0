"""A stand-in for a server of the chat completions API, with the faults that real ones have: limits, errors, cut connections."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str], str]
"""The last turn of a question -> what the judge writes."""


class JudgeServer(ThreadingHTTPServer):
    """Answers questions; the first tries of each question meet `faults`, one after another."""

    daemon_threads = True

    def __init__(self, answer: Answer, faults: Sequence[str] = (), key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults, self.key = answer, list(faults), key
        self.lock = threading.Lock()
        self.tries: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.answered: list[str] = []
        self.at_once = self.most_at_once = 0
        self.slow_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that gave up is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = json.dumps(body["messages"])
        with server.lock:
            number, server.tries[question] = server.tries[question], server.tries[question] + 1
            server.bodies.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.slow_s)
            self._answer(body, question, server.faults[number] if number < len(server.faults) else "")
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, body: dict[str, Any], question: str, fault: str) -> None:
        if self.path != "/v1/chat/completions":
            return self._send(404, b'{"error": "no such path"}')
        if self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._send(401, json.dumps({"error": f"wrong key {self.headers['Authorization']}"}).encode())
        if fault == "limit":
            return self._send(429, b"{}", {"Retry-After": "0.01"})
        if fault in ("500", "503", "400"):
            return self._send(int(fault), b"<html>down</html>")
        if fault == "slow":
            time.sleep(0.8)
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.close()
            return None
        if fault == "no json":
            return self._send(200, b"<html>a proxy</html>")
        if fault == "no choices":
            return self._send(200, b'{"error": {"message": "overloaded"}}')
        text = None if fault == "declined" else self.server.answer(body["messages"][-1]["content"])
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        with self.server.lock:
            self.server.answered.append(question)
        return self._send(200, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(answer: Answer, faults: Sequence[str] = (), key: str | None = None) -> Iterator[JudgeServer]:
    """Run a server in a thread for the block."""
    server = JudgeServer(answer, faults, key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
