"""Texts of strangers as they are shown on a terminal or in a page: what a model, a file or a name holds moves no cursor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import overload

from steerlab.guards.json_values import Json, JsonObject

_LONGEST = 2000
"""Characters of a message; what is longer is cut in the middle."""
_MOVING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, the line break and the tab aside: escapes of a terminal among them
    "\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c"  # marks that turn the direction of a text
    "\u2028\u2029\ufff9-\ufffb]"  # other line breaks, annotations
)


_USER = re.compile(
    r"\b(abfss?://)[^\s'\"<>|/@]*:[^\s'\"<>|]*@|([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s'\"<>|/@]*:[^\s'\"<>|]*|[^\s'\"<>|/@]+)@"
)
"""User and password of a URI, where a password may hold slashes, or a token alone; what stands there of abfs is a container."""
_SECRETS = (
    "[a-z_-]*key", "[a-z_-]*key[_-]?id", "[a-z_-]*token", "[a-z_-]*secret", "aws_[a-z_]+", "[a-z_-]*password", "pwd", "pass",
    "sig", "signature", "credentials?", "auth", "x-amz-[a-z-]+",
)  # fmt: skip
_OPTION = re.compile(rf"([?&](?:{'|'.join(_SECRETS)})=)[^&\s'\"]+", re.IGNORECASE)


def plain(text: str) -> str:
    """Write control characters and direction marks out, as Python does (\\x1b, \\u202e), and leave passwords out."""
    return without_secrets(_MOVING.sub(lambda match: match[0].encode("unicode_escape").decode(), text))


def without_secrets(text: str) -> str:
    """Return a text in which the key and the password of a URI, and secrets among its options, are stars."""
    if "://" not in text:
        return text
    masked = _USER.sub(lambda match: match[0] if _is_container(match) else f"{match[1] or match[2]}***@", text)
    return _OPTION.sub(r"\1***", masked)


def _is_container(match: re.Match[str]) -> bool:
    return match[1] is None and match[2].lower() in ("abfs://", "abfss://")


def without_user(uri: str) -> str:
    """Return a URI without its user, key or password: what it names is the same for whoever may read it."""
    return _OPTION.sub(r"\1***", re.sub(r"(://)[^/@]*@", r"\1", uri))


@overload
def everywhere(change: Callable[[str], str], tree: Mapping[str, Json]) -> JsonObject: ...
@overload
def everywhere(change: Callable[[str], str], tree: object) -> object: ...
def everywhere(change: Callable[[str], str], tree: object) -> object:
    """Return a tree of values of JSON with every text in it, keys too, changed: `everywhere(plain, tree)`."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {everywhere(change, key): everywhere(change, value) for key, value in tree.items()}
    return [everywhere(change, value) for value in tree] if isinstance(tree, list | tuple) else tree


def shown(message: str) -> str:
    """Return a message for people: plain, and cut in its middle where it is longer than a page."""
    message = plain(message)
    if len(message) <= _LONGEST:
        return message
    half = _LONGEST // 2 - 20
    return f"{message[:half]} [...] {message[-half:]}"
