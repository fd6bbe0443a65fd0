"""Load a causal language model or a diffusion pipeline; the only file that knows the attribute names of architectures."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from steerlab import pipelines, sources
from steerlab.job import SamplerConfig
from steerlab.pipelines import Diffusion, Pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

transformers.logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = ("*.safetensors", "*.bin")


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
    kind: str = "causal_lm"


def load_model(
    directory: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
    sampler: Mapping[str, Any] | None = None,
) -> Any:
    """Load a checkpoint in evaluation mode; a directory with a config but no weights is initialised from `seed`.

    A pipeline becomes a `pipelines.Diffusion`, which draws as `sampler` (the fields of `SamplerConfig`) says.
    """
    directory = prepare(Path(directory))
    if pipelines.is_pipeline(directory):
        settings = SamplerConfig.model_validate(sampler or {})
        denoiser = None if settings.denoiser is None else sources.fetch(settings.denoiser)
        return pipelines.load(directory, settings, dtype=dtype, seed=seed, denoiser=denoiser)
    kwargs: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    if has_weights(directory):
        return transformers.AutoModelForCausalLM.from_pretrained(directory, **kwargs).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(directory), **kwargs
        ).eval()


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model."""
    return transformers.AutoTokenizer.from_pretrained(prepare(Path(directory)))


def facts(directory: str | Path) -> ModelFacts:
    """Read a model's sizes from its config, without its weights."""
    directory = prepare(Path(directory))
    model = skeleton(directory)
    config: Any = model.config
    if isinstance(model, Diffusion):
        return _facts_of_pipeline(model)
    return ModelFacts(
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
        max_positions=getattr(config, "max_position_embeddings", 0) or 0,
        has_pad_token=load_tokenizer(directory).pad_token_id is not None,
    )


def _facts_of_pipeline(model: Diffusion) -> ModelFacts:
    """Sizes of a pipeline; width and depth, for estimates, are those of its widest level and of its blocks."""
    config: Any = model.config
    widths = getattr(config, "block_out_channels", None)
    width = max(widths) if widths else config.num_attention_heads * config.attention_head_dim
    depth = len(widths) if widths else getattr(config, "num_layers", 1)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelFacts(model.architecture, width, depth, 0, parameters, 0, False, "diffusion")


def skeleton(directory: str | Path) -> Any:
    """Return a model's modules without any weights: their paths and shapes, to be read only."""
    directory = prepare(Path(directory))
    if pipelines.is_pipeline(directory):
        return pipelines.skeleton(directory)
    return _skeleton(directory, (directory / "config.json").read_text())


@lru_cache(maxsize=8)
def _skeleton(directory: Path, config: str) -> PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return a model's config as JSON values, from which `from_config` makes one like it."""
    return json.loads(model.config.to_json_string(use_diff=False))


def from_config(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with random weights, float32."""
    made = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a copy of a model that has its first decoder layers only. Raises ValueError if it has no more than these."""
    names = layer_names(model)
    if not 0 < num_layers < len(names):
        raise ValueError(f"{num_layers} layers: {type(model).__name__} has {len(names)}, of which a shorter model has fewer")
    config = config_of(model)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == len(names):
            config[name] = value[:num_layers]  # what is said of each layer
    sizes = {name for name in ("num_hidden_layers", "n_layer") if name in config}
    cut: Any = from_config(config | dict.fromkeys(sizes, num_layers))
    cut = cut.to(dtype=model.dtype, device=model.device)
    cut.load_state_dict({name: value for name, value in model.state_dict().items() if name in cut.state_dict()})
    return cut.eval()


def check_sampler(directory: str | Path, sampler: SamplerConfig) -> None:
    """Refuse a sampler that a pipeline cannot take, without loading its weights. Raises ValueError."""
    pipelines.check_scheduler(prepare(Path(directory)), sampler)


def saved_dtype(directory: Path) -> str:
    """Return the type in which a checkpoint's weights were saved; float32 where that is not said."""
    if pipelines.is_pipeline(directory):
        return pipelines.saved_dtype(directory)
    config = directory / "config.json"
    return (json.loads(config.read_text()).get("dtype") or "float32") if config.is_file() else "float32"


def steered_part(model: nn.Module) -> str | None:
    """Return the part of a pipeline that is read and steered; None where that is all of the model."""
    return model.denoiser_name if isinstance(model, Diffusion) else None


def running(model: nn.Module) -> Pass | None:
    """Return the pass of a drawing that runs in this thread; None in a language model."""
    return model.now if isinstance(model, Diffusion) else None


def unsteered_share(model: nn.Module) -> str | None:
    """Say on which part of what a model computes patches do not act; None where they act on all of it."""
    return model.unsteered_share() if isinstance(model, Diffusion) else None


def num_reads(model: nn.Module) -> int:
    """Return how often a module is read in one call of the model."""
    return model.num_reads if isinstance(model, Diffusion) else 1


def small_inputs(model: Any) -> dict[str, Any]:
    """Return arguments of a short call of the model, by which the widths of modules are found."""
    if isinstance(model, Diffusion):
        return {"prompts": [model.small_prompt], "seeds": [0]}
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}


def start_training(model: Any, checkpointing: bool) -> None:
    """Make a loaded model fit for training; with `checkpointing` activations are computed again in the backward pass."""
    if not isinstance(model, Diffusion):
        model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_trained(model: Any, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Write the trained weights, by the names of the model's parameters, as a checkpoint that its library loads."""
    if isinstance(model, Diffusion):
        model.load_state_dict(dict(weights), strict=False)
        model.pipeline.save_pretrained(directory)
        return
    model.config.use_cache = True
    model.save_pretrained(directory, state_dict=dict(weights))


def has_weights(directory: Path) -> bool:
    """Say whether a model directory holds weights or only a config."""
    return any(next(directory.glob(pattern), None) for pattern in _WEIGHTS)


def prepare(directory: Path) -> Path:
    """Return a directory that transformers loads directly; a GGUF file is dequantised once and kept beside it."""
    if (directory / "config.json").is_file() or pipelines.is_pipeline(directory):
        return directory
    gguf = sorted(directory.rglob("*.gguf")) if directory.is_dir() else []
    if len(gguf) != 1:
        found = f"{len(gguf)} GGUF files" if gguf else "neither config.json nor a GGUF file"
        raise ValueError(f"{directory} holds no model: expected config.json, model_index.json or one .gguf file, found {found}")
    return _dequantise(gguf[0])


def _dequantise(gguf: Path) -> Path:
    from transformers import GgufConfig

    target = gguf.parent / f"{gguf.stem}.dequantised"
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(dir=gguf.parent))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            model.save_pretrained(scratch)
            transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
            scratch.rename(target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def embedding(model: PreTrainedModel) -> nn.Module:
    """Return the input embedding."""
    return model.get_input_embeddings()


def max_positions(model: PreTrainedModel) -> float:
    """Return how many tokens a model's context holds; infinity where its config names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def head(model: PreTrainedModel) -> nn.Module:
    """Return the linear map from the last hidden state to logits."""
    found = model.get_output_embeddings()
    if found is None:
        raise ValueError(f"{type(model).__name__} has no language modelling head")
    return found


def layer_names(model: PreTrainedModel) -> list[str]:
    """Return the module paths of the decoder layers, in order."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "model.language_model.layers"):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        return [f"{path}.{i}" for i in range(len(layers))]  # type: ignore[arg-type]
    raise ValueError(f"{type(model).__name__}: its decoder layers are not known; add their path in models.layer_names")


LayerType = Literal["attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down"]
_LLAMA_LIKE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn.c_attn"),
    "attn_o": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT_NEOX = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attention.query_key_value"),
    "attn_o": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_SHARED_INPUT = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""Types of linear layers that read the same tensor."""
_FUSED = ("attn_q", "attn_k", "attn_v")


class WeightPlace(NamedTuple):
    """A linear layer of a decoder layer, y = W x with W of shape (M, N)."""

    module: str
    """Its path."""
    shape: tuple[int, int]
    """(M, N): outputs and inputs, however the architecture stores them."""
    input_of: str
    """Path of the first of the linear layers that read the same tensor: they share one Gram matrix."""
    outputs: tuple[tuple[int, int], ...] | None = None
    """Spans [start, end) of outputs that are meant, where one layer computes several types; None for all."""

    @property
    def num_meant(self) -> int:
        """Number of coefficients that are meant."""
        num_outputs = self.shape[0] if self.outputs is None else sum(end - start for start, end in self.outputs)
        return num_outputs * self.shape[1]


def weight_places(model: PreTrainedModel, types: Sequence[str], layers: Sequence[int]) -> list[WeightPlace]:
    """Return the linear layers of some types in some decoder layers, in the model's order.

    Raises:
        ValueError: the model has no layer of a type, or not so many layers.
    """
    names = layer_names(model)
    outside = [layer for layer in layers if not 0 <= layer < len(names)]
    if outside:
        raise ValueError(f"layer {outside[0]}: {type(model).__name__} has the layers 0 to {len(names) - 1}")
    first = model.get_submodule(names[0])
    modules = {name for name, module in first.named_modules() if isinstance(module, nn.Linear) or stores_transposed(module)}
    table = max((_LLAMA_LIKE, _GPT2, _GPT_NEOX), key=lambda known: sum(path in modules for path in known.values()))
    there = [kind for kind, path in table.items() if path in modules]
    missing = [kind for kind in types if kind not in there]
    if missing:
        raise ValueError(
            f"{missing[0]}: {type(model).__name__} has no such linear layers; it has {', '.join(there) or 'none known'}"
        )
    return [place for layer in layers for place in _places_of_layer(model, names[layer], table, there, types)]


def _places_of_layer(
    model: PreTrainedModel, layer: str, table: Mapping[str, str], there: Sequence[str], types: Sequence[str]
) -> Iterator[WeightPlace]:
    for path in dict.fromkeys(table[kind] for kind in there if kind in types):
        module = model.get_submodule(f"{layer}.{path}")
        shape = linear_shape(module)
        kinds = [kind for kind in there if table[kind] == path]
        together = next((group for group in _SHARED_INPUT if kinds[0] in group), kinds)
        reader = next(table[kind] for kind in there if kind in together)
        chosen = [kind for kind in kinds if kind in types]
        outputs = None if len(chosen) == len(kinds) else _fused_outputs(model, path, shape[0], chosen)
        yield WeightPlace(f"{layer}.{path}", shape, f"{layer}.{reader}", outputs)


def _fused_outputs(model: PreTrainedModel, path: str, size: int, chosen: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the outputs of one layer for queries, keys and values that are of the chosen types."""
    # GPT-NeoX keeps the three of a head together, GPT-2 those of all heads.
    heads = model.config.num_attention_heads if path == _GPT_NEOX["attn_q"] else 1
    part = size // (3 * heads)
    starts = [(3 * head + _FUSED.index(kind)) * part for head in range(heads) for kind in chosen]
    return tuple((start, start + part) for start in sorted(starts))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[union-attr]
    return (columns, rows) if stores_transposed(module) else (rows, columns)  # type: ignore[return-value]


def linear_weight(module: nn.Module, stored: Tensor | None = None) -> Tensor:
    """Return a view (outputs, inputs) of a linear layer's weight, or of a tensor that is stored as it is."""
    weight: Any = module.weight if stored is None else stored
    return weight.T if stores_transposed(module) else weight


def stores_transposed(module: nn.Module) -> bool:
    """Say whether a linear layer stores its weight as (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


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


_BIAS_FLAGS = {"mlp": "mlp_bias", "self_attn": "attention_bias"}
"""Blocks of Llama-like models whose linear layers have biases if the config says so."""


def fold_affine(model: Any, name: str, scale_D: Tensor, shift_D: Tensor) -> None:
    """Merge z -> scale * z + shift of a module's output into weights: its own, and for a shift that it cannot hold into the
    biases of the linear layers behind it.

    D counts the features of the last axis, or the channels of a convolution and of what normalises channels.

    Raises:
        ValueError: the module or the architecture has no place for it; the message says why.
    """
    module: Any = model.get_submodule(name) if ":" not in name else None
    if isinstance(module, _WITH_GAINS) and module.weight is None:
        raise ValueError(f"{name} is a {type(module).__name__} without weights: its map has no place")
    with torch.no_grad():
        if isinstance(module, _BY_OUTPUT):
            by_output = module.weight.double().movedim(0, -1) * scale_D
            _scaled(model, name, by_output.movedim(-1, 0), scale_D, shift_D)
        elif module is not None and (isinstance(module, _WITH_GAINS) or stores_transposed(module)):
            _scaled(model, name, module.weight.double() * scale_D, scale_D, shift_D)
        elif type(module).__name__.endswith("RMSNorm"):
            _fold_into_rms_norm(model, name, scale_D, shift_D)
        else:
            kind = "an element of a tuple" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{name} is {kind}: only the map of a linear layer, a convolution or a norm folds into weights")


_BY_OUTPUT = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Layers whose weight has its outputs first."""
_WITH_GAINS = nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase
"""Layers whose weight is a factor of each output."""


def _scaled(model: Any, name: str, weight: Tensor, scale_D: Tensor, shift_D: Tensor) -> None:
    """Give a module its scaled weight, and the bias that goes with it."""
    module = model.get_submodule(name)
    if module.bias is None and bool(shift_D.any()):
        _declare_bias(model, name)
    module.weight.copy_(weight)
    if module.bias is not None:
        _set_bias(module, scale_D * _bias(module) + shift_D)


def _fold_into_rms_norm(model: Any, name: str, scale_D: Tensor, shift_D: Tensor) -> None:
    """Scale the gain; the shift goes into the biases of the linear layers that read the norm."""
    norm = model.get_submodule(name)
    followers = _linear_followers(model, norm) if bool(shift_D.any()) else []
    _scale_rms_norm(norm, scale_D)
    for path in followers:
        linear = model.get_submodule(path)
        if linear.bias is None:
            _declare_bias(model, path)
        _set_bias(linear, _bias(linear) + linear.weight.double() @ shift_D)


def _bias(module: nn.Module) -> Tensor | float:
    bias: Any = module.bias
    return 0.0 if bias is None else bias.double()


def _set_bias(module: nn.Module, bias_D: Tensor) -> None:
    weight: Any = module.weight
    module.bias = nn.Parameter(bias_D.to(weight), requires_grad=False)


def _scale_rms_norm(norm: nn.Module, scale_D: Tensor) -> None:
    """Scale the gain of an RMS norm, which some architectures keep as the gain and others as the gain less one."""
    weight: Any = norm.weight
    if weight is None:
        raise ValueError(f"a {type(norm).__name__} without weights: the map has no place")
    before = weight.detach().clone()
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
    wanted = scale_D.to(weight.device) * norm(probe).double()
    for offset in (0.0, 1.0):
        weight.copy_(scale_D * (before.double() + offset) - offset)
        if torch.allclose(norm(probe).double(), wanted, rtol=1e-2, atol=1e-3):
            return
    weight.copy_(before)
    raise ValueError(f"the gain of a {type(norm).__name__} is not kept in a way that is known here")


def _linear_followers(model: Any, norm: nn.Module) -> list[str]:
    """Return the linear layers whose input is the norm's output itself, found by one short call."""
    output: list[Any] = []
    found: list[str] = []

    def follow(name: str) -> Any:
        return lambda _module, args: found.append(name) if args and output and args[0] is output[0] else None

    handles = [norm.register_forward_hook(lambda _m, _i, value: output.append(value))]
    handles += [m.register_forward_pre_hook(follow(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        model(**small_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"a {type(norm).__name__} has no bias, and no linear layer takes its output as it is: the shift has no place"
        )
    return found


def _declare_bias(model: Any, path: str) -> None:
    """Give the linear layers of a block the biases that the saved config then promises."""
    parent, _, _ = path.rpartition(".")
    flag = _BIAS_FLAGS.get(parent.rpartition(".")[2], "")
    if not isinstance(model.get_submodule(path), nn.Linear) or not hasattr(model.config, flag):
        raise ValueError(
            f"{path} has no bias, and the config of {type(model).__name__} cannot give it one: the shift has no place"
        )
    setattr(model.config, flag, True)
    for layer in layer_names(model):
        for child in model.get_submodule(f"{layer}.{parent.rpartition('.')[2]}").children():
            if isinstance(child, nn.Linear) and child.bias is None:
                _set_bias(child, torch.zeros(child.out_features))
