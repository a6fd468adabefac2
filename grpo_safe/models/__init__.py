"""Load, adapt and save models: the policy, its reference, the reward model."""

from __future__ import annotations

import re
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
    key: str = ""  # the config key that named it, for messages
    adapter: Path | None = None  # a published policy that is an adapter on the model at `location`: merged when it is loaded

    @property
    def is_hub(self) -> bool:
        """Whether the hub's name and a revision say all of it."""
        return self.adapter is None and not Path(self.location).is_dir()

    @property
    def called(self) -> str:
        """How a message names it: KEY=NAME."""
        return f"{self.key}={self.name}" if self.key else self.name


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
    return Start(start, location, options, key)


def _adapter_start(start: str, folder: Path, trust_remote_code: bool, key: str) -> Start:
    """A policy that was published as an adapter, on the base that its manifest names."""
    if not (folder / checkpoint.MANIFEST).is_file():
        raise UserError(
            f"{key}={start}: an adapter without the {checkpoint.MANIFEST} that names its base; expected a published version, or a whole model"
        )
    layout = checkpoint.locate(Path(), "policy", str(folder), key).manifest["layout"]
    base = resolve_start(layout["base"], layout["revision"], trust_remote_code, key)
    return Start(start, base.location, base.options, key, folder)


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


def reason(error: BaseException) -> str:
    """A library's error on one line."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; if you trust it: policy.trust_remote_code=true, backbone. in train-rm, trust_remote_code=true in eval"
    lines = str(error).strip().splitlines()
    text = f"{lines[0]:.200}" if lines else type(error).__name__
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


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


# --- weights ----------------------------------------------------------------------------------------------------------


def load_weights(auto: Any, start: Start, what: str, attn_implementation: str, new_head: bool, **options: Any) -> Any:
    """auto.from_pretrained of `start`, every weight of it from the checkpoint.

    new_head: layers that a sequence classifier adds to its backbone may be new; else nothing may. UserError where the weights cannot be read, or
    where some are not those of this model: from_pretrained would fill the gaps with random numbers.
    """
    try:
        model, info = auto.from_pretrained(
            start.location, attn_implementation=attn_implementation, output_loading_info=True, ignore_mismatched_sizes=True,
            **options, **start.options,
        )  # fmt: skip
    except (
        Exception
    ) as error:  # also of safetensors, of a quantizer or an attention kernel that is not installed, of a model's own code
        section = start.key.rpartition(".")[0]
        chosen = (
            ""
            if attn_implementation == "sdpa" and "attention" not in str(error)
            else f" with {section or 'model'}.attn_implementation={attn_implementation}"
        )
        raise UserError(f"{start.called}: cannot be loaded as a {what}{chosen} ({reason(error)})") from error
    faults = misfits(model, info, new_head)
    if faults:
        raise UserError(
            f"{start.called}: its weights are not those of a {type(model).__name__}: {'; '.join(faults)}; expected a checkpoint that its "
            "config.json describes, as save_pretrained writes it"
        )
    return model


def misfits(model: Any, info: dict[str, Any], new_head: bool) -> list[str]:
    """What from_pretrained's loading info says of weights that are missing, left over, or of another shape; empty where all is well.

    Left over may be what belongs to a part that the model does not have (another head). new_head: missing, or of another shape, may be
    what stands outside of the backbone, and a pooler.
    """
    prefix = f"{model.base_model_prefix}."
    backbone = getattr(model, model.base_model_prefix, model)
    inside = {name.removeprefix(prefix).split(".")[0] for name, _ in model.named_parameters()}

    def of_head(name: str) -> bool:
        return new_head and backbone is not model and (not name.startswith(prefix) or "pooler" in name.split("."))

    lost = sorted(name for name in info["missing_keys"] if not of_head(name))
    shapes = sorted(entry for entry in map(tuple, info["mismatched_keys"]) if not of_head(entry[0]))
    extra = sorted(name for name in info["unexpected_keys"] if name.removeprefix(prefix).split(".")[0] in inside)
    faults = []
    if lost:
        also = sorted(info["unexpected_keys"])
        named_otherwise = f" (it holds {', '.join(also[:2])} ... instead)" if also else ""
        faults.append(f"{len(lost)} are missing, {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}{named_otherwise}")
    if shapes:
        name, found, expected = shapes[0]
        faults.append(f"{len(shapes)} have another shape, {name} is {list(found)} and not {list(expected)}")
    if extra:
        faults.append(f"{len(extra)} have no place in it, {', '.join(extra[:3])}{' ...' if len(extra) > 3 else ''}")
    if info.get("error_msgs"):
        faults.append(str(info["error_msgs"][0]).strip().splitlines()[0])
    return faults


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


# --- the policy -------------------------------------------------------------------------------------------------------


def load_policy(start: Start, cfg: PolicyConfig, master_weights: bool) -> nn.Module:
    """The causal LM that is trained, with LoRA around it unless full fine-tuning is asked for.

    master_weights: load in float32, because what trains must not be rounded to bfloat16 after each small step.
    """
    model = load_causal_lm(start, "float32" if master_weights else cfg.dtype, cfg.attn_implementation)
    if cfg.lora.enabled:
        check_targets(model, cfg.lora, "policy.lora")
    adapted = add_lora(model, cfg.lora, "CAUSAL_LM") if cfg.lora.enabled else model
    checkpoint_activations(adapted, cfg.gradient_checkpointing)
    return adapted


def load_causal_lm(start: Start, dtype: str, attn_implementation: str = "sdpa") -> Any:
    """A whole causal LM, or a LoRA policy folder (adapter merged); dropout off, as log-probs must repeat."""
    from transformers import AutoModelForCausalLM

    model = load_weights(AutoModelForCausalLM, start, "causal LM", attn_implementation, False, dtype=DTYPES[dtype])
    if start.adapter is not None:
        from peft import PeftModel

        # merged in float32: in bfloat16 most of an adapter rounds away
        model = PeftModel.from_pretrained(model.float(), str(start.adapter)).merge_and_unload().to(DTYPES[dtype])
        model.requires_grad_(True)  # peft had frozen it
    return dropout_off(model).eval()


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
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=lora_targets(cfg), task_type=TaskType[task]
    )
    return get_peft_model(model, peft_config)


def lora_targets(cfg: LoraConfig) -> str | list[str]:
    """target_modules as peft takes it: all-linear, a regular expression of whole names, or a list of last parts of names (a single one too)."""
    chosen = cfg.target_modules
    return [chosen] if isinstance(chosen, str) and chosen != "all-linear" and chosen.replace("_", "").isalnum() else chosen


def check_targets(model: nn.Module, cfg: LoraConfig, key: str) -> None:
    """UserError where `key`.target_modules names what the model lacks, or what LoRA cannot stand around."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    targets = lora_targets(cfg)
    if targets == "all-linear":
        return
    modules = dict(model.named_modules())
    fault = None
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            found = [name for name in modules if _is_target(name, target, whole=isinstance(targets, str))]
        except re.error as error:
            fault = f"{target!r} is no regular expression ({error})"
            break
        other = [name for name in found if not isinstance(modules[name], kinds)]
        if not found:
            fault = f"the model has no {target!r}"
        elif other:
            fault = f"{other[0]} is a {type(modules[other[0]]).__name__}, which LoRA cannot adapt"
    if fault:
        linear = sorted({name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))})
        raise UserError(
            f"{key}.target_modules={cfg.target_modules}: {fault}; its linear layers are {', '.join(linear)}; expected all-linear, names of "
            "layers such as [q_proj,v_proj], or a regular expression of whole names"
        )


def _is_target(name: str, target: str, whole: bool) -> bool:
    return re.fullmatch(target, name) is not None if whole else name == target or name.endswith(f".{target}")


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


def open_policy(folder: Path, manifest: dict[str, Any], dtype: str, trust_remote_code: bool = False) -> Any:
    """A published policy as a whole causal LM."""
    if manifest["layout"]["layout"] == "adapter":
        return load_causal_lm(resolve_start(str(folder), None, trust_remote_code, "policy"), dtype)
    return load_causal_lm(Start(str(folder), str(folder), {"trust_remote_code": trust_remote_code}, "policy"), dtype)


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
