"""The card of a published policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def export_lines(layout: dict[str, Any]) -> list[str]:
    """How far what was written is from what was trained, where weights were merged or cast."""
    if "log_prob_gap" not in layout:
        return []
    gap, moved = layout["log_prob_gap"], layout["log_prob_moved"]
    return [
        f"Written in {layout['dtype']}: its log-probs are {gap:.1e} a token from the trained policy's, which is {moved:.1e} from its start.",
        "",
    ]


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
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
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
        *export_lines(layout),
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
