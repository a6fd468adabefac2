"""A user's function may do anything: each odd return is one sentence that names its objective, and what it changes stays its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_safe.data.rows import import_function
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, Prompt
from grpo_safe.rewards import Objectives, score_labels

PROMPTS = [Prompt(f"id{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(3)]
ROWS = [LabelledRow(prompt, f"answer {i}", {}) for i, prompt in enumerate(PROMPTS)]


def scored(*functions) -> torch.Tensor:
    names = [f"mine{i}" for i in range(len(functions))]
    return score_labels(Objectives(names, [1.0] * len(names), [None] * len(names), list(functions)), ROWS).values


async def later(prompts, completions):
    return [1.0] * len(completions)


def raises(prompts, completions):
    raise KeyError("lost")


def shortens(prompts, completions):
    prompts[0].messages[0]["content"] = "changed"
    completions[:] = ["x"] * len(completions)
    return [0.0] * len(completions)


def length(prompts, completions):
    return [float(len(c)) for c in completions]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda p, c: 1.0, r"gave 1\.0 \(float\); expected a list of 3 numbers"),
        (lambda p, c: None, r"gave None \(NoneType\)"),
        (lambda p, c: "abc", r"gave 'abc' \(str\)"),
        (lambda p, c: {"a": 1}, r"\(dict\)"),
        (lambda p, c: [1.0], "gave 1 numbers for 3 completions"),
        (lambda p, c: ["a", "b", "c"], "gave 'a' for a completion of prompt id0; expected a number or None"),
        (lambda p, c: [1.0, [2.0], 3.0], r"gave \[2\.0\] for a completion of prompt id1"),
        (lambda p, c: np.ones((3, 2)), r"of shape \(3, 2\)"),
        (lambda p, c: torch.ones(3, 1), r"of shape \(3, 1\)"),
        (lambda p: [1.0] * 3, "failed on 3 completions, the first of prompt id0: TypeError"),
        (raises, r"KeyError: 'lost' \(.*test_odd_functions\.py:\d+\)"),
        (later, "is async; expected a plain function"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_an_odd_return_names_its_objective(function, said: str) -> None:
    with pytest.raises(UserError, match=rf"objectives\.mine0\.function {said}|objectives\.mine0\.function .*{said}"):
        scored(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda p, c: (1.0, 2.0, 3.0),
        lambda p, c: np.array([1, 2, 3]),
        lambda p, c: torch.tensor([1.0, 2, 3]),
        lambda p, c: iter([1, True, 3]),
    ],
)
def test_every_list_of_numbers_is_taken(function) -> None:
    assert scored(function)[:, 0].tolist()[::2] == [1.0, 3.0]


def test_a_function_changes_nothing_but_its_own_copy() -> None:
    values = scored(shortens, length)
    assert values[:, 1].tolist() == [8.0] * 3
    assert PROMPTS[0].text == "question 0" and ROWS[0].response == "answer 0"


@pytest.mark.parametrize("source", ["def f(:\n", "raise RuntimeError('broken')\n"])
def test_a_module_that_cannot_be_imported(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("odd_module", None)
    with pytest.raises(
        UserError, match=r"objectives\.mine\.function=odd_module\.f: its module cannot be imported \((SyntaxError|RuntimeError)"
    ):
        import_function("odd_module.f", "objectives.mine.function")
