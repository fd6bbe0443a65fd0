"""How much a tokenizer makes of a text, at most: where the memory is full, its library ends the process without a word."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Step: TypeAlias = Mapping[str, Any]
"""A step of a tokenizer as its library writes it: the keys are those of its type."""

_MOST = 100
"""Characters that a tokenizer may make of one: some write a byte as six characters, such as <0x0A>, or undo ligatures."""
_MOST_PUT = 1_000
"""Tokens that a tokenizer may put around a text; real ones put four at most."""
_BYTE_LEVEL = 4
"""UTF-8 writes a character as so many bytes, each of which a byte-level step makes a character of."""
_TAKES = re.compile(r"(?:\\[swdSWDnrt]|\\[pP]\{\w+\}|\{[1-9][0-9]*(?:,[0-9]*)?\}|[^\\*?|^$(){}])+")
"""Expressions that match no empty text, by the look of them; of what looks otherwise nobody knows."""


def of(tokenizer: PreTrainedTokenizerBase) -> float:
    """Return how many characters a tokenizer makes of one before it looks for tokens, at most."""
    return math.prod(_steps_growth(tokenizer, part) for part in ("normalizer", "pre_tokenizer"))


def check(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Refuse a tokenizer that multiplies a text until the memory is full.

    Raises:
        ValueError: with the part of the tokenizer that does so.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = _steps_growth(tokenizer, part)
        if growth > _MOST:
            raise ValueError(
                f"the {part} of the tokenizer in {directory} makes {_shown(growth)} characters of one; none needs to"
            )
    times, put = 1, 0
    for step in _flat(_state(tokenizer, "post_processor")):
        repeats, around = _around(step)
        times, put = times * repeats, put * repeats + around
        if times > _MOST or put > _MOST_PUT:
            said = f"repeats a text {_shown(times)} times" if times > _MOST else f"puts {put:,} tokens around a text"
            raise ValueError(f"the post-processor of the tokenizer in {directory} {said}; none needs to")


def _state(tokenizer: PreTrainedTokenizerBase, part: str) -> _Step:
    step = getattr(getattr(tokenizer, "backend_tokenizer", None), part, None)
    return {} if step is None else json.loads(step.__getstate__())


def _flat(step: _Step) -> Iterator[_Step]:
    """Yield a step of a tokenizer, or of a sequence of steps each."""
    inner = [step[name] for name in ("normalizers", "pretokenizers", "decoders", "processors") if name in step]
    if not inner:
        yield step
    for one in inner[0] if inner else ():
        yield from _flat(one)


def _steps_growth(tokenizer: PreTrainedTokenizerBase, part: str) -> float:
    growth = 1.0
    for step in _flat(_state(tokenizer, part)):
        growth = min(growth * _growth(step, is_decoder=part == "decoder"), 1e300)
    return growth


def _growth(step: _Step, *, is_decoder: bool) -> float:
    """Return into how many characters a step turns one character, at most; Unicode's own forms aside, which end."""
    kind = step.get("type")
    if kind == "Replace":
        return _replaced(step.get("pattern", {}), len(step.get("content", "")))
    if kind == "Prepend":  # before every stretch of a text that stands between added tokens
        return 1.0 + len(step.get("prepend", ""))
    if kind == "Precompiled":
        return _longest_entry(step.get("precompiled_charsmap"))
    if kind == "ByteLevel":
        return 1.0 if is_decoder else _BYTE_LEVEL
    if kind in ("BPEDecoder", "CTC"):  # they write a space in place of it
        return 1.0 if step.get("suffix", step.get("word_delimiter_token")) else 2.0
    if kind == "BertNormalizer":  # spaces around what is Chinese
        return 3.0
    return 2.0 if kind == ("WordPiece" if is_decoder else "Metaspace") else 1.0  # a space before what stands between spaces


def _replaced(pattern: _Step, length: int) -> float:
    """Return the growth by a replacement of `length` characters; of an empty match one stands before each character."""
    if text := pattern.get("String"):
        return max(1.0, length / len(text))
    return max(1.0, length) if _TAKES.fullmatch(pattern.get("Regex") or "") else 1.0 + length


def _longest_entry(charsmap: str | None) -> float:
    """Return the length of the longest text in a table of SentencePiece: a trie of some bytes, then texts with a zero each."""
    content = base64.b64decode(charsmap or "")
    texts = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return max(1.0, max(len(text.decode(errors="ignore")) for text in texts))


def _around(step: _Step) -> tuple[int, int]:
    """Return how often a post-processor's step writes a text, and how many tokens it puts around."""
    if step.get("type") != "TemplateProcessing":
        return 1, 0 if step.get("type") in (None, "ByteLevel") else 4
    special = {name: len(token.get("ids", ())) for name, token in step.get("special_tokens", {}).items()}
    forms = [step.get("single", ()), step.get("pair", ())]
    put = sum(special.get(piece["SpecialToken"]["id"], 0) for form in forms for piece in form if "SpecialToken" in piece)
    texts = [[piece["Sequence"]["id"] for piece in form if "Sequence" in piece] for form in forms]
    return max(1, *(form.count(name) for form in texts for name in "AB")), put


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number < 1e15 else f"{number:.0e}"
