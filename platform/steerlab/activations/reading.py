"""Read texts through a model: tokenise, batch by length, run no further than needed, keep the selected tokens.

Axes besides those of tokens.py: M vectors that one batch gives, a text's pooled vector or one for each selected token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from steerlab import models
from steerlab.activations.origin import column_name
from steerlab.data.values import Row
from steerlab.guards.json_values import JsonObject
from steerlab.inputs.tokens import ROLES, Batch, Encoded
from steerlab.job import ExtractConfig
from steerlab.patches import taps
from steerlab.steered.language import SteeredModel

PADDING_SHARE = 0.125
"""Most of a batch that may be padding."""
_ROLE_NAMES = {number: name for name, number in ROLES.items()}


class Vectors(NamedTuple):
    """What one batch gave: M vectors of every column, float32 on the model's device."""

    row_M: Tensor
    """Which text of those read each vector is of."""
    token_index_M: Tensor | None
    """Position of its token; None for pooled vectors."""
    token_id_M: Tensor | None
    role_M: Tensor | None
    values: dict[str, Tensor]
    """(M, D) by column."""

    @property
    def num_texts(self) -> int:
        """Number of texts that the vectors are of."""
        return len(self.row_M.unique())

    def cpu(self) -> Vectors:
        """Move everything to the CPU."""
        about = (None if tensor is None else tensor.cpu() for tensor in self[:-1])
        return Vectors(*about, {name: z_MD.cpu() for name, z_MD in self.values.items()})  # type: ignore[arg-type]


class TextReader:
    """Reads the taps of a selection for batches of texts; holds hooks on the model until `close`."""

    def __init__(self, model: SteeredModel, config: ExtractConfig, modules: Sequence[str] | None = None) -> None:
        """Read all that the config selects or, of that, only the taps with the names `modules`."""
        self._model, self._config = model, config
        selected = taps.select(model.model, config.select)
        self._taps = [tap for tap in selected if modules is None or tap.name in modules]
        self._reader = taps.Reader(model.model, self._taps, config.select.side)

    def close(self) -> None:
        """Remove the hooks."""
        self._reader.close()

    @property
    def modules(self) -> list[str]:
        """The names of the taps, in the model's order."""
        return [tap.name for tap in self._taps]

    @cached_property
    def widths(self) -> dict[str, int]:
        """D of every column, found by a forward pass over two small rows; the order is the model's."""
        batch = self._model.encoder.small_batch().to(self._model.device)
        with torch.inference_mode():
            found = self._forward(batch)
        poolings = self._config.pooling
        return {column_name(tap.name, p, poolings): found[tap.name].shape[-1] for tap in self._taps for p in poolings}

    def encode(self, rows: Sequence[Row], data_format: str, first: int) -> tuple[list[Encoded], int]:
        """Tokenise rows of a data set, the first of which has the number `first`; return them and how many were cut.

        Raises:
            ValueError: a text is longer than the model's context.
        """
        conversations = [self._model.encoder.from_row(row, data_format) for row in rows]
        limit, num_cut, texts = self._config.max_tokens, 0, []
        for number, text in enumerate(self._model.encoder.encode_all(conversations), first):
            kept = text.cut(limit)
            num_cut += len(kept) < len(text)
            self._check_context(kept, number)
            texts.append(kept)
        return texts, num_cut

    def _check_context(self, text: Encoded, number: int) -> None:
        context = models.max_positions(self._model.model)
        if len(text) > context:
            raise ValueError(
                f"row {number} has {len(text)} tokens, but the context of {type(self._model.model).__name__} holds {context}: "
                f"set extract.max_tokens to at most {context}"
            )

    @torch.inference_mode()
    def read(self, texts: Sequence[Encoded], first: int = 0) -> Iterator[Vectors]:
        """Yield the vectors of texts, batch by batch, the longest texts first; `first` is the first one's number in messages.

        Raises:
            ValueError: no token of a text is selected.
        """
        alike = models.alike_up_to(self._model.model)
        for chunk in batches([len(text) for text in texts], self._config.batch_tokens, PADDING_SHARE, alike=alike):
            batch = self._model.encoder.collate([texts[i] for i in chunk])
            yield self.read_batch(batch, torch.tensor(chunk), first)

    @torch.inference_mode()
    def read_batch(self, batch: Batch, row_B: Tensor, first: int = 0) -> Vectors:
        """Return the vectors of one padded batch, on either side, whose texts have the numbers `row_B`."""
        batch = batch.to(self._model.device)
        select = self._config.select
        mask_BT = taps.selected(batch, select)
        if not bool((some_B := mask_BT.any(1)).all()):
            number = first + int(row_B[some_B.cpu().logical_not().nonzero()[0, 0]])
            raise ValueError(
                f"row {number}: no token is selected by extract.select "
                f"({json.dumps(select.model_dump(mode='json', exclude_defaults=True, exclude={'modules', 'exclude_modules'}))})"
            )
        found = self._forward(batch)
        poolings = self._config.pooling
        if poolings == ("none",):
            values = {name: z_BTD[mask_BT.to(z_BTD.device)].float() for name, z_BTD in found.items()}
            owner_M = row_B.to(mask_BT.device)[:, None].expand_as(mask_BT)[mask_BT]
            return Vectors(owner_M, batch.position_ids[mask_BT], batch.input_ids[mask_BT], batch.roles[mask_BT], values)
        values = {
            column_name(name, pooling, poolings): taps.pool(z_BTD, mask_BT.to(z_BTD.device), pooling)
            for name, z_BTD in found.items()
            for pooling in poolings
        }
        return Vectors(row_B, None, None, None, values)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        found = self._reader(**batch.read_inputs)
        for name, z_BTD in found.items():
            if isinstance(batch, Batch) and (z_BTD.dim() != 3 or z_BTD.shape[:2] != batch.roles.shape):
                raise ValueError(
                    f"extract.select.modules: {name} gives a tensor of shape {tuple(z_BTD.shape)}, not one vector for each of "
                    f"{tuple(batch.roles.shape)} tokens"
                )
        # A module may run before another that stands before it in the model.
        return {tap.name: found[tap.name] for tap in self._taps}


def batches(lengths: Sequence[int], batch_tokens: int, padding: float = 1.0, *, alike: float = math.inf) -> Iterator[list[int]]:
    """Group numbers of texts by length, longest first, so that a padded batch stays within `batch_tokens`.

    Texts longer than `alike` (`models.alike_up_to`) go with others of the same length only.

    A batch ends earlier where another text would make more than the share `padding` of it padding: a few short texts cost less
    in a pass of their own. Lengths shrink by a factor from batch to batch then, so this adds few.
    """
    chunk: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[chunk[0] if chunk else i]
        padded = (len(chunk) + 1) * longest
        apart = longest > alike and longest != lengths[i]
        if chunk and (apart or padded > batch_tokens or tokens + lengths[i] < (1 - padding) * padded):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(i)
        tokens += lengths[i]
    if chunk:
        yield chunk


def in_order(found: Sequence[Vectors]) -> Vectors:
    """Join batches, on the CPU, in the order of the texts and of the tokens in them."""
    row_M = torch.cat([vectors.row_M for vectors in found])
    order_M = row_M.argsort(stable=True)

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None])[order_M]

    index_M = joined([vectors.token_index_M for vectors in found])
    token_M = joined([vectors.token_id_M for vectors in found])
    role_M = joined([vectors.role_M for vectors in found])
    values = {name: torch.cat([vectors.values[name] for vectors in found])[order_M] for name in found[0].values}
    return Vectors(row_M[order_M], index_M, token_M, role_M, values)


def role_names(role_M: Tensor) -> list[str]:
    """Return the names of roles."""
    return [_ROLE_NAMES[number] for number in role_M.tolist()]


def model_key(model: SteeredModel) -> str:
    """Return a SHA-256 that is different for other weights and for other patches on them."""
    digest = hashlib.sha256(models.fingerprint(model.model).encode())
    for patch in model.patches:
        digest.update(json.dumps([patch.kind, patch.spec()], sort_keys=True).encode())
        for name, tensor in sorted(patch.tensors().items()):
            digest.update(name.encode() + tensor.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def about_model(model: SteeredModel, config: ExtractConfig) -> JsonObject:
    """Return what is written beside activations: of which model they are, and what was read of it."""
    return {
        "model_key": model_key(model),
        "fingerprint": models.fingerprint(model.model),
        "architecture": type(model.model).__name__,
        "patches": [patch.kind for patch in model.patches],
        **model.encoder.about,
        "modules": [tap.name for tap in taps.select(model.model, config.select)],
        "pooling": list(config.pooling),
        "selection": config.select.model_dump(mode="json"),
        "max_tokens": config.max_tokens,
    }
