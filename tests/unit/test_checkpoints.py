"""What a checkpoint must be before anything starts: complete, of a language model, without code of its own unless trusted."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

from steerlab import models
from steerlab.job import Job, ModelConfig
from steerlab.run import check
from steerlab.stages import Plan

WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tiny_dir: Path, tmp_path: Path) -> Path:
    """A complete checkpoint of a tiny Llama."""
    zoo.write("llama", tmp_path / "llama", tiny_dir)
    return tmp_path / "llama"


def rewritten(directory: Path, change: Any) -> None:
    """Change the tensors of a checkpoint."""
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    """What is said before the start; loading says the same."""
    with pytest.raises(ValueError) as before:
        models.check_checkpoint(directory, "sdpa")
    with pytest.raises(ValueError) as while_loading:
        models.load_model(directory)
    assert str(before.value) == str(while_loading.value) and "\n" not in str(before.value)
    return str(before.value)


def test_missing_tensors_are_named(llama: Path) -> None:
    rewritten(llama, lambda tensors: {n: t for n, t in tensors.items() if ".1." not in n})
    said = refusal(llama)
    assert "model.layers.1.input_layernorm.weight is missing" in said and "and 4 more" in said


def test_tensors_of_other_shapes_are_named(llama: Path) -> None:
    rewritten(llama, lambda tensors: {**tensors, "model.norm.weight": torch.zeros(7)})
    assert refusal(llama).endswith("is not that of a LlamaForCausalLM: model.norm.weight is [7], not [32]")


def test_tensors_without_a_place_are_warned_of(llama: Path) -> None:
    rewritten(llama, lambda tensors: {**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(3, 3)})
    with pytest.warns(UserWarning, match=r"does not have are ignored: model\.layers\.2\.mlp\.up_proj\.weight"):
        models.check_checkpoint(llama, "sdpa")


def test_what_is_tied_or_made_again_is_not_missing(llama: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """Tied heads, and buffers that old checkpoints hold."""
    zoo.write("gpt2", tmp_path / "gpt2", tiny_dir, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "gpt2" / WEIGHTS)
    models.check_checkpoint(tmp_path / "gpt2", "sdpa")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewritten(llama, lambda tensors: {**tensors, buffer: torch.zeros(4)})
    models.check_checkpoint(llama, "sdpa")


def test_a_file_that_is_cut_short_is_named(llama: Path) -> None:
    content = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert f"{llama / WEIGHTS} cannot be read and may be truncated" in refusal(llama)


def test_a_shard_that_is_not_there_is_named(llama: Path) -> None:
    model = models.load_model(llama)
    (llama / WEIGHTS).unlink()
    model.save_pretrained(llama, max_shard_size="20KB")
    models.check_checkpoint(llama, "sdpa")
    shard = sorted(llama.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"files are missing: {shard.name}" in refusal(llama)


def test_an_index_without_any_shard_is_no_config_without_weights(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    (llama / "model-00001-of-00001.safetensors").unlink()
    assert "1 of 1 files are missing" in refusal(llama)


def test_a_bin_checkpoint_is_loaded(llama: Path) -> None:
    tensors = load_file(llama / WEIGHTS)
    (llama / WEIGHTS).unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    models.check_checkpoint(llama, "sdpa")
    found = models.load_model(llama).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_model_without_sdpa_runs_with_eager_and_says_so(tiny_dir: Path, tmp_path: Path) -> None:
    without = 0
    for name, architecture in (("gemma2", "Gemma2ForCausalLM"), ("gptj", "GPTJForCausalLM")):
        zoo.write(name, tmp_path / name, tiny_dir)
        if getattr(transformers, architecture)._supports_sdpa:  # GPT-J from transformers 5.24 on
            models.check_checkpoint(tmp_path / name, "sdpa")
            continue
        without += 1
        with pytest.warns(UserWarning, match=f"{architecture} has no attention kernel sdpa: it runs with eager"):
            models.check_checkpoint(tmp_path / name, "sdpa")
        assert models.load_model(tmp_path / name).config._attn_implementation == "eager"
    assert without
    zoo.write("bloom", tmp_path / "bloom", tiny_dir)
    with pytest.raises(ValueError, match="BloomForCausalLM has no such kernel; use sdpa or eager"):
        models.check_checkpoint(tmp_path / "bloom", "flash_attention_2")


@pytest.mark.parametrize(
    ("settings", "library"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, "optimum"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
    ],
)
def test_quantised_weights_without_their_library_are_refused(llama: Path, settings: dict[str, Any], library: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ValueError, match=rf"the weights are quantised \({settings['quant_method']}\).*{library}") as said:
        models.check_checkpoint(llama, "sdpa")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "BertForMaskedLM", "ViTForImageClassification"])
def test_another_head_is_refused(llama: Path, architecture: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    with pytest.raises(ValueError, match=f"holds a {architecture}, which is not a causal language model"):
        models.facts(llama)


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="holds an adapter without its model: give the model, and the adapter as method: imported"
    ):
        models.facts(tmp_path)


MODEL_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path(__file__).parent / "ran").touch()

class OwnConfig(LlamaConfig):
    model_type = "own-kind"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint whose class comes with it; nobody is there to answer a question."""
    config = json.loads((llama / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed = {**config, "model_type": "own-kind", "architectures": ["OwnModel"], "auto_map": auto_map}
    (llama / "config.json").write_text(json.dumps(changed))
    (llama / "own.py").write_text(MODEL_CODE)

    def asked(*_: Any) -> str:
        raise AssertionError("something was asked on standard input")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return llama


def test_code_of_a_checkpoint_runs_only_where_the_job_says_so(own_code: Path) -> None:
    for call in (models.facts, models.load_model, models.skeleton):
        with pytest.raises(ValueError, match=r"needs code that comes with the checkpoint; set model\.trust_remote_code: true"):
            call(own_code)
    found = models.load_model(own_code, trust_remote_code=True)
    assert type(found).__name__ == "OwnModel" and models.facts(own_code, True).architecture == "OwnModel"
    models.check_checkpoint(own_code, "sdpa", trust_remote_code=True)


def test_a_tokenizer_with_code_is_refused_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = llama / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    with pytest.raises(ValueError, match="the tokenizer needs code that comes with the checkpoint"):
        models.load_tokenizer(llama)


def test_the_keys_of_artifacts_know_of_trusted_code_only() -> None:
    assert "trust_remote_code" not in ModelConfig(source="x").model_dump()
    assert ModelConfig(source="x", trust_remote_code=True).model_dump()["trust_remote_code"] is True


def test_ids_beyond_the_embedding_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    """But not those of special tokens that no prompt has, as Gemma 3 has one for images."""
    tokenizer: Any = models.load_tokenizer(tiny_dir)
    zoo.write("llama", tmp_path / "short", tiny_dir, vocab_size=len(tokenizer) - 2)
    with pytest.raises(ValueError, match=rf"2 ids of the tokenizer, such as {len(tokenizer) - 2} .* lie beyond the .* rows"):
        check(Plan.of(job(tmp_path / "short")))
    zoo.write("llama", tmp_path / "more", tiny_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "more")
    check(Plan.of(job(tmp_path / "more")))
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match=r"1 ids of the tokenizer, such as \d+ for 'word'"):
        check(Plan.of(job(tmp_path / "more")))


def test_a_module_that_never_runs_is_named_before_the_start(tiny_dir: Path, tmp_path: Path) -> None:
    zoo.write("gpt2", tmp_path / "gpt2", tiny_dir)
    with pytest.raises(ValueError, match=r"2 of 2 modules never run in a forward pass: transformer\.h\.0\.attn\.attn_drop"):
        check(Plan.of(job(tmp_path / "gpt2", r".*attn_dropout")))
    check(Plan.of(job(tmp_path / "gpt2", r".*ln_1")))
    with pytest.raises(ValueError, match=r"extract.select: the value of transformer holds a Base\w+, not a tensor"):
        check(Plan.of(job(tmp_path / "gpt2", "transformer")))


@pytest.mark.parametrize(("name", "modules"), [("gemma3n_text", r"model.layers.\d+"), ("mixtral", r".*experts.act_fn")])
def test_a_module_without_a_value_for_each_token_is_named_before_the_start(
    name: str, modules: str, tiny_dir: Path, tmp_path: Path
) -> None:
    """Gemma 3n's layers hold four streams before the rows; a router's experts see some of the tokens, in another order."""
    zoo.write(name, tmp_path, tiny_dir)
    with pytest.raises(ValueError, match=r"has the axes \(.*\) for 3 rows of 11 tokens: it has no vector for each token"):
        check(Plan.of(job(tmp_path, modules)))
    check(Plan.of(job(tmp_path, r".*post_attention_layernorm")))


def job(source: Path, modules: str = ".*norm") -> Job:
    """A job that reads texts of the tiny world."""
    from steerlab.stages import JobType

    raw = {
        "name": "read", "model": {"source": str(source)}, "method": {"name": "none"},
        "data": {"prompt_style": "plain", "source": {"source": "tiny:instructions/test", "format": "instruction"}},
        "extract": {"select": {"modules": modules}},
    }  # fmt: skip
    return JobType.model_validate(raw)
