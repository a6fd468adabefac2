"""The three stages at tiny size, in this process: what they write, and that plain transformers reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, stage_config, timeless

from grpo_safe.data.rows import load_prompts
from grpo_safe.errors import UserError
from grpo_safe.stages import evaluate, train_policy, train_rm
from grpo_safe.versions import checkpoint

PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, rows = sys.argv[1], json.load(open(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
scores = []
with torch.inference_mode():
    for prompt, answer in rows:
        inputs = tokenizer(prompt, answer, truncation="only_first", max_length=128, return_tensors="pt")
        scores.append(model(**inputs).logits[0].tolist())
assert "grpo_safe" not in sys.modules
print(json.dumps({"scores": scores, "names": [model.config.id2label[k] for k in range(model.config.num_labels)]}))
"""


def test_reward_model_opens_in_plain_transformers_with_the_logged_scores(tiny_store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "policy"
    train_policy.run(stage_config("train-policy", run_dir, tiny_store, "train.steps=1", "tracking.sample_count=8"), run_dir)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    rows = [(s["prompt"], s["completion"]) for s in samples]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = checkpoint.open_version(tiny_store, "reward-model", "latest")
    out = subprocess.run(
        [sys.executable, "-c", PLAIN, str(found.path), str(tmp_path / "rows.json")],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    plain = json.loads(out.stdout.splitlines()[-1])
    assert plain["names"] == [o["name"] for o in found.manifest["objectives"]]
    logged = torch.tensor([[s["scores"][n] for n in plain["names"]] for s in samples])
    assert len(rows) == 8
    # A head that hardly learned is stretched by its calibration, rounding errors with it.
    stretch = torch.tensor([max(1.0, o["slope"]) for o in found.manifest["objectives"]])
    assert ((torch.tensor(plain["scores"]) - logged).abs() < 5e-5 + 1e-5 * stretch).all()  # samples.jsonl rounds to four digits
    exact = score_as_the_pipeline(found, rows)
    assert ((torch.tensor(plain["scores"]) - exact).abs() < 1e-5 * stretch).all()


def score_as_the_pipeline(found: checkpoint.Version, rows: list[tuple[str, str]]) -> torch.Tensor:
    from grpo_safe.models.reward_model import open_reward_model, score_texts
    from grpo_safe.records import Prompt

    prompts = [Prompt("x", [{"role": "user", "content": prompt}]) for prompt, _ in rows]
    return score_texts(open_reward_model(found, torch.device("cpu")), prompts, [answer for _, answer in rows], 4096)[0]


def test_policy_publishes_merged_weights_and_adapter_that_agree(tiny_store: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_safe.models.embedded import embedded_folder

    words = ("train.steps=2", "optim.lr=1e-2", "optim.warmup=0", "export.dtype=float32")
    train_policy.run(stage_config("train-policy", tmp_path / "run", tiny_store, *words), tmp_path / "run")
    found = checkpoint.open_version(tiny_store, "policy", "latest")
    assert found.manifest["layout"]["layout"] == "merged"
    base_folder = embedded_folder("embedded:tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    merged = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.inference_mode():
        before = base(**inputs).logits
        after = merged(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(found.path / "adapter"))(**inputs).logits
    assert torch.allclose(after, adapted, atol=1e-5)
    assert (after - before).abs().max() > 1e-3  # it was trained
    assert merged.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_same_seed_same_run_other_seed_other_run(tiny_store: Path, tmp_path: Path) -> None:
    rows = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_dir = tmp_path / name
        train_policy.run(stage_config("train-policy", run_dir, tiny_store, f"seed={seed}", "optim.lr=1e-2"), run_dir)
        rows[name] = timeless(read_metrics(run_dir))
    assert rows["a"] == rows["b"]
    assert rows["a"] != rows["c"]


def test_ratio_is_one_and_the_sampler_agrees_before_the_first_update(tiny_store: Path, tmp_path: Path) -> None:
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, "train.steps=1", "sampling.temperature=0.7"), tmp_path)
    (row,) = read_metrics(tmp_path)
    assert row["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert row["sampler_gap"] < 1e-4
    assert row["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("words", [
    ("algo.updates_per_rollout=2", "algo.minibatches=2"),
    ("algo.truncated=mask",),
    ("algo.truncated=penalize",),
    ("policy.lora.enabled=false",),
    ("algo.kl_coef=0", "algo.entropy_coef=0.01"),
    ("policy.gradient_checkpointing=true",),
    ("policy.gradient_checkpointing=selective", "policy.lora.enabled=false"),
    ("policy.dtype=bfloat16", "reward_model_dtype=bfloat16"),
    ("policy.dtype=bfloat16", "policy.lora.enabled=false"),
    ("rollout=generate", "sampling.top_p=0.9"),
    ("objectives.safety.weight=2", "objectives.politeness.weight=0"),
    ("train.eval_every=1", "train.eval_prompts=6"),
])  # fmt: skip
def test_variants_train_and_log(words: tuple[str, ...], tiny_store: Path, tmp_path: Path) -> None:
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, *words), tmp_path)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == [1, 2]
    always = {"reward/mean", "zero_spread_groups", "clip_share", "entropy", "length/mean", "truncated", "score/safety",
              "score_group_std/safety", "gain/safety", "seconds/sampling", "seconds/scoring", "seconds/update", "tokens_per_second",
              "peak_memory_gb", "grad_norm"}  # fmt: skip
    assert always <= set(rows[0])
    assert ("kl" in rows[0]) == ("algo.kl_coef=0" not in words)
    assert ("validation/safety" in rows[0]) == ("train.eval_every=1" in words)
    if "algo.truncated=mask" in words:  # every tiny completion is cut: nothing is left to learn from
        assert rows[0]["truncated"] == 1.0
        assert rows[0]["grad_norm"] == 0.0
    else:
        assert rows[0]["grad_norm"] > 0


def brevity(prompts: list, completions: list[str]) -> list[float | None]:
    """An objective that cannot score an empty completion."""
    return [1 - min(len(c), 100) / 100 if c else None for c in completions]


def test_a_function_stands_beside_the_heads(tiny_store: Path, tmp_path: Path) -> None:
    words = ("objectives.brevity.function=test_three_stages.brevity", "objectives.brevity.weight=0.5")
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, *words), tmp_path)
    row = read_metrics(tmp_path)[0]
    assert 0 < row["score/brevity"] < 1
    assert checkpoint.open_version(tiny_store, "policy", "latest").manifest["objectives"][-1] == {
        "name": "brevity",
        "weight": 0.5,
    }


def test_eval_writes_its_report(tiny_store: Path, tmp_path: Path) -> None:
    train_policy.run(stage_config("train-policy", tmp_path / "p", tiny_store, "optim.lr=1e-2"), tmp_path / "p")
    judge = str(checkpoint.open_version(tiny_store, "reward-model", "latest").path)
    evaluate.run(stage_config("eval", tmp_path / "e", tiny_store, f"reward_model={judge}", "eval.completions=2"), tmp_path / "e")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["prompts"] == 12
    for entry in metrics["objectives"].values():
        d = entry["difference"]
        assert d["low"] <= d["value"] <= d["high"]
        assert d["value"] == pytest.approx(entry["policy"]["value"] - entry["start"]["value"], abs=1e-9)
    samples = [json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert len(samples[0]["policy"]) == 2
    assert "refusals, harmful" in (tmp_path / "e" / "report.md").read_text()


def test_evaluating_the_start_against_itself_differs_by_nothing(tiny_store: Path, tmp_path: Path) -> None:
    train_policy.run(
        stage_config("train-policy", tmp_path / "p", tiny_store, "optim.lr=1e-30", "export.dtype=float32"), tmp_path / "p"
    )
    judge = str(checkpoint.open_version(tiny_store, "reward-model", "latest").path)
    evaluate.run(stage_config("eval", tmp_path / "e", tiny_store, f"reward_model={judge}"), tmp_path / "e")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert all(abs(e["difference"]["value"]) < 1e-6 for e in metrics["objectives"].values())


def pair_rows(path: Path) -> Path:
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"A kind answer number {i}.", "rejected": f"No {i}.", "objective": "helpfulness"}
        for i in range(40)
    ]
    rows += [{"prompt": f"Question {i}?", "response": f"Text {i}", "labels": {"safety": i % 2}} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_labels_and_pairs_in_one_run(tmp_path: Path) -> None:
    data = pair_rows(tmp_path / "rows.jsonl")
    words = ("data=files", f"data.train={data}", "data.validation_fraction=0.5", "data.objectives.safety.range=[0,1]",
             "data.objectives.safety.binary=true", "data.objectives.helpfulness.range=[0,1]", "train.epochs=15")  # fmt: skip
    train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")
    found = checkpoint.open_version(tmp_path / "store", "reward-model", "latest")
    safety, helpfulness = found.manifest["objectives"]
    assert (safety["scale"], helpfulness["scale"]) == ("absolute", "relative")
    assert helpfulness["temperature"] > 0
    card = found.manifest["metrics"]["objectives"]
    assert card["helpfulness"]["n"] == 0
    assert card["helpfulness"]["pair_accuracy"]["value"] > 0.9  # kind and long against curt: easy
    assert card["safety"]["auc"] is not None
    assert "pair accuracy" in (found.path / "README.md").read_text()


def test_causal_backbone_with_lora_is_published_merged_and_calibrated(tmp_path: Path) -> None:
    words = ("backbone.start=embedded:tiny-llama", "backbone.lora.enabled=true", "data.limit=120")
    train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")
    found = checkpoint.open_version(tmp_path / "store", "reward-model", "latest")
    assert not list(found.path.glob("adapter*"))
    assert any(o["offset"] != 0 for o in found.manifest["objectives"])  # no bias to fold it into: it stays in the manifest
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(found.path)
    model = AutoModelForSequenceClassification.from_pretrained(found.path, dtype=torch.float32).eval()
    prompt, _ = load_prompts(stage_config("train-rm", tmp_path / "x", tmp_path / "store").data, "heldout")
    messages = [*prompt[0].messages, {"role": "assistant", "content": "It depends."}]
    inputs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        plain = model(**inputs).logits[0] + torch.tensor([o["offset"] for o in found.manifest["objectives"]])
    assert torch.allclose(score_as_the_pipeline(found, [(prompt[0].text, "It depends.")])[0], plain, atol=1e-5)


def test_the_gate_names_head_and_figure(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"head \w+: R2 .*lower bound must be above 0.*reward_model_gate=warn"):
        train_policy.run(stage_config("train-policy", tmp_path, tiny_store, "reward_model_gate=error"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_could_not_publish_resumes_at_its_end_and_a_finished_one_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_policy.run(stage_config("train-policy", run_dir, tiny_store), run_dir)
    first = checkpoint.open_version(tiny_store, "policy", "latest").manifest
    again = stage_config("train-policy", run_dir, tiny_store, f"resume={run_dir}")
    with pytest.raises(UserError, match=r"finished, published as .*policy/v\d+.*larger train.steps"):
        train_policy.run(again, run_dir)
    (run_dir / "published.txt").unlink()  # as if the disk had been full
    train_policy.run(again, run_dir)
    second = checkpoint.open_version(tiny_store, "policy", "latest").manifest
    assert second["version"] == first["version"] + 1
    assert second["files"]["model.safetensors"] == first["files"]["model.safetensors"]
    assert second["metrics"] == first["metrics"]
    assert [r["step"] for r in read_metrics(run_dir)] == [1, 2]
    longer = stage_config("train-policy", run_dir, tiny_store, f"resume={run_dir}", "train.steps=3")
    train_policy.run(longer, run_dir)
    assert [r["step"] for r in read_metrics(run_dir)] == [1, 2, 3]


def test_profile_logs_floors_and_shows_a_table(tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = stage_config(
        "train-policy", tmp_path / "run", tiny_store, "train.profile=true", "data.limit=200", "train.save_every=null"
    )
    train_policy.run(cfg, tmp_path / "run")
    for row in read_metrics(tmp_path / "run"):
        assert all(row[f"floor/{phase}"] > 0 for phase in ("sampling", "scoring", "reference", "update"))
        assert row["floor/update"] == pytest.approx(2 * row["floor/reference"])  # LoRA: a forward, and as much back
        assert 0 < row["fraction_of_peak"] < 1
        assert row["peak_memory_gb"] >= row["peak_memory_gb/update"] > 0.05
    assert "fraction of peak" in capsys.readouterr().out
