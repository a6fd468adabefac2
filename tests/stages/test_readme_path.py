"""The README's path to real work, typed line by line at tiny size: each stage takes from the one before what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import cli, stage_config

from grpo_safe.cli import conf_dir
from grpo_safe.config import LimitConfig, ObjectiveConfig
from grpo_safe.rewards import choose_objectives
from grpo_safe.stages import train_rm

README = Path(__file__).parents[2] / "README.md"


def path_to_real_work() -> list[str]:
    """Its first three commands."""
    block = README.read_text().partition("For real work")[2].partition("```sh\n")[2].partition("```")[0]
    return [line.partition("#")[0].strip() for line in block.splitlines()][:3]


def rows(count: int, what: str) -> str:
    """Rows in the layout of PKU-SafeRLHF."""
    return "".join(
        json.dumps({
            "prompt": f"{what} question {i}?", "response_0": f"A calm answer {i}.", "response_1": f"A rash answer {i}, now!",
            "is_response_0_safe": True, "is_response_1_safe": i % 3 == 0, "better_response_id": i % 2, "safer_response_id": 0,
        }) + "\n" for i in range(count)
    )  # fmt: skip


def test_the_three_lines(tmp_path: Path) -> None:
    lines = path_to_real_work()
    assert [line.split()[1] for line in lines] == ["train-rm", "train-policy", "eval"]
    (tmp_path / "train.jsonl").write_text(rows(60, "Train"))
    (tmp_path / "test.jsonl").write_text(rows(40, "Held-out"))
    local = ("data.train=train.jsonl", "data.validation=test.jsonl")
    said = []
    for line in lines:
        words = [word for word in line.split()[1:] if not word.startswith(("+backbone=", "+model="))]
        told = local if any(word.startswith("data=") for word in words) else ()
        said.append(cli(*words, "+debug=tiny", *told, cwd=tmp_path).stdout)
    assert re.search(r"train-rm: \d+ rows of data pku_saferlhf, \d+ for validation, objectives safety, helpfulness", said[0])
    assert "60 prompts of data pku_saferlhf, reward model v001, weights safety 1, helpfulness 1, 12 new tokens" in said[1]
    assert "grpo-safe eval: policy v001, data pku_saferlhf, 12 new tokens at temperature 1" in said[2]
    policy = json.loads((tmp_path / "checkpoints/policy/v001/manifest.json").read_text())
    assert [file["source"] for file in policy["data"]["files"]] == ["train.jsonl"]
    (answers,) = tmp_path.glob("runs/eval/**/samples.jsonl")
    prompts = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert prompts and all(prompt.startswith("Held-out question") for prompt in prompts)


def test_a_head_of_which_more_is_not_better_has_no_weight() -> None:
    text = (conf_dir() / "data" / "helpsteer2.yaml").read_text()
    assert re.search(r"verbosity: .*weight: 0 ", text) and re.search(r"complexity: .*weight: 0 ", text)
    chosen = choose_objectives({}, ["helpfulness", "verbosity"], {"helpfulness": 1.0, "verbosity": 0.0})
    assert dict(zip(chosen.names, chosen.weights, strict=True)) == {"helpfulness": 1.0, "verbosity": 0.0}
    limited = choose_objectives(
        {"verbosity": ObjectiveConfig(limit=LimitConfig(0.5))}, ["helpfulness", "verbosity"], {"verbosity": 0.0}
    )
    assert limited.weights == [1.0, 0.0]  # a limit is no weight
    told = choose_objectives({"verbosity": ObjectiveConfig(weight=0.5)}, ["helpfulness", "verbosity"], {"verbosity": 0.0})
    assert told.weights == [1.0, 0.5]


def test_the_weight_reaches_the_manifest_of_the_reward_model(tmp_path: Path) -> None:
    words = ("data.objectives.politeness.weight=0", "data.limit=64")
    train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")
    manifest = json.loads((tmp_path / "store/reward-model/v001/manifest.json").read_text())
    assert {o["name"]: o["weight"] for o in manifest["objectives"]}["politeness"] == 0.0
