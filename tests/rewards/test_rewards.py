"""Objectives -> scores: one forward for all heads, functions beside them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpo_safe.config import ObjectiveConfig
from grpo_safe.data.text import ScoringInput
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.models.reward_model import RewardModel, collate, score_texts, token_batches
from grpo_safe.records import Prompt
from grpo_safe.rewards import Objectives, choose_objectives, score

HEADS = ["safety", "helpfulness", "politeness"]
PAIRS = [
    ("Hi", "Hello."),
    ("How do I boil an egg?", "Put it into boiling water for nine minutes, then cool it."),
    ("Tell me a story " * 20, "No."),
    ("", "An answer to nothing."),
    ("Why?", ""),
    ("Hi", "Go away."),
    ("Name three colours.", "Red, green and blue " * 15),
]


def prompt_of(text: str) -> Prompt:
    return Prompt(text, [{"role": "user", "content": text}])


PROMPTS, TEXTS = [prompt_of(p) for p, _ in PAIRS], [t for _, t in PAIRS]


def reward_model_of(start: str) -> RewardModel:
    folder = embedded_folder(start)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=tokenizer.pad_token_id).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("classifier.weight", "score.weight")):
            torch.nn.init.normal_(weight)
    return RewardModel(model, tokenizer, HEADS, torch.tensor([0.0, 0.5, -1.0]), 128)


@pytest.fixture(scope="module")
def encoder() -> RewardModel:
    return reward_model_of("embedded:tiny-bert")


@pytest.fixture(scope="module", params=["embedded:tiny-bert", "embedded:tiny-llama"])
def reward_model(request) -> RewardModel:
    return reward_model_of(request.param)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_equal_one_by_one_in_any_order(reward_model):
    together, cut = score_texts(reward_model, PROMPTS, TEXTS, 600)
    assert together.shape == (len(PAIRS), 3)
    assert len({round(x, 4) for x in together[:, 0].tolist()}) == len(PAIRS)  # the model tells them apart
    for i in range(len(PAIRS)):
        alone, _ = score_texts(reward_model, [PROMPTS[i]], [TEXTS[i]], 600)
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    order = random.Random(0).sample(range(len(PAIRS)), len(PAIRS))
    mixed, mixed_cut = score_texts(reward_model, [PROMPTS[i] for i in order], [TEXTS[i] for i in order], 10_000)
    assert torch.allclose(mixed, together[order], atol=1e-5)
    assert mixed_cut == cut


def test_scores_equal_a_plain_forward_plus_the_offset(encoder):
    found, cut = score_texts(encoder, PROMPTS, TEXTS, 600)
    assert cut == 0
    for i, (prompt, text) in enumerate(PAIRS):
        with torch.no_grad():
            logits = encoder.model(**encoder.tokenizer([prompt], [text], return_tensors="pt")).logits[0]
        assert torch.allclose(found[i], logits + torch.tensor([0.0, 0.5, -1.0]), atol=1e-5)


def test_inputs_that_lost_some_prompt_are_counted(encoder):
    prompts = [prompt_of("word " * 200), prompt_of("short"), prompt_of("word " * 500)]
    assert score_texts(encoder, prompts, ["a", "b", "c"], 600)[1] == 2


def test_collate_pads_on_the_right():
    batch = collate([ScoringInput([5, 6, 7], [0, 0, 1], 0), ScoringInput([8], [1], 0)], 9, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert "token_type_ids" not in collate([ScoringInput([5], None, 0)], 9, torch.device("cpu"))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_token_batches_are_a_partition_within_the_budget(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 80))]
    budget = rng.choice([1, 40, 64, 200, 10**6])
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    if budget == 10**6:
        assert len(batches) == 1
    if budget == 1:
        assert len(batches) == len([n for n in lengths if n > 1]) + lengths.count(1)


def test_token_batches_of_nothing():
    assert token_batches([], 10) == []
    assert token_batches([5, 1, 2], 6) == [[1, 2], [0]]


# --- objectives -------------------------------------------------------------------------------------------------------


def test_without_configuration_every_head_counts_once():
    found = choose_objectives({}, HEADS)
    assert (found.names, found.weights, found.heads) == (HEADS, [1.0, 1.0, 1.0], [0, 1, 2])
    assert found.functions == [None, None, None]


def test_weights_change_and_functions_extend():
    configured = {
        "politeness": ObjectiveConfig(weight=0.0),
        "roots": ObjectiveConfig(weight=-2.0, function="math.sqrt"),
        "safety": ObjectiveConfig(weight=3.0),
    }
    found = choose_objectives(configured, HEADS)
    assert found.names == [*HEADS, "roots"]
    assert found.weights == [3.0, 1.0, 0.0, -2.0]
    assert found.heads == [0, 1, 2, None]
    assert found.functions == [None, None, None, math.sqrt]


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"safty": ObjectiveConfig()}, r"objectives\.safty: .*no such head; it has safety, helpfulness, politeness"),
        ({"safety": ObjectiveConfig(function="math.sqrt")}, r"objectives\.safety\.function: .*choose another name"),
        ({name: ObjectiveConfig(weight=0.0) for name in HEADS}, r"every weight is 0"),
        ({"x": ObjectiveConfig(function="no_such_module.f")}, r"objectives\.x\.function=no_such_module\.f: no such function"),
        ({"x": ObjectiveConfig(function="math.no_such")}, r"objectives\.x\.function=math\.no_such: no such function"),
        ({"x": ObjectiveConfig(function="sqrt")}, r"objectives\.x\.function=sqrt: no such function"),
        ({"x": ObjectiveConfig(function="math.pi")}, r"objectives\.x\.function=math\.pi: not a function"),
    ],
)
def test_what_cannot_be_scored_is_named(configured, message):
    with pytest.raises(UserError, match=message):
        choose_objectives(configured, HEADS)


def test_functions_stand_beside_heads_and_none_is_masked(encoder):
    seen = []

    def judge(prompts, texts):
        seen.append(([p.text for p in prompts], texts))
        return [None, math.nan, 1, 0.25, True, -3.0, 0.0]

    objectives = Objectives(["politeness", "judge", "safety"], [1.0, 1.0, 0.0], [2, None, 0], [None, judge, None])
    found = score(objectives, encoder, PROMPTS, TEXTS, 600)
    heads, _ = score_texts(encoder, PROMPTS, TEXTS, 600)
    assert found.objectives == ["politeness", "judge", "safety"]
    assert seen == [([p for p, _ in PAIRS], TEXTS)]
    assert torch.allclose(found.values[:, 0], heads[:, 2], atol=1e-6)
    assert torch.allclose(found.values[:, 2], heads[:, 0], atol=1e-6)
    assert found.values[:, 1].tolist() == [0.0, 0.0, 1.0, 0.25, 1.0, -3.0, 0.0]
    assert found.mask[:, 1].tolist() == [False, False, True, True, True, True, True]
    assert bool(found.mask[:, [0, 2]].all())
    assert bool(found.values.isfinite().all())


def test_a_function_with_too_few_answers_is_named(encoder):
    objectives = Objectives(["judge"], [1.0], [None], [lambda prompts, texts: [1.0]])
    with pytest.raises(UserError, match=r"objectives\.judge\.function gave 1 numbers for 7 completions"):
        score(objectives, encoder, PROMPTS, TEXTS, 600)
