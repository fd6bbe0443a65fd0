"""Generation with patches: cache, padding, batches and strengths change nothing they should not."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation, collate
from steerlab.patches import EmbeddingPatch
from steerlab.steered import sampling
from steerlab.steered.language import SteeredModel
from steerlab.steered.sampling import Sampling, choose


@pytest.fixture
def steered(tiny_model: PreTrainedModel, encoder: Encoder) -> SteeredModel:
    """A rotated model with random weights."""
    return SteeredModel(tiny_model, encoder, (EmbeddingPatch(tiny_model.config.hidden_size, 1.2),))


@pytest.fixture
def prompts(encoder: Encoder) -> list[Conversation]:
    """Prompts of unequal length."""
    rows = tiny.rows("separation/test", 6)
    return [encoder.conversation(row["system_prompt_clean"], row["prompt_instructed"]) for row in rows]


def uncached(model: SteeredModel, prompt: Conversation, num: int) -> list[int]:
    """Greedy decoding by a full forward pass for every token: the reference."""
    row = model.encoder.encode(prompt)
    ids, roles = list(row.input_ids), list(row.roles)
    new: list[int] = []
    for _ in range(num):
        with torch.no_grad():
            out = model.model(torch.tensor([ids]), roles=torch.tensor([roles])).logits[0, -1]
        new.append(int(out.argmax()))
        ids.append(new[-1])
        roles.append(model.encoder.response_role_id)
        if new[-1] == model.encoder.tokenizer.eos_token_id:
            break
    return new


def test_cached_batched_decoding_equals_full_forward_passes(steered: SteeredModel, prompts: list[Conversation]) -> None:
    generated = steered.generate(prompts, max_new_tokens=8)[0]
    for prompt, generation in zip(prompts, generated, strict=True):
        assert generation.text == steered.encoder.decode(uncached(steered, prompt, 8))


def test_the_role_of_generated_tokens_matters_in_every_step(steered: SteeredModel, prompts: list[Conversation]) -> None:
    """With another response role the cached steps see other embeddings: the equality above is not a coincidence."""
    row = collate([steered.encoder.encode(prompts[0])], 0)
    with torch.no_grad():
        as_data = steered.model(**row.model_inputs, roles=row.roles).logits[:, -1]
        roles = row.roles.clone()
        roles[:, -1] = 0
        as_instruction = steered.model(**row.model_inputs, roles=roles).logits[:, -1]
    assert not torch.allclose(as_data, as_instruction, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_composition_change_no_logit(steered: SteeredModel, prompts: list[Conversation], side: str) -> None:
    rows = [steered.encoder.encode(prompt) for prompt in prompts]
    together = collate(rows, steered.encoder.pad_id, side)  # type: ignore[arg-type]
    with torch.no_grad():
        batched = steered.model(**together.model_inputs, roles=together.roles).logits
        for i, row in enumerate(rows):
            alone = collate([row], steered.encoder.pad_id)
            expected = steered.model(**alone.model_inputs, roles=alone.roles).logits[0]
            found = batched[i][together.attention_mask[i].bool()]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_several_strengths_in_one_batch_equal_separate_runs(steered: SteeredModel, prompts: list[Conversation]) -> None:
    together = steered.generate(prompts, max_new_tokens=6, strengths=(0.0, 0.5, 1.0))
    for number, strength in enumerate((0.0, 0.5, 1.0)):
        assert together[number] == steered.generate(prompts, max_new_tokens=6, strengths=(strength,))[0]


def test_sampling_does_not_depend_on_the_batch(steered: SteeredModel, prompts: list[Conversation]) -> None:
    settings = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 0.9, "seed": 4}
    together = steered.generate(prompts, **settings)[0]  # type: ignore[arg-type]
    steered.batch_tokens = 1
    alone = steered.generate(prompts, **settings)[0]  # type: ignore[arg-type]
    assert together == alone
    assert together != steered.generate(prompts, **{**settings, "seed": 5})[0]  # type: ignore[arg-type]


def test_log_probabilities_equal_a_plain_forward_pass(steered: SteeredModel, encoder: Encoder) -> None:
    row = tiny.rows("instructions/test", 3)
    conversations = [encoder.from_row(r, "instruction") for r in row]
    found = steered.token_log_probs(conversations)
    for conversation, scores in zip(conversations, found, strict=True):
        encoded = encoder.encode(conversation)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            logits = steered.model(ids, roles=torch.tensor([encoded.roles])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores.log_prob), expected, atol=1e-5, rtol=0)
        assert len(scores.log_prob) == len(scores.roles) == len(scores.in_response) == len(encoded) - 1


def test_hidden_states_equal_those_of_transformers(steered: SteeredModel, prompts: list[Conversation]) -> None:
    row = collate([steered.encoder.encode(prompts[0])], 0)
    with torch.no_grad():
        out = steered.model(**row.model_inputs, roles=row.roles, output_hidden_states=True)
    found, encoded = next(iter(steered.hidden_states(prompts[:1])))
    assert found.shape == (steered.num_layers + 1, len(encoded), steered.model.config.hidden_size)
    for layer in range(steered.num_layers):
        torch.testing.assert_close(found[layer], out.hidden_states[layer][0])
    last = steered.model.get_submodule("model.norm")(found[-1])
    torch.testing.assert_close(last, out.hidden_states[-1][0])


def test_strengths_without_a_patch_are_refused(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="has no patch to scale"):
        SteeredModel(tiny_model, encoder).generate([encoder.conversation("a")], max_new_tokens=1, strengths=(0.5,))


def test_a_prompt_beyond_the_context_is_refused(steered: SteeredModel, encoder: Encoder) -> None:
    limit = steered.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"the model's context holds {limit}"):
        steered.generate([encoder.conversation("a", "b " * limit)], max_new_tokens=1)


def test_a_nucleus_among_the_likeliest_tokens_is_that_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaked rows need few tokens, a flat one all of them; either way the choice is that of a full sort."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(1, 300, generator=generator) * 1e-3
    logits, uniform = torch.cat([5 * torch.randn(40, 300, generator=generator), flat]), torch.rand(41, generator=generator)
    chosen = {}
    for size in (16, 300):
        monkeypatch.setattr(sampling, "_NUCLEUS", size)
        for rows in (slice(0, 40), slice(0, 41)):
            found = choose(logits[rows].clone(), None, Sampling(1.0, 0.6), uniform[rows])[0]
            chosen[size, rows.stop] = found
    assert torch.equal(chosen[16, 40], chosen[300, 40]) and torch.equal(chosen[16, 41], chosen[300, 41])
    assert torch.equal(chosen[16, 41][:40], chosen[16, 40])


def test_the_nucleus_keeps_the_token_that_crosses_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    chosen = {choose(logits.clone(), None, Sampling(1.0, 0.6), torch.tensor([u]))[1][0] for u in (0.0, 0.3, 0.62, 0.63, 0.99)}
    assert chosen == {0, 1}


def test_sampling_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(10_000, 3)
    uniform = torch.linspace(0, 1, 10_001)[:-1]
    chosen, _ = choose(logits.clone(), None, Sampling(1.0), uniform)
    torch.testing.assert_close(chosen.bincount() / 10_000, torch.tensor([0.2, 0.5, 0.3]), atol=2e-3, rtol=0)


def seen(ids: list[int], num: int) -> torch.Tensor:
    """The tokens that occurred in one row."""
    return torch.zeros(1, num, dtype=torch.bool).index_fill(1, torch.tensor(ids), True)


def test_a_repetition_penalty_weakens_what_was_seen() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    assert choose(logits.clone(), seen([0], 3), Sampling(repetition_penalty=1.2), None)[1] == [1]
    assert choose(logits.clone(), seen([2], 3), Sampling(repetition_penalty=1.2), None)[1] == [0]


def test_stop_strings_end_a_generation(steered: SteeredModel, prompts: list[Conversation]) -> None:
    whole = steered.generate(prompts[:1], max_new_tokens=8)[0][0]
    words = whole.text.split()
    stopped = steered.generate(prompts[:1], max_new_tokens=8, stop=(words[2],))[0][0]
    assert stopped.finished
    assert words[2] not in stopped.text
    assert whole.text.startswith(stopped.text)


def test_a_repetition_penalty_weakens_logits_of_both_signs() -> None:
    """CTRL (arXiv 1909.05858): positive logits are divided, negative ones multiplied; what was not seen stays."""
    logits, penalty = torch.tensor([[2.0, -1.0, -1.1, 0.5]]), 1.5
    choose(logits, seen([0, 1, 1], 4), Sampling(repetition_penalty=penalty), None)
    torch.testing.assert_close(logits, torch.tensor([[2.0 / penalty, -1.0 * penalty, -1.1, 0.5]]))
    falls = torch.tensor([[-1.0, -1.2]])
    assert choose(falls, seen([0], 2), Sampling(repetition_penalty=1.5), None)[1] == [1]
