"""The reward-model card: how far each head can be trusted, with intervals; and the gate that asks it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from grpo_safe.algorithm import statistics as st
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, PreferenceRow, Row

CALIBRATION_BINS = 10
COLLAPSED_MEANS = f"its raw scores spread less than {st.COLLAPSED:g} of its labels' spread: it says the same of every answer"


@dataclass(frozen=True)
class Judged:
    """A validation row with the calibrated scores of its one or two inputs."""

    row: Row
    scores: np.ndarray  # [1 or 2, K]
    tokens: int


def reward_model_card(names: list[str], binary: list[bool], judged: list[Judged], resamples: int, seed: int) -> dict[str, Any]:
    """Per objective: n, MSE, R2 against predicting the mean, Spearman, AUC and ECE where binary, pair accuracy, correlation
    with length; correlation between heads. 95% intervals by bootstrap over prompts."""
    labelled = [j for j in judged if isinstance(j.row, LabelledRow)]
    pairs = [j for j in judged if isinstance(j.row, PreferenceRow)]
    card: dict[str, Any] = {"objectives": {}, "judged_rows": len(judged), "bootstrap": resamples}
    for k, name in enumerate(names):
        entry: dict[str, Any] = {"n": 0, "n_pairs": 0}
        rows = [(j, j.row.labels[name]) for j in labelled if isinstance(j.row, LabelledRow) and name in j.row.labels]
        if rows:
            entry |= _label_figures(k, binary[k], rows, resamples, seed)
        chosen = [j for j in pairs if isinstance(j.row, PreferenceRow) and j.row.objective == name]
        if chosen:
            margins = np.array([j.scores[0, k] - j.scores[1, k] for j in chosen])
            clusters = np.array([j.row.prompt.id for j in chosen])
            accuracy = st.bootstrap(st.pair_accuracy, clusters, (margins,), resamples, seed)
            entry |= {"n_pairs": len(chosen), "pair_accuracy": accuracy.as_dict()}
        card["objectives"][name] = entry
    everything = np.concatenate([j.scores for j in judged])
    card["between_heads"] = [
        [_finite(st.pearson(everything[:, a], everything[:, b])) for b in range(len(names))] for a in range(len(names))
    ]
    return card


def _label_figures(k: int, binary: bool, rows: list[tuple[Judged, float]], resamples: int, seed: int) -> dict[str, Any]:
    predicted = np.array([j.scores[0, k] for j, _ in rows], dtype=float)
    label = np.array([value for _, value in rows])
    tokens = np.array([j.tokens for j, _ in rows], dtype=float)
    clusters = np.array([j.row.prompt.id for j, _ in rows])
    figures: dict[str, tuple[Any, tuple[np.ndarray, ...]]] = {
        "mse": (st.mse, (predicted, label)),
        "r2": (st.r2, (predicted, label)),
        "spearman": (st.spearman, (predicted, label)),
        "length_correlation": (st.spearman, (predicted, tokens)),
    }
    if binary:
        figures |= {"auc": (st.auc, (predicted, label)), "ece": (st.ece, (predicted, label))}
    entry: dict[str, Any] = {"n": len(rows), "label_mean": float(label.mean()), "residual_std": float(np.std(predicted - label))}
    for figure, (function, columns) in figures.items():
        entry[figure] = {
            key: _finite(v) for key, v in st.bootstrap(function, clusters, columns, resamples, seed).as_dict().items()
        }
    sources = sorted({j.row.source for j, _ in rows})
    if len(sources) > 1:  # pooled figures partly reward telling sources apart
        entry["within_source"] = {}
        for source in sources:
            inside = np.array([j.row.source == source for j, _ in rows])
            if inside.sum() >= 20 and np.ptp(label[inside]) > 0:
                entry["within_source"][source] = {
                    "n": int(inside.sum()),
                    "spearman": _finite(st.spearman(predicted[inside], label[inside])),
                }
    return entry


def gate(card: dict[str, Any], weights: dict[str, float]) -> list[str]:
    """A sentence per used head that is collapsed (its raw scores hardly differ), or not shown to be better than guessing: R2 lower
    bound at or below 0, or with pairs only, pair accuracy lower bound at or below 0.5."""
    problems = []
    for name, weight in weights.items():
        entry = card["objectives"].get(name)
        if entry is None or weight == 0:
            continue
        if entry.get("collapsed"):
            problems.append(f"head {name}: collapsed, {COLLAPSED_MEANS}")
            continue
        figure, floor = ("r2", 0.0) if entry["n"] else ("pair_accuracy", 0.5)
        value = entry.get(figure)
        low = value["low"] if value else None
        if low is None or not low > floor:
            shown = f"{value['value']:.3f} [{low:.3f}, {value['high']:.3f}]" if value and low is not None else "undefined"
            label = "R2" if figure == "r2" else "pair accuracy"
            problems.append(f"head {name}: {label} {shown}, its 95% lower bound must be above {floor:g}")
    return problems


def check_gate(card: dict[str, Any], version: str, weights: dict[str, float], mode: str) -> list[str]:
    """The gate's sentences, to be shown as warnings; UserError under mode error."""
    problems = gate(card, weights)
    if problems and mode == "error":
        raise UserError(
            f"reward model {version} is not fit to train against: {'; '.join(problems)}. Fit it on more rows, set that objective's "
            "weight to 0, or accept it with reward_model_gate=warn"
        )
    return problems


def show_card(card: dict[str, Any], title: str) -> None:
    """The card as a table in the terminal."""
    table = Table(title=title)
    columns = ["objective", "n", "R2", "Spearman", "MSE", "AUC", "ECE", "pairs", "pair accuracy", "length corr."]
    for column in columns:
        table.add_column(column, justify="left" if column == "objective" else "right")
    for row in _rows(card):
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, 150)).print(table)  # intervals need room, also in a log file


def write_card(path: Path, card: dict[str, Any], manifest: dict[str, Any]) -> None:
    """The card as Markdown beside the weights."""
    names = list(card["objectives"])
    scoring = manifest["scoring"]
    base = manifest["base"]["start"]
    data = manifest["data"]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-classification", "---", "",
        "# Multi-label reward model", "",
        f"Scores an answer on {len(names)} objectives in one forward: {', '.join(names)}. Fitted by grpo-safe from `{base}` on "
        f"`{data['name']}` (licence of the data: {data['licence']}).", "",
        "Higher is better; labels were mapped to [0, 1] by these ranges:", "",
        *(f"- {o['name']}: {o['range'][0]:g} -> 0, {o['range'][1]:g} -> 1, scale {o['scale']}"
          + (f"; add {o['offset']:.6g} to the output where absolute values matter" if o["offset"] else "") for o in manifest["objectives"]),
        "", "## How good each head is", "",
        "On validation prompts that calibrated nothing; 95% intervals by bootstrap over prompts. R2 is against predicting the mean.", "",
        "| objective | n | R2 | Spearman | MSE | AUC | ECE | pairs | pair accuracy | length corr. |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in _rows(card)),
        *(f"\nHead {name} is collapsed: {COLLAPSED_MEANS}." for name, e in card["objectives"].items() if e.get("collapsed")),
        "", "## Correlation between heads", "",
        "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|",
        *(f"| {name} | " + " | ".join("-" if v is None else f"{v:.2f}" for v in row) + " |"
          for name, row in zip(names, card["between_heads"], strict=True)),
        "", "## Use", "", "```python", *_snippet(scoring["formatter"], scoring["max_length"]), "```", "",
    ]  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")


def _snippet(formatter: str, max_length: int) -> list[str]:
    head = [
        "import torch",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForSequenceClassification.from_pretrained("FOLDER")',
    ]
    call = {
        "pair": f'inputs = tokenizer(prompt, answer, truncation="only_first", max_length={max_length}, return_tensors="pt")',
        "chat": 'messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]\n'
        'inputs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")',
        "plain": f'inputs = tokenizer(prompt + "\\n\\n" + answer, truncation=True, max_length={max_length}, return_tensors="pt")',
    }[formatter]
    return [
        *head,
        *call.split("\n"),
        "with torch.inference_mode():",
        "    scores = model(**inputs).logits[0]  # model.config.id2label names them",
    ]


def _rows(card: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, e in card["objectives"].items():
        figures = [_shown(e.get(f)) for f in ("r2", "spearman", "mse", "auc", "ece")]
        rows.append(
            [name, str(e["n"]), *figures, str(e["n_pairs"]), _shown(e.get("pair_accuracy")), _shown(e.get("length_correlation"))]
        )
    return rows


def _shown(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
