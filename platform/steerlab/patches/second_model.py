"""The patch that adds the log-probabilities of a second model to the logits: GenARM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.patches.attaching import CannotFold, Forward, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SecondModelPatch(nn.Module):
    """A second language model whose log-probabilities are added to the logits: z = z_base + alpha log pi_r (GenARM).

    alpha is the strength. The second model reads the same tokens as the model, with a key-value cache of its own.

    Args:
        config: the transformers config of the second model.
    """

    kind: ClassVar[str] = "second_model"
    strength_range: tuple[float, float] | None = None

    def __init__(self, config: dict[str, object]) -> None:
        super().__init__()
        self.config = dict(config)
        self.second: PreTrainedModel = models.from_config(config)

    @classmethod
    def of(cls, second: PreTrainedModel) -> SecondModelPatch:
        """Make the patch of an existing model, without a copy of its weights."""
        # The constructor makes a model from the config, which takes no memory on the meta device.
        with torch.device("meta"):
            patch = cls(dict(models.config_of(second)))
        patch.second = second
        return patch

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register hooks that run the second model before the model, and add its log-probabilities to the head's output.

        Raises:
            ValueError: the two models have vocabularies of different sizes.
        """
        # Logits are added by their index, so with another tokenizer the sum would be of different words. A patch does not know
        # the tokenizers; only the sizes can be compared here.
        own, other = (models.linear_shape(models.head(network))[0] for network in (self.second, model))
        if own != other:
            raise ValueError(f"the second model has {own} tokens, {type(model).__name__} has {other}")
        # The second model moves to the model's dtype and device, where the logits are summed.
        self.second.to(device=model.device, dtype=model.dtype)  # type: ignore[reportCallIssue]  # a decorator hides `self`
        log_probs: list[Tensor] = []
        cache = models.cache_name(self.second)

        def read(_model: nn.Module, _args: object, kwargs: dict[str, object]) -> None:
            passed = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
            # The model's `past_key_values`, roles and strengths are not passed, because they belong to that model.
            inputs = {name: kwargs[name] for name in passed if name in kwargs}
            memory = forward.memory
            # The memory belongs to the call of `generate` instead of the patch, because two generations may use one patch
            # alternately.
            past = {} if memory is None else memory.setdefault(number, models.empty_cache(self.second))
            out = self.second(**inputs, **past, use_cache=memory is not None, only=forward.only)
            if memory is not None and cache is not None and cache in out:
                memory[number] = {cache: out[cache]}
            # The head's output gets log-probabilities, so that both distributions in the product are normalised. They are
            # float32, because a log-sum-exp over a vocabulary loses digits in bfloat16.
            log_probs[:] = [out.logits.float().log_softmax(-1)]

        def edit(_module: nn.Module, _inputs: object, logits_BTV: Tensor) -> Tensor:
            # The value is popped, so that a pass whose head runs twice, or whose second model did not run, fails instead of
            # adding old values.
            alpha, added_BTV = forward.strength_of_logits(number), log_probs.pop()
            return logits_BTV + (added_BTV if alpha is None else alpha * added_BTV).to(logits_BTV.dtype)

        # An empty stack on the second model lets it accept `only`.
        return [
            *attach(self.second, ()).handles,
            model.register_forward_pre_hook(read, with_kwargs=True),
            models.head(model).register_forward_hook(edit),
        ]

    def spec(self) -> dict[str, object]:
        """Return the second model's config."""
        return {"config": self.config}

    def tensors(self) -> dict[str, Tensor]:
        """Return the second model's weights; tied weights are in it once."""
        return dict(self.named_parameters())

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, of which tied ones may be in the state dict once."""
        # `nn.Module.load_state_dict` needs an entry for every name; those of tied weights get the present value.
        once = {name for name, _ in self.named_parameters()}
        tied = {name for name, _ in self.named_parameters(remove_duplicate=False)} - once
        return super().load_state_dict({**{name: self.get_parameter(name) for name in tied}, **state_dict}, strict, assign)

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Raise CannotFold: two models cannot be one."""
        raise CannotFold("a second model's log-probabilities are not weights of the first")
