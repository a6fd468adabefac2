"""A batch as one flat row of tokens without padding: first the prompts, each once, then the completions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """T tokens of B prompts and n completions, and where they stand in right-padded rows, as attention wants them.

    A completion's last token predicts nothing, so it is not among the T.

    Example: prompt "ab" with completions "x" and "yzw" -> tokens a b y z; owner [0, 0]; prompts [[1, 1]]; completions [[0, 0], [1, 1]];
    predictors [1, 1, 2, 3] of the targets x y z w.
    """

    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    owner: torch.Tensor  # [n] each completion's prompt
    prompts: torch.Tensor  # [B, P] bool: where a token is
    completions: torch.Tensor  # [n, C'] bool: where a token is, C' = max(1, C - 1)
    prompt_slots: torch.Tensor  # [prompt tokens] their places among B * P
    completion_slots: torch.Tensor  # [completion tokens] their places among n * C'
    keys: torch.Tensor  # [n, 1, C', P + C'] bool: a completion's token sees its prompt, itself and what is before
    predicted: torch.Tensor  # [n, C] bool: the m tokens whose log-probs are wanted
    targets: torch.Tensor  # [m] those tokens
    predictors: torch.Tensor  # [m] the token of the flat row before each of them


def flat_row(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_ids: torch.Tensor, lengths: torch.Tensor) -> Layout:
    """prompt_ids, prompt_mask [n, P] left-padded; completion_ids [n, C] right-padded; lengths [n]."""
    new = starts_group(prompt_ids, prompt_mask)
    owner = new.cumsum(0) - 1
    prompt_ids, tokens = prompt_ids[new], prompt_mask[new].bool()  # [B, P]
    prompt_lengths = tokens.sum(1)
    predicted = _inside(lengths, completion_ids.shape[1])
    prompts, completions = _inside(prompt_lengths, tokens.shape[1]), _inside(lengths - 1, max(1, completion_ids.shape[1] - 1))
    width = completions.shape[1]
    steps = torch.arange(max(tokens.shape[1], width), device=lengths.device)

    prompt_slots, completion_slots = _places(prompts), _places(completions)
    before = torch.empty_like(predicted, dtype=torch.long)  # [n, C]
    before[:, 0] = (prompt_lengths.cumsum(0) - 1)[owner]
    before[:, 1:][completions[:, : before.shape[1] - 1]] = len(prompt_slots) + torch.arange(
        len(completion_slots), device=before.device
    )
    causal = (steps[:width, None] >= steps[:width]).expand(len(owner), -1, -1)
    return Layout(
        ids=torch.cat([prompt_ids[tokens], completion_ids[:, :width][completions]]),
        positions=torch.cat(
            [steps[: prompts.shape[1]].expand_as(prompts)[prompts], (prompt_lengths[owner, None] + steps[:width])[completions]]
        ),
        owner=owner,
        prompts=prompts,
        completions=completions,
        prompt_slots=prompt_slots,
        completion_slots=completion_slots,
        keys=torch.cat([prompts[owner][:, None].expand(-1, width, -1), causal], dim=2)[:, None],
        predicted=predicted,
        targets=completion_ids[predicted],
        predictors=before[predicted],
    )


def starts_group(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
    """[n, P], [n, P] -> [n] bool: the prompt is not that of the row before."""
    differs = ((prompt_ids[1:] != prompt_ids[:-1]) | (prompt_mask[1:] != prompt_mask[:-1])).any(1)
    return torch.cat([differs.new_ones(1), differs])


def right_padded(values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """[m, ...] -> [n, C, ...], zeros where `inside` [n, C] is False."""
    rest = values.shape[1:]
    return values.new_zeros(inside.numel(), *rest).index_copy(0, _places(inside), values).view(*inside.shape, *rest)


def _inside(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """[n] -> [n, width] bool, True at the first `length` places."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _places(inside: torch.Tensor) -> torch.Tensor:
    """Flat indices of what is True."""
    return inside.flatten().nonzero()[:, 0]
