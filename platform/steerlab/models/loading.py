"""Load and save models and tokenizers, and read a model's sizes without its weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steerlab.data import sources
from steerlab.guards import late, saved
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject
from steerlab.job import SamplerConfig
from steerlab.models.diffusion import saved_pipelines
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.models.language import architecture, growth, weights
from steerlab.models.language.attention import attends
from steerlab.models.language.weight_places import embedding_shape, layer_names
from steerlab.models.loadable import prepare

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steerlab.models.kinds import Model
else:
    transformers = late.module("transformers")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, read before its weights are loaded; methods check their settings against them."""

    architecture: str
    """Name of the class of the model or pipeline."""
    hidden_size: int
    """Width of the hidden states; for a pipeline, that of the widest level of the denoiser."""
    num_layers: int
    """Number of decoder layers; for a pipeline, of levels or blocks of the denoiser."""
    vocab_size: int
    """Number of tokens; 0 for a pipeline."""
    num_parameters: int
    max_positions: int
    """Length of the context in tokens; 0 means that the config names no limit."""
    has_pad_token: bool
    """Whether the tokenizer has a padding token."""
    num_embeddings: int = 0
    """Rows of the input embedding; 0 for a pipeline, which takes no token ids."""
    kind: str = "causal_lm"
    """causal_lm or diffusion."""
    attends: bool = True
    """Whether the model has attention; recurrent models have none. True for a pipeline."""


def load_model(
    directory: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model in evaluation mode.

    Args:
        directory: Folder of a checkpoint of transformers, of a diffusion pipeline, or with one GGUF file.
        dtype: Type of the weights: float32, bfloat16 or float16.
        attention: Attention kernel of a language model. A model that does not support sdpa runs with eager attention.
        seed: Seed of the initial weights, if the folder holds a config but no weights.
        sampler: Fields of `SamplerConfig`, for a diffusion pipeline; None for its defaults.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.

    Returns:
        A `PreTrainedModel`, or a `Diffusion` for a pipeline.

    Raises:
        ValueError: The checkpoint is not complete, or does not hold a causal language model.
    """
    directory = prepare(Path(directory))
    if saved_pipelines.is_pipeline(directory):
        settings = SamplerConfig.model_validate(sampler or {})
        denoiser = None if settings.denoiser is None else sources.fetch(settings.denoiser)
        return saved_pipelines.load(directory, settings, dtype=dtype, seed=seed, denoiser=denoiser)
    kwargs: dict[str, object] = {
        "dtype": DTYPES[dtype],
        "attn_implementation": architecture.attention_of(directory, attention, trust_remote_code),
        "trust_remote_code": trust_remote_code,
    }
    if weights.has_weights(directory):
        with explained(f"the checkpoint {directory}"):
            return weights.load(directory, kwargs).eval()
    config = architecture.read_config(directory, trust_remote_code)
    # The caller's random numbers must not depend on whether weights were initialised here.
    with torch.random.fork_rng(), explained(f"the config in {directory}"):
        torch.manual_seed(seed)
        return architecture.model_class(config).from_config(config, **kwargs).eval()


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder, or in a folder of its own.

    Raises:
        ValueError: The folder has no tokenizer, or the tokenizer needs code that is not trusted or can multiply a text's
            length.
    """
    directory = Path(directory)
    alone = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    # A folder with only a tokenizer is not a model, so `prepare` would refuse it.
    directory = directory if alone else prepare(directory)
    architecture.check_tokenizer_code(directory, trust_remote_code)
    with explained(f"the tokenizer in {directory}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    growth.check(tokenizer, directory)
    return tokenizer


def facts(directory: str | Path, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's sizes from its config, without its weights."""
    directory = prepare(Path(directory))
    model = skeleton(directory, trust_remote_code)
    if isinstance(model, Diffusion):
        return _facts_of_pipeline(model)
    config = architecture.text_config(model)
    num_embeddings, width = embedding_shape(model)
    return ModelFacts(
        architecture=type(model).__name__,
        hidden_size=width,
        num_layers=len(layer_names(model)),
        vocab_size=config.vocab_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
        max_positions=max(0, getattr(config, "max_position_embeddings", 0) or 0),
        has_pad_token=load_tokenizer(directory, trust_remote_code).pad_token_id is not None,
        num_embeddings=num_embeddings,
        attends=attends(model),
    )


def _facts_of_pipeline(model: Diffusion) -> ModelFacts:
    """Return the sizes of a pipeline. Width and depth are rough, for estimates of memory and time."""
    config = model.config
    # A UNet lists a width for each level; a transformer has one width and a number of blocks.
    widths = getattr(config, "block_out_channels", None)
    width = max(widths) if widths else config.num_attention_heads * config.attention_head_dim
    depth = len(widths) if widths else getattr(config, "num_layers", 1)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelFacts(model.architecture, width, depth, 0, parameters, 0, False, kind="diffusion")


def skeleton(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """Return a model on the meta device: modules, paths and shapes, but no values. Callers share it and must not change it."""
    directory = prepare(Path(directory))
    if saved_pipelines.is_pipeline(directory):
        return saved_pipelines.skeleton(directory)
    return architecture.skeleton(directory, trust_remote_code)


def check_checkpoint(directory: str | Path, attention: str, trust_remote_code: bool = False) -> None:
    """Check that a language model can be loaded, without its values; warn if it runs with another attention kernel.

    Raises:
        ValueError: Weights are missing, their quantisation needs a library that is not installed, or the model does not
            support the attention kernel.
    """
    directory = prepare(Path(directory))
    if saved_pipelines.is_pipeline(directory):
        return
    model = architecture.skeleton(directory, trust_remote_code)
    architecture.check_quantisation(model.config)
    weights.check_weights(directory, trust_remote_code)
    if architecture.attention_of(directory, attention, trust_remote_code) != attention:
        warnings.warn(f"{type(model).__name__} has no attention kernel {attention}: it runs with eager", stacklevel=2)


def config_of(model: PreTrainedModel) -> JsonObject:
    """Return a model's config as JSON values without the path that it was read from; `from_config` builds a model of it."""
    config: JsonObject = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return config


def from_config(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return a float32 model with random weights, built from the JSON values of a config."""
    own = transformers.AutoConfig.for_model(**config)
    return architecture.model_class(own).from_config(own, dtype=torch.float32, trust_remote_code=False)


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a copy of a model with only its first `num_layers` decoder layers.

    Raises:
        ValueError: The model has no more layers than these, or has parts besides its language model.
    """
    names = layer_names(model)
    if not 0 < num_layers < len(names):
        raise ValueError(f"{num_layers} layers: {type(model).__name__} has {len(names)}, and a shorter model must have fewer")
    config = config_of(model)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == len(names):
            config[name] = value[:num_layers]  # a list with an entry for each layer, such as `layer_types`
    # Configs may have another name for this number, such as `n_layer` in GPT-2's.
    size = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if size not in config:
        raise ValueError(f"{type(model).__name__} has other parts than its language model, so it cannot be made shorter")
    cut = from_config({**config, size: num_layers})
    cut = cut.to(dtype=model.dtype, device=model.device)  # type: ignore[reportCallIssue]  # a decorator hides `self`
    cut.load_state_dict({name: value for name, value in model.state_dict().items() if name in cut.state_dict()})
    return cut.eval()


def check_sampler(directory: str | Path, sampler: SamplerConfig) -> None:
    """Raise ValueError if a pipeline cannot take the sampler's settings, without loading its weights."""
    saved_pipelines.check_scheduler(prepare(Path(directory)), sampler)


class _Dtype(saved.Shape):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def saved_dtype(directory: Path) -> str:
    """Return the type in which a checkpoint's weights were saved; float32 if its config names no type."""
    if saved_pipelines.is_pipeline(directory):
        return saved_pipelines.saved_dtype(directory)
    config = directory / "config.json"
    return (saved.read(config, _Dtype).dtype or "float32") if config.is_file() else "float32"


def start_training(model: Model, checkpointing: bool) -> None:
    """Prepare a loaded model for training; with `checkpointing`, the backward pass computes activations again."""
    if not isinstance(model, Diffusion):
        model.config.use_cache = False  # training never continues a row; a cache of keys and values would cost memory
    if checkpointing:
        # Reentrant checkpointing gives no gradient if no input of a block needs one, as when only a patch is trained.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_trained(model: Model, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Save a model with trained weights, given by parameter name, as a checkpoint that transformers or diffusers loads."""
    if isinstance(model, Diffusion):
        # Loading is not strict, because `weights` holds parameters only; buffers stay as they were loaded.
        model.load_state_dict(dict(weights), strict=False)
        model.pipeline.save_pretrained(directory)
        return
    model.config.use_cache = True  # `start_training` turned it off; generation from the saved checkpoint needs it
    model.save_pretrained(directory, state_dict=dict(weights))


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256, in hexadecimal, over the name, the shape and the first eight values of each parameter.

    The weights of a checkpoint have the same fingerprint in float32 and in bfloat16, because a patch that was trained on one
    also fits the other.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        # Values are rounded to bfloat16 before they are hashed; reading all values of a large model would take too long.
        values = parameter.detach().flatten()[:8].to("cpu", torch.bfloat16).to(torch.float64).tolist()
        digest.update(json.dumps([name, list(parameter.shape), values]).encode())
    return digest.hexdigest()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a model and its tokenizer as a checkpoint that transformers loads without this package."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
