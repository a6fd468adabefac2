"""Prompts of training judge nothing: they are left out of validation and of the held-out prompts, and the run says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import stage_config

from grpo_safe.data.leakage import normalized
from grpo_safe.errors import UserError
from grpo_safe.stages import evaluate, train_policy, train_rm
from grpo_safe.versions import checkpoint


def written(path: Path, prompts: list[str]) -> str:
    rows = [{"prompt": p, "response": f"Answer {n}.", "labels": {"safety": n % 2}} for n, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(first: int, count: int) -> list[str]:
    return [f"Which allergies does patient {n} have?" for n in range(first, first + count)]


def respelled(prompts: list[str]) -> list[str]:
    return [p.upper().replace(" ", "  ").removesuffix("?") + " ?!" for p in prompts]


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    """Words for a set of 24 training prompts; 20 of the 40 validation prompts are among them, spelled otherwise."""
    train = written(tmp_path / "train.jsonl", questions(0, 24))
    validation = written(tmp_path / "validation.jsonl", respelled(questions(4, 20)) + questions(100, 20))
    return ("data=files", f"data.train={train}", f"data.validation={validation}", "data.objectives.safety.range=[0,1]")


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Boil an egg?", " boil  an\tEGG", True),
        ("Don't panic!", "dont panic", True),
        ("What is 5 - 3?", "What is 5/3?", False),
        ("What is 5 - 3?", "what is 5-3", True),
        ("a + b", "a = b", False),
        ("?", "!", False),
        ("कि", "का", False),  # vowel signs are no punctuation
    ],
)
def test_what_counts_as_the_same_prompt(one: str, other: str, alike: bool) -> None:
    assert (normalized(one) == normalized(other)) is alike


def test_train_rm_judges_on_unseen_prompts_only(data: tuple[str, ...], tmp_path: Path, capsys) -> None:
    train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *data), tmp_path / "run")
    said = capsys.readouterr().out
    assert "data.validation: 20 of 40 rows have prompts that data.train has too" in said
    assert "20 for validation" in said
    (version,) = checkpoint.all_versions(tmp_path / "store")
    assert 0 < version.manifest["metrics"]["judged_rows"] < 20  # half of the unseen ones


def test_train_rm_refuses_validation_that_is_all_training(data: tuple[str, ...], tmp_path: Path) -> None:
    """Random labels, learned by heart: R2 would be 1 and the gate would pass."""
    words = (*data[:2], data[1].replace("data.train", "data.validation"), data[3])
    with pytest.raises(UserError, match=r"data\.validation: 24 of 24 rows .* data\.train has too .* no row is left"):
        train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")
    assert not (tmp_path / "store").exists()


def test_rows_without_a_prompt_are_compared_by_their_answers(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", [""] * 4)
    words = ("data=files", f"data.train={train}", f"data.validation={train}", "data.objectives.safety.range=[0,1]")
    with pytest.raises(UserError, match="4 of 4 rows"):
        train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")


def test_train_policy_and_eval_leave_out_what_was_trained_on(
    data: tuple[str, ...], tiny_store: Path, tmp_path: Path, capsys
) -> None:
    words = (*data, "train.steps=1", "train.eval_every=1")
    run = tmp_path / "policy"
    train_policy.run(stage_config("train-policy", run, tiny_store, *words), run)
    assert "data.validation: 20 of 40 prompts are among the policy's training prompts" in capsys.readouterr().out
    run, newest = tmp_path / "eval", max((tiny_store / "policy").glob("v*"))
    evaluate.run(stage_config("eval", run, tiny_store, f"policy={newest}", "reward_model=v1"), run)
    assert "data.heldout: 20 of 40 prompts are among the policy's training prompts" in capsys.readouterr().out
    asked = {json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()}
    assert asked and asked <= set(questions(100, 20))

    train = data[1].partition("=")[2]
    other = ("data=files", "data.train=elsewhere.jsonl", f"data.heldout={train}")  # another data set, the policy's own prompts
    with pytest.raises(UserError, match=r"data\.heldout: 24 of 24 prompts .* none is left"):
        evaluate.run(stage_config("eval", run, tiny_store, f"policy={newest}", "reward_model=v1", *other), run)
    Path(train).unlink()
    evaluate.run(stage_config("eval", run, tiny_store, f"policy={newest}", "reward_model=v1"), run)
    assert "was not checked: data.train=" in capsys.readouterr().out
