"""Decoding by steps of fixed shape, which CUDA graphs replay: the same tokens as the loop that is free to change shape."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_rollout import PAD, PROMPTS, G, noise_of, run, same, tiny

from grpo_safe import rollout
from grpo_safe.algorithm.sampling import completion_noise
from grpo_safe.rollout import graphs, native
from grpo_safe.rollout.engine import Decoded
from grpo_safe.rollout.static import Eager, StaticDecoder
from grpo_safe.rollout.static_cache import Shape, halved
from grpo_safe.rollout.weights import thin_adapters

# float64: the two paths add in different orders, and their tokens are compared
NAMES = ["llama", "qwen2", "gemma", "gemma3_text", "gpt2", "phi3"]


class Shapes(Eager):
    """Runs each step as it is, and remembers its shape."""

    def __init__(self) -> None:
        self.seen: list[Shape] = []
        self.forgotten = 0

    def __call__(self, shape, step) -> None:
        self.seen.append(shape)
        step()

    def forget(self) -> None:
        self.forgotten += 1


class Replayed:
    """A recorder without a device: `record` keeps the step and runs nothing, as a capture does."""

    def __init__(self) -> None:
        self.warm_ups, self.records, self.replays, self.forgotten = 0, 0, 0, 0

    def warm_up(self, step) -> None:
        self.warm_ups += 1
        step()

    def rehearse(self, step) -> None:
        self.warm_up(step)

    def record(self, step):
        self.records += 1

        def replay() -> None:
            self.replays += 1
            step()

        return replay

    def forget(self) -> None:
        self.forgotten += 1


class Refusing(Replayed):
    """Raises where it is told to; `rehearse` in the middle of the model's forward, as a device would."""

    def __init__(self, at: str, model) -> None:
        super().__init__()
        self.at, self.model = at, model

    def rehearse(self, step) -> None:
        if self.at == "record":
            return self.warm_up(step)
        hook = self.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: self.refuse())
        try:
            return step()
        finally:
            hook.remove()

    def record(self, step):
        self.refuse()

    def refuse(self) -> None:
        self.records += 1
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


def by_steps(runner=None, check_every: int = 2, least_seen: int = 4):
    """The engine over static steps, on the CPU; small numbers, so that a short rollout sees every kind of change."""
    decoder = StaticDecoder(runner or Shapes(), check_every, least_seen)
    return partial(native.decode, static=decoder, static_on="cpu"), decoder


def own_logps(model, found: Decoded, temperature: float) -> list[torch.Tensor]:
    """Log-probs of the tokens found, by one forward over prompt and completion without a cache."""
    own = []
    for i, row in enumerate(found.ids):
        prompt = PROMPTS[i // G]
        with torch.no_grad():
            ids = torch.tensor([prompt + row], device=next(model.parameters()).device)
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        own.append(logps.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return own


def gap_to_own_logps(model, found: Decoded) -> float:
    """Mean difference per token."""
    own = torch.cat(own_logps(model, found, 1.0))
    return float((torch.tensor([x for row in found.logps for x in row]) - own).abs().mean())


@pytest.fixture(scope="module")
def llama():
    return tiny("llama").double()


# --- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_equals_the_loop_of_changing_shapes(name, top_p):
    """Ragged prompts; ends at the first token, in the middle, at the last; places given up on the way."""
    model, noise = tiny(name).double(), noise_of(PROMPTS, 15)
    decode, decoder = by_steps()
    free = run(native.decode, model, PROMPTS, noise, set(), top_p=top_p)
    same(run(decode, model, PROMPTS, noise, set(), top_p=top_p), free)
    assert len({tuple(row) for row in free.ids}) > 5
    lengths = set()
    for ends in ({free.ids[0][0], free.ids[4][14]}, {free.ids[row][t] for row, t in [(0, 9), (3, 6), (4, 4), (8, 7)]}):
        expected = run(native.decode, model, PROMPTS, noise, ends, top_p=top_p)
        same(run(decode, model, PROMPTS, noise, ends, top_p=top_p), expected)
        lengths |= {len(row) for row in expected.ids}
    assert len(lengths) > 3 and {1, 15} <= lengths
    shapes = decoder.run.seen
    assert len({(s.groups, s.members) for s in shapes}) > 1 and {s.seen for s in shapes} == {4, 8, 15}


def test_a_very_low_temperature_is_greedy(llama):
    decode, _ = by_steps()
    found = run(decode, llama, PROMPTS, noise_of(PROMPTS, 9), set(), temperature=1e-4, top_p=1.0)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        greedy = llama.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, pad_token_id=PAD
        )
        assert all(found.ids[i * G + g] == greedy[0, len(prompt) :].tolist() for g in range(G))


def test_logps_are_the_models_own(llama):
    """Against one forward over prompt and completion, no cache."""
    decode, _ = by_steps()
    found = run(decode, llama, PROMPTS, noise_of(PROMPTS, 12), {11, 42}, temperature=0.7, top_p=1.0)
    for logps, own in zip(found.logps, own_logps(llama, found, 0.7), strict=True):
        assert logps == pytest.approx(own.tolist(), abs=1e-5)


@pytest.mark.parametrize("group", [3, 8])
def test_many_ends_give_up_places_in_large_steps_and_keep_every_row(group, llama):
    prompts = [*PROMPTS, [9, 1], [30], [4, 4], [8]]
    noise = np.stack([completion_noise(2, 1, str(p), g, 24) for p in prompts for g in range(group)])
    ends = set(range(20, 28))
    decode, decoder = by_steps()
    found = run(decode, llama, prompts, noise, ends, group=group, temperature=1.5, top_p=1.0)
    same(found, run(native.decode, llama, prompts, noise, ends, group=group, temperature=1.5, top_p=1.0))
    places = [s.places for s in decoder.run.seen]
    sizes = sorted(set(places), reverse=True)
    assert places == sorted(places, reverse=True) and len(sizes) > 2
    assert all(2 * small <= large for large, small in pairwise(sizes))


def test_stops_soon_after_the_last_row_has_ended(llama):
    noise = np.repeat(noise_of([[7]], 40)[:1], 6, axis=0)
    free = run(native.decode, llama, [[7], [7]], noise, set())
    end = free.ids[0][3]
    decode, decoder = by_steps(check_every=4)
    same(run(decode, llama, [[7], [7]], noise, {end}), run(native.decode, llama, [[7], [7]], noise, {end}))
    assert len(decoder.run.seen) <= free.ids[0].index(end) + 4
    assert run(decode, llama, [[7]], noise[:1, :1], set(), group=1).ids == [free.ids[0][:1]]


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_an_end_token_may_be_the_pad_token(pad_is_end, llama):
    noise = noise_of(PROMPTS, 12)
    end = run(native.decode, llama, PROMPTS, noise, set()).ids[2][5]
    pad = end if pad_is_end else PAD
    same(run(by_steps()[0], llama, PROMPTS, noise, {end}, pad=pad), run(native.decode, llama, PROMPTS, noise, {end}, pad=pad))


# --- what one rollout leaves to the next ------------------------------------------------------------------------------


def test_rollouts_after_each_other_share_buffers_and_nothing_else(llama):
    decode, decoder = by_steps()
    first = run(decode, llama, PROMPTS, noise_of(PROMPTS, 12), {11})
    state = decoder.state
    for prompts, seed in ([PROMPTS[:2], 1], [[[9] * 40, [3]], 2], [PROMPTS[::-1], 3]):
        noise = noise_of(prompts, 12, seed)
        same(run(decode, llama, prompts, noise, {11}), run(native.decode, llama, prompts, noise, {11}))
    same(run(decode, llama, PROMPTS, noise_of(PROMPTS, 12), {11}), first)
    assert decoder.state is state and decoder.run.forgotten == 1  # the first time


def test_a_nan_of_an_earlier_rollout_does_not_come_back(llama):
    decode, decoder = by_steps()
    run(decode, llama, PROMPTS, noise_of(PROMPTS, 12), {11})
    state = decoder.state
    for kept in decoder.state.cache._kept.values():
        for flat in kept.values():
            flat.fill_(torch.nan)
    noise = noise_of(PROMPTS[1:], 12)
    same(run(decode, llama, PROMPTS[1:], noise, {11}), run(native.decode, llama, PROMPTS[1:], noise, {11}))
    assert decoder.state is state


def test_weights_updated_in_place_are_seen_and_nothing_is_forgotten():
    model, noise = tiny("llama").double(), noise_of(PROMPTS, 10)
    recorder = Replayed()
    decode, _ = by_steps(graphs.Graphs(recorder))
    before = run(decode, model, PROMPTS, noise, set())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = run(decode, model, PROMPTS, noise, set())
    assert after.ids != before.ids and recorder.forgotten == 1
    same(after, run(native.decode, model, PROMPTS, noise, set()))


@pytest.mark.parametrize(
    "what", ["address", "temperature", "ends", "length", "model", "model in its place", "more rows", "longer prompts"]
)
def test_what_a_recorded_step_stands_on_changes(what):
    """Each makes all graphs worthless: they are forgotten, and what comes next is right."""
    model, prompts, ends, temperature, new = tiny("llama").double(), PROMPTS, {11}, 0.7, 10
    recorder = Replayed()
    decode, _ = by_steps(graphs.Graphs(recorder))
    run(decode, model, prompts, noise_of(prompts, new), ends, temperature=temperature)
    if what == "address":  # as ZeRO-3 gathers: the same weights elsewhere
        model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone() * 2
    elif what == "temperature":
        temperature = 1.3
    elif what == "ends":
        ends = {42}
    elif what == "length":
        new = 12
    elif what == "model":
        model = copy.deepcopy(model)
    elif what == "model in its place":  # as memory that was freed is given out again
        other = copy.deepcopy(model)
        for own, old in zip((*other.parameters(), *other.buffers()), (*model.parameters(), *model.buffers()), strict=True):
            own.data = old.data
        other.model.layers[0].self_attn.scaling *= 3
        model = other
    elif what == "more rows":
        prompts = [*PROMPTS, [5]]
    else:
        prompts = [[5] * 500, *PROMPTS[1:]]
        model.config.max_position_embeddings = 600
    noise = noise_of(prompts, new)
    found = run(decode, model, prompts, noise, ends, temperature=temperature)
    assert recorder.forgotten == 2
    same(found, run(native.decode, model, prompts, noise, ends, temperature=temperature))


def adapted(**options):
    """A model with a LoRA adapter that has learned something."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny("llama"), lora).double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_lora_equals_the_other_loop_and_follows_its_updates(dora):
    """Each rollout reads the adapter anew, where the graphs look for it; another kind of adapter keeps its own forward."""
    model, noise, recorder = adapted(use_dora=dora), noise_of(PROMPTS, 10), Replayed()
    decode, decoder = by_steps(graphs.Graphs(recorder))
    seen = []
    for _ in range(3):
        seen.append(run(decode, model, PROMPTS, noise, {11}))
        same(seen[-1], run(native.decode, model, PROMPTS, noise, {11}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.2)
    assert seen[0].ids != seen[1].ids != seen[2].ids and recorder.forgotten == 1
    assert bool(decoder._adapters) != dora and not any("forward" in vars(m) for m in model.modules())


def test_the_copies_of_an_adapter_have_the_base_weights_type():
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x, kept = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16(), {}
    with torch.no_grad():
        expected = layer(x).float()
        with thin_adapters(model, kept):
            found = layer(x)
        plain = layer.get_base_layer()(x).float()
    assert found.dtype == torch.bfloat16 and {t.dtype for pair in kept.values() for t in pair} == {torch.bfloat16}
    assert (found.float() - expected).norm() < 0.02 * (expected - plain).norm()


def test_an_adapter_that_is_switched_off_is_not_replayed():
    model, noise, recorder = adapted(), noise_of(PROMPTS, 10), Replayed()
    decode, _ = by_steps(graphs.Graphs(recorder))
    on = run(decode, model, PROMPTS, noise, {11})
    same(on, run(native.decode, model, PROMPTS, noise, {11}))
    with model.disable_adapter():
        off = run(decode, model, PROMPTS, noise, {11})
        same(off, run(native.decode, model, PROMPTS, noise, {11}))
    assert off.ids != on.ids and recorder.forgotten == 2
    assert model.get_base_model().config._attn_implementation == "sdpa"


# --- recording --------------------------------------------------------------------------------------------------------


def test_steps_are_recorded_once_per_shape_and_replayed(llama):
    recorder = Replayed()
    decode, _ = by_steps(graphs.Graphs(recorder), least_seen=8)
    noise = noise_of(PROMPTS, 32)
    expected = run(native.decode, llama, PROMPTS, noise, set())
    for rollouts in (1, 2):
        same(run(decode, llama, PROMPTS, noise, set()), expected)
        assert (recorder.warm_ups, recorder.records) == (3 * graphs.WARM_UPS, 3)  # 8, 16 and 32 columns
        assert recorder.warm_ups + recorder.replays == 31 * rollouts


@pytest.mark.parametrize("at", ["rehearse", "record"])
def test_a_step_that_cannot_be_recorded_runs_on_with_one_line(at, llama, caplog):
    recorder = Refusing(at, llama)
    decode, _ = by_steps(graphs.Graphs(recorder))
    noise = noise_of(PROMPTS, 12)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            same(run(decode, llama, PROMPTS, noise, {11}), run(native.decode, llama, PROMPTS, noise, {11}))
    assert recorder.records == 1 and len(caplog.messages) == 1
    assert "stream is capturing" in caplog.text and "more of it" not in caplog.text


def test_running_out_of_memory_is_no_reason_to_go_on(llama):
    class Full(Replayed):
        def record(self, step):
            raise torch.OutOfMemoryError("CUDA out of memory")

    decode, _ = by_steps(graphs.Graphs(Full()))
    with pytest.raises(torch.OutOfMemoryError):
        run(decode, llama, PROMPTS, noise_of(PROMPTS, 12), set())


def test_a_rope_that_asks_the_host_decodes_without_graphs_and_says_so_once(caplog):
    model = tiny("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "longrope"}
    decode, decoder = by_steps()
    native._say_no_graphs.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert run(decode, model, PROMPTS, noise_of(PROMPTS, 6), set()) == run(
                native.decode, model, PROMPTS, noise_of(PROMPTS, 6), set()
            )
    assert decoder.state is None and len(caplog.messages) == 1 and "longrope" in caplog.text


def test_a_cpu_keeps_its_own_path(llama):
    decoder = StaticDecoder(Shapes())
    same(
        run(partial(native.decode, static=decoder), llama, PROMPTS, noise_of(PROMPTS, 6), set()),
        run(native.decode, llama, PROMPTS, noise_of(PROMPTS, 6), set()),
    )
    assert decoder.state is None and decoder.run.seen == []
    assert rollout.engine("native").decode is native.decode
    assert isinstance(rollout.engine("native", cuda_graphs=True).decode.keywords["static"].run, graphs.Graphs)


# --- precision --------------------------------------------------------------------------------------------------------


def test_under_autocast_the_cache_holds_what_products_are_made_in():
    """Float32 weights that compute in bfloat16: log-probs as of one forward over the whole row, within bfloat16."""
    model = tiny("llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    decode, decoder = by_steps()
    found = run(decode, model, PROMPTS, noise_of(PROMPTS, 12), {11}, temperature=1.0, top_p=1.0)
    assert {flat.dtype for kept in decoder.state.cache._kept.values() for flat in kept.values()} == {torch.bfloat16}
    assert gap_to_own_logps(model, found) < 0.08  # a token's log-prob at random is -4


@pytest.mark.parametrize(("full", "needed", "expected"), [(512, 128, 128), (512, 129, 256), (512, 512, 512), (6, 2, 2), (6, 3, 3),
                                                          (5, 1, 1), (100, 30, 50), (1, 1, 1)])  # fmt: skip
def test_sizes_are_halved(full, needed, expected):
    assert halved(full, needed) == expected
