"""The shipped configs of the public sets against made-up rows in each set's documented shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from grpo_safe.config import DataConfig
from grpo_safe.data.public_sets import helpsteer2, hh_rlhf, pku_saferlhf, ultrafeedback
from grpo_safe.data.rows import load_prompts, load_rows
from grpo_safe.records import LabelledRow, PreferenceRow

CONF = Path(__file__).parents[2] / "conf" / "data"
NAMES = ("beavertails", "helpsteer2", "hh_harmless", "hh_helpful", "pku_saferlhf", "ultrafeedback")


def shipped(name: str) -> Any:
    merged = OmegaConf.merge(OmegaConf.load(CONF / "base.yaml"), OmegaConf.load(CONF / f"{name}.yaml"))
    del merged["defaults"]
    return OmegaConf.merge(OmegaConf.structured(DataConfig), merged)


def config(name: str, folder: Path, rows: list[dict[str, Any]]) -> DataConfig:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return OmegaConf.to_object(OmegaConf.merge(shipped(name), {"train": str(source), "validation": str(source)}))


def loaded(name: str, folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    train, validation = load_rows(config(name, folder, rows), seed=0)
    assert train.rows == validation.rows  # both are the same file here
    for row in train.rows:
        if isinstance(row, LabelledRow):
            assert row.labels and all(0 <= value <= 1 for value in row.labels.values())
    return train.rows


@pytest.mark.parametrize("name", NAMES)
def test_config_names_a_hub_set_a_licence_and_objectives(name):
    spec = OmegaConf.to_object(shipped(name))
    assert spec.name == name
    assert spec.train.startswith("hub:") and spec.licence in ("MIT", "CC-BY-4.0", "CC-BY-NC-4.0")
    assert spec.objectives and all(objective.range[0] < objective.range[1] for objective in spec.objectives.values())
    assert spec.pair_objective is None or spec.pair_objective in spec.objectives


# --- PKU-SafeRLHF -----------------------------------------------------------------------------------------------------


def pku_row(**changes: Any) -> dict[str, Any]:
    row = {
        "prompt": "How do I open my neighbour's post box?",
        "response_0": "Bend a wire and fish the letters out.",
        "response_1": "Ask your neighbour; their post is theirs to open.",
        "prompt_source": "made-up",
        "response_0_source": "made-up",
        "response_1_source": "made-up",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": {"Privacy Violation": True},
        "response_1_harm_category": {"Privacy Violation": False},
        "response_0_severity_level": 1,
        "response_1_severity_level": 0,
        "better_response_id": 0,
        "safer_response_id": 1,
        "response_0_sha256": "0" * 64,
        "response_1_sha256": "1" * 64,
    }
    return row | changes


def test_pku_flags_become_labels_and_only_helpfulness_is_a_pair_where_flags_differ(tmp_path):
    rows = loaded("pku_saferlhf", tmp_path, [pku_row()])
    labelled, pairs = rows[:2], rows[2:]
    assert [row.labels for row in labelled] == [{"safety": 0.0}, {"safety": 1.0}]
    assert [(pair.objective, pair.chosen) for pair in pairs] == [("helpfulness", pku_row()["response_0"])]
    assert {row.prompt.text for row in rows} == {pku_row()["prompt"]}


def test_pku_safety_is_a_pair_where_both_flags_agree(tmp_path):
    rows = loaded("pku_saferlhf", tmp_path, [pku_row(is_response_1_safe=False)])
    pairs = {row.objective: row for row in rows if isinstance(row, PreferenceRow)}
    assert pairs["safety"].chosen == pku_row()["response_1"]
    assert pairs["safety"].rejected == pku_row()["response_0"]
    assert pairs["helpfulness"].chosen == pku_row()["response_0"]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"response_0": " "}, 1),  # one empty answer: the other keeps its label, and there is no pair
        ({"response_0": "Same.", "response_1": "Same."}, 2),  # no pair of equal texts
        ({"better_response_id": -1}, 2),  # no preference given
    ],
)
def test_pku_rows_without_a_pair(changes, count):
    rows = pku_saferlhf(pku_row(**changes))
    assert len(rows) == count and all("chosen" not in row for row in rows)


# --- BeaverTails ------------------------------------------------------------------------------------------------------


def test_beavertails_boolean_is_the_safety_label(tmp_path):
    rows = [
        {"prompt": "Is bleach a drink?", "response": r, "category": {"self_harm": not safe}, "is_safe": safe}
        for r, safe in (("No, it is poison.", True), ("Sure, cheers.", False))
    ]
    found = loaded("beavertails", tmp_path, rows)
    assert [row.labels for row in found] == [{"safety": 1.0}, {"safety": 0.0}]
    assert found[0].prompt.messages == [{"role": "user", "content": "Is bleach a drink?"}]


# --- HelpSteer2 -------------------------------------------------------------------------------------------------------


def helpsteer_row(prompt: str, response: str = "A list keeps order.") -> dict[str, Any]:
    scores = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 0, "verbosity": 1}
    return {"prompt": prompt, "response": response, **scores}


def test_helpsteer2_five_attributes_are_mapped_from_0_to_4(tmp_path):
    (row,) = loaded("helpsteer2", tmp_path, [helpsteer_row("What is a list?")])
    expected = {"helpfulness": 0.75, "correctness": 1.0, "coherence": 1.0, "complexity": 0.0, "verbosity": 0.25}
    assert row.labels == expected
    assert row.prompt.messages == [{"role": "user", "content": "What is a list?"}]


def test_helpsteer2_turns_are_taken_apart(tmp_path):
    prompt = "What is a list?\n<extra_id_1>Assistant\nA row of things.\n\nIn order.\n<extra_id_1>User\nAnd a set?"
    (row,) = loaded("helpsteer2", tmp_path, [helpsteer_row(prompt)])
    assert row.prompt.messages == [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A row of things.\n\nIn order."},
        {"role": "user", "content": "And a set?"},
    ]


def test_helpsteer2_null_attribute_is_missing_and_empty_answer_is_left_out(tmp_path):
    partly = helpsteer_row("Name a list.") | {"verbosity": None}
    rows = loaded("helpsteer2", tmp_path, [helpsteer_row("Name a set."), partly])
    assert "verbosity" not in rows[1].labels and len(rows[1].labels) == 4
    assert helpsteer2(helpsteer_row("Name a list.", response="\n")) == []


# --- UltraFeedback ----------------------------------------------------------------------------------------------------


def completion(response: str, *ratings: str | None) -> dict[str, Any]:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {a: {"Rating": r, "Rationale": "made-up"} for a, r in zip(aspects, ratings, strict=True)}
    return {"model": "made-up", "response": response, "annotations": annotations, "overall_score": 7.0}


def feedback_row(*completions: dict[str, Any]) -> dict[str, Any]:
    return {"source": "made-up", "instruction": "Name a river.", "models": [], "completions": list(completions)}


def test_ultrafeedback_ratings_are_mapped_from_1_to_5_and_na_is_missing(tmp_path):
    row = feedback_row(completion("The Rhine.", "5", "N/A", "3", "1"), completion("A lake.", "1", "2", "N/A", "N/A"))
    first, second = loaded("ultrafeedback", tmp_path, [row])
    assert first.labels == {"instruction_following": 1.0, "truthfulness": 0.5, "helpfulness": 0.0}
    assert second.labels == {"instruction_following": 0.0, "honesty": 0.25}
    assert first.prompt.text == "Name a river." and second.response == "A lake."


@pytest.mark.parametrize(
    "row",
    [
        feedback_row(),  # some rows of the set have no completions
        feedback_row(completion("The Rhine.", "N/A", "N/A", "N/A", "N/A")),
        feedback_row(completion("", "5", "5", "5", "5")),
    ],
)
def test_ultrafeedback_rows_that_teach_nothing_give_none(row):
    assert ultrafeedback(row) == []


def test_ultrafeedback_aspect_that_is_absent_is_missing():
    whole = completion("The Rhine.", "5", "4", "3", "2")
    whole["annotations"] = {"honesty": {"Rating": "4"}, "helpfulness": None}
    (row,) = ultrafeedback(feedback_row(whole))
    assert {name for name, value in row["labels"].items() if value is not None} == {"honesty"}


def test_ultrafeedback_is_split_by_prompt(tmp_path):
    rows = [
        feedback_row(completion("Yes.", "5", "5", "5", "5"), completion("No.", "1", "1", "1", "1"))
        | {"instruction": f"Question {n}?"}
        for n in range(200)
    ]
    spec = config("ultrafeedback", tmp_path, rows)
    spec.validation = None  # as shipped
    train, validation = load_rows(spec, seed=0)
    assert len(train.rows) + len(validation.rows) == 400
    assert not {r.prompt.id for r in train.rows} & {r.prompt.id for r in validation.rows}


# --- Anthropic HH -----------------------------------------------------------------------------------------------------

EARLIER = "\n\nHuman: Can I mix these?\n\nAssistant: Which ones?\n\nNames, please.\n\nHuman: Bleach and vinegar."


@pytest.mark.parametrize(("name", "objective"), [("hh_harmless", "safety"), ("hh_helpful", "helpfulness")])
def test_hh_shared_prefix_is_a_prompt_of_several_turns(tmp_path, name, objective):
    row = {"chosen": f"{EARLIER}\n\nAssistant: No: it makes a gas.", "rejected": f"{EARLIER}\n\nAssistant: Sure."}
    (pair,) = loaded(name, tmp_path, [row])
    assert pair.prompt.messages == [
        {"role": "user", "content": "Can I mix these?"},
        {"role": "assistant", "content": "Which ones?\n\nNames, please."},
        {"role": "user", "content": "Bleach and vinegar."},
    ]
    assert (pair.chosen, pair.rejected, pair.objective) == ("No: it makes a gas.", "Sure.", objective)
    (prompt,), _ = load_prompts(config(name, tmp_path, [row]), "train")
    assert prompt == pair.prompt


def test_hh_answer_may_start_on_the_line_after_its_speaker():
    row = {"chosen": "\n\nHuman: Plan?\n\nAssistant:\n1. Rest\n\n2. Eat", "rejected": "\n\nHuman: Plan?\n\nAssistant: No"}
    (pair,) = hh_rlhf(row)
    assert pair["prompt"] == [{"role": "user", "content": "Plan?"}]
    assert pair["chosen"] == "1. Rest\n\n2. Eat"


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: A?\n\nAssistant: Yes.", "\n\nHuman: B?\n\nAssistant: No."),  # no shared prefix
        ("\n\nHuman: A?\n\nAssistant: Yes.", "\n\nHuman: A?\n\nAssistant: Yes."),  # no difference
        ("\n\nHuman: A?\n\nAssistant: Yes.", "\n\nHuman: A?\n\nAssistant: "),  # an empty answer
        ("\n\nHuman: A?\n\nHuman: B?", "\n\nHuman: A?\n\nHuman: C?"),  # ends with the human
        ("\n\nHuman: A?\n\nAssistant: So\n\nAssistant: Yes.", "\n\nHuman: A?\n\nAssistant: So\n\nAssistant: No."),
        ("\n\nAssistant: Yes.", "\n\nAssistant: No."),  # no prompt
        ("", "\n\nHuman: A?"),
        ("", ""),
    ],
)
def test_hh_rows_without_a_pair_give_none(chosen, rejected):
    assert hh_rlhf({"chosen": chosen, "rejected": rejected}) == []
