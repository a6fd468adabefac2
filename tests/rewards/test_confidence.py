"""What a completion says of its confidence: read, and taken out."""

from __future__ import annotations

import pytest

from grpo_safe.errors import UserError
from grpo_safe.records import Prompt
from grpo_safe.rewards.confidence import REQUEST, asking, confidences, unstated


@pytest.mark.parametrize(
    ("text", "confidence", "rest"),
    [
        ("Yes.\nConfidence: 8", 0.8, "Yes."),
        ("Yes. CONFIDENCE:7/10.", 0.7, "Yes."),
        ("Confidence: 3.5, as I am not sure", 0.35, "as I am not sure"),
        ("Confidence: 40", 1.0, ""),
        ("Confidence: 2 Hm. Confidence: 9", 0.2, "Hm."),
        ("I speak with confidence: always", 0.5, "I speak with confidence: always"),
        ("Overconfidence: 3 is a book", 0.5, "Overconfidence: 3 is a book"),
        ("No idea", 0.5, "No idea"),
    ],
)
def test_it_is_read_and_taken_out(text: str, confidence: float, rest: str) -> None:
    assert confidences([text]).tolist() == pytest.approx([confidence])
    assert unstated([text]) == [rest]


def test_every_prompt_is_asked_or_none_is() -> None:
    user = Prompt("a", [{"role": "user", "content": "Hi"}])
    own = Prompt("b", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert asking("Be kind.", [user]) == f"Be kind.\n\n{REQUEST}" and asking(None, [user]) == REQUEST
    with pytest.raises(UserError, match="1 of 2 prompts bring a system message of their own"):
        asking("Be kind.", [user, own])
