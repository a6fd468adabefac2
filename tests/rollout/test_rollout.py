"""Engines: token for token the same, rows independent of their batch, ends and flags as promised."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from grpo_safe import rollout
from grpo_safe.algorithm.sampling import completion_noise
from grpo_safe.config import SamplingConfig
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.records import Prompt
from grpo_safe.rollout import end_tokens, engine, generate, native
from grpo_safe.rollout.engine import Decoded, Engine, left_padded

VOCAB, PAD, G = 61, 0, 3
PROMPTS = [[5, 9, 17, 33, 2, 8, 41], [7], [12, 3, 3, 50]]
WINDOWED = {"gemma3_text", "mistral", "phi3", "starcoder2"}
ENGINES = {"native": native.decode, "generate": generate.decode}


def tiny(name: str):
    """A random model whose weights are large enough that a wrong position or cache row changes its tokens."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        "initializer_range": 0.3,
    }  # fmt: skip
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config).eval()
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)).eval()
    own = {
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
        "qwen2": {"tie_word_embeddings": True},
        "gpt_neox": {"num_key_value_heads": None},
    }.get(name, {})
    own |= {"head_dim": 8, "sliding_window": 4} if name in WINDOWED else {}  # shorter than what is decoded
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(shape | own))).eval()


def noise_of(prompts: list[list[int]], length: int, seed: int = 0) -> np.ndarray:
    return np.stack([completion_noise(seed, 1, str(p), g, length) for p in prompts for g in range(G)])


def run(decode, model, prompts, noise, ends, group=G, pad=PAD, temperature=0.7, top_p=0.9) -> Decoded:
    sampling = SamplingConfig(max_new_tokens=noise.shape[1], temperature=temperature, top_p=top_p)
    with torch.no_grad():
        return decode(model, prompts, noise, group, sampling, ends, pad)


def same(a: Decoded, b: Decoded) -> None:
    assert a.ids == b.ids
    assert a.ended == b.ended
    for x, y in zip(a.logps, b.logps, strict=True):
        assert x == pytest.approx(y, abs=1e-4)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))


@pytest.fixture(scope="module")
def tiny_llama():
    return AutoModelForCausalLM.from_pretrained(embedded_folder("embedded:tiny-llama")).eval()


# --- engines agree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(native.KNOWN))
def test_native_equals_generate_token_for_token(name):
    model = tiny(name)
    noise = noise_of(PROMPTS, 12)
    free = run(native.decode, model, PROMPTS, noise, set())
    same(free, run(generate.decode, model, PROMPTS, noise, set()))
    assert len({tuple(row) for row in free.ids}) > 5
    ends = {free.ids[row][t] for row, t in [(0, 9), (3, 6), (4, 4), (8, 7)]}  # rows end at different steps and leave the batch
    found = run(native.decode, model, PROMPTS, noise, ends)
    same(found, run(generate.decode, model, PROMPTS, noise, ends))
    assert len({len(row) for row in found.ids}) > 2, found.ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_equals_unbatched_decoding_without_a_cache(name):
    """The slow way: one row, no padding, no cache, the whole prefix at every token."""
    from grpo_safe.algorithm.sampling import pick_tokens

    model, noise = tiny(name), noise_of(PROMPTS, 8)
    found = run(native.decode, model, PROMPTS, noise, {11})
    for i, row in enumerate(found.ids):
        prefix, uniforms = list(PROMPTS[i // G]), torch.from_numpy(noise[i])
        for t, token in enumerate(row):
            with torch.no_grad():
                logits = model(torch.tensor([prefix]), use_cache=False).logits[:, -1]
            picked, logp = pick_tokens(logits, uniforms[t : t + 1], 0.7, 0.9)
            assert int(picked) == token, (i, t)
            assert float(logp) == pytest.approx(found.logps[i][t], abs=1e-4)
            prefix.append(token)
        assert len(row) == 8 or row[-1] == 11


@pytest.mark.parametrize("decode", ENGINES.values(), ids=ENGINES)
def test_a_very_low_temperature_is_greedy(decode, llama):
    found = run(decode, llama, PROMPTS, noise_of(PROMPTS, 8), set(), temperature=1e-4, top_p=1.0)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        greedy = llama.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=PAD)
        for g in range(G):
            assert found.ids[i * G + g] == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 3.0},
        {"min_new_tokens": 6},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(30))},
        {"num_beams": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_generate_ignores_what_the_models_generation_config_asks_for(setting):
    """Hub models ship a generation_config (Qwen2.5: repetition_penalty 1.1): it is no part of the policy that is trained."""
    model, noise, ends = tiny("llama"), noise_of(PROMPTS, 10), {7, 11, 23, 42, 58}
    plain = run(generate.decode, model, PROMPTS, noise, ends)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    same(plain, run(generate.decode, model, PROMPTS, noise, ends))


# --- rows are independent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ENGINES.values(), ids=ENGINES)
def test_rows_do_not_depend_on_their_batch_mates(decode, llama):
    noise = noise_of(PROMPTS, 10)
    together = run(decode, llama, PROMPTS, noise, {11, 42})
    for i, prompt in enumerate(PROMPTS):
        alone = run(decode, llama, [prompt], noise[i * G : (i + 1) * G], {11, 42})
        part = slice(i * G, (i + 1) * G)
        same(alone, Decoded(together.ids[part], together.logps[part], together.ended[part]))
    one = run(decode, llama, PROMPTS[:1], noise[1:2], {11, 42}, group=1)  # a single row
    same(one, Decoded(together.ids[1:2], together.logps[1:2], together.ended[1:2]))


def prompts_of(texts: list[str]) -> list[Prompt]:
    return [Prompt(f"id{i}", [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", ["native", "generate"])
def test_sample_gives_the_same_tokens_in_chunks_of_any_size(name, tiny_llama, tokenizer):
    texts = ["Hi", "What is the boiling point of water at sea level?", "Name a colour.", ""]
    prompts = prompts_of(texts)
    ids = [tokenizer(text or "a")["input_ids"] for text in texts]
    found = []
    for batch_size in (1, 6, 100):
        sampling = SamplingConfig(max_new_tokens=6, temperature=0.8, top_p=0.95, batch_size=batch_size)
        found.append(rollout.sample(engine(name), tiny_llama, tokenizer, prompts, ids, G, sampling, seed=3, step=2))
    first = found[0]
    assert len(first) == 4 * G
    assert [p.id for p in first.prompts] == [f"id{i}" for i in range(4) for _ in range(G)]
    for i, prompt in enumerate(ids):
        for g in range(G):
            assert first.prompt_ids[i * G + g][first.prompt_mask[i * G + g].bool()].tolist() == prompt
            assert first.prompt_mask[i * G + g, -1] == 1
    for other in found[1:]:
        assert torch.equal(first.completion_ids, other.completion_ids)
        assert torch.equal(first.completion_mask, other.completion_mask)
        assert torch.allclose(first.sampler_logps, other.sampler_logps, atol=1e-4)
        assert first.texts == other.texts
    assert len({tuple(row) for row in first.completion_ids.tolist()}) == 4 * G


def test_samples_follow_seed_step_and_prompt_not_its_place(tiny_llama, tokenizer):
    prompts, ids = prompts_of(["Hi", "Name a colour."]), [[5, 6], [7, 8, 9]]
    sampling = SamplingConfig(max_new_tokens=5)

    def tokens(prompts, ids, seed, step):
        return rollout.sample(
            engine("native"), tiny_llama, tokenizer, prompts, ids, 2, sampling, seed, step
        ).completion_ids.tolist()

    base = tokens(prompts, ids, 0, 1)
    turned = tokens(prompts[::-1], ids[::-1], 0, 1)
    assert turned == base[2:] + base[:2]
    assert tokens(prompts, ids, 1, 1) != base and tokens(prompts, ids, 0, 2) != base


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ENGINES.values(), ids=ENGINES)
def test_end_tokens_cut_what_would_have_been_sampled(decode, llama):
    """With ends, each row is the row without ends up to and with its first end token."""
    noise = noise_of(PROMPTS, 10, seed=4)
    free = run(decode, llama, PROMPTS, noise, set())
    assert not any(free.ended) and all(len(row) == 10 for row in free.ids)
    first, last, middle = free.ids[0][0], free.ids[4][9], free.ids[7][5]
    for pad in (PAD, first, middle):  # the pad token may be an end token
        for ends in ({first}, {last}, {middle}, {first, middle, last}):
            found = run(decode, llama, PROMPTS, noise, ends, pad=pad)
            for row, row_logps, ended, whole, whole_logps in zip(
                found.ids, found.logps, found.ended, free.ids, free.logps, strict=True
            ):
                at = [t for t, token in enumerate(whole) if token in ends]
                assert row == (whole[: at[0] + 1] if at else whole)
                assert ended == bool(at)
                assert row_logps == pytest.approx(whole_logps[: len(row)], abs=1e-4)
            if first in ends:
                assert len(found.ids[0]) == 1 and found.ended[0]
            if ends == {last}:
                assert found.ended[4]  # an end token at the length limit is an end


@pytest.mark.parametrize("decode", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("at", [0, 3])
def test_all_rows_may_end_at_once(decode, at, llama):
    noise = np.repeat(noise_of([[7]], 8)[:1], 6, axis=0)  # six equal rows
    free = run(decode, llama, [[7], [7]], noise, set())
    end = free.ids[0][at]
    found = run(decode, llama, [[7], [7]], noise, {end})
    cut = free.ids[0].index(end) + 1
    assert found.ids == [free.ids[0][:cut]] * 6
    assert found.ended == [True] * 6


@pytest.mark.parametrize("decode", ENGINES.values(), ids=ENGINES)
def test_one_new_token(decode, llama):
    noise = noise_of(PROMPTS, 1)
    found = run(decode, llama, PROMPTS, noise, set())
    assert all(len(row) == 1 for row in found.ids) and not any(found.ended)
    first = run(decode, llama, PROMPTS, noise_of(PROMPTS, 5), set())
    assert [row[0] for row in first.ids] == [row[0] for row in found.ids]


# --- what the native engine does for speed ----------------------------------------------------------------------------


def test_an_unknown_architecture_falls_back_with_one_line(caplog):
    model, noise = tiny("gemma2"), noise_of(PROMPTS, 6)
    native._say_fallback.cache_clear()
    with caplog.at_level("WARNING"):
        first, second = (run(native.decode, model, PROMPTS, noise, {11}) for _ in range(2))
    assert first == second == run(generate.decode, model, PROMPTS, noise, {11})
    assert [
        r.getMessage() for r in caplog.records if "gemma2" in r.getMessage() and "llama" in r.getMessage()
    ] == caplog.messages[:1]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("shape", ["plain", "disabled", "dora", "two adapters"])
def test_lora_is_merged_for_the_rollout_only(shape):
    """Native equals generate, which goes through the adapter modules, and leaves weights, forwards and attention as they were."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=shape == "dora")
    model = get_peft_model(tiny("llama"), lora).eval()
    if shape == "two adapters":
        model.add_adapter("second", lora)
        model.base_model.set_adapter(["default", "second"])
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noise = noise_of(PROMPTS, 10)
    if shape == "disabled":
        with model.disable_adapter():
            found, expected = (run(decode, model, PROMPTS, noise, {11}) for decode in ENGINES.values())
        same(found, run(native.decode, tiny("llama"), PROMPTS, noise, {11}))
    else:
        found, expected = (run(decode, model, PROMPTS, noise, {11}) for decode in ENGINES.values())
        assert found.ids != run(native.decode, tiny("llama"), PROMPTS, noise, {11}).ids
    same(found, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_double_precision_agrees_to_rounding(llama):
    """Nothing on the way but the log-probs themselves is cut to float32."""
    model = copy.deepcopy(llama).double()
    noise = noise_of(PROMPTS, 10)
    seen: list[torch.Tensor] = []

    def record(module, args, output):
        seen.append(output.logits[0 if output.logits.shape[0] == 1 else slice(None)].reshape(-1, VOCAB))

    hook = model.register_forward_hook(record)
    found = run(native.decode, model, PROMPTS, noise, set())
    hook.remove()
    assert seen[0].dtype == torch.float64
    for i, row in enumerate(found.ids):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[i // G] + row]), use_cache=False).logits[0, len(PROMPTS[i // G]) - 1 : -1]
        assert torch.allclose(seen[0][i // G], logits[0], atol=1e-10)
        for t in range(1, len(row)):
            assert torch.allclose(seen[t][i], logits[t], atol=1e-10)


def test_the_cache_shrinks_as_rows_end_and_keeps_every_row(llama, monkeypatch):
    """Many ends: groups vanish, the widest group shrinks; each row still goes on as it would alone."""
    sizes: list[int] = []
    keep = native.GroupCache.keep

    def kept(self, stay):
        keep(self, stay)
        sizes.append(len(self.lengths) * self.group_size)

    monkeypatch.setattr(native.GroupCache, "keep", kept)
    prompts = [*PROMPTS, [9, 1], [30]]
    noise = noise_of(prompts, 16, seed=2)
    ends = set(range(20, 26))
    found = run(native.decode, llama, prompts, noise, ends, temperature=1.5, top_p=1.0)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2 and sizes[-1] < 5 * G / 2
    for i in range(len(prompts) * G):
        one = run(native.decode, llama, [prompts[i // G]], noise[i : i + 1], ends, group=1, temperature=1.5, top_p=1.0)
        same(one, Decoded(found.ids[i : i + 1], found.logps[i : i + 1], found.ended[i : i + 1]))


@pytest.mark.parametrize("decode", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
def test_sampled_tokens_follow_the_model(decode, temperature, top_p, llama):
    """First and second tokens of many completions of one prompt, against the model's own conditional distributions."""
    n = 1500
    noise = np.random.default_rng(5).random((n, 2))
    found = run(decode, llama, [PROMPTS[0]], noise, set(), group=n, temperature=temperature, top_p=top_p)

    def expected(prefix: list[int]) -> np.ndarray:
        with torch.no_grad():
            probs = (llama(torch.tensor([prefix])).logits[0, -1].double() / temperature).softmax(-1).numpy()
        order = np.argsort(-probs)
        kept = order[: int((probs[order].cumsum() < top_p).sum()) + 1] if top_p < 1 else order
        nucleus = np.zeros_like(probs)
        nucleus[kept] = probs[kept]
        return nucleus / nucleus.sum()

    def follows(tokens: list[int], probs: np.ndarray) -> None:
        counts = np.bincount(tokens, minlength=VOCAB)
        assert counts[probs == 0].sum() == 0
        often = probs * len(tokens) >= 5  # the others are counted as one
        seen, wanted = counts[often], probs[often] * len(tokens)
        rest = len(tokens) - wanted.sum()
        if rest > 1e-6:
            seen, wanted = np.append(seen, len(tokens) - seen.sum()), np.append(wanted, rest)
        assert len(seen) > 1 and chisquare(seen, wanted).pvalue > 1e-3

    follows([row[0] for row in found.ids], expected(PROMPTS[0]))
    common = int(np.bincount([row[0] for row in found.ids]).argmax())
    follows([row[1] for row in found.ids if row[0] == common], expected([*PROMPTS[0], common]))


# --- the record -------------------------------------------------------------------------------------------------------


def rollout_of(tiny_llama, tokenizer, rows: list[list[int]], ended: list[bool]):
    """sample() around an engine that answers these rows."""

    def fake(model, prompt_ids, noise, group_size, sampling, ends, pad):
        return Decoded(rows, [[-0.5 - t for t in range(len(row))] for row in rows], ended)

    prompts = prompts_of(["Hi"])
    return rollout.sample(Engine(fake), tiny_llama, tokenizer, prompts, [[5, 6]], len(rows), SamplingConfig(), 0, 1)


def test_record_counts_the_end_token_even_where_it_is_the_pad_token(tiny_llama, tokenizer):
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end  # SmolLM2: the case that eats tokens
    words = tokenizer(" hello world", add_special_tokens=False)["input_ids"]
    rows = [[end], [*words, end], [*words, *words, *words]]
    found = rollout_of(tiny_llama, tokenizer, rows, [True, True, False])
    assert found.completion_mask.sum(1).tolist() == [1, len(words) + 1, 3 * len(words)]
    assert found.truncated.tolist() == [False, False, True]
    assert found.completion_ids[0, 0] == end
    for row, ids, mask, logps in zip(rows, found.completion_ids, found.completion_mask, found.sampler_logps, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert logps.tolist() == [-0.5 - t if t < len(row) else 0.0 for t in range(ids.numel())]
    assert found.texts == ["", "hello world", "hello world hello world hello world"]


def test_texts_hold_no_special_tokens(tiny_llama, tokenizer):
    words = tokenizer(" fine", add_special_tokens=False)["input_ids"]
    specials = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|endoftext|>", "<|im_end|>")]
    rows = [[specials[0], *words, specials[1], *words], [*words, specials[2]], [specials[1]]]
    found = rollout_of(tiny_llama, tokenizer, rows, [False, True, False])
    assert found.texts == ["fine fine", "fine", ""]
    assert found.completion_mask.sum(1).tolist() == [len(row) for row in rows]


def test_end_tokens_come_from_the_model_and_the_tokenizer(tokenizer):
    model = tiny("llama")
    for configured, expected in [(None, set()), (7, {7}), ([7, 9], {7, 9})]:
        model.generation_config.eos_token_id = configured
        assert end_tokens(model, tokenizer) == expected | {tokenizer.eos_token_id}


def test_left_padded_keeps_rows_at_the_right():
    ids, mask = left_padded([[4, 5, 6], [7], []], pad=9)
    assert ids.tolist() == [[4, 5, 6], [9, 9, 7], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert left_padded([[]], 9)[0].shape == (1, 1)
