"""Jobs whose tokenizer and chat template are a stranger's: what is refused before the start, what is said, what keys hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chat_families import FAMILIES, family
from transformers import LlamaConfig, LlamaForCausalLM

from steerlab import job, run
from steerlab.data import rows
from steerlab.evaluation import TASKS
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataConfig, DataSet
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.steered.language import SteeredModel
from steerlab.training.training_rows import load_rows

ROWS = [
    {"instruction": "Summarise the text.", "input": "The garden was quiet.", "output": "quiet"},
    {"instruction": "say hello", "input": "", "output": "hello"},
]


def model_of(name: str, directory: Path, template: str | None = None) -> Path:
    """Write a small model with the tokenizer of a family, of another template if one is given."""
    tokenizer = family(name).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def job_of(source: Path, tmp_path: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> job.Job:
    """Make a job that trains a model on rows."""
    (tmp_path / "rows.json").write_text(json.dumps(rows or ROWS))
    tree = {
        "name": "a",
        "model": {"source": str(source)},
        "data": {"train": {"source": str(tmp_path / "rows.json")}},
        "method": {"name": "vanilla"},
        "train": {"steps": 1, "micro_batch": 2, "max_tokens": 256},
        **sections,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return job.read(path, JobType)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_the_check(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run.check(Plan.of(job_of(model_of(name, tmp_path / "model"), tmp_path)))
    surprising = not family(name).own_prompt or family(name).folds_system or name == "llama3.1"
    assert any("chat template" in str(warning.message) for warning in recwarn) == surprising


NEVER = "{{ raise_exception('this model does not chat') }}"


def test_a_task_within_another_says_whether_it_asks_in_conversations() -> None:
    inner = {"toxicity": False, "refusal": True}
    for name, chats in inner.items():
        config = TASKS["controllability"].Config.model_validate({"metric": f"{name}/share", "of": {"task": name}})
        assert TASKS["controllability"].chats(config) == chats


def test_a_job_without_conversations_never_looks_at_the_template(tmp_path: Path) -> None:
    model = model_of("gpt2", tmp_path / "model", NEVER)
    text = {"source": "tiny:topics/train", "format": "text", "limit": 8}
    wanted = job_of(
        model,
        tmp_path,
        data={"train": text},
        evaluate=[
            {"task": "perplexity", "data": text},
            {"task": "toxicity", "prompts": text},
        ],
    )
    run.check(Plan.of(wanted))


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"data": {"train": {"source": "tiny:topics/train", "format": "text"}}, "evaluate": [{"task": "separation"}]},
        {"data": {"train": {"source": "tiny:topics/train", "format": "text"}}, "evaluate": [{"task": "perplexity"}]},
    ],
)
def test_a_template_that_refuses_conversations_is_refused_where_they_are_needed(
    tmp_path: Path, section: dict[str, Any]
) -> None:
    model = model_of("gpt2", tmp_path / "model", NEVER)
    with pytest.raises(ValueError, match=r"the chat template refuses the messages .*this model does not chat"):
        run.check(Plan.of(job_of(model, tmp_path, **section)))


def test_rows_that_the_template_changes_are_found_before_the_start(tmp_path: Path) -> None:
    rows = [*ROWS, {"instruction": "a", "input": "", "output": "<think>\nhm\n</think>\n\nfine"}]
    with pytest.raises(ValueError, match=r"data.train: .* row 3: the chat template prints a thought of the answer"):
        run.check(Plan.of(job_of(model_of("qwen3", tmp_path / "model"), tmp_path, rows)))


@pytest.mark.parametrize("name", ["qwen3", "qwen3 thinking"])
def test_a_job_trains_thoughts(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Answers without a thought are counted where they change the tokens of the prompt."""
    data = {"train": {"source": str(tmp_path / "rows.json")}, "thinking": True}
    wanted = job_of(model_of(name, tmp_path / "model"), tmp_path, [THOUGHT, THOUGHT, ROWS[0]], data=data)
    run.check(Plan.of(wanted))
    said = [str(warning.message) for warning in recwarn]
    assert any("the answers of 1 change the tokens" in one for one in said) == (name == "qwen3 thinking")
    assert Plan.of(wanted).stages[0].params["prompt"]["thinking"] is True
    assert stacks.load(tmp_path / "model", prompt=wanted.prompt).encoder.thinking  # type: ignore[union-attr]


def test_answers_that_melt_into_their_prompts_are_said(tmp_path: Path) -> None:
    rows = [*ROWS, {"instruction": "a", "input": "", "output": "\nfine"}]
    with pytest.warns(
        UserWarning, match=r"data.train: of the first 3 rows, the answers of 1 change the tokens of their prompts"
    ):
        run.check(Plan.of(job_of(model_of("smollm2", tmp_path / "model"), tmp_path, rows)))


def test_a_template_whose_tokens_have_no_embedding_is_refused(tmp_path: Path) -> None:
    model = model_of("gpt2", tmp_path / "model")
    small = json.loads((model / "config.json").read_text())["vocab_size"]
    family("chatml base").tokenizer.save_pretrained(tmp_path / "wide")
    wide = json.loads((tmp_path / "wide" / "tokenizer.json").read_text())
    wide["added_tokens"].append({**wide["added_tokens"][0], "id": small + 5, "content": "<|turn|>"})
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(wide))
    template = str(family("chatml base").tokenizer.chat_template).replace("<|im_start|>", "<|turn|>")
    chat = {"source": str(model), "tokenizer": str(tmp_path / "wide"), "chat_template": template}
    with pytest.raises(ValueError, match=r"prints '<\|turn\|>', whose id \d+ lies beyond the \d+ rows"):
        run.check(Plan.of(job_of(model, tmp_path, model=chat)))


THOUGHT = {"instruction": "a", "input": "", "output": "<think>\nhm\n</think>\n\nfine"}


def test_the_rows_that_are_tried_are_those_that_the_job_reads(tmp_path: Path) -> None:
    model = model_of("qwen3", tmp_path / "model")
    rows = [THOUGHT, *ROWS * 10, THOUGHT]
    source = {"source": str(tmp_path / "rows.json")}
    with pytest.warns(UserWarning, match="opens a stored answer"):
        run.check(Plan.of(job_of(model, tmp_path, rows, data={"train": {**source, "offset": 1, "limit": 20}})))
    with pytest.raises(ValueError, match=r"data.train: .*rows.json, .* row 21: the chat template .*; skip_bad: true skips"):
        run.check(Plan.of(job_of(model, tmp_path, rows, data={"train": {**source, "offset": 1}})))
    with (
        pytest.warns(UserWarning, match=r"data.train: of the first 22 rows, 2 are skipped: the chat template"),
        pytest.warns(UserWarning, match="opens a stored answer"),
    ):
        run.check(Plan.of(job_of(model, tmp_path, rows, data={"train": {**source, "skip_bad": True}})))


def test_prompts_that_fit_into_no_row_are_said(tmp_path: Path) -> None:
    model, train = model_of("smollm2", tmp_path / "m"), {"steps": 1, "micro_batch": 1, "max_tokens": 200}
    long = {"instruction": "a", "input": "word " * 200, "output": "b"}
    with pytest.warns(UserWarning, match=r"data.train: of the first 2 rows, 1 have prompts of 200 tokens or more"):
        run.check(Plan.of(job_of(model, tmp_path, [long, {"instruction": "a", "input": "b", "output": "c"}], train=train)))
    with pytest.raises(ValueError, match=r"data.train: of the first 1 rows, no prompt has fewer than 200 tokens"):
        run.check(Plan.of(job_of(model, tmp_path, [long], train=train)))


def test_rows_that_are_only_read_for_activations_are_not_held_against_the_length_of_training(tmp_path: Path) -> None:
    """LinEAS trains on the source; the target is cut by extract.max_tokens."""
    short, long = ({"instruction": "a", "input": text, "output": "b"} for text in ("c", "word " * 200))
    (tmp_path / "long.json").write_text(json.dumps([long] * 4))
    source, target = ({"source": str(tmp_path / name), "loss_on": "all"} for name in ("rows.json", "long.json"))
    wanted = job_of(
        model_of("smollm2", tmp_path / "m"),
        tmp_path,
        [short] * 4,
        data={"source": source, "target": target},
        method={"name": "lineas"},
        train={"steps": 1, "micro_batch": 4, "max_tokens": 200},
        extract={"select": {"modules": ".*post_attention_layernorm"}, "pooling": ["mean"]},
    )
    run.check(Plan.of(wanted))


def test_a_bad_row_behind_those_that_were_tried_is_named_by_its_data_set(tmp_path: Path) -> None:
    rows = [*ROWS, THOUGHT]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"rows.json: row 3: the chat template .*; skip_bad: true skips such rows"):
        load_rows(DataSet(source=str(tmp_path / "rows.json")), Encoder(family("qwen3").tokenizer), 100)


def test_pairs_of_equal_answers_are_said(tmp_path: Path) -> None:
    """The tiny tokenizer knows neither word, so that both answers are its unknown token."""
    rows = [{"prompt": "a", "chosen": "red", "rejected": "blue"}, {"prompt": "a", "chosen": "fine", "rejected": "crude"}]
    data = {"preference": {"source": str(tmp_path / "rows.json"), "format": "preference"}}
    wanted = job_of(Path("tiny:model"), tmp_path, rows, data=data, method={"name": "dpo"})
    with pytest.warns(UserWarning, match="data.preference: of the first 2 rows, 1 are skipped: the answers of a pair are the"):
        run.check(Plan.of(wanted))


def test_a_row_that_the_template_refuses_leaves_the_numbers_of_the_others() -> None:
    encoder = Encoder(family("qwen3").tokenizer)
    found = encode_data(encoder, [ROWS[0], THOUGHT, ROWS[1]], "instruction", 400, skip_bad=True)
    assert (found.numbers, found.num_dropped, found.num_refused) == ([0, 2], 0, 1)
    whole = encode_data(encoder, ROWS, "instruction", 400)
    assert [row.sequences for row in found.rows] == [row.sequences for row in whole.rows]
    pair = {"prompt": "a", "chosen": "fine", "rejected": "poor"}
    pairs = encode_data(encoder, [pair, {**pair, "chosen": THOUGHT["output"]}, pair], "preference", 400, skip_bad=True)
    assert (pairs.numbers, pairs.num_dropped, pairs.num_refused) == ([0, 2], 0, 1)


def test_an_exported_model_ends_turns_in_plain_transformers(tmp_path: Path) -> None:
    loaded = stacks.load(model_of("gemma", tmp_path / "model"))
    assert isinstance(loaded, SteeredModel)
    loaded.save_model(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    end = loaded.encoder.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end in saved["eos_token_id"]


def test_a_base_model_is_trained_with_another_models_template(tmp_path: Path) -> None:
    """The template's content is in the key, wherever it lies; the encoder of a worker has it."""
    model = model_of("gpt2", tmp_path / "model")
    template = str(family("zephyr").tokenizer.chat_template)
    files = [tmp_path / name for name in ("chat.jinja", "copy.jinja", "other.jinja")]
    for file in files:
        file.write_text(template)
    files[2].write_text(template.replace("<|", "<<"))
    jobs = [job_of(model, tmp_path, model={"source": str(model), "chat_template": str(file)}) for file in files]
    run.check(Plan.of(jobs[0]))
    keys = [Plan.of(one).stages[0].params["prompt_fingerprints"] for one in jobs]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert Plan.of(jobs[0]).stages[0].key != Plan.of(job_of(model, tmp_path)).stages[0].key
    loaded = stacks.load(model, prompt=jobs[0].prompt)
    assert isinstance(loaded, SteeredModel)
    prompt = loaded.encoder.encode(loaded.encoder.conversation("say", "hello"))
    assert "<|assistant|>" in loaded.encoder.tokenizer.decode(prompt.input_ids)


def test_a_tokenizer_from_elsewhere_is_taken(tmp_path: Path) -> None:
    model = model_of("gpt2", tmp_path / "model")
    family("neox").tokenizer.save_pretrained(tmp_path / "tokenizer")
    wanted = job_of(model, tmp_path, model={"source": str(model), "tokenizer": str(tmp_path / "tokenizer")})
    loaded = stacks.load(model, prompt=wanted.prompt)
    assert isinstance(loaded, SteeredModel)
    assert loaded.encoder.tokenizer.pad_token == "<|padding|>"


def test_a_tokenizer_belongs_to_the_job_that_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"name": "b", "model": {"source": "tiny:model"}, "method": {"name": "none"}})
    )
    with pytest.raises(job.JobError, match=r"tokenizer: another job makes this model; set model.tokenizer in that job"):
        job_of(tmp_path, tmp_path, model={"source": "job:base.yaml", "tokenizer": "tiny:model"})


@pytest.mark.parametrize("name", ["gemma", "chatml base", "phi3"])
def test_what_is_generated_stops_at_the_end_of_a_turn(name: str, tmp_path: Path) -> None:
    """A model that always ends its turn, in the template's token, which is not the tokenizer's end of a sequence."""
    encoder = Encoder(family(name).tokenizer, prompt_style="plain")
    end = encoder.tokenizer.convert_tokens_to_ids(family(name).end_of_turn)
    assert end != encoder.tokenizer.eos_token_id
    model = LlamaForCausalLM.from_pretrained(model_of(name, tmp_path / "model"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 1.0
    (answer,) = SteeredModel(model.eval(), encoder).generate([encoder.conversation("say", "hello")], max_new_tokens=5)[0]
    assert (answer.text, answer.num_tokens, answer.finished) == ("", 1, True)


def test_training_rows_of_several_formats_are_encoded_each_in_its_own(tmp_path: Path) -> None:
    texts = [{"text": "the garden was quiet"}]
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    for name, content in (("rows.json", ROWS[:2]), ("texts.json", texts), ("chats.json", chats)):
        (tmp_path / name).write_text(json.dumps(content))
    data = DataSet.model_validate(
        {
            "source": str(tmp_path / "rows.json"),
            "also": [
                {
                    "source": str(tmp_path / "texts.json"),
                    "format": "text",
                    "also": [{"source": str(tmp_path / "chats.json"), "format": "conversation"}],
                },
            ],
        }
    )
    assert [part.format for part in data.parts] == ["instruction", "text", "conversation"]
    encoder = Encoder(family("qwen3").tokenizer)
    loaded = load_rows(data, encoder, 300)
    alone = [load_rows(part, encoder, 300) for part in data.parts]
    assert loaded.rows == [row for part in alone for row in part.rows]
    assert loaded.numbers == [0, 1, 2, 3]
    assert loaded.rows[2].input_ids == encoder.tokenizer("the garden was quiet")["input_ids"]
    with pytest.raises(ValueError, match="also mixes rows of formats instruction and text and conversation"):
        rows.read(data)


def test_only_training_data_mix_formats(tmp_path: Path) -> None:
    mixed = {"source": "tiny:topics/train", "format": "text", "also": [{"source": "tiny:instructions/train"}]}
    assert DataConfig.model_validate({"train": mixed, "validation": mixed}).train is not None
    with pytest.raises(ValueError, match=r"source.also: rows of formats text and instruction; only train and validation"):
        DataConfig.model_validate({"source": mixed})
    with pytest.raises(ValueError, match=r"do not go with format"):
        DataSet.model_validate({**mixed, "also": [{"source": "tiny:preferences/train", "format": "preference"}]})
    weighted = {**mixed, "weight": 1.0, "also": [{**mixed["also"][0], "weight": 1.0}]}
    with pytest.raises(ValueError, match="weight: a mixture by weights has rows of one format"):
        DataSet.model_validate(weighted)
    alike = {"source": "tiny:texts/train", "format": "text", "weight": 1.0, "skip_bad": True}
    with pytest.raises(ValueError, match="skip_bad: the rows of a mixture by weights are read as one"):
        DataSet.model_validate({**mixed, "weight": 1.0, "also": [alike]})
    lone = {"task": "perplexity", "data": {"source": "tiny:texts/test", "format": "text", "weight": 2.0}}
    with pytest.raises(ValueError, match=r"evaluate.0.data: weight 2: there is nothing to mix with"):
        run.check(Plan.of(job_of(model_of("smollm2", tmp_path / "n"), tmp_path, ROWS, evaluate=[lone])))
    tree = {"task": "perplexity", "data": mixed}
    wanted = job_of(model_of("smollm2", tmp_path / "m"), tmp_path, ROWS, evaluate=[tree])
    with pytest.raises(ValueError, match=r"evaluate.0.data: also mixes rows of formats text and instruction"):
        run.check(Plan.of(wanted))
