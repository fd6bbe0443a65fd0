"""Texts of a prompt at several strengths, as the commands show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from steerlab.steered.model import SAMPLING_OPTIONS, Asked, Shown

if TYPE_CHECKING:
    from steerlab.steered.language import SteeredModel

_SHOWN_TOKENS = 64
"""Number of generated tokens if a request names no number."""


def side_by_side(steered: SteeredModel, requests: Sequence[Asked], watch: Callable[[list[Shown]], None] | None) -> list[Shown]:
    """Continue the prompts of requests in common batches: `SteeredModel.each_side_by_side`."""
    first = requests[0]
    for request in requests:
        request.check("a language model", "data", "max_new_tokens", *SAMPLING_OPTIONS)
    num = first.samples or 1
    # The order is sample by sample instead of prompt by prompt, so that the first sample of a prompt is the one that it gets
    # with one sample.
    prompts = [steered.encoder.conversation(r.prompt, r.data or "") for _ in range(num) for r in requests]
    shown = [[[""] * num for _ in first.strengths] for _ in requests]

    def put(texts: Mapping[tuple[int, int], str]) -> list[Shown]:
        for (strength, prompt), text in texts.items():
            sample, request = divmod(prompt, len(requests))
            shown[request][strength][sample] = text
        of_requests = [zip(first.strengths, texts_of, strict=True) for texts_of in shown]
        return [Shown([(s, text) for s, samples in of_one for text in samples], {}) for of_one in of_requests]

    outputs = steered.generate(
        prompts,
        max_new_tokens=first.max_new_tokens or _SHOWN_TOKENS,
        temperature=first.temperature or 0.0,
        top_p=1.0 if first.top_p is None else first.top_p,
        top_k=first.top_k or 0,
        min_p=first.min_p or 0.0,
        seed=first.seed or 0,
        strengths=first.strengths,
        watch=None if watch is None else lambda texts: watch(put(texts)),
    )
    return put({(s, p): output.text for s, row in enumerate(outputs) for p, output in enumerate(row)})
