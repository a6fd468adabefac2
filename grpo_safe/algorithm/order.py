"""Which rows a step takes: a pure function of (seed, step), so that a resumed run needs no data position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np


def rows_of_step(total: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the rows of a 1-based step: epoch after epoch, each in an order of its own.

    Example: rows_of_step(3, 2, 1, 0) + rows_of_step(3, 2, 2, 0)[:1] holds 0, 1 and 2 once each.
    """
    first = (step - 1) * per_step
    places = [divmod(position, total) for position in range(first, first + per_step)]
    return [int(_epoch_order(total, seed, epoch)[place]) for epoch, place in places]


def occurrences(items: Sequence[Hashable]) -> list[int]:
    """How often each item stood in the list before its place: a prompt that comes twice in a step must not be answered with the same noise.

    Example: occurrences(["a", "b", "a"]) -> [0, 0, 1]
    """
    seen: Counter[Hashable] = Counter()
    before = []
    for item in items:
        before.append(seen[item])
        seen[item] += 1
    return before


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that follows from its parts, such as (seed, step, rank)."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


@lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)
