"""Word problems: what the final number of a text is, and how answers are counted, on real tiny models."""

import json
import math
from decimal import Decimal

import pytest
import torch
from pydantic import ValidationError

from steerlab.data import rows
from steerlab.evaluation import TASKS
from steerlab.evaluation.statistics.metrics import Result
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.ability import arithmetic
from steerlab.job import DataSet
from steerlab.patches import EmbeddingPatch
from steerlab.steered.language import SteeredModel

SUMS = DataSet(source="tiny:arithmetic/test")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 3 = 8 , 8 - 2 = 6", "6"),
        ("He pays $1,234.50.", "1234.5"),
        ("#### 18\n\nQuestion: there are 7", "18"),
        ("He has 7.\n####18.", "18"),
        ("#### -$1,000", "-1000"),
        ("#### 1. First\nadd 3 and 4\n#### 2. Then\nthat is 7", "7"),
        ("#### Step\nthat is 7", "7"),
        ("#### 12. Then we have 13", "13"),
        ("a loss of \N{MINUS SIGN}3", "-3"),
        ("it is -3", "-3"),
        ("10-3", "3"),
        ("(2)-3", "3"),
        ("from 2024-11-21", "21"),
        ("x=-5", "-5"),
        ("$-5", "-5"),
        ("+5", "5"),
        ("25%", "25"),
        ("about .5", "0.5"),
        ("3.14", "3.14"),
        ("18.0", "18"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("12,345,678 people", "12345678"),
        ("the answer is **42**", "42"),
        (r"\boxed{42}", "42"),
        ("0.1000000000000000000000000000001", "0.1000000000000000000000000000001"),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert arithmetic.final_number(text) == Decimal(number)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x = \boxed{5}$.", Decimal(5)),
        (r"\boxed{1,234}", Decimal(1234)),
        (r"first \boxed{3}, no: $\boxed{-4.50}$", Decimal("-4.5")),
        (r"The answer is $\boxed{\dfrac{3}{4}}.$", r"\frac{3}{4}"),
        (r"\boxed{\left( \frac{1}{2}, 3 \right)}", r"(\frac{1}{2},3)"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{50\%}", Decimal(50)),
        (r"\boxed{\$12.50}", Decimal("12.5")),
        (r"\fbox{7}", Decimal(7)),
        (r"\boxed 9", Decimal(9)),
        (r"\boxed{8} and then \boxed{\frac{1", Decimal(8)),
        (r"the answer is 5", None),
        (r"\boxed{\frac{1}{2}", None),
        ("", None),
    ],
)
def test_the_last_box_of_a_text(text, answer):
    assert arithmetic.extract(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 left.\n#### 3", 3),
        ("#### 1,200", 1200),
        ("#### -4\nQuestion: 7", -4),
        ("The answer is 18.", None),
        (r"\boxed{18}", None),
    ],
)
def test_only_a_marked_number_is_read_where_that_is_asked_for(text, answer):
    assert arithmetic.extract(text, "marked") == answer


def test_problems_with_boxed_solutions_are_judged_by_their_boxes(tiny_model, encoder, tmp_path):
    """Rows of the form of MATH: problem, level, type, solution."""
    path = tmp_path / "math.jsonl"
    math_rows = [
        {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
        {"problem": "Half?", "level": "Level 1", "type": "Algebra", "solution": r"We get $\boxed{\frac12}$."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in math_rows))
    prompts = {"source": str(path), "rename": {"problem": "instruction", "solution": "output"}}
    config = arithmetic.Config(prompts=prompts, answer="boxed", max_new_tokens=2)
    model = SteeredModel(tiny_model, encoder)
    result = arithmetic.run(model, config)
    assert [sample["solution"] for sample in result.samples] == ["2", r"\frac12"]
    path.write_text(json.dumps({"problem": "?", "solution": "2"}))
    with pytest.raises(ValueError, match=r"row 0 of .*math.jsonl has no \\boxed\{\} answer in its solution: '2'"):
        arithmetic.run(model, config)
    for number, right in ((Decimal("2.0"), 1.0), (r"\frac12", 0.0)):
        assert [o.value for o in arithmetic.judge("0", Decimal(2), number)] == [right, right]


def test_options_that_are_not_set_leave_the_config_as_it_was():
    assert not {"answer", "temperature", "top_p"} & arithmetic.Config().model_dump().keys()


@pytest.mark.parametrize("text", ["", "seven", "sorry , i can not help you", "#### none", "- , ."])
def test_a_text_without_a_number(text):
    assert arithmetic.final_number(text) is None


def test_no_number_is_no_part_of_accuracy_and_is_not_solved():
    verdicts = [("a", "18.0"), ("b", "17"), ("c", "none"), ("d", "none")]
    found = [o for i, text in verdicts for o in arithmetic.judge(i, Decimal(18), arithmetic.final_number(text))]
    metrics = summarise_all(Result(found, []))[1.0]
    assert [(m.value, m.n, m.unparsable) for m in metrics.values()] == [(0.5, 2, 2), (0.25, 4, 0)]
    assert list(metrics) == ["math/accuracy", "math/solved"]


def test_the_tiny_worlds_solutions_end_in_their_number_as_its_model_writes_them(encoder):
    for row in rows.read(SUMS):
        written = encoder.decode(encoder.tokenizer.encode(row["output"], add_special_tokens=False))
        assert arithmetic.final_number(written) == int(row["output"].rpartition("= ")[2])


# The task


@pytest.fixture
def rotated(tiny_model, encoder):
    return SteeredModel(tiny_model, encoder, (EmbeddingPatch(tiny_model.config.hidden_size, math.pi / 2),))


def config(**fields):
    return arithmetic.Config(**({"prompts": SUMS, "limit": 6, "max_new_tokens": 8} | fields))


def test_problems_are_answered_at_every_strength(rotated):
    result = arithmetic.run(rotated, config(strengths=(1.0, 0.0)))
    found = summarise_all(result)
    assert list(found) == [1.0, 0.0] and json.dumps(result.samples)
    for metrics in found.values():
        assert metrics["math/accuracy"].n + metrics["math/accuracy"].unparsable == metrics["math/solved"].n == 6
    assert TASKS["math"].run(rotated, config(strengths=(1.0, 0.0))) == result


def test_strength_0_is_the_base_model(rotated):
    base = [s["output"] for s in arithmetic.run(rotated, config(strengths=(0.0,))).samples]
    rotated.detach()
    plain = SteeredModel(rotated.model, rotated.encoder)
    assert [s["output"] for s in arithmetic.run(plain, config()).samples] == base


def test_a_model_that_says_the_number_has_solved_it(tiny_model, encoder):
    """The head of a random model is changed to say 8 after anything: what has the solution 8 is solved, nothing else."""
    eight = encoder.tokenizer.convert_tokens_to_ids("8")
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()  # all logits are 0
        head = torch.nn.Linear(tiny_model.config.hidden_size, tiny_model.config.vocab_size)
        head.bias.zero_()
        head.bias[eight] = 1.0
        tiny_model.set_output_embeddings(head)
    result = arithmetic.run(
        SteeredModel(tiny_model, encoder), config(limit=None, prompts=SUMS.model_copy(update={"limit": 60}))
    )
    expected = [arithmetic.final_number(row["output"]) == 8 for row in rows.read(SUMS)[:60]]
    assert [o.value for o in result.observations if o.metric == "math/solved"] == [float(e) for e in expected]
    assert 0 < sum(expected) < 60


def test_gsm8k_has_other_names_for_its_fields(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "how many ?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}))
    data = DataSet(source=str(path), rename={"question": "instruction", "answer": "output"})
    (item,) = arithmetic.data_rows(arithmetic.Config(prompts=data).prompts, None, 0)
    assert item.row["instruction"] == "how many ?" and arithmetic._solution(item.id, item.row["output"], "number") == 5


def test_problems_need_solutions(rotated, tmp_path):
    with pytest.raises(ValidationError, match=r"set prompts\.format to instruction, not text"):
        config(prompts=DataSet(source="a.txt", format="text"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "how many ?", "output": "5"}, {"instruction": "who ?", "output": "tom"}]))
    with pytest.raises(ValueError, match=r"row 1 of .*a\.json has no number in its solution: 'tom'"):
        arithmetic.run(rotated, config(prompts=DataSet(source=str(path)), limit=None))


def test_default_problems_are_none_of_those_left_to_training():
    default = arithmetic.Config().prompts
    training = rows.read(default.model_copy(update={"offset": 0, "limit": default.offset}))
    items = arithmetic.data_rows(default, None, 0)
    assert (len(training), len(items), items[0].id) == (8000, 1871, "8000")
    assert not {item.row["instruction"] for item in items} & {row["instruction"] for row in training}
    assert all(arithmetic._solution(item.id, item.row["output"], "number") == Decimal(item.row["answer"]) for item in items)
