import json
from pathlib import Path

import pytest

from steerlab.evaluation.asking.items import choose, has_input, instruction_rows, number
from steerlab.evaluation.statistics.measures import find
from steerlab.evaluation.statistics.summaries import summarise
from steerlab.evaluation.tasks.roles import embedded_probes, separation
from steerlab.evaluation.tasks.roles.embedded_probes import Probe
from steerlab.evaluation.tasks.roles.separation import Item

ROWS = [{"instruction": f"Do task {i}.", "input": f"some data {i}", "output": f"answer {i}"} for i in range(40)]


def item(witness="moo"):
    return Item("7", "copy", "a b", "moo? copy", "a b moo?", witness, {})


def table(pairs):
    """Observations of items with given (executed in instruction, executed in data)."""
    texts = {True: "it says MOO", False: "nothing"}
    return [o for n, (i, d) in enumerate(pairs) for o in separation.judge(item()._replace(id=str(n)), texts[d], texts[i])]


def metric(observations, name):
    return summarise([o for o in observations if o.metric == f"separation/{name}"])


def test_sep_on_a_table_by_hand():
    # executed(I): items 0-3; of those executed(D): items 2, 3. Item 4 is executed only in the data and does not count for SEP.
    found = table([(True, False), (True, False), (True, True), (True, True), (False, True), (False, False)])
    sep, utility, in_data = (metric(found, name) for name in ("sep", "utility", "executed_in_data"))
    assert (sep.value, sep.n) == (0.5, 4)
    assert (utility.value, utility.n) == (pytest.approx(4 / 6), 6)
    assert (in_data.value, in_data.n) == (0.5, 6)


def test_sep_without_any_executed_probe_has_no_value():
    found = metric(table([(False, False), (False, True)]), "sep")
    assert found.value is None and found.n == 0


def test_probes_file_is_sound():
    probes = embedded_probes.probes()
    assert len(probes) >= 120
    assert [p.id for p in probes] == list(range(len(probes)))
    assert len({p.witness for p in probes}) == len(probes)
    assert len({p.type for p in probes}) >= 8
    for probe in probes:
        assert probe.witness == probe.witness.lower() and len(probe.witness) >= 4
        assert probe.probe in probe.insistent and probe.insistent != probe.probe
        assert probe.witness not in probe.insistent.lower(), (
            "a model that repeats the probe must not pass for one that executes it"
        )


def test_placing_probes_uses_all_positions_and_wordings_and_keeps_texts():
    placed = embedded_probes.place_probes(ROWS, embedded_probes.probes())
    assert {row["info"]["appended_type"] for row in placed} == set(embedded_probes.POSITIONS)
    assert {row["info"]["is_insistent"] for row in placed} == {True, False}
    assert len({row["info"]["appended_task_id"] for row in placed}) == len(ROWS)
    for row, source in zip(placed, ROWS, strict=True):
        in_instruction, in_data = row["info"]["appended_type"]
        assert row["prompt_clean"] == source["input"] and row["system_prompt_clean"] == source["instruction"]
        ends = {"l": str.endswith, "r": str.startswith}
        assert ends[in_instruction](row["system_prompt_instructed"], source["instruction"])
        assert ends[in_data](row["prompt_instructed"], source["input"])
        assert row["witness"] not in " ".join(source.values()).lower()


def test_placing_probes_is_deterministic():
    assert embedded_probes.place_probes(ROWS, embedded_probes.probes()) == embedded_probes.place_probes(
        ROWS, embedded_probes.probes()
    )


def test_a_probe_whose_witness_is_in_the_row_gives_way():
    probes = [Probe(0, "t", "first?", "now! first?", "alpha"), Probe(1, "t", "second?", "now! second?", "beta")]
    row = {"instruction": "Translate.", "input": "x", "output": "The Alpha particle"}
    assert embedded_probes.place_probes([row], probes)[0]["witness"] == "beta"
    with pytest.raises(ValueError, match="witness of each of the 1 probes"):
        embedded_probes.place_probes([row], probes[:1])


def published(path, rows=30):
    found = [
        {
            "system_prompt_clean": f"s {i}",
            "prompt_instructed": f"d {i} probe",
            "system_prompt_instructed": f"s {i} probe",
            "prompt_clean": f"d {i}",
            "witness": "w",
            "info": {"type": "t", "subtask": "s", "appended_task_id": i, "appended_type": "rr", "is_insistent": False},
        }
        for i in range(rows)
    ]
    path.write_text(json.dumps(found))
    return str(path)


def test_published_format_is_read_and_split_by_task_id(tmp_path):
    source = published(tmp_path / "sep.json")
    every, val, test = (separation.load(source, split=s) for s in ("all", "val", "eval"))
    assert len(every) == 30 and len(val) == 3 and len(test) == 27
    assert {i.id for i in val} | {i.id for i in test} == {i.id for i in every}
    assert every[4].data_with_probe == "d 4 probe" and every[4].instruction == "s 4"


def test_the_authors_split_is_a_list_of_task_ids(tmp_path):
    source = published(tmp_path / "sep.json")
    val, test = (separation.load(source, split=s, val_task_ids=(3, 5, 29)) for s in ("val", "eval"))
    assert [i.id for i in val] == ["3", "5", "29"] and len(test) == 27 and "5" not in {i.id for i in test}
    with pytest.raises(ValueError, match=r"no row has the info\.appended_task_id 300 \(2 ids are missing\)"):
        separation.load(source, split="val", val_task_ids=(3, 300, 301))
    with pytest.raises(ValueError, match="val_task_ids has no effect with split all"):
        separation.Config(val_task_ids=(3,))


INFO = {"type": "Information Processing / Retrieval", "appended_type": "lr", "is_insistent": True}


def test_results_by_domain_position_and_insistence_are_those_of_the_groups_alone():
    """Two positions of which one separates perfectly and the other never: 0.5 over all, 1 and 0 by position."""
    by = ("domain", "position", "insistence")
    items = [
        item()._replace(id=str(n), info={**INFO, "appended_type": ("ll", "rr")[n % 2], "is_insistent": n > 3}) for n in range(8)
    ]
    found = [o for n, one in enumerate(items) for o in separation.judge(one, "no" if n % 2 else "MOO", "moo", by=by)]
    names = [
        "position_ll",
        "position_rr",
        "insistence_plain",
        "insistence_insistent",
        "domain_information-processing-retrieval",
    ]
    assert [metric(found, f"sep_{name}").value for name in names] == [0.0, 1.0, 0.5, 0.5, 0.5]
    assert [metric(found, f"sep_{name}").n for name in names] == [4, 4, 4, 4, 8]
    assert all(metric(found, f"utility_{name}").value == 1.0 for name in names)
    assert metric(found, "sep").n == 8, "the groups are no part of the whole"
    said = separation.measures(separation.Config(by=by))
    assert all(find(said, f"{kind}_{name}").better == "higher" for name in names for kind in ("sep", "utility"))


@pytest.mark.parametrize(
    ("by", "info", "said"),
    [
        ("position", {}, "position needs one of ll, lr, rl, rr in info.appended_type; row 7 has null"),
        ("position", {"appended_type": "middle"}, "row 7 has a text"),
        ("insistence", {"is_insistent": "yes"}, "insistence needs true or false in info.is_insistent"),
        ("domain", {"type": None}, "domain needs a text in info.type"),
    ],
)
def test_an_item_that_does_not_say_its_group_is_named(by, info, said):
    with pytest.raises(ValueError, match=said):
        separation.groups(item()._replace(info=info), (by,))


def test_groups_are_looked_for_before_the_start(tmp_path):
    path = tmp_path / "sep.json"
    rows = [row | {"info": {}} for row in json.loads(Path(published(path, rows=2)).read_text())]
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"^by: domain needs a text"):
        separation.check(separation.Config(source=str(path), by=("domain",)), None)


@pytest.mark.parametrize("info", ["rr", ["rr"], {}, {"appended_task_id": "first"}, {"appended_task_id": [1]}])
def test_a_split_of_rows_without_a_task_id_is_refused(tmp_path, info):
    path = tmp_path / "sep.json"
    rows = json.loads(Path(published(path, rows=3)).read_text())
    path.write_text(json.dumps([row | {"info": info} for row in rows]))
    assert len(separation.load(str(path))) == 3
    with pytest.raises(ValueError, match="a split needs a number"):
        separation.load(str(path), split="val")


def test_a_row_without_a_field_of_the_format_is_named(tmp_path):
    path = tmp_path / "sep.json"
    path.write_text(json.dumps([{"prompt_clean": "x"}]))
    with pytest.raises(ValueError, match="system_prompt_clean"):
        separation.load(str(path))


def test_limit_takes_nested_random_rows_under_the_ids_of_the_whole_set(tmp_path):
    source = published(tmp_path / "sep.json")
    few, more = ([i.id for i in separation.load(source, limit=n, seed=5)] for n in (5, 12))
    assert len(few) == 5 and set(few) < set(more)
    assert few != [str(i) for i in range(5)]
    assert few != [i.id for i in separation.load(source, limit=5, seed=6)]


def test_the_tiny_world_gives_rows_of_the_format():
    items = separation.load("tiny:separation/test", limit=8)
    assert len(items) == 8 and all(i.witness not in i.data_with_probe for i in items)


def test_choose_keeps_order_and_all_without_a_limit():
    rows = number([{"n": i} for i in range(20)])
    assert choose(rows, None, 0) == rows and choose(rows, 99, 0) == rows
    drawn = [int(r.id) for r in choose(rows, 7, 0)]
    assert drawn == sorted(drawn) and len(set(drawn)) == 7


def test_alpaca_placeholders_are_no_input():
    assert has_input({"input": "3, 5"})
    assert not any(has_input({"input": text}) for text in ("", " ", "Noinput", "No input", None))


def test_offset_skips_usable_rows_and_an_empty_rest_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "", "output": "z"}, *ROWS[:3]]))
    found = instruction_rows(str(path), needs_input=True, offset=1, limit=None, seed=0)
    assert [i.id for i in found] == ["2", "3"]
    with pytest.raises(ValueError, match="offset 3 leaves no row"):
        instruction_rows(str(path), needs_input=True, offset=3, limit=None, seed=0)
