"""Weights from a checkpoint, every one of them: from_pretrained would fill gaps with random numbers."""

from __future__ import annotations

from typing import Any

from grpo_safe.errors import UserError
from grpo_safe.models.starts import Start, reason


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
