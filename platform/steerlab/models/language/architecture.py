"""Read a checkpoint's config, choose the class that loads it, and refuse what is not a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steerlab.guards import counts, files, late, saved
from steerlab.guards.faults import explained

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel
else:
    transformers = late.module("transformers")

_TRUST = "set model.trust_remote_code: true to run it, if you trust where it comes from"
_NO_LEFT_TO_RIGHT = {
    "xlnet": "its tokens see those after them",
    "cpmant": "its tokens see those after them",
    "reformer": "its attention needs rows of fixed lengths",
}
"""Model types that transformers lists as causal language models, with the reason why they are not. A test looks for more."""
_CODE_FILES = {"config.json": "config", "tokenizer_config.json": "tokenizer"}
"""Files in which the key `auto_map` names Python code of the checkpoint, with the word for messages."""


def read_config(directory: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a causal language model.

    Raises:
        ValueError: The config cannot be read, needs code that is not trusted, or belongs to another kind of model.
    """
    config = read_any_config(directory, trust_remote_code, f"; {_TRUST}")
    _check_kind(config, _json(directory / "config.json"), directory)
    return config


def read_any_config(directory: Path, trust_remote_code: bool = False, advice: str = ", which no task runs") -> PreTrainedConfig:
    """Read the config of a model of any kind that transformers supports.

    Args:
        directory: Folder of the checkpoint.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        advice: End of the message for a config that needs code.

    Raises:
        ValueError: The config cannot be read, or needs code that is not trusted.
    """
    file = directory / "config.json"
    raw = _json(file)
    kind = raw.get("model_type")
    if not trust_remote_code and not (isinstance(kind, str) and kind in transformers.CONFIG_MAPPING):
        _refuse_code(raw, file, advice)
        raise ValueError(f"{file}: model_type {kind!r:.80} is not supported by transformers {transformers.__version__}")
    counts.check_counts(raw, str(file))
    with explained(str(file)):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        _forget_kernels(config)
    return config


def _forget_kernels(config: PreTrainedConfig) -> None:
    """Remove the choice of kernels from a config and its parts, so that the job's setting decides."""
    # transformers (5.23) downloads a kernel and its code from a hub if the config names a repository here.
    config._attn_implementation_internal = None
    config._experts_implementation_internal = None
    for part in (getattr(config, name, None) for name in config.sub_configs):
        if part is not None:
            _forget_kernels(part)


def check_tokenizer_code(directory: Path, trust_remote_code: bool) -> None:
    """Raise ValueError if a tokenizer needs code that comes with the checkpoint and is not trusted."""
    file = directory / "tokenizer_config.json"
    if not trust_remote_code and file.is_file():
        raw = _json(file)
        # transformers prefers its own class to the code of the checkpoint, if it has a class of this name.
        if not hasattr(transformers, str(raw.get("tokenizer_class"))):
            _refuse_code(raw, file, f"; {_TRUST}")


def runs_own_code(directory: Path) -> bool:
    """Return whether a checkpoint comes with Python code of its own."""
    return any("auto_map" in _json(directory / name) for name in _CODE_FILES if (directory / name).is_file())


def _refuse_code(raw: dict[str, object], file: Path, advice: str) -> None:
    if "auto_map" in raw:
        raise ValueError(f"{file}: the {_CODE_FILES[file.name]} needs code that comes with the checkpoint{advice}")


def _json(file: Path) -> dict[str, object]:
    return saved.read(file, dict[str, object])


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that builds the model: that of language models, or that of models which also read images."""
    is_listed = type(config) in transformers.AutoModelForCausalLM._model_mapping
    has_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    # A type in both tables is loaded as a language model, without the part that reads images.
    return transformers.AutoModelForCausalLM if is_listed or has_code else transformers.AutoModelForImageTextToText


def text_config(model: PreTrainedModel) -> Any:
    """Return the config of a model's language part; the whole config if the model has no other part."""
    return model.config.get_text_config(decoder=True)


def _check_kind(config: PreTrainedConfig, raw: dict[str, object], directory: Path) -> None:
    """Raise ValueError unless a config, and the head that its checkpoint was saved with, are of a causal language model."""
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{directory / 'config.json'}: architectures is a list of names, not {named!r:.80}")
    saved_class = next(iter(named), type(config).__name__.removesuffix("Config"))
    what = f"{directory} holds a {saved_class}, which is not a causal language model"
    if config.is_encoder_decoder:
        raise ValueError(f"{what}: it has an encoder and a decoder")
    if config.model_type in _NO_LEFT_TO_RIGHT:
        raise ValueError(f"{what}: {_NO_LEFT_TO_RIGHT[config.model_type]}")
    cls = model_class(config)
    if type(config) not in cls._model_mapping and "AutoModelForCausalLM" not in getattr(config, "auto_map", {}):
        raise ValueError(what)
    fitting = set(_names_for(config.model_type))
    # A classifier has the same config as the language model with its layers, and transformers would load it with a random head.
    if hasattr(transformers, saved_class) and fitting and raw.get("architectures") and saved_class not in fitting:
        raise ValueError(f"{what}; of its kind these are: {', '.join(sorted(fitting))}")


def _names_for(model_type: str) -> Iterator[str]:
    """Yield the names of the classes whose checkpoints hold a language model of a type, with its head or only its layers."""
    from transformers.models.auto import modeling_auto

    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_MAPPING_NAMES")
    for table in tables:
        names = getattr(modeling_auto, table).get(model_type, ())
        yield from (names,) if isinstance(names, str) else names


def check_quantisation(config: PreTrainedConfig) -> None:
    """Raise ValueError if the weights are quantised and the library that reads them is not installed."""
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    # The settings are a dict as read from the file; transformers replaces it by an object when it loads the weights.
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment()
    except RuntimeError:
        return  # this machine has no GPU, but the workers may have one
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"the weights are quantised ({method}) and cannot be loaded here: {_first_line(error)}") from None


def skeleton(directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model on the meta device, without values; the same object for the same config.

    Raises:
        ValueError: As `read_config`, or the model is not autoregressive or needs more inputs than text.
    """
    return _skeleton(directory, files.read_text(directory / "config.json"), trust_remote_code)


@lru_cache(maxsize=8)
def _skeleton(directory: Path, config: str, trust_remote_code: bool) -> PreTrainedModel:
    # `config`, the content of the file, is only part of the cache's key, so that a changed file gives another skeleton.
    model = make(read_config(directory, trust_remote_code), trust_remote_code)
    # BERT and its relatives attend in both directions unless the config has is_decoder, which their modules store.
    if any(part.__dict__.get("is_decoder") is False for part in model.get_decoder().modules()):
        raise ValueError(
            f"{directory} holds a {type(model).__name__} whose tokens see those after them; the config of a decoder has "
            "is_decoder: true"
        )
    parameters = inspect.signature(type(model).forward).parameters
    needed = [name for name, parameter in parameters.items() if _is_required(name, parameter)]
    if needed:
        raise ValueError(f"{directory} holds a {type(model).__name__}, which needs further inputs: {', '.join(needed)}")
    return model


def _is_required(name: str, parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic and name not in ("self", "input_ids")


def make(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model on the meta device with its default attention. Raises ValueError if its class refuses the config."""
    # On the meta device a tensor has a shape and no memory, so the size in the config does not matter.
    with torch.device("meta"), explained(f"a model of {type(config).__name__}"):
        return model_class(config).from_config(config, trust_remote_code=trust_remote_code)


def attention_of(directory: Path, attention: str, trust_remote_code: bool = False) -> str:
    """Return the attention kernel that a model runs with: `attention`, or eager if it does not support sdpa.

    Raises:
        ValueError: `attention` is a flash kernel, and the model does not support these.
    """
    return _attention_of(directory, files.read_text(directory / "config.json"), attention, trust_remote_code)


@lru_cache(maxsize=8)
def _attention_of(directory: Path, config: str, attention: str, trust_remote_code: bool) -> str:
    model = skeleton(directory, trust_remote_code)
    # A model that reads images consists of several models, each with an attention of its own.
    parts = [model, *(part for part in model.modules() if isinstance(part, transformers.PreTrainedModel))]
    if attention == "sdpa" and not all(part._supports_sdpa for part in parts):
        return "eager"
    if attention.startswith("flash") and not all(part._supports_flash_attn for part in parts):
        raise ValueError(f"model.attention {attention}: {type(model).__name__} has no such kernel; use sdpa or eager")
    return attention
