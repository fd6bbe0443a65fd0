"""Read the activations of a model on texts: tokenise, batch by length, run the model up to the last tap, pool.

Axes besides those of tokens.py: M vectors of a batch, one for each text, or one for each selected token with pooling none.
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
from steerlab.patches import taps, token_masks
from steerlab.steered.language import SteeredModel

PADDING_SHARE = 0.125
"""Largest share of a batch's tokens that may be padding."""
_ROLE_NAMES = {number: name for name, number in ROLES.items()}


class Vectors(NamedTuple):
    """The M vectors of every column that one batch gives, on the model's device."""

    row_M: Tensor
    """Number of each vector's text among the texts that were read."""
    token_index_M: Tensor | None
    """Position of each vector's token in its text; None for pooled vectors, as are the two fields after it."""
    token_id_M: Tensor | None
    role_M: Tensor | None
    values: dict[str, Tensor]
    """Activations by column, (M, D) float32."""

    @property
    def num_texts(self) -> int:
        """Number of texts that the vectors come from."""
        return len(self.row_M.unique())

    def cpu(self) -> Vectors:
        """Return the same vectors on the CPU."""
        about = (None if tensor is None else tensor.cpu() for tensor in self[:-1])
        return Vectors(*about, {name: z_MD.cpu() for name, z_MD in self.values.items()})  # type: ignore[arg-type]


class TextReader:
    """Reads the taps of a selection for batches of texts; it holds hooks on the model until `close`."""

    def __init__(
        self, model: SteeredModel, config: ExtractConfig, modules: Sequence[str] | None = None, strength: float = 1.0
    ) -> None:
        """Prepare to read all taps that the config selects, or only those among them with the names `modules`.

        `strength` is that of the model's newest patch.
        """
        self._model, self._config, self._strength = model, config, strength
        # One forward pass can read all taps. Moments are read for some taps at a time if the sums of all of them exceed memory.
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
        """Width D of every column, from a forward pass over two small rows; in the model's order."""
        batch = self._model.encoder.small_batch().to(self._model.device)
        with torch.inference_mode():
            values = self._forward(batch)
        poolings = self._config.pooling
        return {column_name(tap.name, p, poolings): values[tap.name].shape[-1] for tap in self._taps for p in poolings}

    def encode(self, rows: Sequence[Row], data_format: str, first: int) -> tuple[list[Encoded], int]:
        """Tokenise rows of a data set.

        Args:
            rows: the rows.
            data_format: format of the data set.
            first: number of the first row in the data set, for messages.

        Returns:
            The encoded texts, and how many of them were cut to `extract.max_tokens`.

        Raises:
            ValueError: a text is longer than the model's context.
        """
        conversations = [self._model.encoder.from_row(row, data_format) for row in rows]
        limit, num_cut, texts = self._config.max_tokens, 0, []
        for number, text in enumerate(self._model.encoder.encode_all(conversations), first):
            cut = text.cut(limit)
            num_cut += len(cut) < len(text)
            self._check_context(cut, number)
            texts.append(cut)
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
        """Yield the vectors of texts, batch by batch.

        The batches are sorted by length, the longest texts first; `in_order` restores the order of the texts.

        Args:
            texts: encoded texts.
            first: number of the first text in the data set, for messages.

        Raises:
            ValueError: no token of a text is selected.
        """
        # The longest texts come first, so that the first batch fails instead of the last if memory does not suffice.
        alike = models.alike_up_to(self._model.model)
        for chunk in batches([len(text) for text in texts], self._config.batch_tokens, PADDING_SHARE, alike=alike):
            batch = self._model.encoder.collate([texts[i] for i in chunk])
            yield self.read_batch(batch, torch.tensor(chunk), first)

    @torch.inference_mode()
    def read_batch(self, batch: Batch, row_B: Tensor, first: int = 0) -> Vectors:
        """Return the vectors of one batch, padded on the left or on the right; `row_B` are the numbers of its texts."""
        batch = batch.to(self._model.device)
        select = self._config.select
        # Every text must give a vector, because rows are matched with texts by their number, and a mean over no tokens is NaN.
        mask_BT = token_masks.selected(batch, select, self._model.device)
        if not bool((some_B := mask_BT.any(1)).all()):
            number = first + int(row_B[some_B.cpu().logical_not().nonzero()[0, 0]])
            raise ValueError(
                f"row {number}: no token is selected by extract.select "
                f"({json.dumps(select.model_dump(mode='json', exclude_defaults=True, exclude={'modules', 'exclude_modules'}))})"
            )
        values_BTD = self._forward(batch)
        poolings = self._config.pooling
        # Indexing with the mask preserves the order of rows and tokens, which the columns about them also have.
        if poolings == ("none",):
            values = {name: z_BTD[mask_BT].float() for name, z_BTD in values_BTD.items()}
            owner_M = row_B.to(mask_BT.device)[:, None].expand_as(mask_BT)[mask_BT]
            return Vectors(owner_M, batch.position_ids[mask_BT], batch.input_ids[mask_BT], batch.roles[mask_BT], values)
        values = {
            column_name(name, pooling, poolings): token_masks.pool(z_BTD, mask_BT, pooling)
            for name, z_BTD in values_BTD.items()
            for pooling in poolings
        }
        return Vectors(row_B, None, None, None, values)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return each tap's values, (B, T, D). Raises ValueError for a module that does not give a vector for each token."""
        # Stages read at strength 1, also for pipelines, whose batches have no tokens.
        plain = self._strength == 1 and not self._model.settled
        steered = {} if plain else self._model.arguments(self._strength, len(batch.input_ids))
        values = self._reader(**batch.read_inputs, **steered)
        for name, z_BTD in values.items():
            # A module may give attention weights or a scalar, which are not activations of tokens.
            if isinstance(batch, Batch) and (z_BTD.dim() != 3 or z_BTD.shape[:2] != batch.roles.shape):
                raise ValueError(
                    f"extract.select.modules: {name} gives a tensor of shape {tuple(z_BTD.shape)}, not one vector for each of "
                    f"{tuple(batch.roles.shape)} tokens"
                )
        # The order is that of the model's modules, because a module may run before another that is defined before it.
        return {tap.name: values[tap.name] for tap in self._taps}


def batches(lengths: Sequence[int], batch_tokens: int, padding: float = 1.0, *, alike: float = math.inf) -> Iterator[list[int]]:
    """Yield batches as lists of text numbers, the longest texts first.

    Args:
        lengths: number of tokens of each text.
        batch_tokens: maximum number of tokens of a batch, padding included; a single longer text makes a batch by itself.
        padding: largest share of a batch that may be padding.
        alike: texts longer than this (`models.alike_up_to`) are batched only with texts of the same length.
    """
    # Ending a batch because of its padding adds few batches, because the lengths then shrink by a constant factor from one
    # batch to the next.
    chunk: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[chunk[0] if chunk else i]
        # The texts are sorted by length, so the first text of a batch is its longest.
        padded = (len(chunk) + 1) * longest
        apart = longest > alike and longest != lengths[i]
        if chunk and (apart or padded > batch_tokens or tokens + lengths[i] < (1 - padding) * padded):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(i)
        tokens += lengths[i]
    if chunk:
        yield chunk


def in_order(parts: Sequence[Vectors]) -> Vectors:
    """Join batches, all on the CPU, in the order of the texts and of their tokens."""
    row_M = torch.cat([vectors.row_M for vectors in parts])
    order_M = row_M.argsort(stable=True)  # stable: the tokens of a text stay in their order

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([tensor for tensor in tensors if tensor is not None])[order_M]

    index_M = joined([vectors.token_index_M for vectors in parts])
    token_M = joined([vectors.token_id_M for vectors in parts])
    role_M = joined([vectors.role_M for vectors in parts])
    values = {name: torch.cat([vectors.values[name] for vectors in parts])[order_M] for name in parts[0].values}
    return Vectors(row_M[order_M], index_M, token_M, role_M, values)


def role_names(role_M: Tensor) -> list[str]:
    """Return the names of token roles by their numbers."""
    return [_ROLE_NAMES[number] for number in role_M.tolist()]


def model_key(model: SteeredModel) -> str:
    """Return a SHA-256 of the model's weights and of the patches on it."""
    # The order of the patches counts, that of their tensors does not.
    digest = hashlib.sha256(models.fingerprint(model.model).encode())
    for patch in model.patches:
        digest.update(json.dumps([patch.kind, patch.spec()], sort_keys=True).encode())
        for name, tensor in sorted(patch.tensors().items()):
            # The values are converted to float64, which NumPy has (unlike bfloat16) and which represents every smaller type
            # exactly.
            digest.update(name.encode() + tensor.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def about_model(model: SteeredModel, config: ExtractConfig) -> JsonObject:
    """Return the description that is stored with activations: the fields of `Origin` and others for users to read."""
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
