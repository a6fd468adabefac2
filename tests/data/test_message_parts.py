"""Messages in the shapes that chat APIs write: content in parts, answers with their conversation, fields beside the content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_safe.config import DataConfig, DataObjectiveConfig
from grpo_safe.data.rows import load_answers, load_prompts, load_rows
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, PreferenceRow


def spec(folder: Path, *rows: dict[str, Any]) -> DataConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        name="x",
        licence="none",
        train=str(path),
        validation=str(path),
        objectives={"o": DataObjectiveConfig()},
        pair_objective="o",
    )


def text_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_content_in_parts_is_the_prompt_that_its_text_is(tmp_path: Path) -> None:
    plain = {"prompt": [said("user", "Hi\nthere")]}
    parts = {"prompt": [said("user", text_parts("Hi", "there"), name=None, tool_calls=[])]}
    (prompt,), _ = load_prompts(spec(tmp_path, plain, parts), "train")  # the same id: one prompt
    assert prompt.messages == [{"role": "user", "content": "Hi\nthere"}]


def test_an_answer_may_come_with_its_conversation(tmp_path: Path) -> None:
    ask = said("user", "Hi")
    pair = {"prompt": "Hi", "chosen": [ask, said("assistant", "Yes")], "rejected": [ask, said("assistant", text_parts("No"))]}
    labelled = {"prompt": "Ho", "response": [said("assistant", text_parts("A", "B"))], "labels": {"o": 1.0}}
    config = spec(tmp_path, pair, labelled)
    first, second = load_rows(config, 0)[0].rows
    assert isinstance(first, PreferenceRow) and (first.chosen, first.rejected) == ("Yes", "No")
    assert isinstance(second, LabelledRow) and second.response == "A\nB"
    assert [row.response for row in load_answers(config, False)[0]] == ["Yes", "No", "A\nB"]


def test_a_list_of_answers_stays_several(tmp_path: Path) -> None:
    rows = {"prompt": "Hi", "response": ["A", [said("assistant", "B")]]}
    assert [row.response for row in load_answers(spec(tmp_path, rows), False)[0]] == ["A", "B"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": [said("user", "Hi"), said("assistant", None, tool_calls=[{"id": 1}])]},
            r"row 1: prompt: .*assistant has tool_calls=",
        ),
        ({"prompt": [said("tool", "42", tool_call_id="c1")]}, r"row 1: prompt: .*tool has tool_call_id='c1'"),
        ({"prompt": [said("user", [{"type": "image_url", "image_url": "x"}])]}, r"row 1: prompt: .*part \{'type': 'image_url'"),
        ({"prompt": "Hi", "response": [said("user", "Hi")]}, r"row 1: response ends with a turn of role user"),
        (
            {"prompt": "Hi", "response": [said("assistant", "A", function_call={"name": "f"})]},
            r"row 1: response: .*function_call=",
        ),
        ({"prompt": "Hi", "response": [said("assistant", "  ")]}, r"row 1: response='  ': expected a valid text"),
        ({"prompt": [said("user", [])]}, r"row 1: prompt=.*expected a valid string, or a list"),
    ],
)
def test_what_would_be_dropped_is_refused(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_rows(spec(tmp_path, {"response": "A", "labels": {"o": 1.0}} | row), 0)
