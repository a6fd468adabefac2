"""Load, adapt and save models: the policy, its reference, the reward model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from grpo_safe.config import BackboneConfig, LoraConfig, PolicyConfig, SamplingConfig
from grpo_safe.errors import UserError
from grpo_safe.models import embedded
from grpo_safe.versions import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Start:
    """Where a model starts from, as from_pretrained takes it."""

    name: str  # what the user wrote
    location: str  # a folder or a hub name
    options: dict[str, Any]
    adapter: Path | None = None  # a published policy that is an adapter on the model at `location`: merged when it is loaded

    @property
    def is_hub(self) -> bool:
        """Whether the hub's name and a revision say all of it."""
        return self.adapter is None and not Path(self.location).is_dir()


def resolve_start(start: str, revision: str | None, trust_remote_code: bool, key: str) -> Start:
    """A folder, a hub name or embedded:NAME, checked as far as the local disk can tell."""
    location = start
    if embedded.is_embedded(start):
        location = str(embedded.embedded_folder(start))
    elif start.startswith((".", "/", "~")) or start.count("/") != 1:
        location = str(Path(start).expanduser())
        if (Path(location) / "adapter_config.json").is_file():
            return _adapter_start(start, Path(location), trust_remote_code, key)
        if not (Path(location) / "config.json").is_file():
            raise UserError(
                f"{key}={start}: no model folder (no config.json there); expected a folder, OWNER/NAME on the hub, embedded:NAME"
            )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    return Start(start, location, options)


def _adapter_start(start: str, folder: Path, trust_remote_code: bool, key: str) -> Start:
    """A policy that was published as an adapter, on the base that its manifest names."""
    if not (folder / checkpoint.MANIFEST).is_file():
        raise UserError(
            f"{key}={start}: an adapter without the {checkpoint.MANIFEST} that names its base; expected a published version, or a whole model"
        )
    layout = checkpoint.locate(Path(), "policy", str(folder), key).manifest["layout"]
    base = resolve_start(layout["base"], layout["revision"], trust_remote_code, key)
    return Start(start, base.location, base.options, folder)


def hub_commit(start: Start) -> str | None:
    """The commit of a hub model that was read, as a branch may move; None for a folder."""
    if not start.is_hub:
        return None
    from transformers.utils.hub import cached_file, extract_commit_hash

    found = cached_file(start.location, "config.json", revision=start.options.get("revision"), local_files_only=True)
    return extract_commit_hash(found, None) or start.options.get("revision")


def load_tokenizer(start: Start) -> Any:
    """The tokenizer; a pad token is chosen where there is none. UserError where it cannot be had."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(start.location, **start.options)
    except (OSError, ValueError) as error:
        raise UserError(f"{start.name}: its tokenizer cannot be loaded ({str(error).splitlines()[0]:.160})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(start: Start) -> Any:
    """The model's config alone: shapes and context length, before any weight is read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(start.location, **start.options)
    except (OSError, ValueError) as error:
        raise UserError(f"{start.name}: its config cannot be loaded ({str(error).splitlines()[0]:.160})") from error


def context_length(config: Any) -> int:
    """Tokens that the model can attend to."""
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**20)


def prompt_room(config: Any, start: Start, sampling: SamplingConfig) -> int:
    """Tokens that a prompt may have beside sampling.max_new_tokens; UserError where the context leaves none."""
    room = context_length(config) - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens={sampling.max_new_tokens}: the context of {start.name} leaves no room for a prompt"
        )
    return min(room, sampling.max_prompt_tokens or room)


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


# --- the policy -------------------------------------------------------------------------------------------------------


def load_policy(start: Start, cfg: PolicyConfig, master_weights: bool) -> nn.Module:
    """The causal LM that is trained, with LoRA around it unless full fine-tuning is asked for.

    master_weights: load in float32, because what trains must not be rounded to bfloat16 after each small step.
    """
    model = load_causal_lm(start, "float32" if master_weights else cfg.dtype, cfg.attn_implementation)
    adapted = add_lora(model, cfg.lora, "CAUSAL_LM") if cfg.lora.enabled else model
    checkpoint_activations(adapted, cfg.gradient_checkpointing)
    return adapted


def load_causal_lm(start: Start, dtype: str, attn_implementation: str = "sdpa") -> Any:
    """A whole causal LM, or a LoRA policy folder (adapter merged); dropout off, as log-probs must repeat."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            start.location,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **start.options,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{start.name}: cannot be loaded as a causal LM ({str(error).splitlines()[0]:.160})") from error
    model, report = loaded
    refuse_partial(start.name, report, new="")
    if start.adapter is not None:
        from peft import PeftModel

        # merged in float32: in bfloat16 most of an adapter rounds away
        model = cast_weights(
            PeftModel.from_pretrained(cast_weights(model, "float32"), str(start.adapter)).merge_and_unload(), dtype
        )
    return dropout_off(model).eval()


def cast_weights(model: Any, dtype: str) -> Any:
    """The model with its weights in `dtype`, and its buffers as they are: rounded to bfloat16, rotary frequencies would turn far tokens elsewhere."""
    for weight in model.parameters():
        weight.data = weight.data.to(DTYPES[dtype])
    return model


def refuse_partial(name: str, report: dict[str, Any], new: str) -> None:
    """Raises UserError where a checkpoint lacks weights or holds others: what does not load is drawn at random, and would train.

    report: of from_pretrained. new: prefix of the body of a classifier; what stands outside of it, or is its pooler, may be new, and what only another
    head used may be left over. "": nothing may differ.
    """
    missing, left = (sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys"))
    if new:
        missing = [key for key in missing if key.startswith(f"{new}.") and ".pooler." not in key]
        left = left if missing else []
    for what, keys in (
        ("lacks", missing),
        ("holds unknown", left),
        ("holds of another shape", sorted(str(k) for k in report["mismatched_keys"])),
    ):
        if keys:
            raise UserError(
                f"{name}: its checkpoint {what} {keys[0]}"
                + (f" and {len(keys) - 1} more" if keys[1:] else "")
                + ", which would be drawn at random or left "
                "out; expected the weights of the model that its config.json describes"
            )


def dropout_off(model: nn.Module) -> nn.Module:
    """Every dropout of the modules at 0, in training mode too: a policy's log-probs must repeat. The config, which is published, keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # what attention hands to its kernel
                setattr(module, name, 0.0)
    return model


def add_lora(model: nn.Module, cfg: LoraConfig, task: str) -> nn.Module:
    """LoRA adapters around a model; the rest is frozen. Adapter weights are float32."""
    from peft import LoraConfig as PeftConfig
    from peft import TaskType, get_peft_model

    peft_config = PeftConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=cfg.target_modules, task_type=TaskType[task]
    )
    return get_peft_model(model, peft_config)


def adapter_off(policy: Any) -> AbstractContextManager[Any]:
    """Under LoRA the reference is the policy with its adapter off: no second copy."""
    return policy.disable_adapter() if is_lora(policy) else nullcontext()


def is_lora(model: nn.Module) -> bool:
    """Whether adapters stand around a model that can do without them: peft's own model, not one that transformers put an adapter into."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def save_policy(
    policy: nn.Module,
    tokenizer: Any,
    start: Start,
    folder: Path,
    cfg: PolicyConfig,
    merged: bool,
    dtype: str | None,
    probe: list[list[int]],
) -> dict[str, Any]:
    """Write a policy that opens anywhere; returns what the manifest says of its layout.

    A LoRA policy on a hub base is an adapter. On any other base, whose path would be one machine's, the merged weights stand on top and the
    adapter in adapter/. Merging is done in float32, then cast to `dtype` (None: that of the weights that trained, of an adapter float32). What was
    written is opened again and its log-probs of `probe`, rows of tokens, are compared with the trained policy's.

    Raises UserError where the written policy is not the trained one.
    """
    tokenizer.save_pretrained(folder)
    if is_lora(policy) and start.is_hub and not merged:
        save_adapter(policy, folder)
        return {"layout": "adapter", "base": start.name, "revision": hub_commit(start)}
    dtype = dtype or ("bfloat16" if next(policy.parameters()).dtype == torch.bfloat16 and not is_lora(policy) else "float32")
    layout: dict[str, Any] = {"layout": "full", "base": start.name, "dtype": dtype}
    if is_lora(policy):
        save_adapter(policy, folder / "adapter")
        layout |= {"layout": "merged", "adapter": "adapter/"}
    exact = detached_copy(policy, lambda: load_causal_lm(start, "float32"), cfg.lora, "CAUSAL_LM")
    trained = token_logps(exact, probe)
    exact.to(DTYPES[dtype]).save_pretrained(folder)
    del exact
    written = load_causal_lm(Start(str(folder), str(folder), {"trust_remote_code": cfg.trust_remote_code}), "float32")
    gap = float((token_logps(written, probe) - trained).abs().mean())
    del written
    moved = float((token_logps(load_causal_lm(start, "float32"), probe) - trained).abs().mean())
    if not gap <= max(LEAST_GAP, MOST_GAP * moved):  # nan too
        raise UserError(
            f"export.dtype={dtype}: the log-probs of the written policy are {gap:.2e} away from the trained one's (mean of {trained.numel()} tokens), which is "
            f"{moved:.2e} away from its start: rounding would publish another policy; resume with export.dtype=float32. Nothing was published"
        )
    return layout | {"log_prob_gap": gap, "log_prob_moved": moved}


LEAST_GAP, MOST_GAP = 1e-4, 0.02  # nats a token; share of what training moved


def token_logps(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Log-prob of each token of each row after its first, one row at a time, [tokens] float32."""
    parts = [torch.zeros(0)]
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            parts.append(logps.gather(-1, ids[0, 1:, None])[:, 0].cpu())
    return torch.cat(parts)


def save_adapter(policy: Any, folder: Path) -> None:
    """The LoRA weights alone, as peft opens them."""
    policy.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card template: ours stands on top


def detached_copy(model: nn.Module, reload: Callable[[], nn.Module], lora: LoraConfig, task: str) -> Any:
    """A whole float32 copy on the CPU with LoRA merged: nothing that trains is touched.

    Every weight is the model's own. A layer that the start lacks (a pooler, a head's first layer) is drawn at random when the start is loaded, so
    an adapter on a freshly loaded start would be another model.
    """
    copy: Any = add_lora(reload(), lora, task) if is_lora(model) else reload()
    copy.load_state_dict({name: w.detach().float().cpu().clone() for name, w in model.state_dict().items()})
    return copy.merge_and_unload() if is_lora(model) else copy


def open_policy(folder: Path, manifest: dict[str, Any], dtype: str) -> Any:
    """A published policy as a whole causal LM."""
    start = Start(str(folder), str(folder), {})
    return load_causal_lm(
        resolve_start(str(folder), None, False, "policy") if manifest["layout"]["layout"] == "adapter" else start, dtype
    )


def faithful_dtype(manifest: dict[str, Any], dtype: str) -> str:
    """The dtype in which a published policy is compared with its start: LoRA merged into bfloat16 would round back towards the start."""
    return "float32" if manifest["layout"]["layout"] in ("adapter", "merged") else dtype


# --- the reward model -------------------------------------------------------------------------------------------------


def load_backbone(start: Start, cfg: BackboneConfig, objectives: list[str], pad_token_id: int) -> nn.Module:
    """A sequence classifier with one regression output per objective, named by id2label."""
    from transformers import AutoModelForSequenceClassification

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
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            start.location, config=config, dtype=DTYPES[cfg.dtype], attn_implementation=cfg.attn_implementation, output_loading_info=True,
            **start.options,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{start.name}: cannot be loaded as a sequence classifier ({str(error).splitlines()[0]:.160})") from error
    model, report = loaded
    refuse_partial(start.name, report, new=model.base_model_prefix)
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
