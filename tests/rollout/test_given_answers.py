"""Answers of a data set as a rollout: read, grouped, drawn, ended, scored by their labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_safe import models
from grpo_safe.config import DataConfig, DataObjectiveConfig
from grpo_safe.data.rows import load_answers
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, Prompt
from grpo_safe.rewards import Objectives, score_labels
from grpo_safe.rollout.dataset import form_groups, given


def spec(tmp_path: Path, rows: list[dict], **changes) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objectives = {name: DataObjectiveConfig([0, 4]) for name in ("safety", "charm")}
    given_ones = {"name": "x", "licence": "x", "train": str(path), "validation": "none.jsonl", "objectives": objectives}
    return DataConfig(**(given_ones | changes))


ROWS = [
    {"prompt": "Hi", "response": "Hello.", "safety": 4, "charm": 2},
    {"prompt": "Bye", "response": "So long.", "safety": 1},
    {"prompt": "Hi", "response": "What?", "charm": 0},
    {"prompt": "Hi", "response": "Hello.", "charm": 4},
]
PAIRS = [{"prompt": "Hi", "chosen": "Hello.", "rejected": "What?", "objective": "charm"}]


def prompt(text: str) -> Prompt:
    return Prompt(text, [{"role": "user", "content": text}])


def test_labelled_rows_are_grouped_by_prompt_and_equal_answers_put_together(tmp_path: Path) -> None:
    rows, prints = load_answers(spec(tmp_path, ROWS), labelled=True)
    found = form_groups(rows, 2)
    assert [p.text for p in found.prompts] == ["Hi"] and found.left_out == 1 and len(prints) == 1
    assert [(a.response, a.labels) for a in found.answers[0]] == [
        ("Hello.", {"safety": 1.0, "charm": 1.0}),
        ("What?", {"charm": 0.0}),
    ]
    with pytest.raises(UserError, match=r"no prompt of data.train has algo.group_size=3 .* the most is 2; set algo.group_size=2"):
        form_groups(rows, 3)


def test_pairs_lists_and_rows_without_labels(tmp_path: Path) -> None:
    rows, _ = load_answers(spec(tmp_path, PAIRS), labelled=True)
    assert [(r.response, r.labels) for r in rows] == [("Hello.", {"charm": 1.0}), ("What?", {"charm": 0.0})]
    unlabelled = [{"prompt": "Hi", "response": ["a", "b", "c"]}, {"prompt": "Bye", "response": "d"}, *PAIRS]
    rows, _ = load_answers(spec(tmp_path, unlabelled, objectives={}), labelled=False)
    assert [(r.prompt.text, r.response, r.labels) for r in rows] == [
        ("Hi", "a", {}), ("Hi", "b", {}), ("Hi", "c", {}), ("Bye", "d", {}), ("Hi", "Hello.", {}), ("Hi", "What?", {}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "labelled", "sentence"),
    [
        ({"prompt": "Hi"}, False, "row 1: response=None: expected a valid text"),
        ({"prompt": "Hi", "response": ["a", ""]}, False, "row 1: response='': expected a valid text"),
        ({"prompt": "Hi", "response": []}, False, "row 1: response=.*expected a valid text"),
        ({"prompt": "Hi", "chosen": "a"}, False, "row 1: rejected=None: expected a valid text"),
        ({"prompt": "Hi", "response": "a"}, True, "no label for any of safety, charm"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "objective": "wit"}, True, "preference for objective 'wit'"),
    ],
)
def test_a_bad_row_is_named(row: dict, labelled: bool, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_answers(spec(tmp_path, [row]), labelled)


def test_the_share_for_validation_is_held_back(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "a", "safety": 1} for i in range(200)]
    whole, part = (load_answers(spec(tmp_path, rows, **c), True)[0] for c in ({}, {"validation": None}))
    assert len(whole) == 200 and 150 < len(part) < 200


def test_a_rollout_of_given_answers() -> None:
    tokenizer = models.load_tokenizer(models.resolve_start("embedded:tiny-llama", None, False, "policy.start"))
    answers = [[LabelledRow(prompt(q), f"{q} says {i}", {}) for i in range(n)] for q, n in (("ab", 2), ("cd", 7))]
    answers[0][1] = LabelledRow(prompt("ab"), "word " * 40, {})
    rollout, rows = given(tokenizer, answers, [[1, 2], [3]], 2, 30, seed=0, step=1)
    assert [p.id for p in rollout.prompts] == ["ab", "ab", "cd", "cd"] == [r.prompt.id for r in rows]
    assert rollout.truncated.tolist() == [False, True, False, False] and not rollout.sampled
    lengths = rollout.completion_mask.sum(1).tolist()
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        kept = rollout.completion_ids[i, :length].tolist()
        assert kept == (ids[:30] if i == 1 else [*ids, tokenizer.eos_token_id])
        assert rollout.texts[i] == row.response or i == 1
    draws = {tuple(r.response for r in given(tokenizer, answers, [[1], [3]], 2, 30, 0, step)[1][2:]) for step in range(1, 30)}
    assert len(draws) > 5 and all(len(set(d)) == 2 for d in draws)  # of seven, other two at other steps
    assert given(tokenizer, answers[1:], [[3]], 2, 30, 0, 1)[1] == rows[2:]  # whoever else is in the batch


def test_labels_are_scores_and_missing_ones_are_masked() -> None:
    def wit(prompts, texts):
        return [None if text == "b" else len(text) / 10 for text in texts]

    objectives = Objectives(["safety", "charm", "wit"], [1.0] * 3, [0, 1, None], [None, None, wit])
    rows = [LabelledRow(prompt("x"), "a", {"safety": 0.25, "charm": 1.0}), LabelledRow(prompt("x"), "b", {"charm": 0.5})]
    scores = score_labels(objectives, rows)
    assert scores.values.tolist() == [[0.25, 1.0, pytest.approx(0.1)], [0.0, 0.5, 0.0]]
    assert scores.mask.tolist() == [[True, True, True], [False, True, False]]
