"""A matrix of architectures: each decodes, scores, reads, folds and steers as plain transformers would, or is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers.models.auto import modeling_auto

from steerlab import models
from steerlab.activations.reading import batches
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, CannotFold, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered.language import SteeredModel

DIFFERENT = ["llama", "gpt2", "opt", "bloom", "falcon/40b", "gemma2", "phi3", "gpt_oss", "mamba", "qwen3_next", "llava"]
OTHERS = [
    "afmoe", "aya_vision", "apertus", "arcee", "aria_text", "bamba", "bitnet", "biogpt", "codegen", "cohere", "cohere2",
    "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "falcon", "falcon/rw", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma3",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt_bigcode", "gpt_bigcode/heads", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "granite_swa", "hy_v3",
    "internlm3", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jais2", "jamba", "jetmoe", "lfm2", "lfm2_moe", "llama4",
    "llama4_text", "mamba2", "minicpm3", "minimax", "minimax_m2", "ministral", "ministral3", "mimo_v2_flash", "mistral",
    "mistral3", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "openai-gpt", "persimmon", "phi4_multimodal", "phi", "phimoe", "qwen2", "qwen2_moe",
    "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "recurrent_gemma", "rwkv",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu", "zaya",
]  # fmt: skip
REFUSED = {
    "bert": "whose tokens see those after them; the config of a decoder has is_decoder: true",
    "roberta": "whose tokens see those after them; the config of a decoder has is_decoder: true",
    "t5": "holds a T5, which is not a causal language model: it has an encoder and a decoder",
    "bart": "holds a Bart, which is not a causal language model: it has an encoder and a decoder",
    "vit": "holds a ViT, which is not a causal language model",
    "clip": "holds a CLIP, which is not a causal language model",
    "xlm": "whose tokens see those after them; the config of a decoder has is_decoder: true",
    "xlnet": "holds a XLNet, which is not a causal language model: its tokens see those after them",
    "cpmant": "holds a CpmAnt, which is not a causal language model: its tokens see those after them",
    "reformer": "holds a Reformer, which is not a causal language model: its attention needs rows of fixed lengths",
    "blip": "holds a BlipForConditionalGeneration, which needs further inputs: pixel_values",
}
TEXTS = ("give the topic", "say red and give the topic of lamp lamp", "lamp")
NEW_TOKENS = 6
STRENGTH = 0.7


@pytest.fixture
def made(request: pytest.FixtureRequest, tiny_dir: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A tiny model of the architecture that the test names, as transformers made it, and the folder that it was saved in."""
    return zoo.write(request.param, tmp_path, tiny_dir), tmp_path


@pytest.mark.parametrize("made", DIFFERENT, indirect=True)
def test_a_model_is_what_transformers_makes_of_it(made: tuple[Any, Path]) -> None:
    check(*made)


@pytest.mark.slow
@pytest.mark.parametrize("made", OTHERS, indirect=True)
def test_every_other_model_is_too(made: tuple[Any, Path]) -> None:
    check(*made)


@torch.no_grad()
def check(plain: Any, directory: Path) -> None:
    """Compare steerlab's model of a checkpoint with transformers' own, and print a line of a table."""
    models.check_checkpoint(directory, "eager")
    encoder = Encoder(models.load_tokenizer(directory), prompt_style="plain")
    steered = SteeredModel(models.load_model(directory), encoder)
    prompts = [encoder.conversation(text, "red") for text in TEXTS]
    rows = [encoder.encode(prompt).input_ids for prompt in prompts]
    assert len({len(row) for row in rows}) == len(rows), "rows of different lengths, so that a batch is padded"
    check_generation(plain, steered, prompts, rows)
    check_scores(plain, steered, prompts, rows)
    check_hidden_states(plain, steered, prompts, rows)
    check_strength_0(steered, prompts)
    folded = {kind: what_folding_says(directory, kind, prompts) for kind in ("linear", "norm")}
    padded = "padded" if models.reads_padding(plain) else "one length at a time"
    print(f"\n{type(plain).__name__}: {padded}, {steered.model.config._attn_implementation}, folds: {folded}")


def check_generation(plain: Any, steered: SteeredModel, prompts: Sequence[Any], rows: Sequence[list[int]]) -> None:
    """Compare a batch with transformers' greedy continuations, one by one without padding."""
    eos = plain.generation_config.eos_token_id
    for row, found in zip(rows, steered.generate(prompts, max_new_tokens=NEW_TOKENS)[0], strict=True):
        ids = torch.tensor([row])
        own = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, forced_eos_token_id=None
        )
        expected = own[0, ids.shape[1] :].tolist()
        assert found.num_tokens == len(expected) and found.finished == (expected[-1] == eos)
        assert found.text == steered.encoder.decode(expected)


def check_scores(plain: Any, steered: SteeredModel, prompts: Sequence[Any], rows: Sequence[list[int]]) -> None:
    for row, scored in zip(rows, steered.token_log_probs(prompts), strict=True):
        logits_TV = plain(input_ids=torch.tensor([row])).logits[0].float()
        own_T = logits_TV.log_softmax(-1)[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.log_prob), own_T, atol=2e-3, rtol=1e-3)


def plain_states(plain: Any, names: Sequence[str], row: Sequence[int]) -> Tensor:
    """Return the embedding of a row and what every layer makes of it, by transformers alone."""
    seen: list[Tensor] = []
    layers = [plain.get_input_embeddings(), *map(plain.get_submodule, names)]
    keep = lambda _m, _i, out: seen.append(taps.value_at(out, None, "a layer")[0].float())  # noqa: E731
    handles = [layer.register_forward_hook(keep) for layer in layers]
    plain(input_ids=torch.tensor([list(row)]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def check_hidden_states(plain: Any, steered: SteeredModel, prompts: Sequence[Any], rows: Sequence[list[int]]) -> None:
    """Compare the embedding and every layer's output, and those of a padded batch on the tokens that are none."""
    names = models.layer_names(plain)
    assert len(names) == plain.config.get_text_config(decoder=True).num_hidden_layers
    expected = [plain_states(plain, names, row) for row in rows]
    for own_LTD, (states_LTD, _) in zip(expected, steered.hidden_states(prompts), strict=True):
        torch.testing.assert_close(states_LTD, own_LTD, atol=1e-3, rtol=1e-3)
    reader = taps.Reader(steered.model, [taps.Tap(name) for name in names])
    batch = collate([steered.encoder.encode(prompt) for prompt in prompts], steered.encoder.pad_id)
    found = reader(**batch.read_inputs)
    reader.close()
    for number, own in enumerate(expected):
        padded = torch.stack([found[name][number, : own.shape[1]].float() for name in names])
        torch.testing.assert_close(padded, own[1:], atol=1e-3, rtol=1e-3)


def patch_on(steered: SteeredModel, modules: Sequence[str], shifted: bool = True) -> ActivationPatch:
    """A patch that changes what some modules give."""
    reader = taps.Reader(steered.model, [taps.Tap(name) for name in modules])
    widths = {name: value.shape[-1] for name, value in reader(**models.small_inputs(steered.model)).items()}
    reader.close()
    generator = torch.Generator().manual_seed(0)

    def drawn(width: int) -> Tensor:
        return 0.3 * torch.randn(width, generator=generator)

    maps = {n: AffineMap(1 + drawn(w), drawn(w) if shifted else torch.zeros(w)) for n, w in widths.items()}
    return ActivationPatch.from_maps(maps, Selection(modules="|".join(map(re.escape, modules))))


def scores(steered: SteeredModel, prompts: Sequence[Any], strength: float = 1.0) -> Tensor:
    return torch.cat([torch.tensor(row.log_prob) for row in steered.token_log_probs(prompts, strength=strength)])


def check_strength_0(steered: SteeredModel, prompts: Sequence[Any]) -> None:
    """The patch acts, and at strength 0 the model is itself bit for bit, while it writes as well."""
    before, written = scores(steered, prompts), steered.generate(prompts, max_new_tokens=NEW_TOKENS)
    steered.detach()
    patched = SteeredModel(steered.model, steered.encoder, (patch_on(steered, models.layer_names(steered.model)),))
    assert torch.equal(scores(patched, prompts, 0.0), before)
    assert (scores(patched, prompts) - before).abs().max() > 0.01
    assert patched.generate(prompts, max_new_tokens=NEW_TOKENS, strengths=(0.0,)) == written
    patched.detach()


def what_folding_says(directory: Path, kind: str, prompts: Sequence[Any]) -> str:
    """Fold a map on a linear layer or on a norm; it computes what the patched model does, or there is a reason."""
    steered = SteeredModel(models.load_model(directory), Encoder(models.load_tokenizer(directory), prompt_style="plain"))
    layer = models.layer_names(steered.model)[-1]
    width = models.embedding_shape(steered.model)[1]
    modules = steered.model.get_submodule(layer).named_modules()
    inside = {name: module for name, module in modules if module_is(module, kind, width)}
    if not inside:
        return "there is none"
    written = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2")  # to the hidden states, rather than to a router or a query
    last = next((name for name in reversed(inside) if name.endswith(written)), next(reversed(inside)))
    name = f"{layer}.{last}"
    plain = scores(steered, prompts)
    steered.detach()
    folded = SteeredModel(steered.model, steered.encoder, (patch_on(steered, [name], shifted=kind == "norm"),))
    expected = scores(folded, prompts, STRENGTH)
    try:
        folded.fold(STRENGTH)
    except CannotFold as reason:
        return str(reason)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(scores(folded, prompts), expected, atol=1e-3, rtol=1e-3)
    return "yes"


def module_is(module: torch.nn.Module, kind: str, width: int) -> bool:
    """Say whether a module is of a kind and writes to the hidden states: no choice of experts, which jumps."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != (2 if kind == "linear" else 1):
        return False
    if kind == "norm":
        return True
    is_linear = type(module) is torch.nn.Linear or models.stores_transposed(module)
    return is_linear and models.linear_shape(module)[0] == width


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_causal_language_model_is_refused_in_one_line(name: str, tiny_dir: Path, tmp_path: Path) -> None:
    zoo.config(name).save_pretrained(tmp_path)
    models.load_tokenizer(tiny_dir).save_pretrained(tmp_path)
    for call in (models.facts, models.load_model):
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])) as refusal:
            call(tmp_path)
        assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_a_row_beyond_the_first_context_changes_no_other_row(tiny_dir: Path, tmp_path: Path) -> None:
    """Phi 3's rotary embedding becomes that of the longest row of a batch: here 8 and 6 tokens beside 14, first context 10."""
    zoo.write("phi3/longrope", tmp_path, tiny_dir)
    steered = SteeredModel(models.load_model(tmp_path), Encoder(models.load_tokenizer(tmp_path), prompt_style="plain"))
    prompts = [steered.encoder.conversation(text, "red") for text in TEXTS]
    rows = [steered.encoder.encode(prompt) for prompt in prompts]
    assert sorted(len(row) > models.alike_up_to(steered.model) for row in rows) == [False, False, True]
    for number, prompt in enumerate(prompts):
        (alone,) = steered.token_log_probs([prompt])
        together = steered.token_log_probs(prompts)[number]
        torch.testing.assert_close(torch.tensor(together.log_prob), torch.tensor(alone.log_prob), atol=1e-4, rtol=1e-4)
        assert steered.generate(prompts, max_new_tokens=2)[0][number] == steered.generate([prompt], max_new_tokens=2)[0][0]
    batch = collate(rows, steered.encoder.pad_id)
    wrong = steered.logits(batch, 1.0)[0, : len(rows[0])]
    right = steered.logits(collate(rows[:1], steered.encoder.pad_id), 1.0)[0]
    assert (wrong - right).abs().max() > 0.1, "in one batch they do change"
    chunks = list(batches([len(row) for row in rows], 4096, alike=models.alike_up_to(steered.model)))
    assert sorted(map(sorted, chunks)) == [[0, 2], [1]]


UNMADE = {"blt"}  # of which the zoo makes a large one
LISTED = sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*DIFFERENT, *OTHERS, *REFUSED, *UNMADE})


@pytest.mark.slow
@pytest.mark.parametrize("name", LISTED)
def test_every_type_that_transformers_lists_is_refused_or_reads_from_left_to_right(
    name: str, tiny_dir: Path, tmp_path: Path
) -> None:
    """By numbers: another last token changes no logits before it, and padding on the left is read as the probe says."""
    try:
        plain = zoo.write(name, tmp_path, tiny_dir)
    except Exception as error:  # what its config wants besides is not known here
        pytest.skip(f"no small {name} can be made: {error}")
    try:
        models.facts(tmp_path)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
        return
    ids = torch.arange(5, 14)[None]
    other = ids.clone()
    other[0, -1] += 1
    try:
        before, after = (plain(input_ids=row).logits[0, :-1] for row in (ids, other))
    except Exception as error:
        pytest.skip(f"the small {name} does not run: {error}")
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)
