"""Reward models: a language model's backbone with a head of one output, which scores a text by the state of its last token.

`PrefixRewards` scores many next tokens of the same text side by side: all candidates are placed at the next position, each
attends to the text and to itself, and the keys and values of the text are computed once.

Axes besides those of tokens.py: C columns of a batch after which candidates are placed, K candidates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from steerlab.guards.faults import explained
from steerlab.models import named
from steerlab.models.language.architecture import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SIDE_BY_SIDE = 512
"""Maximum number of candidates of a row in one pass, because the attention mask of a pass has a row for each of them."""


def check_reward_model(directory: Path) -> int:
    """Refuse a folder that does not hold a reward model, without loading its weights, and return the number of its tokens.

    Raises:
        ValueError: it is not a sequence classifier with one output, or its cache cannot be cut back.
    """
    from transformers import AutoModelForSequenceClassification

    config = named.check(directory, AutoModelForSequenceClassification)
    if config.num_labels != 1:
        raise ValueError(f"{directory} has {config.num_labels} classes; a reward model has one output (num_labels 1)")
    _check_cache(config, directory.name)
    return int(config.get_text_config().vocab_size)


def load_reward_model(directory: Path) -> PrefixRewards:
    """Load a reward model, a sequence classifier with one output. Raises ValueError as `check_reward_model` does."""
    from transformers import AutoModelForSequenceClassification

    check_reward_model(directory)
    model = named.load(directory, AutoModelForSequenceClassification)
    backbone = getattr(model, model.base_model_prefix)
    heads = [child for child in model.children() if child is not backbone and isinstance(child, nn.Linear)]
    # The head is found by its shape, because transformers calls it `score`, `classifier` or otherwise, depending on the model's
    # family.
    if len(heads) != 1:
        raise ValueError(f"{directory}: {type(model).__name__} does not have exactly one linear head on its hidden states")
    return PrefixRewards(backbone, heads[0])


def reward_head(model: PreTrainedModel, file: Path) -> PrefixRewards:
    """Return the rewards that a linear head gives to the last hidden states of a language model.

    Args:
        model: The language model, whose weights are used as they are.
        file: A safetensors file with a weight (1, D) or (D,), and optionally a bias (1,), under any names.

    Raises:
        ValueError: the file holds something else, or a weight of another width.
    """
    with explained(f"the reward head {file}"):
        tensors = load_file(file)
    backbone: Any = getattr(model, model.base_model_prefix)
    width = text_config(model).hidden_size
    weights = [value for value in tensors.values() if value.numel() > 1]
    biases = [value for value in tensors.values() if value.numel() == 1]
    if len(weights) != 1 or len(biases) > 1 or weights[0].numel() != width:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items()) or "nothing"
        raise ValueError(
            f"the reward head {file} holds {shapes}; it should hold a weight (1, {width}) and optionally a bias (1,)"
        )
    _check_cache(model.config, type(model).__name__)
    head = nn.Linear(width, 1, bias=bool(biases))
    head.load_state_dict({"weight": weights[0].view(1, width), **({"bias": biases[0].view(1)} if biases else {})})
    return PrefixRewards(backbone, head)


def _check_cache(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError for a model whose cache drops tokens, so that candidates could not be removed from it again."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=config.get_text_config()).layers
    # A sliding window drops its oldest tokens, and a recurrent state cannot be reverted.
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError(
            f"{name}: a reward model needs full attention in every layer, so that candidates can be removed from the cache"
        )


class PrefixRewards:
    """Rewards r([x, v]) of texts x with a next token v."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        self.backbone, self.head = backbone, head

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the reward model. The head stays in float32, because a reward of several units has only two digits in
        bfloat16."""
        self.backbone.to(device=device, dtype=dtype)
        self.head.to(device=device, dtype=torch.float32)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the backbone embeds."""
        return int(self.backbone.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor], cache: object = None) -> object:
        """Read tokens, (B, T), after those of a cache, and return the cache with them; None makes a new one."""
        from transformers import DynamicCache

        if cache is None:
            cache = DynamicCache(config=self.backbone.config)  # type: ignore[arg-type]
        self.backbone(**inputs, past_key_values=cache, use_cache=True)
        return cache

    @torch.no_grad()
    def of(self, candidates_BCK: Tensor, columns_C: Tensor, mask_BT: Tensor, cache: object) -> Tensor:
        """Return the rewards of candidates that follow the text up to a column, (B, C, K); the cache does not change.

        Args:
            candidates_BCK: Tokens that are placed after each column.
            columns_C: Columns of the batch.
            mask_BT: 1 at tokens, 0 at padding, for all T columns in the cache.
            cache: Keys and values of the T columns.
        """
        size = max(1, _SIDE_BY_SIDE // candidates_BCK.shape[2])
        pieces = zip(candidates_BCK.split(size, 1), columns_C.split(size), strict=True)
        return torch.cat([self._of_columns(ids_BCK, columns_C, mask_BT, cache) for ids_BCK, columns_C in pieces], 1)

    def _of_columns(self, ids_BCK: Tensor, columns_C: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
        num_rows, num_columns, num = ids_BCK.shape
        num_new, num_read = num_columns * num, mask_BT.shape[1]
        # A candidate attends to the tokens of its row up to its column, and to itself.
        past = torch.arange(num_read, device=mask_BT.device) <= columns_C[:, None]
        past_BCT = past[None] & mask_BT.bool()[:, None]
        itself = torch.eye(num_new, dtype=torch.bool, device=mask_BT.device).expand(num_rows, -1, -1)
        seen_BNX = torch.cat([past_BCT.repeat_interleave(num, 1), itself], 2)
        dtype = next(self.backbone.parameters()).dtype
        mask_B1NX = torch.zeros(seen_BNX.shape, dtype=dtype, device=mask_BT.device)
        # The mask is added to the attention scores; both of transformers' own kernels expect a mask of four axes.
        mask_B1NX = mask_B1NX.masked_fill(~seen_BNX, torch.finfo(dtype).min)[:, None]
        position_BC = mask_BT.cumsum(1)[:, columns_C]  # as many tokens precede it, counted from 0
        states_BND = self.backbone(
            input_ids=ids_BCK.reshape(num_rows, num_new),
            attention_mask=mask_B1NX,
            position_ids=position_BC.repeat_interleave(num, 1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.crop(-num_new)  # a negative number: transformers 5.23 refuses the number of remaining tokens
        return self.head(states_BND.float())[..., 0].view(num_rows, num_columns, num)
