"""Bounds on how much a tokenizer can lengthen a text.

A tokenizer from an untrusted source could turn one character into millions. When memory runs out, the library `tokenizers`
ends the process without an error message.
"""

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
"""Settings of one step of a tokenizer, as in tokenizer.json; the keys depend on the step's type."""

_MOST = 100
"""Largest number of characters that one may become. Some growth is usual: a byte becomes six characters, such as <0x0A>."""
_MOST_PUT = 1_000
"""Largest number of tokens that a tokenizer may add around a text; real ones add four or fewer."""
_BYTE_LEVEL = 4
"""Largest number of bytes of a character in UTF-8; a byte-level step turns each of them into a character."""
_NOT_EMPTY = re.compile(r"(?:\\[swdSWDnrt]|\\[pP]\{\w+\}|\{[1-9][0-9]*(?:,[0-9]*)?\}|[^\\*?|^$(){}])+")
"""Regular expressions of simple form, which match no empty text. Others are assumed to match it."""


def of(tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the largest number of characters that one character becomes before the text is split into tokens."""
    return math.prod(_steps_growth(tokenizer, part) for part in ("normalizer", "pre_tokenizer"))


def check(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Check that a tokenizer does not lengthen texts excessively.

    Raises:
        ValueError: A part of the tokenizer may; the message names it.
    """
    # The decoder counts too, because generated ids become text through it.
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = _steps_growth(tokenizer, part)
        if growth > _MOST:
            raise ValueError(
                f"the {part} of the tokenizer in {directory} makes {_shown(growth)} characters of one, which no tokenizer needs"
            )
    # A text is repeated `times` times with `put` tokens around it. Each step repeats what the steps before it added.
    times, put = 1, 0
    for step in _flat(_state(tokenizer, "post_processor")):
        repeats, around = _around(step)
        times, put = times * repeats, put * repeats + around
        if times > _MOST or put > _MOST_PUT:
            fault = f"repeats a text {_shown(times)} times" if times > _MOST else f"puts {put:,} tokens around a text"
            raise ValueError(f"the post-processor of the tokenizer in {directory} {fault}, which no tokenizer needs")


def _state(tokenizer: PreTrainedTokenizerBase, part: str) -> _Step:
    # A tokenizer in pure Python has no backend, and so none of these steps.
    step = getattr(getattr(tokenizer, "backend_tokenizer", None), part, None)
    return {} if step is None else json.loads(step.__getstate__())


def _flat(step: _Step) -> Iterator[_Step]:
    """Yield a step, or each of its inner steps if it is a sequence."""
    inner = [step[name] for name in ("normalizers", "pretokenizers", "decoders", "processors") if name in step]
    if not inner:
        yield step
    for inner_step in inner[0] if inner else ():
        yield from _flat(inner_step)


def _steps_growth(tokenizer: PreTrainedTokenizerBase, part: str) -> float:
    growth = 1.0
    for step in _flat(_state(tokenizer, part)):
        # The growth stays below infinity, so that a message can show the number.
        growth = min(growth * _growth(step, is_decoder=part == "decoder"), 1e300)
    return growth


def _growth(step: _Step, *, is_decoder: bool) -> float:
    """Return the largest number of characters that a step turns one character into."""
    # Unicode normalisation (NFD, NFKD) is counted as 1: its growth is bounded, and repeating it changes nothing.
    kind = step.get("type")
    if kind == "Replace":
        return _replaced(step.get("pattern", {}), len(step.get("content", "")))
    if kind == "Prepend":  # once before each part of a text between added tokens, which may be one character
        return 1.0 + len(step.get("prepend", ""))
    if kind == "Precompiled":
        return _longest_entry(step.get("precompiled_charsmap"))
    if kind == "ByteLevel":
        return 1.0 if is_decoder else _BYTE_LEVEL
    if kind in ("BPEDecoder", "CTC"):  # these replace a text by a space; an empty one matches before each character
        return 1.0 if step.get("suffix", step.get("word_delimiter_token")) else 2.0
    if kind == "BertNormalizer":  # a space on both sides of each Chinese character
        return 3.0
    # These put a space before a word, which may be one character.
    return 2.0 if kind == ("WordPiece" if is_decoder else "Metaspace") else 1.0


def _replaced(pattern: _Step, length: int) -> float:
    """Return the growth if each match of `pattern` is replaced by `length` characters."""
    if text := pattern.get("String"):
        return max(1.0, length / len(text))
    # An expression that matches the empty text matches before each character, which stays.
    return max(1.0, length) if _NOT_EMPTY.fullmatch(pattern.get("Regex") or "") else 1.0 + length


def _longest_entry(charsmap: str | None) -> float:
    """Return the length of the longest replacement in a normalisation table of SentencePiece, in base64."""
    # The table is the size of a trie (4 bytes), the trie, and the replacements, each with a zero byte at its end.
    content = base64.b64decode(charsmap or "")
    texts = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return max(1.0, max(len(text.decode(errors="ignore")) for text in texts))


def _around(step: _Step) -> tuple[int, int]:
    """Return how often a post-processor's step repeats a text, and how many tokens it adds around it."""
    if step.get("type") != "TemplateProcessing":
        # Around a pair of texts BERT's post-processor adds three tokens and RoBERTa's four.
        return 1, 0 if step.get("type") in (None, "ByteLevel") else 4
    # A special token of a template may represent several ids.
    special = {name: len(token.get("ids", ())) for name, token in step.get("special_tokens", {}).items()}
    forms = [step.get("single", ()), step.get("pair", ())]
    put = sum(special.get(piece["SpecialToken"]["id"], 0) for form in forms for piece in form if "SpecialToken" in piece)
    # A template may contain the text A or B several times.
    texts = [[piece["Sequence"]["id"] for piece in form if "Sequence" in piece] for form in forms]
    return max(1, *(form.count(name) for form in texts for name in "AB")), put


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number < 1e15 else f"{number:.0e}"
