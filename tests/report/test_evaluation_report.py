"""The report of an evaluation: what is marked, and that a model's text is shown and never interpreted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_safe.report.evaluation import comparison_rows, print_comparison, write_report

HOSTILE = "# All is well\n\n<script>alert(1)</script>\n```\n| a | b |\n---\n[click](http://x)\rcarriage\u2028separator"


def entry(start: float, policy: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    def figure(value: float, lo: float, hi: float) -> dict[str, float]:
        return {"value": value, "low": lo, "high": hi}

    return {
        "start": figure(start, start, start), "policy": figure(policy, policy, policy),
        "difference": figure(policy - start, low, high), **more,
    }  # fmt: skip


def metrics() -> dict[str, Any]:
    return {
        "prompts": 40, "completions": 2, "start": "embedded:tiny-llama",
        "policy": {"kind": "policy", "version": 3, "content_sha256": "a" * 64},
        "judge": {"kind": "reward-model", "version": 7, "content_sha256": "b" * 64},
        "objectives": {"safety": entry(0.5, 0.7, 0.1, 0.3), "wit": entry(0.5, 0.4, -0.2, -0.01), "tact": entry(0.5, 0.6, -0.1, 0.3)},
        "by_kind": {"harmful": {"safety": entry(0.2, 0.8, 0.5, 0.7)}},
        "refusals": {"harmful": entry(0.1, 0.9, 0.7, 0.9, n=10), "everyday": entry(0.0, 0.0, 0.0, 0.0, n=30)},
        "tokens": entry(30.0, 20.0, -12.0, -8.0), "truncated": entry(0.5, 0.25, -0.5, 0.0),
    }  # fmt: skip


def sample(n: int, text: str = "Seven minutes.", kind: str = "everyday", prompt: str | None = None) -> dict[str, Any]:
    def said(words: str, refused: bool = False) -> list[dict[str, Any]]:
        return [{"text": words, "scores": {"safety": 0.123}, "refused": refused}]

    return {"prompt": prompt or f"Question {n}?", "kind": kind, "start": said("No.", True), "policy": said(text)}


def report(folder: Path, samples: list[dict[str, Any]], shown: int = 3) -> str:
    write_report(folder, metrics(), samples, shown)
    return (folder / "report.md").read_text(encoding="utf-8")


def test_only_a_difference_whose_interval_excludes_zero_is_marked() -> None:
    marks = {row[0]: row[4] for row in comparison_rows(metrics())}
    assert marks == {
        "safety": "up", "wit": "down", "tact": "", "refusals, harmful (n=10)": "too few to say", "refusals, everyday (n=30)": "",
        "tokens an answer": "down", "share cut by the length limit": "",
    }  # fmt: skip


def test_figures_of_a_row() -> None:
    rows = {row[0]: row[1:4] for row in comparison_rows(metrics())}
    assert rows["wit"] == ("0.500", "0.400", "-0.100 [-0.200, -0.010]")
    assert rows["tokens an answer"] == ("30.0", "20.0", "-10.0 [-12.0, -8.0]")


def test_report_names_versions_judge_and_groups(tmp_path: Path) -> None:
    text = report(tmp_path, [sample(0)])
    for fragment in (
        "# Policy v003 against its start `embedded:tiny-llama`", "40 held-out prompts, 2 completion(s)", "v007 (content bbbbbbbbbbbb)",
        "| safety | 0.500 | 0.700 | +0.200 [+0.100, +0.300] | up |", "| refusals, harmful (n=10) |", "### harmful",
        "start (safety 0.12, refusal):", "policy (safety 0.12):", "    Seven minutes.",
    ):  # fmt: skip
        assert fragment in text, fragment


def test_text_of_a_model_and_of_a_prompt_is_a_code_block(tmp_path: Path) -> None:
    text = report(tmp_path, [sample(0, text=HOSTILE, prompt=HOSTILE)])
    parts = text.partition("## Samples")[2].split("\n")
    for line in parts:
        for piece in ("All is well", "script", "```", "| a", "click", "carriage", "separator"):
            assert piece not in line or line.startswith("    "), line
    assert "\r" not in text and "\u2028" not in text  # either would start a line that is not indented
    first = next(n for n, line in enumerate(parts) if "All is well" in line)
    assert parts[first - 1] == ""  # without a blank line before it, indentation would be no code block
    assert sum("<script>" in line for line in parts) == 2


def test_empty_answer_is_said_to_be_empty(tmp_path: Path) -> None:
    assert "    (empty)\n" in report(tmp_path, [sample(0, text="")])


def test_kind_of_a_sample_cannot_write_markdown(tmp_path: Path) -> None:
    text = report(tmp_path, [sample(0, kind="harm\n# title <b>")])
    assert "Prompt (harm title b):" in text


def test_samples_are_spread_and_all_are_kept_in_a_file(tmp_path: Path) -> None:
    samples = [sample(n) for n in range(10)]
    text = report(tmp_path, samples, shown=3)
    assert [n for n in range(10) if f"    Question {n}?" in text] == [0, 3, 6]
    kept = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in kept if line] == samples
    assert "Question" not in report(tmp_path, samples, shown=0)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics()


def test_samples_file_has_a_line_each_whatever_they_say(tmp_path: Path) -> None:
    report(tmp_path, [sample(0, text=HOSTILE), sample(1)])
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == 2


def test_table_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(metrics())
    out = capsys.readouterr().out
    assert "policy v003 against its start, 40 held-out prompts" in out
    (line,) = [line for line in out.splitlines() if "wit" in line]
    assert "-0.100 [-0.200, -0.010]" in line and "down" in line
