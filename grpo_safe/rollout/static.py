"""Decoding with tensors of fixed shape and address, so that one step can be captured as a CUDA graph and replayed.

On a GPU a small model's token costs the launches of some thousand kernels, not their arithmetic; a graph launches them at once. For that a step
may not depend on anything that the host knows: which token it is, who has ended, where it writes all stand in tensors. The step is an ordinary
function, which also runs on a CPU; who runs it (`Eager`, or graphs.Graphs) is given.

As in the other path the prompt stands in the cache once per group, and noise belongs to the completion. Different is that attention reads a
whole stretch of the cache under a mask (stretches double in length, so early tokens read little), and that rows which have ended stay until half
of the places can go at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from grpo_safe.algorithm.sampling import pick_tokens
from grpo_safe.config import SamplingConfig
from grpo_safe.rollout.attention import prefill
from grpo_safe.rollout.engine import Decoded
from grpo_safe.rollout.static_cache import Shape, StaticCache, halved
from grpo_safe.rollout.weights import Adapters, thin_adapters

LEAST_WIDTH = 64  # prompt tokens that the cache has room for at least: a graph for each power of two, not for each prompt
LEAST_SEEN = 128  # completion tokens that attention reads at least
CHECK_EVERY = 16  # tokens between two looks at which rows have ended; each look waits for the device


class Runner(Protocol):
    """Runs a step of a shape; may record it once and repeat what it recorded, as nothing but tensors changes."""

    failure: str | None  # why it has given up recording

    def __call__(self, shape: Hashable, step: Callable[[], None]) -> None: ...

    def forget(self) -> None:
        """Addresses have changed: what was recorded is worthless."""
        ...


class Eager:
    """Runs every step as it is."""

    failure: str | None = None

    def __call__(self, shape: Hashable, step: Callable[[], None]) -> None:
        step()

    def forget(self) -> None:
        pass


class State:
    """Everything that a step reads and writes beside the weights."""

    def __init__(self, cache: StaticCache, sampling: SamplingConfig, ends: tuple[int, ...]) -> None:
        device, places, new = cache.column.device, cache.places, cache.new
        self.cache, self.sampling = cache, sampling
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.tokens = torch.zeros(places, dtype=torch.long, device=device)  # the newest token of each place
        self.rows = torch.zeros(places, dtype=torch.long, device=device)  # the completion that each place runs
        self.no_row = places  # the completion of places that run none: written to, never read
        self.uniforms = torch.zeros(places + 1, new, dtype=torch.float64, device=device)
        self.out = torch.zeros(places + 1, new, dtype=torch.long, device=device)
        self.logps = torch.zeros(places + 1, new, device=device)
        self.ended = torch.zeros(places + 1, dtype=torch.bool, device=device)
        self.logits: Tensor | None = None  # kept where tokens are picked outside the step
        self._rows: list[int] = []  # `rows` as the host knows them
        self._first = cache.shape

    def begin(self, noise: np.ndarray, pad: int) -> None:
        """New completions, each in the place of its number."""
        n = len(noise)
        self._rows, self._first = list(range(n)), self.cache.shape
        self.rows[:n] = torch.arange(n, device=self.rows.device)
        self.uniforms[:n] = torch.from_numpy(noise)
        self.out.fill_(pad)
        self.ended.fill_(False)
        self.cache.column.zero_()

    # --- one step -----------------------------------------------------------------------------------------------------

    def forward(self, lm: Any) -> Tensor:
        """The newest tokens through the model -> logits of the next, [b * G, V]; moves on by one column."""
        cache = self.cache
        shape = cache.shape
        cache.clear_bias()
        positions = (cache.lengths[: shape.groups, None] + cache.column).expand(-1, shape.members).reshape(-1, 1)
        tokens = self.tokens[: shape.places, None]
        logits = lm(input_ids=tokens, position_ids=positions, use_cache=False, group_cache=cache).logits[:, 0]
        cache.clear_bias()
        cache.column.add_(1)
        return logits

    def pick(self, logits: Tensor) -> None:
        """Tokens of the current column, by each completion's own noise."""
        places, column = len(logits), self.cache.column
        rows = self.rows[:places]
        chosen, logps = pick_tokens(logits, self.uniforms[rows, column], self.sampling.temperature, self.sampling.top_p)
        self.out[rows, column] = chosen
        self.logps[rows, column] = logps
        self.ended[rows] = self.ended[rows] | (chosen[:, None] == self.ends).any(1)
        self.tokens[:places] = chosen

    def step_of(self, lm: Any) -> Callable[[], None]:
        """The step. Under top_p picking asks the host how many tokens to sort, so it stays outside: `pick_kept`."""
        if self.sampling.top_p >= 1.0:
            return lambda: self.pick(self.forward(lm))
        return lambda: self._keep_logits(self.forward(lm))

    def _keep_logits(self, logits: Tensor) -> None:
        assert self.logits is not None
        self.logits[: len(logits)] = logits

    def pick_kept(self) -> None:
        """What follows a step under top_p."""
        if self.logits is not None:
            self.pick(self.logits[: self.cache.shape.places])

    # --- rows that end ------------------------------------------------------------------------------------------------

    def leave(self, length: int) -> bool:
        """Rows that have ended leave, if that frees half of the places; False when all have. length: tokens of each row so far."""
        shape, ended = self.cache.shape, self.ended.tolist()  # waits for the device
        live: list[list[int]] = []
        for g in range(shape.groups):
            rows = self._rows[g * shape.members : (g + 1) * shape.members]
            live.append([m for m, row in enumerate(rows) if row != self.no_row and not ended[row]])
        alive = [g for g, members in enumerate(live) if members]
        if not alive:
            return False
        groups = halved(self._first.groups, len(alive))
        members = halved(self._first.members, max(len(live[g]) for g in alive))
        if 2 * groups * members > shape.places:
            return True
        chosen: list[list[int]] = []  # a place without a row repeats one that runs, and writes to no_row
        rows = []
        for i in range(groups):
            g = alive[i] if i < len(alive) else alive[0]
            mine = live[g] if i < len(alive) else []
            chosen.append([*mine, *[live[g][0]] * (members - len(mine))])
            rows += [self._rows[g * shape.members + m] for m in mine] + [self.no_row] * (members - len(mine))
        device = self.rows.device
        of_groups = torch.tensor([*alive, *[alive[0]] * (groups - len(alive))], device=device)
        of_members = torch.tensor(chosen, device=device)
        places = (of_groups[:, None] * shape.members + of_members).flatten()
        self.cache.keep(of_groups, of_members, replace(shape, groups=groups, members=members), length)
        self.tokens[: len(places)] = self.tokens[places]
        self.rows[: len(places)] = torch.tensor(rows, device=device)
        self._rows = rows
        return True


class StaticDecoder:
    """The engine's loop over static steps. Lives as long as the run: what was allocated and recorded serves every rollout."""

    def __init__(self, run: Runner, check_every: int = CHECK_EVERY, least_seen: int = LEAST_SEEN) -> None:
        self.run, self.check_every, self.least_seen = run, check_every, least_seen
        self.state: State | None = None
        self._settings: Hashable = None
        self._model: Callable[[], Any] = lambda: None
        self._adapters: Adapters = {}

    def decode(
        self, lm: Any, prompt_ids: list[list[int]], noise: np.ndarray, group_size: int, sampling: SamplingConfig,
        ends: set[int], pad: int,
    ) -> Decoded:  # fmt: skip
        """group_size completions of each prompt, under `group_attention`."""
        if self._model() is not lm:
            self._adapters = {}
        with thin_adapters(lm, self._adapters):
            return self._decode(lm, prompt_ids, noise, group_size, sampling, ends, pad)

    def _decode(
        self, lm: Any, prompt_ids: list[list[int]], noise: np.ndarray, group_size: int, sampling: SamplingConfig,
        ends: set[int], pad: int,
    ) -> Decoded:  # fmt: skip
        new = noise.shape[1]
        lengths = [len(row) for row in prompt_ids]
        width = max(LEAST_WIDTH, 1 << (max(lengths) - 1).bit_length())
        state = self._state(lm, Shape(len(lengths), group_size, width, new), lengths, sampling, ends)
        cache = state.cache
        state.begin(noise, pad)
        logits = prefill(lm, prompt_ids, cache).repeat_interleave(group_size, 0)
        if sampling.top_p < 1.0 and state.logits is None:
            state.logits = logits.new_zeros(cache.places, logits.shape[-1])
        state.pick(logits)
        step = state.step_of(lm)
        for t in range(1, new):
            if t % self.check_every == 0 and not state.leave(t):
                break
            cache.shape = replace(cache.shape, seen=halved(new, max(t, self.least_seen)))
            self.run(cache.shape, step)
            state.pick_kept()
        return _cut(state.out[: len(noise)].tolist(), state.logps[: len(noise)].tolist(), ends)

    def _state(self, lm: Any, shape: Shape, lengths: list[int], sampling: SamplingConfig, ends: set[int]) -> State:
        """The tensors for this rollout: those of the last one, unless they are too small or something in a step has changed."""
        settings = (sampling.temperature, sampling.top_p, tuple(sorted(ends)), shape.seen, addresses(lm, self._adapters))
        old = self.state.cache if self.state is not None else None
        fits = old is not None and shape.places <= old.places and shape.groups * shape.width <= old.prompt_places
        if self._model() is not lm or settings != self._settings or not fits:
            self.run.forget()
            same = old is not None and self._model() is lm and old.new == shape.seen
            places = max(shape.places, old.places if same and old is not None else 0)
            prompt_places = max(shape.groups * shape.width, old.prompt_places if same and old is not None else 0)
            self.state = None  # before the new one is made: both need not fit
            del old
            cache = StaticCache(places, prompt_places, shape.seen, lm.device)
            self.state, self._settings, self._model = State(cache, sampling, settings[2]), settings, weakref.ref(lm)
        assert self.state is not None
        self.state.cache.begin(lengths, shape)
        return self.state


def addresses(lm: Any, copies: Adapters) -> Hashable:
    """Where a recorded step finds the weights, and how it goes through the adapters. In-place updates change nothing here."""
    copied = (t for pair in copies.values() for t in pair)
    tensors = tuple((t.data_ptr(), t.dtype, t.shape) for t in (*lm.parameters(), *lm.buffers(), *copied))
    tuners: list[Any] = [m for m in lm.modules() if isinstance(m, BaseTunerLayer)]
    adapters = tuple((m.disable_adapters, m.merged, tuple(m.active_adapters), tuple(m.scaling.items())) for m in tuners)
    return tensors, adapters, lm.training


def obstacle(lm: Any) -> str | None:
    """Why this model's step cannot be recorded; None: it can."""
    ropes = getattr(lm.config, "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in (ropes, *ropes.values()) if isinstance(r, dict)}
    if odd := kinds & {"dynamic", "longrope"}:
        return f"its rotary embedding ({', '.join(sorted(odd))}) asks the host for the longest position at every token"
    return None


def _cut(tokens: list[list[int]], logps: list[list[float]], ends: set[int]) -> Decoded:
    """Each row up to and with its first end token."""
    lengths = [next((t + 1 for t, token in enumerate(row) if token in ends), len(row)) for row in tokens]
    ids = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    return Decoded(ids, [row[:n] for row, n in zip(logps, lengths, strict=True)], [row[-1] in ends for row in ids])
