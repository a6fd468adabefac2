"""What eval found: a table in the terminal, metrics.json, samples.jsonl, report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

FEW = 30  # prompts; below, a difference is not called one
Row = tuple[str, str, str, str, str]


def print_comparison(metrics: dict[str, Any]) -> None:
    """Before, after, paired difference with its interval; a difference whose interval excludes 0 is marked."""
    table = Table(title=f"policy v{metrics['policy']['version']:03d} against its start, {metrics['prompts']} held-out prompts")
    for column in ("", "start", "policy", "difference [95% interval]", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in comparison_rows(metrics):
        table.add_row(*map(escape, row))
    console = Console()
    Console(width=max(console.width, 110)).print(table)


def comparison_rows(metrics: dict[str, Any]) -> list[Row]:
    """The rows of the table: objectives, refusals by kind, lengths."""
    rows = [_row(name, entry) for name, entry in metrics["objectives"].items()]
    rows += [_row(f"refusals, {_inline(kind)} (n={entry['n']})", entry) for kind, entry in metrics["refusals"].items()]
    return [*rows, _row("tokens an answer", metrics["tokens"], 1), _row("share cut by the length limit", metrics["truncated"])]


def write_report(run_dir: Path, metrics: dict[str, Any], samples: list[dict[str, Any]], shown: int) -> None:
    """metrics.json, samples.jsonl and the Markdown report."""
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), encoding="utf-8")
    judge = metrics["judge"]
    lines = [
        f"# Policy v{metrics['policy']['version']:03d} against its start `{metrics['start']}`",
        "",
        f"{metrics['prompts']} held-out prompts, {metrics['completions']} completion(s) each, the same sampling noise for both. Scores by reward model "
        f"v{judge['version']:03d} (content {judge['content_sha256'][:12]}): if the policy was trained against it, they say how far training "
        "went, not how safe the policy is. 95% intervals over prompts: of scores Student's t, from 100 prompts on a BCa bootstrap; of rates exact "
        "(Clopper-Pearson, one completion a prompt), of their paired differences the wider of Newcombe's and Tango's. Fewer than 30 prompts are too few "
        "to say. "
        "The intervals are not corrected for how many there are.",
        "",
        *_table(comparison_rows(metrics)),
        "",
        "Refusals are judged by wording. On harmful prompts they are wanted, on the others they are not.",
        "",
        "## By kind of prompt",
        "",
    ]
    for kind, entries in metrics["by_kind"].items():
        lines += [f"### {_inline(kind)}", "", *_table([_row(name, entry) for name, entry in entries.items()]), ""]
    lines += ["## Samples", ""]
    stride = max(1, len(samples) // max(1, shown))
    for sample in samples[::stride][:shown]:
        lines += [f"Prompt ({_inline(sample['kind'])}):", "", *_quoted(sample["prompt"]), ""]
        for who in ("start", "policy"):
            first = sample[who][0]
            scores = ", ".join(f"{name} {value:.2f}" for name, value in first["scores"].items())
            lines += [f"{who} ({scores}{', refusal' if first['refused'] else ''}):", "", *_quoted(first["text"]), ""]
    (run_dir / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _row(name: str, entry: dict[str, Any], digits: int = 3) -> Row:
    d = entry["difference"]
    clear = d["low"] > 0 or d["high"] < 0
    few = entry.get("n", FEW) < FEW
    return (
        name,
        f"{entry['start']['value']:.{digits}f}",
        f"{entry['policy']['value']:.{digits}f}",
        f"{d['value']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]",
        "too few to say" if few else ("up" if d["value"] > 0 else "down") if clear else "",
    )


def _table(rows: list[Row]) -> list[str]:
    return [
        "| | start | policy | difference [95% interval] | |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def _quoted(text: str) -> list[str]:
    """As a code block by indentation: text of a model is shown, never interpreted."""
    return ["    " + line for line in (text or "(empty)").splitlines()]


def _inline(text: str) -> str:
    return "".join(c for c in text if c.isalnum() or c in " -_")
