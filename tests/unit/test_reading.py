"""What is read of a model is what the model computes: against transformers' own hidden states, on four architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from steerlab import patches
from steerlab.activations import reading
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import PADDING, Encoded, collate
from steerlab.job import ExtractConfig
from steerlab.steered.language import SteeredModel

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGS = {
    "llama": (LlamaConfig(vocab_size=64, max_position_embeddings=32, **SMALL), r"model\.layers\.\d+"),
    "qwen2": (Qwen2Config(vocab_size=64, max_position_embeddings=32, **SMALL), r"model\.layers\.\d+"),
    "gemma2": (
        Gemma2Config(vocab_size=64, max_position_embeddings=32, head_dim=8, sliding_window=4, **SMALL),
        r"model\.layers\.\d+",
    ),
    "gpt2": (GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=3, n_head=2), r"transformer\.h\.\d+"),
}
LENGTHS = (7, 3, 5, 1)


def random_model(name: str, encoder: Encoder, *stack: Any) -> SteeredModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name][0])
    return SteeredModel(model, encoder, stack)


def texts() -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(64, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Encoded(ids, [0] * len(ids), [False] * len(ids), [0] * len(ids)) for ids in rows]


def config(name: str, **fields: Any) -> ExtractConfig:
    select = {"modules": CONFIGS[name][1], **fields.pop("select", {})}
    return ExtractConfig.model_validate({"select": select, "batch_tokens": 16, **fields})


def own_hidden_states(model: PreTrainedModel, text: Encoded) -> tuple[Tensor, ...]:
    """Return (T, D) after every layer but the last, whose entry has the final norm behind it."""
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([text.input_ids]), output_hidden_states=True)
    return tuple(z_BTD[0] for z_BTD in out.hidden_states[1:-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_means_are_those_of_transformers(name: str, encoder: Encoder) -> None:
    model = random_model(name, encoder)
    expected = [own_hidden_states(model.model, text) for text in texts()]
    every = reading.TextReader(model, config(name, pooling=["none"]))
    found = reading.in_order(list(every.read(texts())))
    every.close()
    assert found.row_M.tolist() == [i for i, length in enumerate(LENGTHS) for _ in range(length)]
    assert found.token_index_M is not None and found.token_id_M is not None
    assert found.token_index_M.tolist() == [t for length in LENGTHS for t in range(length)]
    assert found.token_id_M.tolist() == [token for text in texts() for token in text.input_ids]
    pooled = reading.in_order(list(reading.TextReader(model, config(name, pooling=["mean"])).read(texts())))
    assert pooled.row_M.tolist() == [0, 1, 2, 3]
    for layer, place in enumerate(list(found.values)[:-1]):
        layers = [states[layer] for states in expected]
        torch.testing.assert_close(found.values[place], torch.cat(layers), rtol=1e-5, atol=1e-5)
        means = torch.stack([z_TD.mean(0) for z_TD in layers])
        torch.testing.assert_close(pooled.values[place], means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pooling", ["none", "mean", "last", "max"])
def test_either_padding_side_gives_the_same(name: str, pooling: str, encoder: Encoder) -> None:
    reader = reading.TextReader(random_model(name, encoder), config(name, pooling=[pooling]))
    left, right = (
        reading.in_order([reader.read_batch(collate(texts(), 0, side), torch.arange(len(LENGTHS)))])
        for side in ("left", "right")
    )
    assert left.row_M.tolist() == right.row_M.tolist()
    for place in left.values:
        torch.testing.assert_close(left.values[place], right.values[place], rtol=1e-5, atol=1e-5)


def test_widths_are_known_before_a_text_is_read(encoder: Encoder) -> None:
    chosen = config("llama", select={"modules": r"model\.layers\.0\.mlp(\.up_proj)?"}, pooling=["mean", "last"])
    reader = reading.TextReader(random_model("llama", encoder), chosen)
    assert reader.widths == {
        "model.layers.0.mlp@mean": 16,
        "model.layers.0.mlp@last": 16,
        "model.layers.0.mlp.up_proj@mean": 32,
        "model.layers.0.mlp.up_proj@last": 32,
    }
    assert {name: z_MD.shape[1] for name, z_MD in next(reader.read(texts())).values.items()} == reader.widths


def test_columns_stand_in_the_models_order_whatever_runs_first(encoder: Encoder) -> None:
    """A layer's MLP stands before its norms and runs between them."""
    chosen = config("llama", select={"modules": r"model\.layers\.0\.(mlp|.*layernorm)"})
    reader = reading.TextReader(random_model("llama", encoder), chosen)
    expected = [f"model.layers.0.{name}" for name in ("mlp", "input_layernorm", "post_attention_layernorm")]
    assert reader.modules == list(reader.widths) == list(next(reader.read(texts())).values) == expected


def test_patches_are_seen(encoder: Encoder) -> None:
    """A rotation of data tokens reaches what is read, and changes the model's key."""
    plain, rotated = random_model("llama", encoder), random_model("llama", encoder, patches.EmbeddingPatch(16, 1.5))
    data = [Encoded(text.input_ids, [1] * len(text), text.in_response, text.parts) for text in texts()]
    chosen = config("llama")
    a, b = (next(reading.TextReader(model, chosen).read(data)).values["model.layers.0"] for model in (plain, rotated))
    assert (a - b).abs().max() > 1e-3
    assert reading.model_key(plain) != reading.model_key(rotated)
    assert reading.model_key(plain) == reading.model_key(random_model("llama", encoder))
    other = random_model("llama", encoder, patches.EmbeddingPatch(16, 1.4))
    assert reading.model_key(rotated) != reading.model_key(other)


def test_a_text_without_a_selected_token_is_named(encoder: Encoder) -> None:
    reader = reading.TextReader(random_model("llama", encoder), config("llama", select={"positions": [[2, None]]}))
    with pytest.raises(ValueError, match=r"row 103: no token is selected by extract.select \(.*positions.*\)"):
        list(reader.read(texts(), first=100))


def test_long_texts_are_cut_and_counted(encoder: Encoder) -> None:
    rows = [{"text": "the red cat " * n} for n in (1, 9, 2)]
    reader = reading.TextReader(random_model("llama", encoder), config("llama", max_tokens=8))
    found, num_cut = reader.encode(rows, "text", 0)
    assert ([len(text) for text in found], num_cut) == ([4, 8, 7], 1)


def test_a_text_beyond_the_context_says_what_to_set(encoder: Encoder) -> None:
    reader = reading.TextReader(random_model("llama", encoder), config("llama", max_tokens=64))
    with pytest.raises(ValueError, match=r"row 7 has 37 tokens, .* holds 32: set extract.max_tokens to at most 32"):
        reader.encode([{"text": "red"}, {"text": "the red cat " * 12}], "text", 6)


def test_a_module_that_gives_no_vector_a_token_is_refused(encoder: Encoder) -> None:
    model = random_model("llama", encoder)
    chosen = config("llama", select={"modules": r"model\.layers\.0\.self_attn:1"})
    with pytest.raises(ValueError, match="holds a NoneType, not a tensor"):
        _ = reading.TextReader(model, chosen).widths
    model = random_model("llama", encoder)
    model.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"self_attn:1 gives a tensor of shape \(2, 2, 3, 3\), not one vector for each of"):
        _ = reading.TextReader(model, chosen).widths


def test_batches_are_of_similar_length_and_within_the_limit() -> None:
    lengths = [3, 9, 1, 20, 8, 2, 9]
    found = list(reading.batches(lengths, 20))
    assert found[0] == [3]
    assert sorted(i for chunk in found for i in chunk) == list(range(7))
    assert all(len(chunk) * max(lengths[i] for i in chunk) <= 20 for chunk in found)
    assert [max(lengths[i] for i in chunk) for chunk in found] == [20, 9, 8, 2]
    assert list(reading.batches(lengths, 1000)) == [[3, 1, 6, 4, 0, 5, 2]]
    few = list(reading.batches(lengths, 1000, 0.125))
    assert few == [[3], [1, 6, 4], [0], [5], [2]]
    assert len(list(reading.batches(list(range(1, 513)), 10**6, 0.125))) < 25
    assert list(reading.batches([50], 20)) == [[0]], "a text longer than the limit goes alone"


def test_padding_is_never_kept(encoder: Encoder) -> None:
    reader = reading.TextReader(random_model("llama", encoder), config("llama", pooling=["none"]))
    for vectors in reader.read(texts()):
        assert vectors.role_M is not None
        assert not (vectors.role_M == PADDING).any()
