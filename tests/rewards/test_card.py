"""The reward-model card: figures that a hand can check, a gate that lets no guess pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, PreferenceRow, Prompt
from grpo_safe.rewards.card import Judged, check_gate, gate, reward_model_card, show_card, write_card

RNG = np.random.default_rng(0)


def prompt(n: int) -> Prompt:
    return Prompt(f"{n:016x}", [{"role": "user", "content": f"Question {n}?"}])


def labelled(n: int, labels: dict[str, float], scores: list[float], source: str = "", tokens: int = 5) -> Judged:
    return Judged(LabelledRow(prompt(n), f"Answer {n}.", labels, source), np.array([scores]), tokens)


def pair(n: int, objective: str, chosen: list[float], rejected: list[float]) -> Judged:
    return Judged(PreferenceRow(prompt(n), "Yes.", "No.", objective), np.array([chosen, rejected]), 9)


def card_of(
    judged: list[Judged], names: tuple[str, ...] = ("safety", "wit"), binary: tuple[bool, ...] = (False, False)
) -> dict[str, Any]:
    return reward_model_card(list(names), list(binary), judged, 200, 0)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_head_that_is_right_and_a_head_that_says_the_mean() -> None:
    labels = [(n % 5) / 4 for n in range(60)]
    card = card_of([labelled(n, {"safety": y, "wit": y}, [y, 0.5], tokens=n) for n, y in enumerate(labels)])
    right, mean = card["objectives"]["safety"], card["objectives"]["wit"]
    assert (right["n"], right["n_pairs"], right["label_mean"]) == (60, 0, 0.5)
    assert right["mse"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert right["r2"]["value"] == right["r2"]["low"] == right["spearman"]["value"] == 1.0
    assert right["residual_std"] == 0.0
    assert mean["mse"]["value"] == pytest.approx(0.125)  # the variance of 0, 1/4 ... 1
    assert mean["r2"]["value"] == pytest.approx(0.0)
    assert mean["spearman"]["value"] is None  # no spread: undefined, and null in JSON
    assert "auc" not in right and "ece" not in right
    json.dumps(card, allow_nan=False)


def test_figures_are_over_the_rows_that_have_the_label() -> None:
    judged = [labelled(n, {"safety": n % 2, "wit": 1 - n % 2}, [n % 2, n % 2]) for n in range(40)]
    judged += [labelled(n, {"safety": n % 2}, [n % 2, 99.0]) for n in range(40, 60)]
    card = card_of(judged)["objectives"]
    assert (card["safety"]["n"], card["wit"]["n"]) == (60, 40)
    assert card["wit"]["mse"]["value"] == 1.0 and card["wit"]["r2"]["value"] == pytest.approx(-3.0)


def test_binary_objective_has_auc_and_calibration_error() -> None:
    judged = [labelled(n, {"safety": n % 2, "wit": n % 2}, [0.9 if n % 2 else 0.1, 0.2]) for n in range(40)]
    card = card_of(judged, binary=(True, False))["objectives"]
    assert card["safety"]["auc"]["value"] == 1.0
    assert card["safety"]["ece"]["value"] == pytest.approx(0.1)
    assert "auc" not in card["wit"]


def test_pairs_are_counted_on_their_own_head() -> None:
    judged = [pair(n, "wit", [0.0, 1.0], [9.0, 0.0 if n % 4 else 2.0]) for n in range(40)]
    entry = card_of(judged)["objectives"]
    assert entry["safety"] == {"n": 0, "n_pairs": 0}
    assert entry["wit"]["n_pairs"] == 40 and "r2" not in entry["wit"]
    accuracy = entry["wit"]["pair_accuracy"]
    assert accuracy["value"] == pytest.approx(0.75)
    assert 0.5 < accuracy["low"] < 0.75 < accuracy["high"] < 1


def test_intervals_are_over_prompts_not_rows() -> None:
    noise = RNG.normal(0, 0.3, 20)
    labels = [(n % 5) / 4 for n in range(20)]
    once = card_of([labelled(n, {"safety": y}, [y + noise[n], 0.0]) for n, y in enumerate(labels)], ("safety", "wit"))
    often = card_of([labelled(n, {"safety": y}, [y + noise[n], 0.0]) for n, y in enumerate(labels) for _ in range(50)])
    widths = [c["objectives"]["safety"]["mse"]["high"] - c["objectives"]["safety"]["mse"]["low"] for c in (once, often)]
    assert widths[1] == pytest.approx(widths[0], rel=0.02)  # the same rows fifty times tell nothing new


def test_length_correlation_and_correlation_between_heads() -> None:
    judged = [labelled(n, {"safety": n / 29}, [n / 29, -n / 29], tokens=100 - n) for n in range(30)]
    card = card_of(judged)
    assert card["objectives"]["safety"]["length_correlation"]["value"] == pytest.approx(-1.0)
    assert np.array(card["between_heads"]) == pytest.approx(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    flat = card_of([labelled(n, {"safety": n / 29}, [n / 29, 1.0]) for n in range(30)])
    assert flat["between_heads"][0][1] is None


def test_pooled_sources_are_also_judged_apart() -> None:
    """A head that only tells two sources apart looks good pooled, and is shown to be nothing within each."""
    rows = []
    for n in range(100):
        source = "easy" if n % 2 else "hard"
        base = 0.75 if n % 2 else 0.0
        rows.append(labelled(n, {"safety": base + 0.25 * (n // 2 % 2)}, [base + 0.01 * (n // 4 % 2), 0.0], source))
    rows += [labelled(200 + n, {"safety": 0.5}, [0.5, 0.0], "constant") for n in range(30)]
    rows += [labelled(300 + n, {"safety": n % 2}, [n % 2, 0.0], "small") for n in range(10)]
    entry = card_of(rows)["objectives"]["safety"]
    assert entry["spearman"]["value"] > 0.7
    assert set(entry["within_source"]) == {"easy", "hard"}  # not: no spread of labels, under 20 rows
    assert entry["within_source"]["easy"]["n"] == 50
    assert all(abs(e["spearman"]) < 0.1 for e in entry["within_source"].values())
    one = card_of([labelled(n, {"safety": n % 2}, [n % 2, 0.0], "only") for n in range(40)])
    assert "within_source" not in one["objectives"]["safety"]


# --- the gate ---------------------------------------------------------------------------------------------------------


def figure(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


CARD = {
    "objectives": {
        "good": {"n": 50, "n_pairs": 0, "r2": figure(0.4, 0.001, 0.6)},
        "noise": {"n": 50, "n_pairs": 0, "r2": figure(0.1, -0.05, 0.3)},
        "edge": {"n": 50, "n_pairs": 0, "r2": figure(0.1, 0.0, 0.3)},
        "undefined": {"n": 50, "n_pairs": 0, "r2": figure(0.1, None, None)},
        "pairs": {"n": 0, "n_pairs": 50, "pair_accuracy": figure(0.7, 0.51, 0.8)},
        "coin": {"n": 0, "n_pairs": 50, "pair_accuracy": figure(0.6, 0.5, 0.7)},
        "both": {"n": 50, "n_pairs": 50, "r2": figure(0.1, -0.1, 0.2), "pair_accuracy": figure(0.9, 0.8, 0.95)},
        "nothing": {"n": 0, "n_pairs": 0},
    }
}


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ("good", None),
        ("pairs", None),
        ("noise", "head noise: R2 0.100 [-0.050, 0.300], its 95% lower bound must be above 0"),
        ("edge", "head edge: R2 0.100 [0.000, 0.300], its 95% lower bound must be above 0"),
        ("undefined", "head undefined: R2 undefined, its 95% lower bound must be above 0"),
        ("coin", "head coin: pair accuracy 0.600 [0.500, 0.700], its 95% lower bound must be above 0.5"),
        ("both", "head both: R2 0.100 [-0.100, 0.200], its 95% lower bound must be above 0"),  # labels count where there are any
        ("nothing", "head nothing: pair accuracy undefined, its 95% lower bound must be above 0.5"),
    ],
)
def test_gate_by_head(head: str, sentence: str | None) -> None:
    assert gate(CARD, {head: 1.0}) == ([sentence] if sentence else [])
    assert gate(CARD, {head: -1.0}) == ([sentence] if sentence else [])  # a negative weight relies on it as much
    assert gate(CARD, {head: 0.0}) == []


def test_gate_passes_over_functions_that_have_no_head() -> None:
    assert gate(CARD, {"good": 1.0, "brevity": 1.0}) == []


def test_error_and_warn() -> None:
    weights = {"good": 1.0, "noise": 1.0, "coin": 2.0}
    with pytest.raises(UserError) as caught:
        check_gate(CARD, "v003", weights, "error")
    message = str(caught.value)
    for fragment in ("reward model v003 is not fit", "head noise: R2", "head coin: pair accuracy", "reward_model_gate=warn"):
        assert fragment in message
    assert len(check_gate(CARD, "v003", weights, "warn")) == 2
    assert check_gate(CARD, "v003", {"good": 1.0}, "error") == []


def test_a_head_of_noise_does_not_pass_and_a_head_with_signal_does() -> None:
    labels = RNG.integers(0, 5, 80) / 4
    judged = [
        labelled(n, {"safety": float(y), "wit": float(y)}, [0.5 + 0.1 * RNG.normal(), 0.7 * y + 0.15 + 0.1 * RNG.normal()])
        for n, y in enumerate(labels)
    ]
    problems = gate(card_of(judged), {"safety": 1.0, "wit": 1.0})
    assert len(problems) == 1 and problems[0].startswith("head safety: R2 -")


# --- what is shown ----------------------------------------------------------------------------------------------------


MANIFEST: dict[str, Any] = {
    "scoring": {"formatter": "pair", "max_length": 128},
    "base": {"start": "embedded:all-MiniLM-L6-v2"},
    "data": {"name": "mine", "licence": "CC-BY-4.0"},
    "objectives": [
        {"name": "safety", "range": [0, 4], "scale": "absolute", "offset": 0.0},
        {"name": "wit", "range": [5, 1], "scale": "relative", "offset": 0.25},
    ],
}


def small_card() -> dict[str, Any]:
    judged = [labelled(n, {"safety": (n % 5) / 4}, [(n % 5) / 4, 0.5]) for n in range(40)]
    return card_of([*judged, *(pair(n, "wit", [0.5, 1.0], [0.5, 0.0]) for n in range(40, 60))])


def test_markdown_card(tmp_path: Path) -> None:
    write_card(tmp_path / "README.md", small_card(), MANIFEST)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for fragment in (
        "2 objectives in one forward: safety, wit", "`embedded:all-MiniLM-L6-v2`", "licence of the data: CC-BY-4.0",
        "- safety: 0 -> 0, 4 -> 1, scale absolute\n", "- wit: 5 -> 0, 1 -> 1, scale relative; add 0.25 to the output",
        "| safety | 40 | 1.000 [1.000, 1.000] |", "| wit | 0 | - | - | - | - | - | 20 | 1.000 [1.000, 1.000] |",
        "max_length=128",
    ):  # fmt: skip
        assert fragment in text, fragment
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables]
    assert widths == [11] * 4 + [4] * 4  # every row as wide as its head


@pytest.mark.parametrize(("formatter", "call"), [("pair", "only_first"), ("chat", "apply_chat_template"), ("plain", "\\n\\n")])
def test_card_shows_how_to_score_and_its_code_is_python(tmp_path: Path, formatter: str, call: str) -> None:
    write_card(tmp_path / "README.md", small_card(), MANIFEST | {"scoring": {"formatter": formatter, "max_length": 64}})
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert call in code
    compile(code, "card", "exec")


def test_card_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_card(small_card(), "reward model v001")
    out = capsys.readouterr().out
    assert "reward model v001" in out and "1.000 [1.000, 1.000]" in out
    assert all(name in out for name in ("safety", "wit", "pair accuracy"))
