"""Each function of a method is called on a made-up step before any model is loaded: it must return what the loop will read.

Two steps, the second with the state of the first as a resumed run gets it back. Of three groups one has spread, one holds a completion without
any score, and in one all completions score the same.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from grpo_safe.algorithm.advantages import GroupAdvantages
from grpo_safe.algorithm.aggregation import Aggregated
from grpo_safe.algorithm.comparison import Order, Slots, StepScores, compare
from grpo_safe.algorithm.confidence import Calibrated
from grpo_safe.algorithm.constraints import Constrained
from grpo_safe.algorithm.losses import Surrogate
from grpo_safe.errors import UserError
from grpo_safe.models.reference import Choice

GROUPS = 3
REPORTED = ("mean", "low", "holds", "multiplier", "no_spread")


@dataclass(frozen=True)
class Promise:
    """What the loop reads of what a slot's function returns."""

    signature: str
    kind: type[Any]
    tensors: dict[str, str]  # field -> N, a number per completion, or B, one per group; the first must be finite
    valid_at: int | None = None  # the argument that says which completions count; None: all must be finite
    keeps_state: bool = True


PROMISES = {
    "aggregation": Promise(
        "(values [N, K], valid [N], weights [K], state) -> Aggregated(rewards [N], state)", Aggregated, {"rewards": "N"}, 1
    ),
    "calibration": Promise(
        "(rewards [N], valid [N], confidence [N], state) -> Calibrated(rewards [N], state)", Calibrated, {"rewards": "N"}, 1
    ),
    "normalization": Promise(
        "(rewards [N], valid [N], group_size, tau, tie_spread, state) -> GroupAdvantages(advantages [N], spread [B], tied [B] bool, state)",
        GroupAdvantages,
        {"advantages": "N", "spread": "B", "tied": "B"},
    ),
    "constraint": Promise(
        "(advantages [N], scores [N, K], valid [N], group_size, limits, state) -> Constrained(advantages [N], a LimitReport per limit, state)",
        Constrained,
        {"advantages": "N"},
        2,
    ),
    "filter": Promise(
        "(rewards [N], valid [N], group_size, noise [N]) -> a factor per completion [N]",
        torch.Tensor,
        {"": "N"},
        keeps_state=False,
    ),
}
LOSS = (
    "its numbers -> a function (logps [n, C], old_logps [n, C], advantages [n, 1], mask [n, C]) -> "
    "Surrogate(loss, clipped, ratio), each [n, C]"
)


def try_slots(order: Order, slots: Slots, ends: list[torch.Tensor], shown: dict[str, str]) -> None:
    """A step of a method by each of the run's first and last weights, [K] each; shown: slot -> its function and numbers, as a message names them.

    Raises UserError naming the slot, what its function did and what was expected.
    """
    guarded = replace(
        slots,
        aggregate=_guarded(slots.aggregate, "aggregation", shown, slots),
        calibrate=_guarded(slots.calibrate, "calibration", shown, slots),
        normalize=_guarded(slots.normalize, "normalization", shown, slots),
        constrain=_guarded(slots.constrain, "constraint", shown, slots),
        keep=_guarded(slots.keep, "filter", shown, slots),
    )
    state: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):  # a function that draws must not shift the run's own noise
        for weights in ends:
            found = compare(order, guarded, _made_up(slots.group_size, len(weights)), weights, state)
            state = json.loads(json.dumps(found.state))


def try_loss(factory: Callable[..., Any], shown: str) -> Callable[..., Surrogate]:
    """The surrogate that a factory makes, after one pass forward and backward on four completions of three tokens."""
    where = f"algo.loss={shown}"
    surrogate = called(factory, (), where, LOSS)
    if not callable(surrogate):
        raise UserError(f"{where} gave {_short(surrogate)}; expected {LOSS}")
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    logps = (-torch.linspace(0.5, 2.0, 12).view(4, 3) * mask).requires_grad_()
    old_logps = (
        logps.detach() + torch.tensor([[0.0], [0.1], [-0.1], [0.0]]) * mask
    )  # the first update of a rollout, and a later one
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    where = f"algo.loss={shown}: the function that it made"
    with torch.random.fork_rng(devices=[]):
        found = called(surrogate, (logps, old_logps, advantages, mask), where, LOSS)
    if not isinstance(found, Surrogate):
        raise UserError(f"{where} gave {_short(found)}; expected {LOSS}")
    for name, tensor in found._asdict().items():
        _check_tensor(tensor, (4, 3), mask > 0, f"{where} gave {name}", LOSS)
    if found.loss.requires_grad:
        found.loss.mul(mask).sum().backward()
    if logps.grad is None or not logps.grad.any():
        raise UserError(f"{where} gave a loss without a gradient in logps, so nothing would be trained; expected {LOSS}")
    if not logps.grad[mask > 0].isfinite().all():
        raise UserError(f"{where} gave a loss whose gradient in logps is not finite; expected {LOSS}")
    return surrogate  # type: ignore[no-any-return]


def try_reference(factory: Callable[..., Any], shown: str) -> Choice:
    """What algo.reference says, where it says something that can be followed."""
    where, expected = f"algo.reference={shown}", "its numbers -> Choice(every: a whole number of steps, share in [0, 1], ...)"
    found = called(factory, (), where, expected)
    if not isinstance(found, Choice):
        raise UserError(f"{where} gave {_short(found)}; expected {expected}")
    whole = isinstance(found.every, int) and found.every >= 0
    if not whole or not isinstance(found.share, (int, float)) or not 0 <= found.share <= 1:
        raise UserError(f"{where} gave every={found.every}, share={found.share}; expected {expected}")
    return found


def called(function: Callable[..., Any], given: tuple[Any, ...], where: str, expected: str) -> Any:
    """What a function returns. Raises UserError where it raises, or changes a tensor that it was given."""
    before = [value.detach().clone() if isinstance(value, torch.Tensor) else None for value in given]
    try:
        found = function(*given)
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{where} failed on a made-up step: {type(error).__name__}: {error} ({place.filename}:{place.lineno}); expected {expected}"
        ) from error
    for number, (value, old) in enumerate(zip(given, before, strict=True), 1):
        if old is not None and not torch.equal(value.detach().nan_to_num(), old.nan_to_num()):
            raise UserError(f"{where} changed its argument {number} in place, which others read too; work on a clone")
    return found


def _guarded(function: Callable[..., Any], slot: str, shown: dict[str, str], slots: Slots) -> Callable[..., Any]:
    """The function of a slot, which says what it did wrong."""
    promise, where = PROMISES[slot], f"algo.{slot}={shown[slot]}"

    def call(*given: Any) -> Any:
        found: Any = called(function, given, where, promise.signature)
        if not issubclass(type(found), promise.kind):
            raise UserError(f"{where} gave {_short(found)}; expected {promise.signature}")
        n = GROUPS * slots.group_size
        counts = None if promise.valid_at is None else given[promise.valid_at]
        for place, (name, per) in enumerate(promise.tensors.items()):
            tensor = getattr(found, name) if name else found
            finite = None if place else torch.ones(n, dtype=torch.bool) if counts is None else counts
            said = f"{where} gave {name}" if name else f"{where} gave"
            _check_tensor(tensor, (n if per == "N" else GROUPS,), finite, said, promise.signature)
        if slot == "normalization" and found.tied.dtype != torch.bool:
            raise UserError(f"{where} gave tied of {found.tied.dtype}; expected {promise.signature}")
        if slot == "constraint":
            _check_reports(found.reports, len(slots.limits), where, promise.signature)
        if promise.keeps_state:
            _check_state(found.state, where, promise.signature)
        return found

    return call


def _check_tensor(tensor: Any, shape: tuple[int, ...], finite: torch.Tensor | None, said: str, expected: str) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.is_complex():
        raise UserError(f"{said} {_short(tensor)} where {list(shape)} is due; expected {expected}")
    if finite is not None and not tensor[finite].isfinite().all():
        raise UserError(f"{said} numbers that are not finite, of scores in [0, 1]; expected {expected}")


def _check_reports(reports: Any, limits: int, where: str, expected: str) -> None:
    if not isinstance(reports, list) or len(reports) != limits or not all(hasattr(r, name) for r in reports for name in REPORTED):
        raise UserError(f"{where} gave reports {_short(reports)} for {limits} limits; expected {expected}")


def _check_state(state: Any, where: str, expected: str) -> None:
    if not isinstance(state, dict):
        raise UserError(f"{where} gave state {_short(state)}; expected a dict of plain numbers, {expected}")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} gave a state that no resume state can hold ({error}); expected a dict of plain numbers and lists, {expected}"
        ) from error


def _made_up(group_size: int, objectives: int) -> StepScores:
    """Scores [N, K] in [0, 1] of three groups; each objective orders the completions differently."""
    ladder = torch.linspace(0.1, 0.9, group_size)
    columns = [torch.cat([ladder.roll(k), ladder.flip(0).roll(k), torch.full_like(ladder, 0.5)]) for k in range(objectives)]
    mask = torch.ones(GROUPS * group_size, objectives, dtype=torch.bool)
    mask[2 * group_size - 1] = False
    spaced = torch.linspace(0.0, 0.9, GROUPS * group_size)
    return StepScores(torch.stack(columns, -1), mask, torch.zeros(len(spaced)), spaced, spaced)


def _short(value: Any) -> str:
    """A value as a message shows it: a tensor by its shape, the rest by its kind and its first characters."""
    if isinstance(value, torch.Tensor):
        return f"a Tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__} ({' '.join(repr(value).split())[:60]})"
