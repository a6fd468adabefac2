"""Asking a completion how sure it is, reading what it says, and taking that out before anything scores it."""

from __future__ import annotations

import re

import torch

from grpo_safe.errors import UserError
from grpo_safe.records import Prompt

REQUEST = 'End your answer with a line "Confidence: k", where k from 0 (a guess) to 10 (certain) says how sure you are of it.'
STATED = re.compile(r"[ \t]*\bconfidence:\s*(\d+(?:\.\d+)?)(?:\s*/\s*\d+)?[ \t]*[.,!?]*", re.IGNORECASE)
UNSTATED = 0.5


def asking(system_prompt: str | None, prompts: list[Prompt]) -> str:
    """The system prompt with the request. Raises UserError where a prompt would not be asked, as it brings a system message of its own."""
    own = sum(p.messages[0]["role"] == "system" for p in prompts)
    if own:
        raise UserError(
            f"algo.calibration asks for a confidence in the system prompt, and {own} of {len(prompts)} prompts bring a system message of their own; "
            "move it into the prompt, or set algo.calibration=none"
        )
    return REQUEST if system_prompt is None else f"{system_prompt}\n\n{REQUEST}"


def unstated(texts: list[str]) -> list[str]:
    """Completions without what they say of their confidence.

    Example: unstated(["Yes.\\nConfidence: 8/10."]) -> ["Yes."]
    """
    return [STATED.sub("", text).strip() for text in texts]


def confidences(texts: list[str]) -> torch.Tensor:
    """[N] in [0, 1]: the first that each states, over 10; .5 where it states none."""
    found = (STATED.search(text) for text in texts)
    return torch.tensor([UNSTATED if m is None else min(10.0, float(m.group(1))) / 10 for m in found])
