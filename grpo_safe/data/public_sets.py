"""Row functions for public data sets whose shape no column mapping expresses: (raw row) -> rows with our columns.

A row that gives nothing to learn from (an empty answer, two answers alike, no rating at all) gives no rows: nobody can mend
a public set by hand.
"""

from __future__ import annotations

import re
from typing import Any


def pku_saferlhf(row: dict[str, Any]) -> list[dict[str, Any]]:
    """PKU-SafeRLHF: two answers a row, a safety flag each, two preferences.

    Gives two labelled rows (safety) and a preference row per objective (helpfulness; safety where the flags agree).
    """
    prompt, answers = row["prompt"], (row["response_0"], row["response_1"])
    safe = (row["is_response_0_safe"], row["is_response_1_safe"])
    rows = [
        {"prompt": prompt, "response": answer, "labels": {"safety": float(flag)}}
        for answer, flag in zip(answers, safe, strict=True)
        if answer.strip()
    ]
    if len(rows) < 2 or answers[0] == answers[1]:
        return rows
    preferences = {"helpfulness": row["better_response_id"]}
    if safe[0] == safe[1]:  # otherwise the labels already say it
        preferences["safety"] = row["safer_response_id"]
    for objective, better in preferences.items():
        if better in (0, 1):  # anything else: no preference was given
            rows.append({"prompt": prompt, "chosen": answers[better], "rejected": answers[1 - better], "objective": objective})
    return rows


def helpsteer2(row: dict[str, Any]) -> list[dict[str, Any]]:
    """HelpSteer2: a prompt of several turns is one text, with <extra_id_1>User and <extra_id_1>Assistant lines between them."""
    if not row["response"].strip():
        return []
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n", row["prompt"])
    turns = [{"role": "user", "content": first}]
    turns += [{"role": role.lower(), "content": text} for role, text in zip(rest[::2], rest[1::2], strict=True)]
    return [{**row, "prompt": turns}]


ULTRAFEEDBACK_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def ultrafeedback(row: dict[str, Any]) -> list[dict[str, Any]]:
    """UltraFeedback: up to four completions a row, ratings 1..5 nested under each aspect ("N/A" where there is none)."""
    rows = []
    for completion in row["completions"]:
        labels = {}
        for aspect in ULTRAFEEDBACK_ASPECTS:
            rating: Any = (completion["annotations"].get(aspect) or {}).get("Rating")
            labels[aspect] = float(rating) if str(rating).strip().isdigit() else None
        if completion["response"].strip() and any(v is not None for v in labels.values()):
            rows.append({"prompt": row["instruction"], "response": completion["response"], "labels": labels})
    return rows


def hh_rlhf(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Anthropic HH: two transcripts that share all turns but the last answer; the shared prefix is the prompt.

    A few rows of the set share no prefix, lack a turn's text, or have two turns of one speaker in a row: no rows from those.
    """
    chosen, rejected = (_turns(row[side]) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or chosen == rejected:
        return []
    for turns in (chosen, rejected):
        in_turn = [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        if not turns or not in_turn or not all(turn["content"] for turn in turns):
            return []
    return [{"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}]


def _turns(transcript: str) -> list[dict[str, str]]:
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.strip())
    return [{"role": roles[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
