"""Load a causal language model; the only file that knows the attribute names of architectures."""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
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


def load_model(
    directory: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
) -> PreTrainedModel:
    """Load a checkpoint in evaluation mode; a directory with a config but no weights is initialised from `seed`."""
    directory = prepare(Path(directory))
    kwargs: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    if has_weights(directory):
        return AutoModelForCausalLM.from_pretrained(directory, **kwargs).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), **kwargs).eval()


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model."""
    return AutoTokenizer.from_pretrained(prepare(Path(directory)))


def facts(directory: str | Path) -> ModelFacts:
    """Read a model's sizes from its config, without its weights."""
    directory = prepare(Path(directory))
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return ModelFacts(
        architecture=type(skeleton).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        num_parameters=sum(p.numel() for p in skeleton.parameters()),
        max_positions=getattr(config, "max_position_embeddings", 0) or 0,
        has_pad_token=load_tokenizer(directory).pad_token_id is not None,
    )


def has_weights(directory: Path) -> bool:
    """Say whether a model directory holds weights or only a config."""
    return any(next(directory.glob(pattern), None) for pattern in _WEIGHTS)


def prepare(directory: Path) -> Path:
    """Return a directory that transformers loads directly; a GGUF file is dequantised once and kept beside it."""
    if (directory / "config.json").is_file():
        return directory
    gguf = sorted(directory.rglob("*.gguf")) if directory.is_dir() else []
    if len(gguf) != 1:
        found = f"{len(gguf)} GGUF files" if gguf else "neither config.json nor a GGUF file"
        raise ValueError(f"{directory} holds no model: expected config.json or one .gguf file, found {found}")
    return _dequantise(gguf[0])


def _dequantise(gguf: Path) -> Path:
    from transformers import GgufConfig

    target = gguf.parent / f"{gguf.stem}.dequantised"
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(dir=gguf.parent))
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            model.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
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


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the names, shapes and first values of all weights: cheap, and different for other weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:8].to("cpu", torch.float64).tolist()
        digest.update(json.dumps([name, list(parameter.shape), values]).encode())
    return digest.hexdigest()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a checkpoint that plain transformers loads."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
