"""Load, adapt and save models: the policy, its reference, the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from grpo_safe.config import BackboneConfig, ExportConfig, LoraConfig, PolicyConfig, SamplingConfig
from grpo_safe.errors import UserError
from grpo_safe.models.dropout import without_dropout
from grpo_safe.models.export import checked_export, log_probs
from grpo_safe.models.lora import adapter_off, add_lora, check_targets, is_lora, merged
from grpo_safe.models.starts import Start, pinned, reason, resolve_start
from grpo_safe.models.weights import load_weights

__all__ = [
    "DTYPES",
    "KEPT",
    "Start",
    "adapter_off",
    "add_lora",
    "cast_weights",
    "check_targets",
    "check_tokens",
    "checkpoint_activations",
    "context_length",
    "detached_copy",
    "faithful_dtype",
    "fold_affine",
    "head_layer",
    "is_lora",
    "load_backbone",
    "load_causal_lm",
    "load_config",
    "load_policy",
    "load_tokenizer",
    "lossless",
    "merged",
    "open_policy",
    "pinned",
    "prompt_bound",
    "prompt_room",
    "resolve_start",
    "save_adapter",
    "save_policy",
    "weight_bytes",
    "weight_bytes_of",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(start: Start) -> Any:
    """The tokenizer; a pad token is chosen where there is none. UserError where it cannot be had."""
    from transformers import AutoTokenizer

    options = start.options
    if start.adapter is not None and (Path(start.adapter) / "tokenizer_config.json").is_file():
        start, options = replace(start, location=start.adapter), {"trust_remote_code": options["trust_remote_code"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(start.location, **options)
    except Exception as error:  # transformers, tokenizers and a model's own code raise many kinds
        raise UserError(f"{start.called}: its tokenizer cannot be loaded ({reason(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{start.called}: its tokenizer has neither an end token nor a pad token; expected eos_token in its tokenizer_config.json, "
            "or nothing tells when a completion ends and what fills a batch"
        )
    return tokenizer


def load_config(start: Start) -> Any:
    """The model's config alone: shapes and context length, before any weight is read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(start.location, **start.options)
    except Exception as error:  # of the library, of JSON, or of a model's own code
        raise UserError(f"{start.called}: its config cannot be loaded ({reason(error)})") from error


# Encoders that count positions from padding_idx + 1, so that the first rows of their position table are never a token's.
OFFSET_POSITIONS = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def context_length(config: Any) -> int:
    """Tokens that the model can attend to."""
    positions = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**20)
    if getattr(config, "model_type", None) in OFFSET_POSITIONS:
        positions -= 1 + int(config.pad_token_id if config.pad_token_id is not None else 1)
    return positions


def check_tokens(tokenizer: Any, config: Any, start: Start) -> None:
    """UserError where the tokenizer's pad or end token has no row in the model's embeddings."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    for what in ("pad_token", "eos_token"):
        token = getattr(tokenizer, f"{what}_id")
        if rows is not None and token is not None and token >= rows:
            raise UserError(
                f"{start.called}: its {what} {getattr(tokenizer, what)!r} has id {token}, and its embeddings end at {rows - 1}; resize the "
                f"embeddings, or name a {what} that they hold in its tokenizer_config.json"
            )


def prompt_room(config: Any, start: Start, sampling: SamplingConfig) -> int:
    """Tokens that a prompt may have beside sampling.max_new_tokens; UserError where the context leaves none."""
    room = context_length(config) - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens={sampling.max_new_tokens}: the context of {start.name} leaves no room for a prompt"
        )
    return min(room, sampling.max_prompt_tokens or room)


def prompt_bound(config: Any, sampling: SamplingConfig) -> str:
    """Which of prompt_room's bounds holds, for messages."""
    context = context_length(config)
    if sampling.max_prompt_tokens is not None and sampling.max_prompt_tokens <= context - sampling.max_new_tokens:
        return f"sampling.max_prompt_tokens={sampling.max_prompt_tokens}"
    return f"the model's context of {context} beside sampling.max_new_tokens={sampling.max_new_tokens}"


def weight_bytes(start: Start) -> int:
    """Bytes of the weight files of a local folder (0 for a hub name: not known before the download)."""
    return 0 if start.is_hub else weight_bytes_of(Path(start.location))


def weight_bytes_of(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


# What the selective kind of checkpointing keeps: results of matrix products and of attention. The rest (norms, activation functions, rotary
# embedding, copies) is more than half of what a layer would keep, and cheap to compute once more.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_activations(model: Any, how: bool | str) -> None:
    """What the layers of a transformers model keep for the backward pass: False all, True their inputs alone, "selective" KEPT.

    Called after add_lora, which asks a model that checkpoints for gradients of the embeddings' output; only a reentrant checkpoint needs them.
    """
    if not how:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.disable_input_require_grads()  # transformers asks for them too


def load_policy(start: Start, cfg: PolicyConfig, master_weights: bool) -> nn.Module:
    """The causal LM that is trained, with LoRA around it unless full fine-tuning is asked for.

    master_weights: load in float32, because what trains must not be rounded to bfloat16 after each small step.
    """
    model = load_causal_lm(start, "float32" if master_weights else cfg.dtype, cfg.attn_implementation)
    if cfg.lora.enabled:
        check_targets(model, cfg.lora, "policy.lora")
    adapted = add_lora(without_dropout(model), cfg.lora, "CAUSAL_LM") if cfg.lora.enabled else without_dropout(model)
    checkpoint_activations(adapted, cfg.gradient_checkpointing)
    return adapted


def load_causal_lm(start: Start, dtype: str, attn_implementation: str = "sdpa") -> Any:
    """A whole causal LM for evaluation; a start with an adapter is merged in float32 and then cast."""
    if start.adapter is None:
        return _from_pretrained(start, DTYPES[dtype], attn_implementation)
    return cast_weights(merged(_with_adapter(start, "float32", attn_implementation)), dtype)


def _from_pretrained(start: Start, dtype: torch.dtype, attn_implementation: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = load_weights(AutoModelForCausalLM, start, "causal LM", attn_implementation, False, dtype=dtype)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers puts an adapter of the hub in, unmerged and unasked
        raise UserError(
            f"{start.called}: the hub holds a LoRA adapter under this name, no whole model; download it and give its folder, or name a merged model"
        )
    return model.eval()


def cast_weights(model: Any, dtype: str) -> Any:
    """The model with its weights in `dtype`, and its buffers as they are: rounded to bfloat16, rotary frequencies would turn far tokens elsewhere."""
    for weight in model.parameters():
        weight.data = weight.data.to(DTYPES[dtype])
    return model


def _with_adapter(start: Start, dtype: str, attn_implementation: str = "sdpa") -> Any:
    """The base in `dtype` (rounded as it was in training) with its adapter, float32 and unmerged, beside it."""
    from peft import PeftModel

    assert start.adapter is not None
    base = cast_weights(_from_pretrained(start, DTYPES[start.dtype or dtype], attn_implementation), dtype)
    return PeftModel.from_pretrained(base, start.adapter).eval()


def save_policy(
    policy: nn.Module, tokenizer: Any, start: Start, folder: Path, cfg: PolicyConfig, export: ExportConfig,
    rows: Sequence[tuple[list[int], int]],
) -> dict[str, Any]:  # fmt: skip
    """Write a policy that opens anywhere; returns what the manifest says of its layout.

    A LoRA policy on a hub base is an adapter. On any other base, whose path would be one machine's, the merged weights stand on top and the
    adapter in adapter/. Merging is done in float32, then cast to export.dtype. What was written is opened again, and its log-probs of `rows`
    (see log_probs) compared with those of what was trained: UserError where the export is another policy.
    """
    tokenizer.save_pretrained(folder)
    fresh = load_causal_lm(start, "float32")
    before = torch.empty(0) if is_lora(policy) else log_probs(fresh, rows)
    whole = detached_copy(policy, fresh, cfg.lora, "CAUSAL_LM")
    trained = log_probs(whole, rows)
    if is_lora(policy):
        with adapter_off(whole):
            before = log_probs(whole, rows)
    layout: dict[str, Any] = {
        "layout": "adapter",
        "base": start.name,
        "revision": start.options.get("revision"),
        "dtype": cfg.dtype,
    }
    if is_lora(policy) and start.is_hub and not export.merged:
        save_adapter(policy, folder)
    else:
        layout = {"layout": "full", "base": start.name, "dtype": export.dtype or lossless(policy)}
        if is_lora(policy):
            save_adapter(policy, folder / "adapter")
            layout |= {"layout": "merged", "adapter": "adapter/"}
            whole = merged(whole)
        whole.to(DTYPES[layout["dtype"]]).save_pretrained(folder)
    del whole, fresh
    reread = log_probs(open_policy(folder, {"layout": layout}, "float32", cfg.trust_remote_code), rows)
    return layout | {"export": checked_export(reread, trained, before, layout["dtype"])}


def lossless(policy: Any) -> str:
    """The narrowest dtype of whole weights that keeps what was trained: float32 unless the weights that trained are bfloat16 themselves."""
    narrow = not is_lora(policy) and all(p.dtype == torch.bfloat16 for p in policy.parameters())
    return "bfloat16" if narrow else "float32"


def save_adapter(policy: Any, folder: Path) -> None:
    """The LoRA weights alone, as peft opens them."""
    policy.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card template: ours stands on top


def detached_copy(model: nn.Module, fresh: Any, lora: LoraConfig, task: str) -> Any:
    """`fresh`, the start loaded anew in float32 on the CPU, with every weight of the model and LoRA unmerged: nothing that trains is touched.

    Every weight, not only the adapter: what the start's files lack (a pooler, a pre-classifier) was drawn at random when the model was
    loaded, and is drawn otherwise now; and a base that was rounded to bfloat16 is what the adapter was trained beside.
    """
    copy = add_lora(fresh, lora, task) if is_lora(model) else fresh
    copy.load_state_dict({name: w.detach().float().cpu().clone() for name, w in model.state_dict().items()})
    return copy.eval()


def open_policy(folder: Path, manifest: dict[str, Any], dtype: str, trust_remote_code: bool = False) -> Any:
    """A published policy as a causal LM that computes what was trained.

    An adapter is merged in float32; under bfloat16 it stays float32 beside its base, and weights with an adapter merged in stay float32:
    rounded, most of what was learned would fall back to the start's.
    """
    layout = manifest["layout"]
    if layout["layout"] == "adapter":
        base = resolve_start(layout["base"], layout.get("revision"), trust_remote_code, "policy")
        adapted = _with_adapter(replace(base, adapter=str(folder), dtype=layout.get("dtype")), dtype)
        return merged(adapted) if dtype == "float32" else adapted
    start = Start(str(folder), str(folder), {"trust_remote_code": trust_remote_code}, "policy")
    return load_causal_lm(start, "float32" if layout["layout"] == "merged" else dtype)


def faithful_dtype(manifest: dict[str, Any], dtype: str) -> str:
    """The dtype in which a published policy is compared with its start: weights with an adapter merged in stay float32, so the start does too."""
    return "float32" if manifest["layout"]["layout"] == "merged" else dtype


def load_backbone(start: Start, cfg: BackboneConfig, objectives: list[str], pad_token_id: int) -> nn.Module:
    """A sequence classifier with one regression output per objective, named by id2label."""
    from transformers import AutoModelForSequenceClassification

    if start.adapter is not None:
        raise UserError(
            f"{start.name}: a LoRA adapter; expected a whole model to fit a reward model from (export.merged=true publishes one)"
        )
    config = load_config(start)
    config.num_labels = len(objectives)
    config.problem_type = "regression"
    config.id2label = dict(enumerate(objectives))
    config.label2id = {name: i for i, name in enumerate(objectives)}
    config.pad_token_id = pad_token_id  # last-token pooling of causal LMs looks for it
    if cfg.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, cfg.dropout)
    if config.is_encoder_decoder:
        raise UserError(
            f"{start.called}: a {config.model_type} is an encoder-decoder; expected an encoder (such as BERT) or a causal LM, which reads prompt "
            "and answer as one text"
        )
    model = load_weights(
        AutoModelForSequenceClassification,
        start,
        "sequence classifier",
        cfg.attn_implementation,
        True,
        config=config,
        dtype=DTYPES[cfg.dtype],
    )
    if cfg.lora.enabled:
        check_targets(model, cfg.lora, "backbone.lora")
    adapted = add_lora(model, cfg.lora, "SEQ_CLS") if cfg.lora.enabled else model
    checkpoint_activations(adapted, cfg.gradient_checkpointing)
    return adapted


def head_layer(model: nn.Module) -> nn.Linear:
    """The last linear layer of a sequence classifier: the one whose outputs are the objectives."""
    outputs = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == outputs]
    if not layers:
        raise UserError(f"{type(model).__name__}: no linear layer with {outputs} outputs; its head cannot be calibrated")
    return layers[-1]


def fold_affine(model: nn.Module, slope: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """score -> slope * score + offset, written into the head's weights; returns the offset that could not be folded.

    slope, offset, result: [K]. A head without a bias (causal LMs) keeps none on reload: its offset stays outside, in the manifest.
    """
    head = head_layer(model)
    with torch.no_grad():
        head.weight.mul_(slope.to(head.weight)[:, None])
        if head.bias is None:
            return offset
        head.bias.mul_(slope.to(head.bias)).add_(offset.to(head.bias))
    return torch.zeros_like(offset)
