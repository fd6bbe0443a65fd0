"""Write an object only if it does not exist: of several writers one succeeds, wherever they run.

pyarrow cannot do so (26.0 sends no `If-None-Match`, with any metadata), so object stores are written by other
clients here: `botocore` (If-None-Match), `gcsfs` (ifGenerationMatch=0) and `adlfs` (If-None-Match). Each finds credentials in
the usual places of its cloud, as pyarrow does, and the options of the URI are passed on. s3fs 2026.9 is not used: with a server
that accepts the connection and never answers, it waits forever, whatever limits it is given.
"""

from __future__ import annotations

import os
import threading
import uuid
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_PACKAGES = {"s3": "botocore", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
"""Scheme -> package that writes there. Other schemes are pyarrow's `mock` and fsspec's `memory`, which no process shares."""
_EXTRAS = {"botocore": "s3", "gcsfs": "gs", "adlfs": "azure"}
# The limits are short, because a process whose renewal of a claim hangs for a minute counts as dead.
_CONNECT_S, _READ_S = 5, 10
_EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
"""Answers of S3 if the object exists, or if another one is being written there at the same moment."""
_within_process = threading.Lock()


def check(root: str) -> None:
    """Raise ValueError if the package that writes to this ROOT is not installed."""
    package = _PACKAGES.get(_scheme(root))
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"ROOT '{root}' needs the package {package}, which keeps two clusters from computing the same stage: "
            f"pip install 'steerlab[{_EXTRAS[package]}]'"
        )


def write_file(path: Path, content: bytes) -> bool:
    """Write a file if it does not exist; return whether this call wrote it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A link is used instead of O_EXCL, so that the file appears with its content and on NFS the server decides. The temporary
    # file is hidden and has a random name, so that two writers do not share a partly written file.
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        written.write_bytes(content)
        os.link(written, path)
    except FileExistsError:
        # The answer of an NFS server may have been lost, and the request sent again.
        return written.exists() and os.path.samefile(written, path)
    finally:
        # Only the temporary name is removed; the link still refers to the content.
        written.unlink(missing_ok=True)
    return True


def write_object(root: str, path: str, content: bytes) -> bool:
    """Write an object if it does not exist; return whether this call wrote it.

    Args:
        root: URI of the store, for its scheme, options and credentials.
        path: path of the object on the store's file system: bucket and key.
        content: the content, which is unique to the caller.

    Raises:
        ValueError: the package for the scheme is not installed.
        OSError: the store does not answer or refuses.
    """
    check(root)
    if _scheme(root) == "s3":
        bucket, _, key = path.partition("/")
        # Each process has its own client, because botocore's connections do not survive a fork.
        return _write_s3(_s3_client(root, os.getpid()), bucket, key, content)
    filesystem = _filesystem(root)
    with _within_process:  # `memory` looks first and then writes
        try:
            filesystem.pipe_file(path, content, mode="create")
        except FileExistsError:
            # The answer to the first request may have been lost, and the client may have sent it again.
            return filesystem.cat_file(path) == content
    return True


def _write_s3(client: Any, bucket: str, key: str, content: bytes) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        return True
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in _EXISTS:
            raise OSError(f"{bucket}/{key} cannot be written: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"{bucket}/{key} cannot be written: {error}") from error
    try:
        # The answer to the first request may have been lost here too.
        return client.get_object(Bucket=bucket, Key=key)["Body"].read() == content
    except ClientError:  # removed since, or not yet written by the other one
        return False


@lru_cache(maxsize=8)
def _s3_client(root: str, process: int) -> Any:
    """Return a client for the server and the credentials of a ROOT; `process` prevents a forked child from using its
    parent's."""
    from botocore.config import Config
    from botocore.session import Session

    options, user, password, endpoint = _options(root)
    style = "virtual" if options.get("force_virtual_addressing") == "true" or endpoint is None else "path"
    return Session().create_client(
        "s3", region_name=options.get("region"), endpoint_url=endpoint, aws_access_key_id=user, aws_secret_access_key=password,
        config=Config(
            connect_timeout=_CONNECT_S, read_timeout=_READ_S, retries={"total_max_attempts": 3, "mode": "standard"},
            s3={"addressing_style": style},
        ),
    )  # fmt: skip


def _options(root: str) -> tuple[dict[str, str], str | None, str | None, str | None]:
    """Return the options of a URI, its user and password, and the URL of its server, as pyarrow reads them."""
    uri = urlsplit(root)
    options = {name: values[-1] for name, values in parse_qs(uri.query).items()}
    user, password = (None if part is None else unquote(part) for part in (uri.username, uri.password))
    override = options.get("endpoint_override")
    return options, user, password, None if override is None else f"{options.get('scheme', 'https')}://{override}"


def _scheme(root: str) -> str:
    return root.partition("://")[0].lower()


def _filesystem(root: str) -> Any:
    """Return fsspec's file system with the options that pyarrow reads from the URI of ROOT."""
    import fsspec

    options, user, password, endpoint = _options(root)
    match _PACKAGES.get(_scheme(root)):
        case "gcsfs":
            return fsspec.filesystem("gs", token="anon" if user == "anonymous" else None, endpoint_url=endpoint)
        case "adlfs":
            host = urlsplit(root).hostname or ""
            account = options.get("account_name", host.split(".")[0] if "." in host else user)
            return fsspec.filesystem("abfs", account_name=account, account_key=password, anon=False, read_timeout=_READ_S)
    return fsspec.filesystem(_scheme(root))
