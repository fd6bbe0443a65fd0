"""What ASIDE's analyses compute, against naive loops: embeddings by role, attention by role, the concept's activation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

from steerlab import models
from steerlab.data.worlds import tiny_checkpoint
from steerlab.evaluation.asking.items import Numbered
from steerlab.evaluation.statistics.sample_kinds import heat_map, histogram
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.roles import attention_by_role, embedding_shift, instruction_concept, probing
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, INSTRUCTION
from steerlab.models.language.attention import attends
from steerlab.patches import EmbeddingPatch
from steerlab.steered.language import SteeredModel

ROWS, SEPARATION = "tiny:instructions/test", "tiny:separation/test"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on disk, with the weights of seed 0."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write_model(path)
    models.save_model(models.load_model(path, seed=0), AutoTokenizer.from_pretrained(path), path)
    return path


def build(directory: Path, **rotation: Any) -> SteeredModel:
    """The model on disk with a patch on its embeddings, without arguments with none."""
    model = models.load_model(directory)
    patches = (EmbeddingPatch(model.config.hidden_size, **rotation),) if rotation else ()
    return SteeredModel(model, Encoder(AutoTokenizer.from_pretrained(directory), prompt_style="plain"), patches)


def values_of(result: Any, strength: float = 1.0) -> dict[str, float]:
    return {name.partition("/")[2]: metric.value for name, metric in summarise_all(result)[strength].items()}


# Embeddings


@pytest.mark.parametrize("angle_rad", [math.pi / 2, 0.7])
def test_a_rotation_turns_every_token_by_its_angle_and_keeps_norms_and_ranks(directory: Path, angle_rad: float) -> None:
    """At half the strength by half the angle, and at 0 not at all: the table has one form of each token."""
    model = build(directory, angle_rad=angle_rad)
    config = embedding_shift.Config(limit=60, strengths=(1.0, 0.5, 0.0), base=str(directory))
    result = embedding_shift.run(model, config)
    for strength in config.strengths:
        found = values_of(result, strength)
        assert found["role_cosine"] == pytest.approx(math.cos(strength * angle_rad), abs=1e-5)
        assert found["role_distance"] == pytest.approx(2 * math.sin(strength * angle_rad / 2), abs=1e-5)
        assert found["norm_instruction"] == pytest.approx(found["norm_data"], rel=1e-5)
        assert found["rank_instruction"] == pytest.approx(found["rank_data"], rel=1e-5)
        # The weights were not trained: the instruction form is the base's embedding, and the data form is what was rotated.
        assert found["base_cosine_instruction"] == pytest.approx(1.0) and found["base_distance"] == 0.0
        assert found["base_cosine_data"] == pytest.approx(math.cos(strength * angle_rad), abs=1e-5)
        assert found["base_rank"] is None, "nothing moved"


def test_the_forms_of_tokens_are_those_that_the_model_computes(directory: Path) -> None:
    """The reference is the table itself, special tokens left out, and a shift by the patch's own vectors."""
    model = build(directory, shift=True)
    patch: Any = model.patches[0]
    torch.nn.init.normal_(patch.shift_RD, generator=torch.Generator().manual_seed(0))
    ids = embedding_shift.vocabulary(model, embedding_shift.Config(limit=None))
    assert not {*ids} & {*model.encoder.tokenizer.all_special_ids} and len(ids) > 200
    table_ND = model.model.get_input_embeddings().weight[ids].detach()
    for role in (INSTRUCTION, DATA):
        torch.testing.assert_close(model.embeddings(ids, role), table_ND + patch.shift_RD[role].detach())
        assert torch.equal(model.embeddings(ids, role, strength=0.0), table_ND)


def test_the_measures_of_two_forms_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    instruction_ND, data_ND, base_ND = (torch.randn(9, 4, generator=generator) for _ in range(3))
    by_token, ranks = embedding_shift.compared(instruction_ND, data_ND, base_ND)
    for n in range(9):
        i, d, b = instruction_ND[n], data_ND[n], base_ND[n]
        assert by_token["role_cosine"][n] == pytest.approx(float(i @ d / (i.norm() * d.norm())), abs=1e-6)
        assert by_token["role_distance"][n] == pytest.approx(float((i - d).norm() / i.norm()), rel=1e-5)
        assert by_token["base_cosine_data"][n] == pytest.approx(float(b @ d / (b.norm() * d.norm())), abs=1e-6)
        assert by_token["base_distance"][n] == pytest.approx(float((i - b).norm() / b.norm()), rel=1e-5)
    assert ranks["base_rank"] == pytest.approx(naive_rank(instruction_ND - base_ND), rel=1e-5)


def naive_rank(x_ND: torch.Tensor) -> float:
    """Exponential of the entropy of the singular values, from a singular value decomposition."""
    singular = torch.linalg.svdvals(x_ND.double())
    share = singular / singular.sum()
    return math.exp(-sum(p * math.log(p) for p in share.tolist() if p > 1e-9))


def test_the_effective_rank_counts_directions() -> None:
    assert embedding_shift.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert embedding_shift.effective_rank(torch.ones(7, 3)) == pytest.approx(1)
    assert embedding_shift.effective_rank(torch.zeros(4, 3)) is None
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert embedding_shift.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(wanted)
    x_ND = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    assert embedding_shift.effective_rank(x_ND) == pytest.approx(naive_rank(x_ND))
    assert embedding_shift.effective_rank(x_ND.T) == pytest.approx(naive_rank(x_ND))


def test_a_base_of_another_width_is_refused(directory: Path) -> None:
    facts = replace(models.facts(directory), hidden_size=999)
    with pytest.raises(ValueError, match=r"base: .* has embeddings of width 128, but the job's model of 999"):
        embedding_shift.check(embedding_shift.Config(base=str(directory)), facts)


# Attention


def test_shares_of_attention_are_those_of_a_loop() -> None:
    """Of hand-made weights: two layers, three heads, six tokens, of which the last two are the response."""
    weights_LHTT = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).tril().softmax(-1)
    parts = {"instruction": [1, 2], "data": [3], "response": [4, 5], "other": [0]}
    masks = {name: torch.tensor([t in places for t in range(6)]) for name, places in parts.items()}
    found = attention_by_role.shares(weights_LHTT, masks)
    for name, places in parts.items():
        for layer in range(2):
            for head in range(3):
                naive = sum(float(weights_LHTT[layer, head, t, place]) for t in (4, 5) for place in places) / 2
                assert float(found[name][layer, head]) == pytest.approx(naive, rel=1e-5)


def test_attention_is_that_of_the_eager_kernel_and_the_kernel_comes_back(directory: Path) -> None:
    """The four shares sum to 1 in every layer; single heads have the layer's as their mean; roles are the prompt's own."""
    model = build(directory, angle_rad=math.pi / 2)
    kernel = model.model.config._attn_implementation
    config = attention_by_role.Config(source=ROWS, limit=3, heads=True, strengths=(1.0, 0.0))
    result = attention_by_role.run(model, config)
    assert model.model.config._attn_implementation == kernel == "sdpa"
    found = values_of(result)
    heads = model.model.config.num_attention_heads
    for layer in range(1, model.num_layers + 1):
        assert sum(found[f"{part}_layer_{layer:02d}"] for part in attention_by_role.PARTS) == pytest.approx(1)
        by_head = [found[f"data_layer_{layer:02d}_head_{head:02d}"] for head in range(1, heads + 1)]
        assert sum(by_head) / heads == pytest.approx(found[f"data_layer_{layer:02d}"])
    assert sum(found[part] for part in attention_by_role.PARTS) == pytest.approx(1)
    plain = attention_by_role.run(build(directory), config.model_copy(update={"strengths": (1.0,)}))
    assert values_of(plain) == pytest.approx(values_of(result, 0.0)) and values_of(plain) != pytest.approx(found)


def test_weights_are_causal_rows_that_sum_to_one(directory: Path) -> None:
    model = build(directory)
    prompt = model.encoder.conversation("count the words", "one two three", "three")
    ((weights_LHTT, encoded),) = model.attention([prompt])
    assert weights_LHTT.shape == (model.num_layers, model.model.config.num_attention_heads, len(encoded), len(encoded))
    torch.testing.assert_close(weights_LHTT.sum(-1), torch.ones(weights_LHTT.shape[:3]))
    assert not weights_LHTT.triu(1).any()


def test_uniform_attention_has_a_density_near_one() -> None:
    """Instruction and data then get what their share of the tokens is, but for the response's own tokens."""
    T = 400
    weights_LHTT = (torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]).expand(1, 1, T, T)
    position = torch.arange(T)
    masks = {"instruction": position < 100, "data": (position >= 100) & (position < 396), "response": position >= 396}
    masks["other"] = torch.zeros(T, dtype=torch.bool)
    found = dict(attention_by_role._named(weights_LHTT, masks, heads=False))
    assert found["instruction_density_layer_01"] == pytest.approx(1, abs=0.01)
    assert found["data_density_layer_01"] == pytest.approx(1, abs=0.01)
    assert found["instruction_layer_01"] == pytest.approx(100 / 398, abs=0.001)


def test_a_model_without_attention_is_refused_when_the_job_is_checked(directory: Path) -> None:
    with torch.device("meta"):
        recurrent = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16))
    assert not attends(recurrent)
    facts = models.facts(directory)
    assert facts.attends
    attention_by_role.check(attention_by_role.Config(source=ROWS), facts)
    with pytest.raises(ValueError, match="task: MambaForCausalLM has no attention weights"):
        attention_by_role.check(
            attention_by_role.Config(source=ROWS), replace(facts, attends=False, architecture="MambaForCausalLM")
        )
    with pytest.raises(ValueError, match=r"returns attention weights for 0 of its \d layers"):
        models.attention_weights(models.load_model(directory), object())


# Concept

CONCEPT: Mapping[str, Any] = {"source": ROWS, "separation_source": SEPARATION, "num_rows": 24, "limit": 5}


@pytest.fixture(scope="module")
def concept(directory: Path) -> tuple[SteeredModel, Any]:
    """A rotated model and the concept's activations in it."""
    model = build(directory, angle_rad=math.pi / 2)
    return model, instruction_concept.run(model, instruction_concept.Config(**CONCEPT, texts=2, bins=7))


def test_the_concept_is_that_of_probing(concept: tuple[SteeredModel, Any]) -> None:
    """A positive activation is what `probing` calls instruction, so the two tasks agree on shares and accuracy."""
    model, result = concept
    same = values_of(probing.run(model, probing.Config(**CONCEPT, measures=("concept",))))
    found = values_of(result)
    assert found["active_injected"] == pytest.approx(same["probe_as_instruction"])
    assert found["accuracy"] == pytest.approx(same["concept_accuracy"])


def test_the_comparison_of_injected_and_clean_is_the_area_under_the_curve() -> None:
    injected_N, clean_N = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([0.3, 0.0, -2.0, 1.0])
    read: Any = instruction_concept.Activations(0, injected_N, clean_N, injected_N, None)  # type: ignore[arg-type]
    found = {o.metric.partition("/")[2]: (o.value, o.weight) for o in instruction_concept._observe("a", read, 1.0)}
    area = roc_auc_score([1] * 3 + [0] * 4, [*injected_N.tolist(), *clean_N.tolist()])
    assert found["injected_above_clean"] == (pytest.approx(area), 1.0)
    assert found["activation_injected"] == (pytest.approx(1.3 / 3), 3.0)
    assert found["active_clean"] == (pytest.approx(0.5), 4.0)


def test_the_samples_hold_both_groups_and_a_value_for_each_token(concept: tuple[SteeredModel, Any]) -> None:
    _, result = concept
    drawn, *texts = result.samples
    assert drawn["kind"] == "histogram" and [*drawn["groups"]] == ["injected", "clean"] and len(drawn["edges"]) == 8
    assert all(sum(shares) == pytest.approx(1) for shares in drawn["groups"].values())
    assert len(texts) == 2 and all(text["kind"] == "tokens" and len(text["tokens"]) == len(text["values"]) for text in texts)
    # The mean over the histogram's groups is that of the metric, up to the width of a bin.
    middles = [(a + b) / 2 for a, b in zip(drawn["edges"], drawn["edges"][1:], strict=False)]
    mean = sum(m * share for m, share in zip(middles, drawn["groups"]["injected"], strict=True))
    assert mean == pytest.approx(values_of(result)["activation_injected"], abs=drawn["edges"][1] - drawn["edges"][0])


def test_a_histogram_counts_in_common_bins() -> None:
    drawn: Any = histogram("a", 1.0, {"x": [0.0, 1.0, 1.0, 3.9], "y": [4.0], "none": []}, unit="u", bins=4)
    assert drawn["edges"] == [0, 1, 2, 3, 4] and drawn["sizes"] == {"x": 4, "y": 1}
    assert drawn["groups"] == {"x": [0.25, 0.5, 0.0, 0.25], "y": [0, 0, 0, 1.0]}


def test_a_heat_map_has_one_finite_value_for_each_token() -> None:
    assert heat_map("a", 1.0, ["x", "y"], [0.123456, None], unit="u")["values"] == [0.1235, None]
    with pytest.raises(ValueError, match="1 values for 2 tokens"):
        heat_map("a", 1.0, ["x", "y"], [1.0], unit="u")
    with pytest.raises(ValueError, match="NaN or infinite"):
        heat_map("a", 1.0, ["x"], [math.nan], unit="u")


@pytest.mark.parametrize("style", ["plain", "aside"])
def test_the_parts_of_an_answered_row_are_its_texts_without_headings(directory: Path, style: Any) -> None:
    model = build(directory)
    model.encoder = Encoder(AutoTokenizer.from_pretrained(directory), prompt_style=style)
    row = Numbered("0", {"instruction": "count the words", "input": "red ship sea", "output": "red"})
    encoded = model.encoder.encode(attention_by_role.answered(model, row))
    parts = attention_by_role.parts_of(encoded)
    assert torch.stack([*parts.values()]).sum(0).eq(1).all()
    text = {
        name: model.encoder.decode([token for token, inside in zip(encoded.input_ids, mask, strict=True) if inside]).strip()
        for name, mask in parts.items()
    }
    assert (text["instruction"], text["data"], text["response"]) == ("count the words", "red ship sea", "red")
    whole = model.encoder.encode(model.encoder.conversation("count the words", "red ship sea", "red"))
    assert encoded.input_ids == whole.input_ids and encoded.roles == whole.roles, "the parts change no token and no role"
