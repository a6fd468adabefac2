"""A reward model fitted by LoRA: what is published gives the scores that were judged, also where the start lacks weights that the classifier needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import stage_config
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
)

from grpo_safe import models
from grpo_safe.algorithm.statistics import r2
from grpo_safe.data.rows import load_rows
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.models.reward_model import open_reward_model, score_texts
from grpo_safe.stages import train_rm
from grpo_safe.versions import checkpoint


def encoder(folder: Path, kind: str) -> Path:
    """Encoders without what a sequence classifier adds: a pooler, a pre-classifier."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-bert"))
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "pad_token_id": 0, "max_position_embeddings": 512,
    }  # fmt: skip
    if kind == "deberta":
        model: Any = DebertaV2Model(DebertaV2Config(
            type_vocab_size=0, relative_attention=True, position_buckets=32, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            share_att_key=True, pooler_hidden_size=32, **small,
        ))  # fmt: skip
    elif kind == "distilbert":
        model = DistilBertModel(DistilBertConfig(
            vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=512,
        ))  # fmt: skip
    else:
        model = BertModel(BertConfig(**small), add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fit(tmp_path: Path, kind: str, *words: str) -> tuple[Any, Path]:
    start = encoder(tmp_path / "start", kind)
    attention = "eager" if kind == "deberta" else "sdpa"
    cfg = stage_config(
        "train-rm", tmp_path / "run", tmp_path / "store", f"backbone.start={start}", f"backbone.attn_implementation={attention}",
        "backbone.lora.enabled=true", "optim.lr=1e-2", "data.limit=200", *words,
    )  # fmt: skip
    train_rm.run(cfg, tmp_path / "run")
    return cfg, tmp_path / "store"


@pytest.mark.parametrize("kind", ["deberta", "distilbert", "bert without pooler"])
def test_the_published_reward_model_is_the_judged_one(tmp_path: Path, kind: str) -> None:
    cfg, store = fit(tmp_path, kind)
    found = checkpoint.open_version(store, "reward-model", "latest")
    reward_model = open_reward_model(found, torch.device("cpu"))
    _, validation = load_rows(cfg.data, cfg.seed)
    judging = [r for r in validation.rows if int(r.prompt.id[8:16], 16) % 2 == 1]
    scores, _ = score_texts(reward_model, [r.prompt for r in judging], [r.response for r in judging], 4096)
    for k, name in enumerate(reward_model.objectives):
        rows = [i for i, row in enumerate(judging) if name in row.labels]
        again = r2(scores[rows, k].numpy().astype(float), np.array([judging[i].labels[name] for i in rows]))
        assert again == pytest.approx(found.manifest["metrics"]["objectives"][name]["r2"]["value"], abs=1e-4)


def test_a_model_that_is_not_the_judged_one_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = models.detached_copy

    def other_pooler(*arguments: Any) -> Any:
        copy = copied(*arguments)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in copy.named_parameters():
                if "pooler" in name:
                    parameter.add_(torch.randn_like(parameter))
        return copy

    monkeypatch.setattr(train_rm.models, "detached_copy", other_pooler)
    with pytest.raises(
        UserError, match=r"gives other scores than the one that was judged: \d\.\de.* apart in the mean of 16 rows"
    ):
        fit(tmp_path, "deberta")
    assert not list((tmp_path / "store" / "reward-model").glob("*"))
    monkeypatch.undo()


def test_bfloat16_is_judged_with_its_own_rounding(tmp_path: Path) -> None:
    _, store = fit(tmp_path, "deberta", "backbone.dtype=bfloat16")
    assert checkpoint.open_version(store, "reward-model", "latest").manifest["version"] == 1
