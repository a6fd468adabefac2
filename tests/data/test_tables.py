"""Cells of a table are text unless they are labels; the row that is named is the row that is wrong; arrays and saved folders are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from grpo_safe.config import DataConfig, DataObjectiveConfig
from grpo_safe.data.rows import load_answers, load_prompts, load_rows
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow

ROWS = [{"prompt": f"Q{n}", "response": f"A{n}", "safety": n % 2} for n in range(4)]


def spec(path: object) -> DataConfig:
    return DataConfig(name="x", licence="x", train=str(path), validation=str(path), objectives={"safety": DataObjectiveConfig()})


def read(path: object) -> list[tuple[str, str, dict[str, float]]]:
    rows = load_rows(spec(path), seed=0)[0].rows
    return [(r.prompt.text, r.response, r.labels) for r in rows if isinstance(r, LabelledRow)]


def table(path: Path, *records: str, separator: str = ",") -> Path:
    path.write_text("\n".join((f"prompt{separator}response{separator}safety", *records)) + "\n")
    return path


@pytest.mark.parametrize("word", ["None", "N/A", "NaN", "null", "1", "007", "1e5", "True", "2024-01-01"])
def test_a_cell_of_text_stays_as_it_is_written(word: str, tmp_path: Path) -> None:
    found = read(table(tmp_path / "rows.csv", f"Q0,{word},1", f"{word},A1,0"))
    assert found == [("Q0", word, {"safety": 1.0}), (word, "A1", {"safety": 0.0})]
    assert [p.text for p in load_prompts(spec(tmp_path / "rows.csv"), "train")[0]] == ["Q0", word]
    assert [a.labels for a in load_answers(spec(tmp_path / "rows.csv"), labelled=True)[0]] == [{"safety": 1.0}, {"safety": 0.0}]


def test_a_column_of_numbers_only_is_text_too(tmp_path: Path) -> None:
    assert [row[:2] for row in read(table(tmp_path / "rows.csv", "1,10,1", "2,20,0"))] == [("1", "10"), ("2", "20")]


@pytest.mark.parametrize("cell", ["high", "1_0", "0x1", "NA"])
def test_a_label_that_is_no_number_is_named_with_its_row(cell: str, tmp_path: Path) -> None:
    path = table(tmp_path / "rows.csv", '"Q\n\n0",A0,1', "", '"Q1","A\n1",', f"Q2,A2,{cell}", "Q3,A3,0")
    with pytest.raises(UserError, match=r"rows\.csv row 2: no label"):
        read(path)
    path.write_text(path.read_text().replace('\n1",', '\n1",0'))
    with pytest.raises(UserError, match=rf"rows\.csv row 3: safety='{cell}': expected a number"):
        read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,response,safety\nQ0,A0,1\nQ1,A, 1,0\n", r"row 2, line 3, has 4 cells and the header 3"),
        ("prompt,response,safety\nQ0,A0,1\nQ1,A1\n", r"row 2, line 3, has 2 cells"),
        ("prompt,response,response\nQ0,A0,1\n", r"names 'response' twice"),
        ('prompt,response,safety\nQ0,A0,1\nQ1,"A1,0\n', r"row 2 cannot be read"),
        ("", r"no header line"),
    ],
)
def test_a_table_out_of_shape_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read(tmp_path / "rows.csv")


EXPECTED = [(r["prompt"], r["response"], {"safety": float(r["safety"])}) for r in ROWS]


def test_tabs_and_packed_tables(tmp_path: Path) -> None:
    plain = table(tmp_path / "rows.tsv", *("\t".join(map(str, r.values())) for r in ROWS), separator="\t")
    assert read(plain) == EXPECTED
    (tmp_path / "packed.tsv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read(tmp_path / "packed.tsv.gz") == EXPECTED
    long = table(tmp_path / "long.csv", f"Q0,{'word ' * 40_000},1")  # a cell of 200 kB
    assert len(read(long)[0][1]) == 200_000


def test_a_json_array_and_lines_of_json(tmp_path: Path) -> None:
    array, rows = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text("\n " + json.dumps(ROWS, indent=2))
    rows.write_text("\n".join(json.dumps(r) for r in ROWS))
    assert read(array) == EXPECTED == read(rows)
    array.write_text(json.dumps([*ROWS, {**ROWS[0], "safety": "x"}]))
    with pytest.raises(UserError, match=r"array\.json row 5: label safety='x'"):
        read(array)
    array.write_text(json.dumps(ROWS)[:-5])
    with pytest.raises(UserError, match=r"array\.json line 1: malformed JSON"):
        read(array)


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == EXPECTED
    DatasetDict({"train": Dataset.from_list(ROWS[:2]), "test": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(UserError, match=r"several splits \(train, test\); name one, such as .*several/train"):
        read(tmp_path / "several")
    assert read(tmp_path / "several" / "train") == EXPECTED[:2]
    hashes = [load_prompts(spec(tmp_path / p), "train")[1][0]["sha256"] for p in ("one", "several/test", "several/train")]
    assert hashes[0] != hashes[2]
