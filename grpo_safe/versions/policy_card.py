"""The card of a published policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_policy_card(path: Path, manifest: dict[str, Any]) -> None:
    """Markdown beside the weights: what it was trained from, against and on, and how to open it."""
    config, layout, data = manifest["config"], manifest["layout"], manifest["data"]
    judge = manifest["parents"][0]
    base = manifest["base"]["start"]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [grpo, safety, alignment]", "---", ""]
    if layout["layout"] == "adapter":
        opening = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}", revision={layout.get("revision")!r}, dtype="{layout.get("dtype", "float32")}")',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    else:
        opening = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        ]
    weights = ", ".join(f"{o['name']} {o['weight']:g}" for o in manifest["objectives"])
    lines = [
        *front,
        "# Policy trained by multi-objective GRPO",
        "",
        f"Trained by grpo-safe from `{base}` against reward model v{judge['version']:03d} (content {judge['content_sha256'][:12]}), "
        f"weights: {weights}.",
        f"Prompts: `{data['name']}` (licence of the data: {data['licence']}). {config['train']['steps']} steps of "
        f"{config['train']['prompts_per_step']} prompts x {config['algo']['group_size']} completions, seed {config['seed']}.",
        "",
        f"System prompt in training: {manifest['system_prompt']!r}. Layout: {layout['layout']}"
        + ("; the LoRA adapter alone stands in `adapter/`." if "adapter" in layout else "."),
        "",
        *export_lines(layout.get("export")),
        "Scores of its own reward model say how far training went, not how safe the policy is: `grpo-safe eval` compares it with its start.",
        "",
        "| figure at the last step | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in manifest["metrics"].items() if isinstance(value, float)),
        "",
        "```python",
        *opening,
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def export_lines(export: dict[str, float] | None) -> list[str]:
    """How far these files, opened again, are from the policy that was trained."""
    if export is None:
        return []
    return [
        f"Opened again, its log-probs differ from the trained policy's by {export['log_prob_gap']:.1e} nats a token in the mean; training moved "
        f"them by {export['log_prob_change']:.1e} (both over {export['tokens']:.0f} tokens, computed in float32).",
        "",
    ]
