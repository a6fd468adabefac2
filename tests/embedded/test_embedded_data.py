"""The data that ships with the package keeps the promises of its card."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from importlib import resources

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from grpo_safe.algorithm.statistics import spearman
from grpo_safe.judges.refusal import refuses

OBJECTIVES = ("safety", "politeness", "meaningfulness", "actionability")
SPLITS = ("train", "validation", "heldout")


def rows(split: str) -> list[dict]:
    text = resources.files("grpo_safe").joinpath("embedded", f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


EVERYTHING = [r for split in SPLITS for r in rows(split)]


def by_prompt(some: list[dict]) -> dict[str, list[dict]]:
    grouped = defaultdict(list)
    for r in some:
        grouped[r["prompt"]].append(r)
    return grouped


def total(row: dict) -> int:
    return sum(row["labels"][o] for o in OBJECTIVES)


def test_size_and_kinds() -> None:
    prompts = by_prompt(EVERYTHING)
    assert len(prompts) == 240
    kinds = Counter(answers[0]["kind"] for answers in prompts.values())
    assert all(70 <= kinds[k] <= 90 for k in ("harmful", "lookalike", "everyday"))
    assert all(len({a["response"] for a in answers}) >= 4 for answers in prompts.values())
    assert all(set(r["labels"]) == set(OBJECTIVES) and all(v in range(5) for v in r["labels"].values()) for r in EVERYTHING)


def test_no_prompt_is_in_two_splits() -> None:
    seen = [set(by_prompt(rows(split))) for split in SPLITS]
    assert [len(s) for s in seen] == [141, 59, 40]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_best_answer_is_a_redirect_or_a_helpful_one() -> None:
    for prompt, answers in by_prompt(EVERYTHING).items():
        best = [a for a in answers if total(a) == max(map(total, answers))]
        wanted = "redirect" if answers[0]["kind"] == "harmful" else "helpful"
        assert {a["style"] for a in best} == {wanted}, prompt


def test_complying_with_harm_scores_below_a_bare_refusal() -> None:
    complying = [r for r in EVERYTHING if r["kind"] == "harmful" and r["style"].startswith("complies")]
    refusing = [r for r in EVERYTHING if r["style"] == "bare_refusal"]
    assert np.mean([total(r) for r in complying]) < np.mean([total(r) for r in refusing])
    assert all(r["labels"]["meaningfulness"] == r["labels"]["actionability"] == 0 for r in complying)
    assert max(r["labels"]["safety"] for r in complying) <= 1


def test_sentences_vary() -> None:
    seen = defaultdict(set)
    for i, r in enumerate(EVERYTHING):
        words = re.findall(r"[a-z0-9']+", r["response"].lower())
        for j in range(len(words) - 4):
            seen[tuple(words[j : j + 5])].add(i)
    worst = max(seen.items(), key=lambda item: len(item[1]))
    assert len(worst[1]) <= 3, worst


def test_refusal_words_stand_in_answers_that_help_and_in_answers_that_comply() -> None:
    words = re.compile(r"\b(sorry|cannot|can't|unable|unfortunately|illegal|dangerous|against|shouldn't|never)\b", re.IGNORECASE)
    helping = [r for r in EVERYTHING if r["style"].startswith("helpful")]
    complying = [r for r in EVERYTHING if r["style"] in ("refusal_words_then_complies", "complies_with_warning")]
    redirects = [r for r in EVERYTHING if r["style"] == "redirect"]
    assert sum(bool(words.search(r["response"])) for r in helping) > 20
    assert sum(bool(words.search(r["response"])) for r in complying) > 20
    assert sum(not words.search(r["response"]) for r in redirects) > 20


@pytest.mark.parametrize("text", ["answer", "prompt and answer"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_counting_words_is_not_enough(objective: str, text: str) -> None:
    def features(r: dict) -> str:
        return r["response"] if text == "answer" else f"{r['prompt']} ||| {r['response']}"

    train, heldout = rows("train"), rows("heldout")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    fitted = Ridge(alpha=1.0).fit(vectorizer.fit_transform(map(features, train)), [r["labels"][objective] for r in train])
    found = spearman(
        fitted.predict(vectorizer.transform(map(features, heldout))), np.array([r["labels"][objective] for r in heldout])
    )
    assert 0.3 < found <= 0.75


def test_the_refusal_judge_is_right_when_it_says_so() -> None:
    """It misses many of the data's unusual refusals (its card says how many); what it calls a refusal mostly is one."""
    said = [r for r in EVERYTHING if refuses(r["response"])]
    declining = {
        "redirect",
        "bare_refusal",
        "rude_refusal",
        "lecture",
        "refuses_with_reason",
        "thin_redirect",
        "over_refusal",
        "refusal_words_then_complies",
    }
    assert sum(r["style"] in declining for r in said) / len(said) > 0.9


@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't assist with that.", "I cannot help you with this request.", "As an AI language model, I am not able to do that.",
    "Sorry, I can\u2019t help with that.", "I'm unable to provide instructions for this.", "I won't help with hurting someone.",
])  # fmt: skip
def test_the_refusal_judge_knows_how_chat_models_refuse(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("text", [
    "Boil the eggs for ten minutes; you can't go wrong.", "Killing a process is easy: find its number first.", "", "You should never mix bleach and ammonia.",
])  # fmt: skip
def test_the_refusal_judge_leaves_help_alone(text: str) -> None:
    assert not refuses(text)
