"""The records that flow between rooms: prompts -> rollout -> scores -> train batch. A shape per field.

B prompts, G completions per prompt, N = B * G, K objectives, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One prompt, as chat messages.

    Example: Prompt("3f2a...", [{"role": "user", "content": "Hi"}], kind="everyday")
    """

    id: str  # content hash: the sampling noise of its completions is tied to it
    messages: tuple[Message, ...] | list[Message]
    kind: str = "unknown"

    @property
    def text(self) -> str:
        """The conversation as plain text; a single user message is just its content."""
        return conversation_text(self.messages)


@dataclass(frozen=True)
class LabelledRow:
    """An answer with labels in [0, 1]; a missing objective is absent, never zero.

    Example: LabelledRow(prompt, "Boil it for ten minutes.", {"helpfulness": 0.75})
    """

    prompt: Prompt
    response: str
    labels: dict[str, float]
    source: str = ""


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers, the first preferred on one objective.

    Example: PreferenceRow(prompt, "Sure: ...", "No.", "helpfulness")
    """

    prompt: Prompt
    chosen: str
    rejected: str
    objective: str
    source: str = ""


Row = LabelledRow | PreferenceRow


@dataclass
class Rollout:
    """The N completions of one step, no rewards. Rows of a group are neighbours: row b * G + g.

    Example: B = 1, G = 2, "Hi" -> ["Hello.", "Yes?"].
    """

    prompts: list[Prompt]  # N
    prompt_ids: torch.Tensor  # [N, P] left-padded
    prompt_mask: torch.Tensor  # [N, P] 1 where a token is
    completion_ids: torch.Tensor  # [N, C] right-padded, the end token included
    completion_mask: torch.Tensor  # [N, C] 1 where a token was sampled
    sampler_logps: torch.Tensor  # [N, C] of the engine, after temperature
    truncated: torch.Tensor  # [N] bool: hit the length limit without an end token
    texts: list[str]  # N, special tokens removed
    sampled: bool = True  # by the policy; False: a data set's answers, whose sampler_logps mean nothing

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class Scores:
    """What the objectives say of N completions; higher is better.

    Example: Scores(["safety"], values=[[0.9], [0.1]], mask=[[1], [1]])
    """

    objectives: list[str]  # K names
    values: torch.Tensor  # [N, K] float32
    mask: torch.Tensor  # [N, K] bool: False where an objective could not score

    def __len__(self) -> int:
        return self.values.shape[0]

    def rows(self, index: list[int]) -> Scores:
        """The rows `index`."""
        return Scores(self.objectives, self.values[index], self.mask[index])


@dataclass
class TrainBatch:
    """A rollout with what the loss multiplies."""

    prompt_ids: torch.Tensor  # [n, P]
    prompt_mask: torch.Tensor  # [n, P]
    completion_ids: torch.Tensor  # [n, C]
    completion_mask: torch.Tensor  # [n, C] 1 where the loss counts
    lengths: torch.Tensor  # [n] sampled tokens, also of rows that the loss leaves out
    sampler_logps: torch.Tensor  # [n, C]
    advantages: torch.Tensor  # [n], or [n, C] where tokens differ
    old_logps: torch.Tensor | None = None  # [n, C]; None: one update per rollout, policy_logps.detach()
    ref_logps: torch.Tensor | None = None  # [n, C]; None: no reference is used
    rewards: torch.Tensor | None = None  # [n]; of losses that rank completions
    values: torch.Tensor | None = None  # [n, C]; of a critic, at the start of the step
    returns: torch.Tensor | None = None  # [n, C]; what the critic should have said
    ref_hidden: torch.Tensor | None = None  # [n, C, h]; what the reference's LM head reads before each completion token
    ref_eos_logps: torch.Tensor | None = None  # [n, C]; of the reference, that the completion ends before each of its tokens
    kinds: torch.Tensor | None = None  # [n] index of the prompt's kind, where a loss weighs kinds
    kind_weights: tuple[float, ...] = ()  # what a completion of each kind counts
    unit: int = 1  # neighbours that belong together: 2 in pairs, G in ranked groups

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def rows(self, index: torch.Tensor) -> TrainBatch:
        """The rows `index`, with the padding columns that none of them uses cut away."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        whole = ("unit", "kind_weights")
        picked = {name: value if value is None or name in whole else value[index] for name, value in picked.items()}
        width = max(1, int(picked["lengths"].max()))
        for name in (
            "completion_ids", "completion_mask", "sampler_logps", "old_logps", "ref_logps", "ref_hidden", "ref_eos_logps", "values",
            "returns",
        ):  # fmt: skip
            picked[name] = None if picked[name] is None else picked[name][:, :width]
        if picked["advantages"].dim() == 2:
            picked["advantages"] = picked["advantages"][:, :width]
        prompt_width = max(1, int(picked["prompt_mask"].sum(1).max()))
        for name in ("prompt_ids", "prompt_mask"):
            picked[name] = picked[name][:, -prompt_width:]
        return TrainBatch(**picked)


@dataclass
class PolicyOutputs:
    """One forward of the policy on a batch: just what the loss declared."""

    logps: torch.Tensor  # [n, C] log-prob of each completion token, after temperature
    entropy: torch.Tensor | None = None  # [n, C]
    values: torch.Tensor | None = None  # [n, C] what a critic expects before each completion token
    eos_logps: torch.Tensor | None = None  # [n, C] log-prob that the completion ends before each of its tokens
    ref_kl: torch.Tensor | None = None  # [n, C] KL(reference || policy) over the whole vocabulary, at each completion token
    hidden: torch.Tensor | None = None  # [n, C, h] what the LM head reads before each completion token


@dataclass(frozen=True)
class Extras:
    """What one forward is asked for beside log-probs, entropy and a critic's values."""

    eos: int | None = None  # the token that ends a completion, where its log-probs are wanted
    eos_temperature: float | None = None  # of those log-probs; None: that of the others
    hidden: bool = False  # what the LM head reads
    reference_head: tuple[torch.Tensor, torch.Tensor | None] | None = None  # weight, bias for ref_hidden; None: the policy's own


def join_scores(parts: list[Scores]) -> Scores:
    """Scores of several rollouts, one below the other."""
    import torch

    return Scores(parts[0].objectives, torch.cat([p.values for p in parts]), torch.cat([p.mask for p in parts]))


def conversation_text(messages: tuple[Message, ...] | list[Message]) -> str:
    """A conversation as plain text, for encoders: one user message is its content, more are labelled by role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)
