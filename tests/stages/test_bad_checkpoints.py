"""Checkpoints whose weights do not load, or cannot be used: one sentence that names the key, before a step, nothing published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import stage_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CanineConfig,
    CanineModel,
    CanineTokenizer,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from grpo_safe import models
from grpo_safe.config import BackboneConfig
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.stages import train_policy, train_rm

Weights = dict[str, Any]
META = {"format": "pt"}


def copy_of(name: str, folder: Path, change: Callable[[Weights], Weights] = dict, **config: Any) -> Path:
    """The tiny model of this name with its weights and its config changed."""
    shutil.copytree(embedded_folder(f"embedded:{name}"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata=META)
    described = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def renamed(weights: Weights) -> Weights:
    return {f"_orig_mod.{name}": w for name, w in weights.items()}


def without_a_layer(weights: Weights) -> Weights:
    return {name: w for name, w in weights.items() if "layers.1." not in name and "layer.1." not in name}


def refused_policy(tmp_path: Path, store: Path, start: Path, *words: str) -> str:
    before = sorted(store.rglob("*"))
    cfg = stage_config("train-policy", tmp_path / "run", store, f"policy.start={start}", *words)
    with pytest.raises(UserError) as caught:
        train_policy.run(cfg, tmp_path / "run")
    assert sorted(store.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_backbone(tmp_path: Path, start: Path, *words: str) -> str:
    cfg = stage_config("train-rm", tmp_path / "run", tmp_path / "store", f"backbone.start={start}", "data.limit=40", *words)
    with pytest.raises(UserError) as caught:
        train_rm.run(cfg, tmp_path / "run")
    assert not list((tmp_path / "store").rglob("v001"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- weights that are not the model's ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "config", "fragments"),
    [
        (renamed, {}, ("are missing", "model.embed_tokens.weight", "_orig_mod.model.embed_tokens.weight")),
        (without_a_layer, {}, ("9 are missing", "model.layers.1.input_layernorm.weight")),
        (dict, {"num_hidden_layers": 1}, ("9 have no place in it", "model.layers.1.input_layernorm.weight")),
        (dict, {"intermediate_size": 128}, ("another shape", "down_proj.weight is [32, 64] and not [32, 128]")),
    ],
)
def test_a_policy_starts_only_from_its_own_weights(
    tmp_path: Path, tiny_store: Path, change: Callable[[Weights], Weights], config: Weights, fragments: tuple[str, ...]
) -> None:
    start = copy_of("tiny-llama", tmp_path / "model", change, **config)
    message = refused_policy(tmp_path, tiny_store, start)
    for fragment in (f"policy.start={start}", *fragments):
        assert fragment in message


@pytest.mark.parametrize(
    ("name", "change", "fragment"),
    [
        ("tiny-bert", renamed, "bert.embeddings.LayerNorm.bias"),
        ("tiny-bert", without_a_layer, "bert.encoder.layer.1."),
        ("tiny-llama", without_a_layer, "9 are missing"),
    ],
)
def test_a_reward_model_starts_only_from_its_own_weights(
    tmp_path: Path, name: str, change: Callable[[Weights], Weights], fragment: str
) -> None:
    start = copy_of(name, tmp_path / "model", change)
    message = refused_backbone(tmp_path, start)
    assert f"backbone.start={start}" in message and fragment in message


def small(**more: Any) -> dict[str, Any]:
    return {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64} | more


@pytest.mark.parametrize(
    "made",
    [
        lambda: BertModel(BertConfig(**small()), add_pooling_layer=False),  # no pooler: the classifier adds one
        lambda: BertForMaskedLM(BertConfig(**small())),  # another head is left over
        lambda: DistilBertModel(DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=4, hidden_dim=64)),
        lambda: RobertaModel(RobertaConfig(**small())),  # its pooler is left over, the classifier's head has two layers
    ],
)
def test_layers_that_a_classifier_adds_may_be_new(tmp_path: Path, made: Callable[[], Any]) -> None:
    made().save_pretrained(tmp_path)
    backbone = models.load_backbone(models.Start("x", str(tmp_path), {}), BackboneConfig(), ["a", "b", "c"], 0)
    assert models.head_layer(backbone).out_features == 3


def test_a_classifier_with_other_labels_gives_its_backbone(tmp_path: Path) -> None:
    cfg, first, second = BackboneConfig(), tmp_path / "first", tmp_path / "second"
    BertModel(BertConfig(**small())).save_pretrained(first)
    one = models.load_backbone(models.Start("x", str(first), {}), cfg, ["a"], 0)
    one.save_pretrained(second)
    three = models.load_backbone(models.Start("x", str(second), {}), cfg, ["a", "b", "c"], 0)
    assert models.head_layer(three).out_features == 3
    assert (three.bert.pooler.dense.weight == one.bert.pooler.dense.weight).all()


def test_a_whole_checkpoint_opens_and_ties_its_head(tmp_path: Path) -> None:
    start = copy_of("tiny-llama", tmp_path / "model")
    assert "lm_head.weight" not in load_file(start / "model.safetensors")
    model = models.load_causal_lm(models.Start("x", str(start), {}), "float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- what a library raises --------------------------------------------------------------------------------------------


def pointer(weights: Path) -> None:
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


def torn(weights: Path) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("break_file", [pointer, torn])
def test_weight_files_that_cannot_be_read(tmp_path: Path, tiny_store: Path, break_file: Callable[[Path], None]) -> None:
    policy, encoder = copy_of("tiny-llama", tmp_path / "model"), copy_of("tiny-bert", tmp_path / "encoder")
    break_file(policy / "model.safetensors")
    break_file(encoder / "model.safetensors")
    assert f"policy.start={policy}: cannot be loaded as a causal LM (SafetensorError" in refused_policy(
        tmp_path, tiny_store, policy
    )
    assert f"backbone.start={encoder}: cannot be loaded as a sequence classifier (Safe" in refused_backbone(tmp_path, encoder)


@pytest.mark.parametrize(
    ("config", "words", "fragment"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, (), "cannot be loaded as a causal LM"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, (), "bitsandbytes"),
        ({}, ("policy.attn_implementation=flash_attention_2",), "policy.attn_implementation=flash_attention_2"),
        ({}, ("policy.attn_implementation=nonsense",), "policy.attn_implementation=nonsense"),
    ],
)
def test_what_is_not_installed(
    tmp_path: Path, tiny_store: Path, config: dict[str, Any], words: tuple[str, ...], fragment: str
) -> None:
    start = copy_of("tiny-llama", tmp_path / "model", **config)
    message = refused_policy(tmp_path, tiny_store, start, *words)
    assert f"policy.start={start}" in message and fragment in message


# --- LoRA's targets ---------------------------------------------------------------------------------------------------


def adapted_layers(*words: str) -> set[str]:
    cfg = stage_config("train-policy", Path("unused"), Path("unused"), *words).policy
    policy = models.load_policy(models.resolve_start(cfg.start, None, False, "policy.start"), cfg, False)
    return {name.split(".lora_")[0].rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("word", "layers"),
    [
        ("[q_proj,v_proj]", {"q_proj", "v_proj"}),
        ("q_proj", {"q_proj"}),
        ("'.*self_attn.*'", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_stands_around_the_layers_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, layers: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if word.startswith("'"):
        with pytest.raises(
            UserError, match=r"policy\.lora\.target_modules.*self_attn is a LlamaAttention, which LoRA cannot adapt"
        ):
            adapted_layers(f"policy.lora.target_modules={word}")
        word = "'.*self_attn.*proj'"
    assert adapted_layers(f"policy.lora.target_modules={word}") == layers


@pytest.mark.parametrize("word", ["nope", "[q_proj,nope]", "'nope.*'", "'nope('"])
def test_a_layer_that_the_model_lacks_is_named(tmp_path: Path, tiny_store: Path, word: str) -> None:
    message = refused_policy(tmp_path, tiny_store, embedded_folder("embedded:tiny-llama"), f"policy.lora.target_modules={word}")
    assert "policy.lora.target_modules=" in message and "nope" in message and "down_proj, gate_proj" in message
    words = ("backbone.lora.enabled=true", f"backbone.lora.target_modules={word}")
    message = refused_backbone(tmp_path, embedded_folder("embedded:tiny-bert"), *words)
    assert "backbone.lora.target_modules=" in message and "key" in message


@pytest.mark.parametrize("word", ["5", "[]", "[1]", "{a: 1}", "null"])
def test_targets_are_names(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match=r"policy\.lora\.target_modules=.*expected all-linear"):
        stage_config("train-policy", tmp_path / "run", tmp_path / "store", f"policy.lora.target_modules={word}")


# --- tokens and shapes that the stages cannot use ---------------------------------------------------------------------


def tokenizer_without(folder: Path, *tokens: str) -> None:
    described = json.loads((folder / "tokenizer_config.json").read_text()) | dict.fromkeys(tokens)
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def test_pad_token_without_an_embedding(tmp_path: Path, tiny_store: Path) -> None:
    start = copy_of("tiny-llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(start)
    for key, message in (
        ("policy", refused_policy(tmp_path, tiny_store, start)),
        ("backbone", refused_backbone(tmp_path, start)),
    ):
        assert f"{key}.start={start}: its pad_token '[PAD]' has id 49152, and its embeddings end at 49151" in message


def test_no_end_token(tmp_path: Path, tiny_store: Path) -> None:
    start = copy_of("tiny-llama", tmp_path / "model")
    tokenizer_without(start, "eos_token")
    assert f"policy.start={start}: it must be known how a completion ends" in refused_policy(tmp_path, tiny_store, start)
    tokenizer_without(start, "eos_token", "pad_token")
    assert "neither an end token nor a pad token" in refused_policy(tmp_path, tiny_store, start)


def test_backbones_that_read_no_pair(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-bert"))
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    message = refused_backbone(tmp_path, tmp_path / "t5")
    assert f"backbone.start={tmp_path / 't5'}: a t5 is an encoder-decoder" in message
    canine = CanineConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=512,
        num_hash_buckets=64, local_transformer_stride=16,
    )  # fmt: skip
    CanineModel(canine).save_pretrained(tmp_path / "canine")
    CanineTokenizer().save_pretrained(tmp_path / "canine")
    assert "expected backbone.start=MODEL with a fast tokenizer" in refused_backbone(tmp_path, tmp_path / "canine")


def test_positions_that_start_behind_the_padding(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-bert"))
    config = RobertaConfig(**small(vocab_size=len(tokenizer)), max_position_embeddings=130, type_vocab_size=2, pad_token_id=0)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    message = refused_backbone(tmp_path, tmp_path / "roberta", "backbone.max_length=130")
    assert "backbone.max_length=130" in message and "reads 129 tokens" in message
    assert models.context_length(RobertaConfig(max_position_embeddings=514)) == 512
    assert models.context_length(BertConfig(max_position_embeddings=512)) == 512
