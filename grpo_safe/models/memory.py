"""How much GPU memory train-policy needs, from shapes alone: GB = 1e9 bytes, per device.

An estimate on the safe side: where a figure depends on the data, the worst case counts. No model is built, torch is not
imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GB = 1e9
OVERHEAD_GB = 1.5  # CUDA context, workspaces of cuBLAS and NCCL
USABLE = 0.9  # share of a device to plan with: the rest goes to fragments, as the cache grows token by token
BUCKET_ELEMENTS = 50_000_000  # launch.bucket_elements
LIVE_ELEMENTS = 1_000_000_000  # ZeRO-3 holds at most so many gathered weights during a forward (DeepSpeed's default)
CHUNK_LOGITS = 3 * 2**24  # the packed path: logits, softmax and a product of one chunk of positions
LOGIT_COPIES = 5  # fp32 [tokens, vocab] at the worst moment of the backward pass: the logits and four temporaries
IN_FLIGHT = 0.25  # gradients on their way through a layer, as a share of what the layer saves
DECODING_BYTES = 32  # per row and vocabulary entry: logits and log-probs in fp32, probabilities and their sums in fp64

ALWAYS = ("weights", "reference", "optimizer", "reward_model", "overhead")
SAMPLING = ("kv_cache", "decoding", "gathered")
UPDATE = ("gradients", "activations", "logits", "buffers")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that its memory follows from. The defaults are Qwen2's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the LM head is the embedding matrix
    qkv_bias: bool = True  # Qwen2 has biases on q, k and v; Llama has none
    gated: bool = True  # three MLP matrices; GPT-2 has two
    biases: bool = False  # GPT-2: a bias on every linear layer and every norm
    positions: int = 0  # GPT-2: learned position embeddings

    @property
    def parameters(self) -> int:
        """All weights. Exact for Qwen2, Llama and GPT-2."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = 2 if self.gated else 1
        layer = sum(inputs * outputs for inputs, outputs in self.linears)
        layer += (q + 2 * kv) * (self.qkv_bias or self.biases)
        layer += (self.hidden + up * self.intermediate + self.hidden) * self.biases
        norms = (2 * self.layers + 1) * self.hidden * (2 if self.biases else 1)
        tables = self.vocab * (1 if self.tied else 2) + self.positions
        return self.layers * layer + norms + tables * self.hidden

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's linear layers: q, k, v, o, then the MLP's."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        up = [(self.hidden, self.intermediate)] * (2 if self.gated else 1)
        return [*attention, *up, (self.intermediate, self.hidden)]


QWEN2_5 = {
    "0.5b": ModelShape(24, 896, 4864, 14, 2, 64, 151_936, tied=True),
    "7b": ModelShape(28, 3584, 18_944, 28, 4, 128, 152_064, tied=False),
    "14b": ModelShape(48, 5120, 13_824, 40, 8, 128, 152_064, tied=False),
}


def shape_of(config: Any) -> ModelShape:
    """Read a transformers config with the names of Qwen2, Llama or GPT-2; ValueError names one that is missing."""

    def read(*names: str) -> int:
        found = next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)
        if found is None:
            raise ValueError(f"{type(config).__name__} has no {' or '.join(names)}: its memory cannot be estimated")
        return int(found)

    kind = getattr(config, "model_type", "")
    gpt2 = kind == "gpt2"
    hidden, heads = read("hidden_size", "n_embd"), read("num_attention_heads", "n_head")
    own_width = not gpt2 or getattr(config, "n_inner", None) is not None
    return ModelShape(
        layers=read("num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=read("intermediate_size", "n_inner") if own_width else 4 * hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        vocab=read("vocab_size"),
        tied=bool(getattr(config, "tie_word_embeddings", True)),
        qkv_bias=kind == "qwen2",
        gated=not gpt2,
        biases=gpt2,
        positions=read("n_positions", "max_position_embeddings") if gpt2 else 0,
    )


def lora_parameters(shape: ModelShape, r: int) -> int:
    """Weights of rank-r adapters on every linear layer except the LM head: r (inputs + outputs) each."""
    return shape.layers * sum(r * (inputs + outputs) for inputs, outputs in shape.linears)


@dataclass(frozen=True)
class PolicyMemory:
    """What a run holds on one device, GB. Sampling and the update follow each other: their own parts never coexist."""

    weights: float
    reference: float  # the second copy that the KL term wants; 0 under LoRA: the policy with its adapter off
    optimizer: float  # fp32 master weights and two Adam moments
    reward_model: float
    overhead: float
    kv_cache: float  # sampling: keys and values of the rows decoded at once
    decoding: float  # sampling: the working memory of one token
    gathered: float  # sampling under ZeRO-3: the whole weights
    gradients: float  # update
    activations: float  # update: what the layers save for the backward pass
    logits: float  # update
    buffers: float  # update under ZeRO: buckets, and the layers that ZeRO-3 has gathered
    strategy: str
    processes: int
    lora: bool
    gradient_checkpointing: bool | str
    cache_stays: bool = False  # rollout.cuda_graphs: what graphs read stays at its address, also in the update

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in (*ALWAYS, *SAMPLING, *UPDATE)}

    @property
    def total(self) -> float:
        """All parts, as if they coexisted."""
        return sum(self.parts.values())

    @property
    def sampling(self) -> float:
        """What is held while completions are sampled."""
        return sum(self.parts[name] for name in (*ALWAYS, *SAMPLING))

    @property
    def update(self) -> float:
        """What is held in the backward pass."""
        return sum(self.parts[name] for name in self.in_update)

    @property
    def in_update(self) -> tuple[str, ...]:
        """The parts that the update holds."""
        return (*ALWAYS, *UPDATE, *(("kv_cache",) if self.cache_stays else ()))

    @property
    def peak(self) -> float:
        """The larger phase."""
        return max(self.sampling, self.update)


def policy_memory(
    shape: ModelShape, *, lora_rank: int | None, strategy: str, processes: int, weight_bytes: int,
    gradient_checkpointing: bool | str, micro_batch_tokens: int, rows_at_once: int, prompt_tokens: int, new_tokens: int,
    kl: bool, reward_model_gb: float, packed: bool = False, cache_stays: bool = False,
) -> PolicyMemory:  # fmt: skip
    """Memory of a train-policy run on each of `processes` devices.

    lora_rank: None for full fine-tuning. weight_bytes: 4 float32, 2 bfloat16. rows_at_once: completions decoded at once on
    a device. prompt_tokens, new_tokens: the longest that may occur. kl: the loss has a KL term. packed: the LM head works in
    chunks (train.packed, a proven architecture). cache_stays: rollout.cuda_graphs. ValueError for an unknown strategy.
    """
    if strategy not in ("single", "zero1", "zero2", "zero3", "zero3_offload"):
        raise ValueError(f"strategy {strategy!r}: expected single, zero1, zero2, zero3 or zero3_offload")
    single, zero3, offload = strategy == "single", strategy.startswith("zero3"), strategy == "zero3_offload"
    lora = lora_rank is not None
    # peft keeps adapters in float32; DeepSpeed casts the whole module, and holds float32 masters of its own
    adapter_bytes = 4 if single else weight_bytes
    adapter = lora_parameters(shape, lora_rank) if lora_rank is not None else 0
    trainable = adapter if lora else shape.parameters
    own_bytes = weight_bytes if lora else adapter_bytes  # what trains is float32 on one process, and so is its reference
    trainable_bytes = adapter_bytes
    state_bytes = 8 if single and trainable_bytes == 4 else 12
    frozen_share, trained_share = 1.0 / processes if zero3 else 1.0, 1.0 if single else 1.0 / processes
    on_device = 0.0 if offload else 1.0

    whole = shape.parameters * own_bytes + adapter * adapter_bytes
    tokens = max(micro_batch_tokens, prompt_tokens + new_tokens)  # a row that is longer than the budget stands alone
    row_tokens = rows_at_once * (prompt_tokens + new_tokens)
    token_activations = _token_activations(
        shape, weight_bytes, gradient_checkpointing, float32_adapters=lora and adapter_bytes > weight_bytes
    )
    token_kv = 2 * shape.kv_heads * shape.head_dim * weight_bytes  # of one layer
    token_kv_repeated = 2 * shape.heads * shape.head_dim * weight_bytes  # masked attention repeats them to all heads
    return PolicyMemory(
        weights=whole * frozen_share * on_device / GB,
        reference=shape.parameters * own_bytes * frozen_share * on_device / GB if kl and not lora else 0.0,
        optimizer=trainable * state_bytes * trained_share * on_device / GB,
        reward_model=reward_model_gb,
        overhead=OVERHEAD_GB,
        kv_cache=row_tokens * shape.layers * token_kv / GB,
        decoding=(rows_at_once * shape.vocab * DECODING_BYTES + row_tokens * (token_kv + token_kv_repeated)) / GB,
        gathered=whole / GB if zero3 else 0.0,
        gradients=trainable * trainable_bytes * (1.0 if strategy == "zero1" else trained_share) * on_device / GB,
        activations=tokens * token_activations / GB,
        # prompts may be short, so all of a micro-batch may be completion tokens
        logits=_logit_elements(shape, max(micro_batch_tokens, new_tokens), packed, lora) * 4 / GB,
        buffers=_buffer_elements(shape, strategy) * weight_bytes / GB,
        strategy=strategy,
        processes=processes,
        lora=lora,
        gradient_checkpointing=gradient_checkpointing,
        cache_stays=cache_stays,
    )


def fits(memory: PolicyMemory, device_gb: float) -> bool:
    """Whether the peak stays within the usable share of a device."""
    return memory.peak <= USABLE * device_gb


def table(memory: PolicyMemory) -> str:
    """Part, GB and phase, one line a part that is not zero, then the sums."""
    phases = dict.fromkeys(ALWAYS, "always") | dict.fromkeys(SAMPLING, "sampling") | dict.fromkeys(UPDATE, "update")
    phases |= {"kv_cache": "always"} if memory.cache_stays else {}
    rows = [(name, value, phases[name]) for name, value in memory.parts.items() if value > 0]
    rows += [("sampling", memory.sampling, "sum"), ("update", memory.update, "sum")]
    rows += [("peak", memory.peak, "the larger")]
    return "\n".join(f"{name:<13} {value:7.2f} GB  {when}" for name, value, when in rows)


def warning(memory: PolicyMemory, device_gb: float) -> str | None:
    """For a run that will not fit: a sentence with the two largest parts and the keys that lower them, and the table."""
    if fits(memory, device_gb):
        return None
    sampling = memory.sampling > memory.update
    phase, held = ("sampling", (*ALWAYS, *SAMPLING)) if sampling else ("update", memory.in_update)
    names = sorted(held, key=lambda name: -memory.parts[name])
    largest = "; then ".join(f"{name} ({memory.parts[name]:.1f} GB): {_remedy(memory, name)}" for name in names[:2])
    return (
        f"by its shapes this run needs {memory.peak:.1f} GB a device ({phase}); {USABLE:.0%} of {device_gb:.1f} GB can be "
        f"planned with. Largest: {largest}\n{table(memory)}"
    )


def _token_activations(shape: ModelShape, weight_bytes: int, gradient_checkpointing: bool | str, float32_adapters: bool) -> float:
    """Bytes that a token leaves in the layers until the backward pass, at its worst moment."""
    q = shape.heads * shape.head_dim
    norms = 2 * shape.hidden * (4 + 2 * weight_bytes)  # the input in float32, the normalized input, the output
    attention = 5 * q * weight_bytes  # queries, repeated keys and values, the output and its copy
    mlp = (4 if shape.gated else 2) * shape.intermediate * weight_bytes
    layer = norms + attention + mlp
    if float32_adapters:  # each adapter casts its input; the copy is kept, three inputs of linear layers are not
        casts = sum(inputs for inputs, _ in shape.linears)
        layer += 4 * casts - weight_bytes * (2 * shape.hidden + shape.intermediate)
    if not gradient_checkpointing:
        return (shape.layers + IN_FLIGHT) * layer
    kept = shape.hidden * weight_bytes  # each layer's input, and one layer recomputed
    if gradient_checkpointing == "selective":
        # models.KEPT: each product's result (an adapter's beside its layer's) and attention's
        products = sum(outputs for _, outputs in shape.linears)
        kept += (products + q) * weight_bytes + (4 * products if float32_adapters else 0)
    return shape.layers * kept + (1 + IN_FLIGHT) * layer


def _logit_elements(shape: ModelShape, tokens: int, packed: bool, lora: bool) -> int:
    """Float32 elements around the LM head at the worst moment; a head that trains sums its gradient in float32."""
    if not packed:
        return tokens * shape.vocab * LOGIT_COPIES
    return CHUNK_LOGITS + (0 if lora else shape.vocab * shape.hidden)


def _buffer_elements(shape: ModelShape, strategy: str) -> int:
    """Elements of ZeRO's buckets (reduce, and gather or prefetch) and of the weights that ZeRO-3 has gathered."""
    if strategy == "single":
        return 0
    return 2 * BUCKET_ELEMENTS + (min(shape.parameters, LIVE_ELEMENTS) if strategy.startswith("zero3") else 0)


def _remedy(memory: PolicyMemory, part: str) -> str:
    """What lowers a part."""
    if part == "activations" and not memory.gradient_checkpointing:
        return "policy.gradient_checkpointing=selective (about half of them stays), or =true (almost none)"
    if part == "activations" and memory.gradient_checkpointing == "selective":
        return "policy.gradient_checkpointing=true"
    if part in ("gradients", "optimizer", "reference"):
        return _shard(memory)
    return {
        "weights": "a smaller policy.start, as sampling needs the whole policy on each device",
        "activations": "lower train.micro_batch_tokens",
        "logits": "lower train.micro_batch_tokens",
        "kv_cache": "lower sampling.batch_size",
        "decoding": "lower sampling.batch_size",
        "gathered": "a smaller policy.start, as sampling needs the whole policy on each device",
        "reward_model": "a smaller reward_model",
        "buffers": "lower launch.bucket_elements",
        "overhead": "no key lowers it",
    }[part]


def _shard(memory: PolicyMemory) -> str:
    """What divides the parts that grow with the trained weights, or moves them off the device."""
    alone = memory.processes == 1 or memory.strategy == "zero3"
    launch = "launch=zero3_offload" if alone else "launch=zero3"
    return launch if memory.lora else f"{launch}, or policy.lora.enabled=true"
