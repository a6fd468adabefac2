"""Every bad row and every bad source is refused with its place, what was found and what was expected."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from grpo_safe.config import ColumnsConfig, DataConfig, DataObjectiveConfig
from grpo_safe.data.rows import import_function, load_prompts, load_rows
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, PreferenceRow

GOOD = {"prompt": "Boil an egg?", "response": "Seven minutes.", "labels": {"safety": 1, "help": 0.5}}


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def spec(train: Any, **changes: Any) -> DataConfig:
    settings = {
        "name": "test",
        "licence": "none",
        "train": train,
        "validation": train,
        "objectives": {"safety": DataObjectiveConfig(), "help": DataObjectiveConfig()},
    }
    return DataConfig(**(settings | changes))


def only(range_: list[float] | None = None, column: str | None = None, name: str = "safety") -> dict[str, Any]:
    return {name: DataObjectiveConfig(range=range_ or [0.0, 1.0], column=column)}


def labels_of(path: str, **changes: Any) -> list[dict[str, float]]:
    rows = load_rows(spec(path, **changes), seed=0)[0].rows
    assert all(isinstance(row, LabelledRow) for row in rows)
    return [row.labels for row in rows]


def refused(config: DataConfig, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(config, seed=0)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


def questions(count: int) -> list[dict[str, Any]]:
    return [GOOD | {"prompt": f"Question {n}?", "response": f"Answer {m}."} for n in range(count) for m in range(2)]


# --- bad rows ---------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "Boil an egg?", "chosen": "Seven minutes.", "rejected": "No.", "objective": "help"}

BAD_ROWS = {
    "above its range": (GOOD | {"labels": {"safety": 1.5}}, ("safety=1.5", "[0, 1]")),
    "below its range": (GOOD | {"labels": {"safety": -0.1}}, ("safety=-0.1", "[0, 1]")),
    "infinite": (GOOD | {"labels": {"safety": math.inf}}, ("safety=inf", "[0, 1]")),
    "text for a label": (GOOD | {"labels": {"safety": "high"}}, ("safety='high'", "expected a number or null")),
    "number as text": (GOOD | {"labels": {"safety": "1"}}, ("safety='1'", "expected a number or null")),
    "labels not an object": (GOOD | {"labels": [1, 0]}, ("labels=[1, 0]", "expected {objective: number}")),
    "unknown objective": (GOOD | {"labels": {"wit": 1}}, ("'wit'", "safety, help")),
    "all labels null": (GOOD | {"labels": {"safety": None}}, ("no label", "safety, help")),
    "no labels": ({"prompt": "Boil an egg?", "response": "Yes."}, ("no label", "safety, help")),
    "prompt a number": (GOOD | {"prompt": 7}, ("prompt=7", "expected a valid string", "{role, content}")),
    "prompt null": (GOOD | {"prompt": None}, ("prompt=None", "expected a valid string")),
    "prompt without messages": (GOOD | {"prompt": []}, ("prompt=[]", "{role, content}")),
    "message without content": (GOOD | {"prompt": [{"role": "user"}]}, ("{role, content}", "assistant")),
    "unknown role": (GOOD | {"prompt": [{"role": "human", "content": "Hi"}]}, ("'human'", "user")),
    "half a surrogate pair": (GOOD | {"prompt": "Egg \ud83d"}, ("prompt='Egg \\ud83d'", "expected a valid string")),
    "no prompt": ({"question": "Hi", "response": "Yes."}, ("'prompt'", "question", "data.columns.prompt")),
    "empty response": (GOOD | {"response": " \n"}, ("response=' \\n'", "not empty")),
    "response null": (GOOD | {"response": None}, ("response=None", "not empty")),
    "response a list": (GOOD | {"response": ["Yes."]}, ("response=['Yes.']", "expected a valid text")),
    "equal answers": (PAIR | {"rejected": PAIR["chosen"]}, ("chosen and rejected", "same text")),
    "empty rejected": (PAIR | {"rejected": ""}, ("rejected=''", "not empty")),
    "no rejected": ({k: v for k, v in PAIR.items() if k != "rejected"}, ("rejected=None", "not empty")),
    "pair of unknown objective": (PAIR | {"objective": "wit"}, ("'wit'", "safety, help")),
    "pair without objective": (PAIR | {"objective": None}, ("objective None", "data.pair_objective", "safety, help")),
    "not an object": (["Boil an egg?", "Yes."], ("found list", "expected an object")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named_by_file_and_row(tmp_path, case):
    bad, words = BAD_ROWS[case]
    path = lines(tmp_path / "rows.jsonl", [GOOD, GOOD | {"prompt": "Fry one?"}, bad, GOOD])
    refused(spec(path), f"{path} row 3", *words)


def test_malformed_json_is_named_by_row_and_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + '\n\n{"prompt": "Hi", }\n', encoding="utf-8")
    refused(spec(str(path)), f"{path} row 3", "malformed JSON", "column")


def test_a_bad_row_of_validation_names_that_file(tmp_path):
    train = lines(tmp_path / "train.jsonl", [GOOD])
    validation = lines(tmp_path / "validation.jsonl", [GOOD, GOOD | {"response": ""}])
    refused(spec(train, validation=validation), f"{validation} row 2", "response=''")


def test_prompts_are_checked_as_rows_are(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "Hi"}, {"prompt": 7}])
    with pytest.raises(UserError, match=r"rows\.jsonl row 2: prompt=7"):
        load_prompts(spec(path), "train")


# --- bad sources and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.csv", "folder", "embedded:nothing"])
def test_missing_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    refused(spec(source), f"data.train={source}", "no such file", ".parquet")


@pytest.mark.parametrize("source", [None, "", [], 5, ["rows.jsonl", None]])
def test_source_that_is_no_source(source):
    refused(spec(source), "data.train=", "expected a path")


def test_unknown_kind_of_file(tmp_path):
    path = lines(tmp_path / "rows.txt", [GOOD])
    refused(spec(path), f"data.train={path}", "unknown kind of file", ".jsonl")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    refused(spec(str(path)), f"data.train={path}", "no rows")
    refused(spec(str(path), validation=None), f"data.train={path}", "no rows")
    with pytest.raises(UserError, match=r"data\.train=.*rows\.jsonl: no prompts"):
        load_prompts(spec(str(path)), "train")


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9"}\n')
    refused(spec(str(path)), str(path), "cannot be read", "UTF-8")


def test_gz_that_is_not_gzip_or_is_cut_short(tmp_path):
    plain, cut = tmp_path / "plain.jsonl.gz", tmp_path / "cut.jsonl.gz"
    lines(plain, [GOOD])
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in questions(300)).encode())
    cut.write_bytes(whole[: len(whole) // 2])
    for path in (plain, cut):
        refused(spec(str(path)), str(path), "cannot be read")


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_table_that_cannot_be_read(tmp_path, name):
    path = tmp_path / name
    path.write_text("")
    refused(spec(str(path)), f"data.train={path}", "cannot be read")


def test_unreadable_table_is_told_by_its_cause(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,safety\nHi,Yes,1\nHi,Yes,1,0,1\n")
    refused(spec(str(path), objectives=only()), f"data.train={path}", "line 3")


@pytest.mark.parametrize("source", ["hub:owner/name", "hub:owner/name:train?config=x"])
def test_malformed_hub_address(source):
    refused(spec(source), f"data.train={source}", "hub:OWNER/NAME:SPLIT")


def test_no_objectives(tmp_path):
    refused(spec(lines(tmp_path / "rows.jsonl", [GOOD]), objectives={}), "data.objectives", "NAME: {range: [lo, hi]}")


@pytest.mark.parametrize("side", ["train", "validation"])
def test_objective_without_any_label(tmp_path, side):
    whole = lines(tmp_path / "whole.jsonl", [GOOD])
    partial = lines(tmp_path / "partial.jsonl", [GOOD | {"labels": {"safety": 1, "help": None}}])
    config = spec(whole)
    setattr(config, side, partial)
    refused(config, f"data.{side}", "objective help", "data.objectives")


@pytest.mark.parametrize("path", ["math.no_such_function", "no_such_module.function", "plain", "", "math.pi"])
def test_bad_row_function_path(tmp_path, path):
    source = lines(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"data\.row_function="):
        load_rows(spec(source, row_function=path), seed=0)
    with pytest.raises(UserError, match=r"objectives\.x\.function="):
        import_function(path, "objectives.x.function")


@pytest.fixture
def row_functions(tmp_path, monkeypatch):
    """An importable module of row functions, as a user would write one."""
    (tmp_path / "my_row_functions.py").write_text(
        "def raises(row):\n    return row['answers']\n"
        "def asserts(row):\n    assert False, 'not today'\n"
        "def one(row):\n    return dict(row)\n"
        "def nothing(row):\n    pass\n"
        "def texts(row):\n    return ['prompt', 'response']\n"
        "def drops(row):\n    return []\n"
        "def doubles(row):\n    for n in range(2):\n        yield {**row, 'response': f'{n}'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_row_functions"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("raises", "KeyError: 'answers'"),
        ("asserts", "not today"),
        ("one", "expected a list of dicts"),
        ("nothing", "NoneType"),
        ("texts", "expected a list of dicts"),
    ],
)
def test_row_function_that_fails(tmp_path, row_functions, name, word):
    path = lines(tmp_path / "rows.jsonl", [GOOD])
    refused(spec(path, row_function=f"{row_functions}.{name}"), f"{path} row 1", f"row_function={row_functions}.{name}", word)


def test_row_function_may_give_several_rows_or_none(tmp_path, row_functions):
    path = lines(tmp_path / "rows.jsonl", [GOOD])
    train, _ = load_rows(spec(path, row_function=f"{row_functions}.doubles"), seed=0)
    assert [row.response for row in train.rows] == ["0", "1"]
    refused(spec(path, row_function=f"{row_functions}.drops"), "data.train", "no rows")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_jsonl_gz_is_read_as_its_plain_file(tmp_path):
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    lines(plain, questions(5))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = (load_rows(spec(str(path)), seed=0)[0] for path in (plain, packed))
    assert first.rows == second.rows and len(first.rows) == 10
    assert first.fingerprints[0]["sha256"] != second.fingerprints[0]["sha256"]


def test_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert labels_of(str(path)) == [{"safety": 1.0, "help": 0.5}]


def test_csv_labels_by_column_and_empty_cells_are_missing(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer,safe,help\n"Eggs, how?",Boil.,True,4\nHam?,"In\nslices.",False,\nTea?,Hot.,,0\n')
    columns = ColumnsConfig(prompt="question", response="answer")
    objectives = only(column="safe") | only([0.0, 4.0], "help", "help")
    train, _ = load_rows(spec(str(path), columns=columns, objectives=objectives), seed=0)
    assert [row.labels for row in train.rows] == [{"safety": 1.0, "help": 1.0}, {"safety": 0.0}, {"help": 0.0}]
    assert [row.prompt.text for row in train.rows] == ["Eggs, how?", "Ham?", "Tea?"]


def test_bad_row_of_a_csv_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,safety\nHi,Yes.,1\nHi,No.,3\n")
    refused(spec(str(path), objectives=only()), f"{path} row 2", "safety=3", "[0, 1]")


def test_parquet_with_messages_labels_and_pairs(tmp_path):
    path = tmp_path / "rows.parquet"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Egg"}]
    none = {"response": None, "labels": None, "chosen": None, "rejected": None, "objective": None}
    rows = [
        none | {"prompt": messages, "response": "Boil.", "labels": {"safety": 1.0, "help": None}},
        none | {"prompt": messages, "chosen": "Boil.", "rejected": "No.", "objective": "help"},
    ]
    Dataset.from_list(rows).to_parquet(str(path))
    train, _ = load_rows(spec(str(path)), seed=0)
    labelled, pair = train.rows
    assert labelled.labels == {"safety": 1.0} and isinstance(pair, PreferenceRow) and pair.objective == "help"
    assert labelled.prompt.messages == messages == pair.prompt.messages


def test_hub_source_reads_split_and_data_dir_of_a_local_set(tmp_path):
    (tmp_path / "set" / "part").mkdir(parents=True)
    lines(tmp_path / "set" / "part" / "train.jsonl", [GOOD])
    lines(tmp_path / "set" / "part" / "test.jsonl", [GOOD | {"response": "Eight."}])
    address = f"hub:{tmp_path}/set:{{}}?data_dir=part"
    train, validation = load_rows(spec(address.format("train"), validation=address.format("test")), seed=0)
    assert [row.response for row in train.rows + validation.rows] == ["Seven minutes.", "Eight."]
    assert train.fingerprints[0]["fingerprint"] and train.fingerprints[0]["rows"] == 1
    refused(spec(address.format("nosplit")), "data.train=hub:", "cannot be loaded", "nosplit")


def test_several_sources_are_joined_in_order(tmp_path):
    paths = [lines(tmp_path / f"{n}.jsonl", [GOOD | {"response": f"{n}"}] * (n + 1)) for n in range(2)]
    train, _ = load_rows(spec(paths), seed=0)
    assert [row.response for row in train.rows] == ["0", "1", "1"]
    assert [(f["source"], f["rows"]) for f in train.fingerprints] == [(paths[0], 1), (paths[1], 2)]


@pytest.mark.parametrize("split", ["train", "validation", "heldout"])
def test_embedded_splits_have_prompts_that_no_other_has(split):
    def prompts(name: str) -> set[str]:
        return {p.id for p in load_prompts(spec(f"embedded:{name}"), "train")[0]}

    others = {"train", "validation", "heldout"} - {split}
    assert prompts(split) and not any(prompts(split) & prompts(other) for other in others)


# --- labels, pairs, prompts -------------------------------------------------------------------------------------------


def test_range_is_mapped_to_0_1_and_an_inverted_range_inverts(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [GOOD | {"labels": {"harm": value}} for value in (0, 1, 4)])
    assert [row["harm"] for row in labels_of(path, objectives=only([0.0, 4.0], name="harm"))] == [0.0, 0.25, 1.0]
    assert [row["harm"] for row in labels_of(path, objectives=only([4.0, 0.0], name="harm"))] == [1.0, 0.75, 0.0]
    refused(spec(path, objectives=only([3.0, 0.0], name="harm")), f"{path} row 3", "harm=4", "[3, 0]")


def test_null_and_nan_labels_are_missing_not_zero(tmp_path):
    rows = [GOOD, GOOD | {"labels": {"safety": None, "help": 0}}, GOOD | {"labels": {"safety": 1, "help": math.nan}}]
    found = labels_of(lines(tmp_path / "rows.jsonl", rows))
    assert found == [{"safety": 1.0, "help": 0.5}, {"help": 0.0}, {"safety": 1.0}]


def test_boolean_labels(tmp_path):
    rows = [GOOD | {"labels": {"safety": True, "help": False}}]
    assert labels_of(lines(tmp_path / "rows.jsonl", rows)) == [{"safety": 1.0, "help": 0.0}]


def test_labels_may_stand_beside_the_prompt(tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "Hi", "response": "Yes.", "safety": 1, "score": 3, "other": "x"}])
    assert labels_of(path, objectives=only() | only([1.0, 5.0], "score", "help")) == [{"safety": 1.0, "help": 0.5}]


def test_pair_objective_fills_in_where_no_column_says_it(tmp_path):
    rows = [{k: v for k, v in PAIR.items() if k != "objective"}, PAIR]
    train, _ = load_rows(spec(lines(tmp_path / "rows.jsonl", rows), pair_objective="safety"), seed=0)
    assert [row.objective for row in train.rows] == ["safety", "help"]
    assert (train.rows[0].chosen, train.rows[0].rejected) == ("Seven minutes.", "No.")


def test_empty_prompt_is_allowed_and_a_string_is_one_user_message(tmp_path):
    rows = [GOOD | {"prompt": ""}, GOOD | {"prompt": "Hi"}, GOOD | {"prompt": [{"role": "user", "content": "Hi"}]}]
    train, _ = load_rows(spec(lines(tmp_path / "rows.jsonl", rows)), seed=0)
    prompts = [row.prompt for row in train.rows]
    assert prompts[0].messages == [{"role": "user", "content": ""}]
    assert prompts[1] == prompts[2] and prompts[0].id != prompts[1].id


def test_chat_message_prompt_keeps_its_turns_and_kind(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    path = lines(tmp_path / "rows.jsonl", [GOOD | {"prompt": [m | {"name": "x"} for m in messages], "kind": "harmful"}])
    (prompt,), _ = load_prompts(spec(path), "train")
    assert prompt.messages == messages and prompt.kind == "harmful"
    assert prompt.text == "System: Be short.\n\nUser: Hi"


# --- splits -----------------------------------------------------------------------------------------------------------


def test_without_validation_no_prompt_is_on_both_sides_and_prompts_agree_with_rows(tmp_path):
    config = spec(lines(tmp_path / "rows.jsonl", questions(300)), validation=None, validation_fraction=0.2)
    train, validation = load_rows(config, seed=0)
    sides = [{row.prompt.id for row in split.rows} for split in (train, validation)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300
    assert 30 < len(sides[1]) < 90  # 60 expected, by hash
    assert len(train.rows) + len(validation.rows) == 600  # both rows of a prompt went to its side
    for name, side in (("train", sides[0]), ("validation", sides[1]), ("heldout", sides[1])):
        assert {prompt.id for prompt in load_prompts(config, name)[0]} == side


def test_heldout_falls_back_to_validation(tmp_path):
    paths = {name: lines(tmp_path / f"{name}.jsonl", [GOOD | {"prompt": name}]) for name in ("train", "validation", "heldout")}
    whole, without = spec(**paths), spec(**(paths | {"heldout": None}))
    assert [load_prompts(whole, name)[0][0].text for name in paths] == ["train", "validation", "heldout"]
    assert load_prompts(without, "heldout")[0][0].text == "validation"
    assert load_prompts(spec(**(paths | {"validation": None})), "heldout")[0][0].text == "heldout"


def test_prompts_are_distinct_and_in_file_order(tmp_path):
    path = lines(tmp_path / "rows.jsonl", questions(6))
    prompts, fingerprints = load_prompts(spec(path), "train")
    assert [prompt.text for prompt in prompts] == [f"Question {n}?" for n in range(6)]
    assert [f["source"] for f in fingerprints] == [path]


@pytest.mark.parametrize(("fraction", "key"), [(0.0, "data.validation"), (1.0, "data.train")])
def test_share_that_leaves_a_side_empty_is_refused(tmp_path, fraction, key):
    path = lines(tmp_path / "rows.jsonl", questions(4))
    refused(
        spec(path, validation=None, validation_fraction=fraction), f"{key}: no rows", f"validation_fraction={fraction:g}", path
    )


def test_limit_is_drawn_with_the_seed_and_keeps_file_order(tmp_path):
    path = lines(tmp_path / "rows.jsonl", questions(100))
    everything = load_rows(spec(path), seed=0)[0].rows
    drawn = [load_rows(spec(path, limit=20), seed=seed)[0].rows for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 20
    places = [everything.index(row) for row in drawn[0]]
    assert places == sorted(places)
    assert load_rows(spec(path, limit=1000), seed=3)[0].rows == everything


def test_rows_without_a_prompt_are_split_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "", "response": f"text {i}", "labels": {"safety": 1}}) + "\n" for i in range(60))
    )
    spec = DataConfig(
        name="x", licence="x", train=str(path), validation_fraction=0.5, objectives={"safety": DataObjectiveConfig()}
    )
    train, validation = load_rows(spec, 0)
    assert len({r.prompt.id for r in train.rows + validation.rows}) == 60
    assert 10 < len(validation.rows) < 50
