"""Make a folder one that transformers loads directly: a GGUF file is dequantised once, into the cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from steerlab.data import sources
from steerlab.guards import counts, files
from steerlab.guards.faults import explained
from steerlab.models.diffusion import saved_pipelines
from steerlab.models.language import gguf_header, weights

_MOST_OWN, _MOST_COMPUTED = 10**6, 2**28
"""Parameters that a model may have beyond those in its GGUF file, before it is looked at which are missing; and numbers that
its class computes, such as masks."""


def prepare(directory: Path) -> Path:
    """Return a directory that transformers loads directly; a GGUF file is dequantised once, into the cache.

    Raises:
        ValueError: the directory holds no model, several, or what is no file.
    """
    files.check_folder(directory)
    is_model = (directory / "config.json").is_file()
    if is_model and (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds a model and an adapter (adapter_config.json), which transformers would put into it: merge it "
            "with peft, or take the adapter's files away"
        )
    if is_model or saved_pipelines.is_pipeline(directory):
        return directory
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory} holds an adapter without its model: merge it into the model with peft, and give that")
    gguf = sorted([*directory.glob("*.gguf"), *directory.glob("*/*.gguf")])
    if len(gguf) != 1:
        found = f"{len(gguf)} GGUF files" if gguf else "neither config.json nor a GGUF file"
        raise ValueError(f"{directory} holds no model: expected config.json, model_index.json or one .gguf file, found {found}")
    return _dequantise(gguf[0])


def _dequantise(gguf: Path) -> Path:
    from transformers import GgufConfig

    state = gguf.stat()
    # In the cache, by its content: what lies beside the file may be read only, or somebody else's.
    target = sources.cache_root() / "gguf" / sources.file_sha256(gguf, state.st_size, state.st_mtime_ns)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(target.with_suffix(".lock")):
        if not target.exists():
            with explained(f"the GGUF file {gguf}"):
                _check_gguf(gguf)
            scratches = tempfile.TemporaryDirectory(dir=target.parent)
            with explained(f"the GGUF file {gguf}"), weights.without_its_report(), scratches as scratch:
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    gguf.parent,
                    gguf_file=gguf.name,
                    quantization_config=GgufConfig(dequantize=True),
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
                model, loading = loaded
                weights.check_loading(gguf, model, loading)
                model.save_pretrained(Path(scratch, "model"))
                transformers.AutoTokenizer.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, trust_remote_code=False
                ).save_pretrained(Path(scratch, "model"))
                Path(scratch, "model").rename(target)
    return target


def _check_gguf(gguf: Path) -> None:
    """Refuse a header that claims more than the file holds, and sizes of which it holds no tensors: transformers would make
    them all.

    Raises:
        ValueError: with the first such claim.
    """
    files.check(gguf)
    if (gguf.parent / "adapter_config.json").exists():
        raise ValueError(f"{gguf.parent} holds a GGUF file and an adapter (adapter_config.json): take the adapter's files away")
    header = gguf_header.read(gguf)
    layers = [number for name, number in header.numbers.items() if name.endswith(".block_count")]
    if not layers or max(layers) > len(header.elements):
        said = f"that it has {max(layers):,} layers" if layers else "no number of layers"
        raise ValueError(f"{gguf} says {said}, and holds {len(header.elements)} tensors")
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    counts.check_counts(config.to_dict(), str(gguf))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    made, held = sum(p.numel() for p in model.parameters()), sum(header.elements.values())
    computed = sum(buffer.numel() for buffer in model.buffers())
    if made > held + _MOST_OWN or computed > held + _MOST_COMPUTED:
        raise ValueError(f"{gguf} describes a model of {made + computed:,} numbers, and holds {held:,}")
