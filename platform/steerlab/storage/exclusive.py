"""Write an object only if it does not exist: of several writers one succeeds, wherever they run.

pyarrow cannot (26.0 sends no `If-None-Match`, whatever metadata it is given), so object stores are written by their fsspec
packages here: `s3fs` sends If-None-Match, `gcsfs` ifGenerationMatch=0, `adlfs` If-None-Match. Each finds credentials in the
usual places of its cloud, as pyarrow does, and the options of the URI are passed on.
"""

from __future__ import annotations

import os
import threading
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
"""Scheme -> package that writes there. Other schemes are pyarrow's `mock` and fsspec's `memory`, which no process shares."""
_EXTRAS = {"s3fs": "s3", "gcsfs": "gs", "adlfs": "azure"}
_CONNECT_S, _READ_S = 5, 15
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
    # A link and not O_EXCL: the file appears with its content, and on NFS the server decides.
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        written.write_bytes(content)
        os.link(written, path)
    except FileExistsError:
        # The answer of an NFS server may have been lost, and the request sent again.
        return written.exists() and os.path.samefile(written, path)
    finally:
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
    filesystem = _filesystem(root)
    with _within_process:  # `memory` looks first and then writes
        try:
            filesystem.pipe_file(path, content, mode="create")
        except OSError as error:
            if not _exists_already(error):
                raise
            # The answer to the first request may have been lost, and the client have sent it again.
            return filesystem.cat_file(path) == content
    return True


def _scheme(root: str) -> str:
    return root.partition("://")[0].lower()


def _filesystem(root: str) -> Any:
    """Return fsspec's file system with the options that pyarrow reads from the URI of ROOT."""
    import fsspec

    uri, options = urlsplit(root), {name: values[-1] for name, values in parse_qs(urlsplit(root).query).items()}
    user, password = (None if part is None else unquote(part) for part in (uri.username, uri.password))
    override = options.get("endpoint_override")
    endpoint = None if override is None else f"{options.get('scheme', 'https')}://{override}"
    match _PACKAGES.get(_scheme(root)):
        case "s3fs":
            style = "virtual" if options.get("force_virtual_addressing") == "true" else "path"
            return fsspec.filesystem(
                "s3", key=user, secret=password, endpoint_url=endpoint,
                client_kwargs={"region_name": options["region"]} if "region" in options else {},
                config_kwargs={
                    "connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "retries": {"max_attempts": 3},
                    **({"s3": {"addressing_style": style}} if endpoint is not None else {}),
                },
            )  # fmt: skip
        case "gcsfs":
            return fsspec.filesystem("gs", token="anon" if user == "anonymous" else None, endpoint_url=endpoint)
        case "adlfs":
            host = uri.hostname or ""
            account = host.split(".")[0] if "." in host else user
            account = options.get("account_name", account)
            return fsspec.filesystem("abfs", account_name=account, account_key=password, anon=False, read_timeout=_READ_S)
    return fsspec.filesystem(_scheme(root))


def _exists_already(error: OSError) -> bool:
    if isinstance(error, FileExistsError):
        return True
    # s3fs 2026.9 raises FileExistsError only if the answer names the condition, which servers other than AWS may not do. A
    # conflict is two such requests at the same moment, of which the other one succeeds.
    answer = getattr(error.__cause__, "response", None) or {}
    return answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
