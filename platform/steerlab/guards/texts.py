"""Make texts from models, files and names safe to show: without terminal escapes, direction marks and passwords."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import overload

from steerlab.guards.json_values import Json, JsonObject

_LONGEST = 2000
"""Maximum number of characters of a message; a longer one is cut in the middle."""
_MOVING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line break; terminal escapes begin with one of them
    "\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c"  # marks that change the direction of a text (Trojan Source)
    "\u2028\u2029\ufff9-\ufffb]"  # other line breaks, and annotations
)


_USER = re.compile(
    r"\b(abfss?://)[^\s'\"<>|/@]*:[^\s'\"<>|]*@|([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s'\"<>|/@]*:[^\s'\"<>|]*|[^\s'\"<>|/@]+)@"
)
"""Matches the scheme and the user part of a URI: a user with a password, which may contain slashes, or a token alone.

For Azure's abfs:// only user:password counts: a single word before the @ is the name of a container.
"""
_SECRETS = (
    "[a-z_-]*key", "[a-z_-]*key[_-]?id", "[a-z_-]*token", "[a-z_-]*secret", "aws_[a-z_]+", "[a-z_-]*password", "pwd", "pass",
    "sig", "signature", "credentials?", "auth", "x-amz-[a-z-]+",
)  # fmt: skip
_OPTION = re.compile(rf"([?&](?:{'|'.join(_SECRETS)})=)[^&\s'\"]+", re.IGNORECASE)


def plain(text: str) -> str:
    """Return a text with control characters and direction marks escaped (\\x1b, \\u202e), and secrets masked."""
    return without_secrets(_MOVING.sub(lambda match: match[0].encode("unicode_escape").decode(), text))


def without_secrets(text: str) -> str:
    """Return a text in which users, passwords and secret options of URIs are replaced by ***."""
    # Most texts have no URI, and the expressions below are slow on long ones.
    if "://" not in text:
        return text
    masked = _USER.sub(lambda match: match[0] if _is_container(match) else f"{match[1] or match[2]}***@", text)
    return _OPTION.sub(r"\1***", masked)


def _is_container(match: re.Match[str]) -> bool:
    return match[1] is None and match[2].lower() in ("abfs://", "abfss://")


def without_user(uri: str) -> str:
    """Return a URI without its user, password and secret options, so that a key does not depend on who reads the URI."""
    return _OPTION.sub(r"\1***", re.sub(r"(://)[^/@]*@", r"\1", uri))


@overload
def everywhere(change: Callable[[str], str], tree: Mapping[str, Json]) -> JsonObject: ...
@overload
def everywhere(change: Callable[[str], str], tree: object) -> object: ...
def everywhere(change: Callable[[str], str], tree: object) -> object:
    """Return a tree of JSON values with `change` applied to every text, including keys: `everywhere(plain, tree)`."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {everywhere(change, key): everywhere(change, value) for key, value in tree.items()}
    return [everywhere(change, value) for value in tree] if isinstance(tree, list | tuple) else tree


def shown(message: str) -> str:
    """Return a message as it can be shown: escaped by `plain`, and cut in the middle if it is longer than a page."""
    message = plain(message)
    if len(message) <= _LONGEST:
        return message
    # The end of a message often has the cause, so the middle is omitted.
    half = _LONGEST // 2 - 20
    return f"{message[:half]} [...] {message[-half:]}"
