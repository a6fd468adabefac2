"""The gradient of a step does not depend on how the batch is cut into micro-batches, nor on the number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from grpo import grpo_loss
from transformers import GPT2Config, GPT2LMHeadModel

from grpo_safe.algorithm.losses import Denominators, Loss
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.forward import PackedForward, PlainForward, micro_batches, policy_outputs
from grpo_safe.records import Extras, TrainBatch
from grpo_safe.runtime import Runtime
from grpo_safe.stages.train_policy import collecting, updating

RUNTIME = Runtime(0, 1, torch.device("cpu"), "single")
GROUP = 3


@pytest.fixture(params=[PlainForward, PackedForward])
def path(request):
    return request.param


class Recorder:
    """A Trainable that keeps each optimizer step's gradient instead of taking the step."""

    def __init__(self, path, model) -> None:
        self.model, self.module = path(model), model
        self.gradients: list[torch.Tensor] = []
        self.lasts: list[bool] = []

    def backward(self, loss, last) -> None:
        loss.backward()
        self.lasts.append(last)

    def step(self, lr) -> float:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.model.zero_grad(set_to_none=True)
        return float(self.gradients[-1].norm())


def tiny_model(dtype=torch.float64):
    """GPT-2's shape: its norms keep float64, so that gradients agree to more than float32's digits."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def ragged_batch(seed: int = 0, n: int = 12) -> TrainBatch:
    g = torch.Generator().manual_seed(seed)
    p, c = 9, 7
    prompt_lengths = torch.randint(1, p + 1, (n // GROUP,), generator=g).repeat_interleave(GROUP)
    lengths = torch.randint(1, c + 1, (n,), generator=g)
    prompt_mask = (torch.arange(p) >= p - prompt_lengths[:, None]).long()
    inside = (torch.arange(c) < lengths[:, None]).long()
    loss_mask = inside.clone()
    loss_mask[4] = 0  # left out of the loss, as a truncated completion under algo.truncated=mask
    logps = -4 + torch.randn(n, c, generator=g, dtype=torch.float64)
    prompt_ids = torch.randint(1, 50, (n // GROUP, p), generator=g).repeat_interleave(GROUP, 0) * prompt_mask
    return TrainBatch(
        prompt_ids, prompt_mask, torch.randint(1, 50, (n, c), generator=g) * inside,
        loss_mask, lengths, (logps * inside).float(), torch.randn(n, generator=g, dtype=torch.float64), logps * inside,
        (logps + 0.3) * inside,
    )  # fmt: skip


def run_update(path, budget: int, **algo):
    cfg = TrainPolicyConfig()
    cfg.train.micro_batch_tokens, cfg.algo.group_size, cfg.algo.entropy_coef = budget, GROUP, 0.01
    cfg.sampling.temperature = 0.8
    for name, value in algo.items():
        setattr(cfg.algo, name, value)
    recorder = Recorder(path, tiny_model())
    loss_fn = grpo_loss(cfg.algo.clip_eps, cfg.algo.kl_coef, cfg.algo.entropy_coef)
    sums, norm, _ = updating.update(
        cfg, SimpleNamespace(rt=RUNTIME, trainable=recorder, extras=Extras()), ragged_batch(), Loss(loss_fn, "kept"), step=1
    )
    return recorder, sums, norm


@pytest.mark.parametrize("budget", [60, 1])
def test_gradient_and_sums_do_not_depend_on_the_micro_batch_budget(path, budget):
    whole, sums, norm = run_update(path, 10**6)
    cut, cut_sums, cut_norm = run_update(path, budget)
    assert len(whole.lasts) == 1
    assert len(cut.lasts) >= 2 and cut.lasts == [False] * (len(cut.lasts) - 1) + [True]
    assert budget > 1 or len(cut.lasts) == 12
    assert (cut.gradients[0] - whole.gradients[0]).norm() <= 1e-9 * whole.gradients[0].norm()
    assert cut_norm == pytest.approx(norm, rel=1e-9)
    assert sorted(sums) == sorted(cut_sums)
    for name, value in sums.items():
        assert cut_sums[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_gradient_does_not_depend_on_the_number_of_ranks(path):
    """Two ranks count their denominators together; their gradients add up to one rank's."""
    batch, model = ragged_batch(), path(tiny_model())
    counts = [updating.count(RUNTIME, batch, rows) for rows in (range(12), range(6), range(6, 12))]
    together = Denominators(counts[1].sequences + counts[2].sequences, counts[1].tokens + counts[2].tokens)
    assert together == counts[0]
    assert counts[0] == Denominators(12.0, float(batch.completion_mask.sum()))
    gradients = []
    for shares in ([range(12)], [range(6), range(6, 12)]):
        model.zero_grad()
        for rows in shares:
            for index in micro_batches(model, batch, rows, 40):
                part = batch.rows(index)
                outputs = policy_outputs(model, part, 1.0, "kept")
                grpo_loss(0.2, 0.04, 0.01)(outputs, part, together)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-9 * gradients[0].norm()


def test_minibatches_take_each_group_once_per_update():
    cfg = TrainPolicyConfig()
    cfg.algo.group_size, cfg.algo.minibatches = GROUP, 3
    rounds = []
    for update in range(2):
        parts = [updating.minibatch_rows(cfg, RUNTIME, 24, 5, update * 3 + part, GROUP) for part in range(3)]
        assert sorted(row for part in parts for row in part) == list(range(24))
        for part in parts:
            assert all(part[i : i + GROUP] == list(range(part[i], part[i] + GROUP)) for i in range(0, len(part), GROUP))
        rounds.append(parts)
    assert rounds[0] != rounds[1]
    assert rounds[0][0] == updating.minibatch_rows(cfg, RUNTIME, 24, 5, 0, GROUP)


def test_a_minibatch_holds_the_same_groups_on_two_ranks():
    cfg = TrainPolicyConfig()
    cfg.algo.group_size, cfg.algo.minibatches = GROUP, 3
    for part in range(3):
        whole = updating.minibatch_rows(cfg, RUNTIME, 24, 5, part, GROUP)
        halves = [updating.minibatch_rows(cfg, Runtime(r, 2, torch.device("cpu"), "zero2"), 12, 5, part, GROUP) for r in range(2)]
        assert sorted(halves[0] + [12 + row for row in halves[1]]) == sorted(whole)


def test_update_takes_one_optimizer_step_a_minibatch(path):
    recorder, sums, _ = run_update(path, 60, minibatches=2, updates_per_rollout=2)
    assert len(recorder.gradients) == 4
    assert recorder.lasts.count(True) == 4
    assert sums["passes"] == 4.0
    assert sums["tokens"] == 2 * float(ragged_batch().completion_mask.sum())
    # nothing moved in between (the recorder takes no step), so both updates saw the same tokens and the halves add up
    one, one_sums, _ = run_update(path, 10**6)
    halves = recorder.gradients[0] + recorder.gradients[1]
    assert (halves / 2 - one.gradients[0]).norm() <= 1e-9 * one.gradients[0].norm()  # two halves of equal size
    assert sums["kl"] == pytest.approx(2 * one_sums["kl"], rel=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_fixed_logps_equal_one_forward_and_are_zero_on_padding(path, budget):
    cfg = TrainPolicyConfig()
    cfg.train.micro_batch_tokens, cfg.sampling.temperature = budget, 0.8
    batch, model = ragged_batch(), path(tiny_model())
    found = collecting.fixed_outputs(cfg, RUNTIME, model, batch, Extras()).logps
    inside = torch.arange(batch.completion_ids.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        expected = policy_outputs(model, batch, 0.8).logps
    assert not found.requires_grad
    assert torch.allclose(found[inside].double(), expected[inside].double(), atol=1e-6)
    assert found[~inside].abs().max() == 0
    assert found[4, : batch.lengths[4]].abs().min() > 0  # a row that the loss leaves out keeps its log-probs


@pytest.mark.parametrize("budget", [1, 25, 60, 10**6])
def test_micro_batches_are_a_partition(path, budget):
    batch, rows = ragged_batch(3), [0, 2, 3, 5, 7, 8, 11]
    micros = path.micro_batches(batch, rows, budget)
    assert sorted(i for index in micros for i in index.tolist()) == rows


def test_plain_micro_batches_keep_the_budget_with_padding():
    """A micro-batch is as wide as its widest prompt plus its longest completion."""
    for seed in range(4):
        batch = ragged_batch(seed)
        for index in PlainForward.micro_batches(batch, range(len(batch)), 50):
            rows = batch.rows(index)
            assert len(rows) == 1 or rows.prompt_ids.numel() + rows.completion_ids.numel() <= 50


@pytest.mark.parametrize("budget", [10, 18, 30, 60])
def test_packed_micro_batches_count_a_shared_prompt_once(budget):
    for seed in range(4):
        batch = ragged_batch(seed)
        prompts, lengths = batch.prompt_mask.sum(1).tolist(), batch.lengths.tolist()
        for index in PackedForward.micro_batches(batch, range(len(batch)), budget):
            rows = index.tolist()
            groups = [[i for i in rows if i // GROUP == g] for g in sorted({i // GROUP for i in rows})]
            cost = sum(prompts[part[0]] + sum(lengths[i] for i in part) for part in groups)
            assert len(rows) == 1 or cost <= budget
            assert all(part == list(range(part[0], part[-1] + 1)) for part in groups)
            for part in groups:  # cut only where the group alone is too long
                first = part[0] // GROUP * GROUP
                whole = prompts[first] + sum(lengths[first : first + GROUP])
                assert len(part) == GROUP or whole > budget


def test_packed_micro_batches_are_fewer_and_hold_whole_groups():
    batch = ragged_batch()
    packed, plain = (path.micro_batches(batch, range(len(batch)), 60) for path in (PackedForward, PlainForward))
    assert len(packed) < len(plain)
    assert all(
        sorted({i // GROUP for i in index.tolist()}) == sorted(i // GROUP for i in index.tolist() if i % GROUP == 0)
        for index in packed
    )


@pytest.mark.parametrize("budget", [1, 20, 60])
def test_micro_batches_part_no_unit(path, budget):
    """Losses over pairs or whole groups find them side by side."""
    for unit, n in ((GROUP, 12), (2, 12)):
        batch = ragged_batch(1, n)
        batch.unit = unit
        if unit == 2:  # pairs of one prompt, as DPO has them
            batch = batch.rows(torch.tensor([0, 1, 3, 5, 7, 6, 10, 9]))
        micros = path.micro_batches(batch, range(len(batch)), budget)
        assert sorted(i for index in micros for i in index.tolist()) == list(range(len(batch)))
        for index in micros:
            rows = index.tolist()
            assert all(rows[i : i + unit] == list(range(rows[i], rows[i] + unit)) for i in range(0, len(rows), unit))


@pytest.mark.parametrize("zero", [(3, 4, 5, 9), tuple(range(12)), ()])
def test_completions_without_advantage_skip_the_backward_pass_only(path, zero):
    """Same gradient, same figures, same denominators; where nothing is left, one filler keeps the ranks in step."""
    cfg = TrainPolicyConfig()
    cfg.train.micro_batch_tokens, cfg.algo.group_size = 1, GROUP
    batch = ragged_batch()
    batch.advantages[list(zero)] = 0.0
    batch.ref_logps = None
    found = []
    for skips in (False, True):
        recorder = Recorder(path, tiny_model())
        loss = Loss(grpo_loss(0.2, 0.0, 0.0), "detached", advantage_only=skips)
        sums, _, _ = updating.update(cfg, SimpleNamespace(rt=RUNTIME, trainable=recorder, extras=Extras()), batch, loss, step=1)
        found.append((recorder, sums))
    (all_, all_sums), (few, few_sums) = found
    assert len(all_.lasts) == 12 and few.lasts.count(True) == 1 and few.lasts[-1]
    assert len(few.lasts) == max(1, 12 - len(zero))
    assert (all_.gradients[0] - few.gradients[0]).norm() <= 1e-12 * (1 + all_.gradients[0].norm())
    assert few_sums == pytest.approx(all_sums, rel=1e-6, abs=1e-6)
