"""What the model cannot tell apart as it reads it is counted and left out; how much was cut is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import stage_config

from grpo_safe.errors import UserError
from grpo_safe.stages import train_rm

LONG = "the same words again and again " * 40  # past max_length=32


def run(tmp_path: Path, *rows: dict, more: tuple[str, ...] = (), judged: tuple[dict, ...] = ()) -> None:
    good = [{"prompt": f"Question {n}?", "response": f"Answer {n}.", "labels": {"safety": n % 2}} for n in range(20)]
    judging = [row | {"prompt": f"Other {n}?"} for n, row in enumerate(good)]
    for name, some in (("train", [*good, *rows]), ("validation", [*judging, *judged])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    words = [
        "data=files", f"data.train={tmp_path}/train.jsonl", f"data.validation={tmp_path}/validation.jsonl",
        "data.objectives.safety.range=[0,1]", "backbone.max_length=32", "train.epochs=0.1", "data.pair_objective=safety", *more,
    ]  # fmt: skip
    train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")


def pair(n: int) -> dict:
    return {"prompt": f"Long {n}?", "chosen": LONG + "yes", "rejected": LONG + "no"}


def test_pairs_alike_after_the_cut_and_answers_without_a_token_are_left_out(tmp_path: Path, capsys) -> None:
    empty = {"prompt": "Zero width?", "response": "\u200b\u200d", "labels": {"safety": 1}}
    words = {"prompt": "Thumbs?", "response": "\U0001f44d", "labels": {"safety": 1}}  # a token, if an unknown one
    hollow = {"prompt": "Nothing?", "chosen": "Something.", "rejected": "\u200b"}
    run(tmp_path, pair(0), pair(1), empty, hollow, words)
    said = capsys.readouterr().out
    assert "data.train: 4 of 25 rows say nothing as the model reads them at backbone.max_length=32" in said
    assert "(2 pairs whose answers are the same tokens, 2 answers without a token)" in said
    assert "train-rm: 21 rows of data files" in said


def test_the_count_of_cut_inputs_is_said(tmp_path: Path, capsys) -> None:
    run(tmp_path, {"prompt": LONG, "response": "Short.", "labels": {"safety": 1}})
    assert "data.train: 1 of 21 inputs fill backbone.max_length=32 or were cut to it" in capsys.readouterr().out


def test_most_rows_alike_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: 30 of 50 rows say nothing .* these are most; raise backbone\.max_length"):
        run(tmp_path, *(pair(n) for n in range(30)))
    assert not (tmp_path / "store").exists()


def test_an_objective_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    more = ("data.objectives.wit.range=[0,1]",)
    told_apart = {"prompt": "New?", "chosen": "A joke.", "rejected": "None.", "objective": "wit"}
    with pytest.raises(UserError, match=r"data\.train: 1 of 21 rows say nothing .* no row is left for wit"):
        run(tmp_path, pair(0) | {"objective": "wit"}, more=more, judged=(told_apart,))
