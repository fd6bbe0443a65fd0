"""A real S3 server for tests: moto's, in a process of its own, behind a layer that mends two of its faults.

python tests/unit/s3_server.py        prints its port, and serves until its standard input ends
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

KEY, SECRET, BUCKET = "testing", "testing", "bucket"


class Server(NamedTuple):
    """A running server with one empty bucket."""

    port: int

    def root(self, folder: str) -> str:
        """A URI below the bucket, with the options that lead to the server."""
        return f"s3://{KEY}:{SECRET}@{BUCKET}/{folder}?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"


@contextmanager
def running() -> Iterator[Server]:
    """Run a server during the block."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Server(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


class Mended:
    """A WSGI layer around moto 5.2."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner = inner
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        if environ["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environ:
            # moto looks whether the object exists and then writes it, in two steps: two requests could both succeed.
            with self._lock:
                return list(self._inner(environ, start))
        if environ["REQUEST_METHOD"] == "POST" and "uploadId=" in environ.get("QUERY_STRING", ""):
            return self._end_of_upload(environ, start)
        return self._inner(environ, start)

    def _end_of_upload(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """Give the answer the name that S3 gives it; pyarrow refuses moto's."""
        answer: list[Any] = []

        def note(status: str, headers: list[tuple[str, str]], *_: object) -> None:
            answer.extend((status, headers))

        body = b"".join(self._inner(environ, note))
        body = body.replace(b"CompleteMultipartUploadResponse", b"CompleteMultipartUploadResult")
        status, headers = answer
        start(status, [(name, str(len(body)) if name.lower() == "content-length" else value) for name, value in headers])
        return [body]


def main() -> None:
    """Serve until standard input ends."""
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    from moto.backends import get_backend
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *args: object) -> None:
            pass

    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, Mended(app), threaded=True, request_handler=Quiet)
    get_backend("s3")["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
