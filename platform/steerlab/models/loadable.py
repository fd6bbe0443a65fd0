"""Check a model's folder, and convert a GGUF file into a checkpoint that transformers loads directly."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steerlab.data import sources
from steerlab.guards import counts, files, late
from steerlab.guards.faults import explained
from steerlab.models.diffusion import saved_pipelines
from steerlab.models.language import gguf_header, weights

if TYPE_CHECKING:
    import transformers
else:
    transformers = late.module("transformers")

_MOST_OWN, _MOST_COMPUTED = 10**6, 2**28
"""Largest number of parameters, and of elements of buffers such as masks, that a model may have beyond those in its GGUF file.
Whether parameters are missing is checked after loading; these bounds prevent an absurd header from filling the memory
before."""


def prepare(directory: Path) -> Path:
    """Return a directory that transformers loads directly: `directory` itself, or the dequantised copy of its GGUF file.

    The copy is made once and stored in the cache.

    Raises:
        ValueError: The directory does not hold a model, holds several models, an adapter, or entries that are not regular
            files.
    """
    transformers.logging.disable_progress_bar()  # before anything is loaded, because a command draws its own
    files.check_folder(directory)
    is_model = (directory / "config.json").is_file()
    if is_model and (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds a model and an adapter (adapter_config.json), which transformers would put into it: merge it "
            "with peft, or remove the adapter's files"
        )
    if is_model or saved_pipelines.is_pipeline(directory):
        return directory
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory} holds an adapter without its model: give the model, and the adapter as method: imported")
    # Repositories may have each quantisation in a folder of its own.
    gguf = sorted([*directory.glob("*.gguf"), *directory.glob("*/*.gguf")])
    if len(gguf) != 1:
        present = f"{len(gguf)} GGUF files" if gguf else "neither config.json nor a GGUF file"
        raise ValueError(
            f"{directory} holds no model: expected config.json, model_index.json or one .gguf file, found {present}"
        )
    return _dequantise(gguf[0])


def _dequantise(gguf: Path) -> Path:
    """Return the float32 checkpoint made of a GGUF file, after making it if it is not in the cache yet."""
    from transformers import GgufConfig

    state = gguf.stat()
    # The copy is in the cache, named by the hash of its content, because the file's own folder may be read-only or belong to
    # somebody else.
    target = sources.cache_root() / "gguf" / sources.file_sha256(gguf, state.st_size, state.st_mtime_ns)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Workers of one machine share the cache: the first one converts the file, the others wait.
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
                # The directory is renamed last, so that a directory under this name is always complete.
                Path(scratch, "model").rename(target)
    return target


def _check_gguf(gguf: Path) -> None:
    """Check a GGUF file before transformers allocates what its header describes.

    Raises:
        ValueError: The header claims more than the file holds, or describes a model that is larger than the file's tensors.
    """
    files.check(gguf)
    if (gguf.parent / "adapter_config.json").exists():
        raise ValueError(f"{gguf.parent} holds a GGUF file and an adapter (adapter_config.json): remove the adapter's files")
    header = gguf_header.read(gguf)
    layers = [number for name, number in header.numbers.items() if name.endswith(".block_count")]
    # The number of layers is checked before the model is built, because each layer costs time and memory for its modules, on
    # the meta device too.
    if not layers or max(layers) > len(header.elements):
        claim = f"that it has {max(layers):,} layers" if layers else "no number of layers"
        raise ValueError(f"{gguf} claims {claim}, and holds {len(header.elements)} tensors")
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    counts.check_counts(config.to_dict(), str(gguf))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    num_parameters, num_stored = sum(p.numel() for p in model.parameters()), sum(header.elements.values())
    computed = sum(buffer.numel() for buffer in model.buffers())
    if num_parameters > num_stored + _MOST_OWN or computed > num_stored + _MOST_COMPUTED:
        raise ValueError(f"{gguf} describes a model of {num_parameters + computed:,} numbers, and holds {num_stored:,}")
