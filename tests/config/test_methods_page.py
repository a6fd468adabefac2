"""docs/methods.md: a row for every preset, figures that are there, and an example that runs as it is printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from in_process import CONF, composed

from grpo_safe.algorithm.comparison import StepScores, compare
from grpo_safe.checks import typed, validated
from grpo_safe.rewards import Objectives
from grpo_safe.stages.train_policy.method import build_method

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """preset -> the other cells of its row in the table of methods."""
    table = PAGE.partition("## The table")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def test_every_preset_has_a_row_and_every_row_a_preset() -> None:
    presets = {p.stem for p in (CONF / "algo").glob("*.yaml")}
    assert set(rows()) == presets
    for name, (paper, *said) in rows().items():
        assert len(said) == 3 and all(said), name
        assert paper == "" or re.search(r"\d{4}\.\d{5}", paper), name


@pytest.mark.parametrize("name", sorted(rows()))
def test_the_row_names_the_paper_that_the_preset_names(name: str) -> None:
    first = (CONF / "algo" / f"{name}.yaml").read_text().partition("\n")[0]
    assert set(re.findall(r"\d{4}\.\d{5}", first)) <= set(re.findall(r"\d{4}\.\d{5}", rows()[name][0])), first


def test_linked_figures_and_pages_exist() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert any(link.endswith(".png") for link in linked)
    assert [link for link in linked if "://" not in link and not (DOCS / link).is_file()] == []


def test_the_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.strip().splitlines()) <= 15
    place = tmp_path / re.match(r"# (\S+)\n", code).group(1)
    place.parent.mkdir(parents=True)
    place.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    for line in re.findall(r"^grpo-safe train-policy (.*harmonic.*)$", PAGE, re.MULTILINE):
        cfg = typed(validated("train-policy", composed("train-policy", line.strip("'"))))
        method = build_method(cfg.algo, Objectives(["a", "b"], [1.0, 3.0], [0, 1], [None, None]), {}, 8)
        scores = torch.tensor([[0.5, 0.5], [0.9, 0.2]] + [[0.4, 0.4]] * 6)
        found = compare(
            method.order, method.slots, StepScores(scores, torch.ones(8, 2).bool(), torch.zeros(8), torch.zeros(8)), torch.tensor([1.0, 3.0]), {}
        )  # fmt: skip
        assert found.rewards[:2].tolist() == pytest.approx([0.5, 1 / (0.25 / 0.9 + 0.75 / 0.2)])
        assert int(found.groups.advantages.argmax()) == 0
