"""Read and write checkpoints: whole models, their sizes without weights, models like another one."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor, nn

from steerlab.data import sources
from steerlab.guards import saved
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject
from steerlab.job import SamplerConfig
from steerlab.models.diffusion import saved_pipelines
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.models.language import architecture, growth, weights
from steerlab.models.language.weight_places import embedding_shape, layer_names
from steerlab.models.loadable import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steerlab.models.kinds import Model

transformers.logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are loaded; methods check their settings against it."""

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_parameters: int
    max_positions: int
    has_pad_token: bool
    num_embeddings: int = 0
    """Rows of the input embedding; 0 where ids are none of the model's inputs."""
    kind: str = "causal_lm"


def load_model(
    directory: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
    sampler: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint in evaluation mode; a directory with a config but no weights is initialised from `seed`.

    A pipeline becomes a `pipelines.Diffusion`, which draws as `sampler` (the fields of `SamplerConfig`) says. A language model
    without sdpa runs with eager attention. Code that comes with a checkpoint runs only with `trust_remote_code`.

    Raises:
        ValueError: the checkpoint is not complete, or is no causal language model's.
    """
    directory = prepare(Path(directory))
    if saved_pipelines.is_pipeline(directory):
        settings = SamplerConfig.model_validate(sampler or {})
        denoiser = None if settings.denoiser is None else sources.fetch(settings.denoiser)
        return saved_pipelines.load(directory, settings, dtype=dtype, seed=seed, denoiser=denoiser)
    kwargs: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "attn_implementation": architecture.attention_of(directory, attention, trust_remote_code),
        "trust_remote_code": trust_remote_code,
    }
    if weights.has_weights(directory):
        with explained(f"the checkpoint {directory}"):
            return weights.load(directory, kwargs).eval()
    config = architecture.read_config(directory, trust_remote_code)
    with torch.random.fork_rng(), explained(f"the config in {directory}"):
        torch.manual_seed(seed)
        return architecture.model_class(config).from_config(config, **kwargs).eval()


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model, or in a folder of its own.

    Raises:
        ValueError: it needs code that is not trusted, or there is none.
    """
    directory = Path(directory)
    alone = any((directory / name).is_file() for name in _TOKENIZER_FILES)
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
    )


def _facts_of_pipeline(model: Diffusion) -> ModelFacts:
    """Sizes of a pipeline; width and depth, for estimates, are those of its widest level and of its blocks."""
    config = model.config
    widths = getattr(config, "block_out_channels", None)
    width = max(widths) if widths else config.num_attention_heads * config.attention_head_dim
    depth = len(widths) if widths else getattr(config, "num_layers", 1)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelFacts(model.architecture, width, depth, 0, parameters, 0, False, kind="diffusion")


def skeleton(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """Return a model's modules without any weights: their paths and shapes, to be read only."""
    directory = prepare(Path(directory))
    if saved_pipelines.is_pipeline(directory):
        return saved_pipelines.skeleton(directory)
    return architecture.skeleton(directory, trust_remote_code)


def check_checkpoint(directory: str | Path, attention: str, trust_remote_code: bool = False) -> None:
    """Refuse a language model that cannot be loaded, before it is; warn where it is not loaded quite as asked.

    Raises:
        ValueError: weights are missing or need a library that is not there, or the model lacks the kernel of attention.
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
    """Return a model's config as JSON values, from which `from_config` makes one like it, without where it was read from."""
    config: JsonObject = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return config


def from_config(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with random weights, float32."""
    own = transformers.AutoConfig.for_model(**config)
    return architecture.model_class(own).from_config(own, dtype=torch.float32, trust_remote_code=False)


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a copy of a model that has its first decoder layers only. Raises ValueError if it has no more than these."""
    names = layer_names(model)
    if not 0 < num_layers < len(names):
        raise ValueError(f"{num_layers} layers: {type(model).__name__} has {len(names)}, of which a shorter model has fewer")
    config = config_of(model)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == len(names):
            config[name] = value[:num_layers]  # what is said of each layer
    size = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if size not in config:
        raise ValueError(f"{type(model).__name__} has other parts than its language model, so it is not made shorter")
    cut = from_config({**config, size: num_layers})
    cut = cut.to(dtype=model.dtype, device=model.device)  # type: ignore[reportCallIssue]  # a decorator hides `self`
    cut.load_state_dict({name: value for name, value in model.state_dict().items() if name in cut.state_dict()})
    return cut.eval()


def check_sampler(directory: str | Path, sampler: SamplerConfig) -> None:
    """Refuse a sampler that a pipeline cannot take, without loading its weights. Raises ValueError."""
    saved_pipelines.check_scheduler(prepare(Path(directory)), sampler)


class _Dtype(saved.Shape):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def saved_dtype(directory: Path) -> str:
    """Return the type in which a checkpoint's weights were saved; float32 where that is not said."""
    if saved_pipelines.is_pipeline(directory):
        return saved_pipelines.saved_dtype(directory)
    config = directory / "config.json"
    return (saved.read(config, _Dtype).dtype or "float32") if config.is_file() else "float32"


def start_training(model: Model, checkpointing: bool) -> None:
    """Make a loaded model fit for training; with `checkpointing` activations are computed again in the backward pass."""
    if not isinstance(model, Diffusion):
        model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_trained(model: Model, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Write the trained weights, by the names of the model's parameters, as a checkpoint that its library loads."""
    if isinstance(model, Diffusion):
        model.load_state_dict(dict(weights), strict=False)
        model.pipeline.save_pretrained(directory)
        return
    model.config.use_cache = True
    model.save_pretrained(directory, state_dict=dict(weights))


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names, shapes and first values of all weights: cheap, and different for other weights.

    It is the same for the same weights in float32 and in bfloat16: a patch that was trained on one stands on the other.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:8].to("cpu", torch.bfloat16).to(torch.float64).tolist()
        digest.update(json.dumps([name, list(parameter.shape), values]).encode())
    return digest.hexdigest()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a checkpoint that plain transformers loads."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
