"""What the policy and the reward model read."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from grpo_safe.data.text import encode_for_scoring, encode_prompts, formatter_of, with_system
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.records import Prompt

TEXTS = [
    ("How long do I boil an egg?", "About nine minutes."),
    ("", "An answer to nothing."),
    ("A question without an answer?", ""),
    ("Ünïcode — 漢字 and \n new   lines", "emoji 🙂 and [SEP] inside"),
]


HEAD = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(text: str) -> Prompt:
    return Prompt("id", [{"role": "user", "content": text}])


@pytest.fixture(scope="module")
def bert():
    return AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-bert"))


@pytest.fixture(scope="module")
def llama():
    return AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a chat template and without a separator: a base causal LM's."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))
    tokenizer.chat_template = None
    return tokenizer


def test_formatter_follows_the_tokenizer(bert, llama, plain):
    assert [formatter_of(t) for t in (bert, llama, plain)] == ["pair", "chat", "plain"]


# --- the reward model's input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_pair_is_what_the_tokenizer_makes_of_two_texts(bert, prompt, response):
    fresh = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-bert"))
    expected = fresh([prompt], [response])  # as lists: fresh(prompt, "") takes "" for no pair
    found = encode_for_scoring(bert, prompt_of(prompt), response, 512)
    assert found.ids == expected["input_ids"][0]
    assert found.type_ids == expected["token_type_ids"][0]
    assert found.cut == 0


def test_a_pair_that_is_too_long_loses_the_prompts_left_side(bert):
    prompt, response = " ".join(f"w{i}" for i in range(200)), "the answer stays whole"
    full = encode_for_scoring(bert, prompt_of(prompt), response, 10_000)
    found = encode_for_scoring(bert, prompt_of(prompt), response, 50)
    assert len(found.ids) == len(found.type_ids) == 50
    assert found.cut == len(full.ids) - 50
    assert found.ids == [full.ids[0], *full.ids[-49:]]  # [CLS], then the right end
    assert found.type_ids == [0, *full.type_ids[-49:]]
    assert bert.decode(found.ids, skip_special_tokens=True).endswith("w199 the answer stays whole")
    exact = encode_for_scoring(bert, prompt_of(prompt), response, len(full.ids))
    assert exact.cut == 0 and exact.ids == full.ids


def test_an_answer_longer_than_the_input_loses_its_own_end(bert):
    response = " ".join(["answer"] * 30 + ["end"] * 30)
    found = encode_for_scoring(bert, prompt_of("a prompt"), response, 20)
    assert len(found.ids) == 20
    words = bert.decode(found.ids, skip_special_tokens=True).split()
    assert words == ["answer"] * 17  # three special tokens
    assert found.cut == 2


def test_chat_is_the_template_with_the_answer_as_the_assistants_turn(llama):
    prompt = Prompt("id", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    found = encode_for_scoring(llama, prompt, "Hello there.", 512)
    text = llama.decode(found.ids)
    assert text == HEAD + "Hello there.<|im_end|>\n"
    assert found.type_ids is None and found.cut == 0


def test_a_chat_that_is_too_long_keeps_the_answer(llama):
    found = encode_for_scoring(llama, prompt_of("long " * 300), "The answer stays whole.", 40)
    assert len(found.ids) == 40
    assert found.cut > 200
    assert llama.decode(found.ids).endswith("long <|im_end|>\n<|im_start|>assistant\nThe answer stays whole.<|im_end|>\n")


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_without_a_pair_too_an_over_long_answer_loses_its_own_end(kind, request):
    tokenizer = request.getfixturevalue(kind)
    found = encode_for_scoring(tokenizer, prompt_of("a prompt"), " ".join(["answer"] * 60 + ["end"] * 60), 40)
    assert tokenizer.decode(found.ids).count("answer") > tokenizer.decode(found.ids).count("end")


def test_plain_puts_a_blank_line_between(plain):
    found = encode_for_scoring(plain, prompt_of("Question?"), "Answer.", 512)
    assert plain.decode(found.ids) == "Question?\n\nAnswer."
    short = encode_for_scoring(plain, prompt_of("Question?"), "Answer.", 3)
    assert short.ids == found.ids[-3:] and short.cut == len(found.ids) - 3


@pytest.mark.parametrize("kind", ["bert", "llama", "plain"])
def test_an_input_never_exceeds_its_length(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for prompt, response in [*TEXTS, ("word " * 80, "reply " * 80)]:
        for max_length in (8, 33, 128):
            found = encode_for_scoring(tokenizer, prompt_of(prompt), response, max_length)
            assert 0 < len(found.ids) <= max_length
            assert found.type_ids is None or len(found.type_ids) == len(found.ids)


def test_several_turns_are_labelled_by_role_for_an_encoder(bert):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "More?")]
    prompt = Prompt("id", [{"role": role, "content": content} for role, content in turns])
    found = encode_for_scoring(bert, prompt, "Yes.", 128)
    assert found.ids == bert("User: Hi\n\nAssistant: Hello\n\nUser: More?", "Yes.")["input_ids"]


# --- the policy's input -----------------------------------------------------------------------------------------------


def test_system_prompt_comes_first_unless_there_is_one():
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Own."}
    assert with_system([user], "Be kind.") == [{"role": "system", "content": "Be kind."}, user]
    assert with_system([system, user], "Be kind.") == [system, user]
    assert with_system((user,), None) == [user]


def test_prompts_end_where_the_assistant_speaks(llama):
    ids = encode_prompts(llama, [prompt_of("Hi"), prompt_of("Name a colour.")], "Be kind.", 200).ids
    assert llama.decode(ids[0]) == HEAD
    assert llama.decode(ids[1]).endswith("Name a colour.<|im_end|>\n<|im_start|>assistant\n")


def test_a_base_model_reads_plain_text(plain):
    ids = encode_prompts(plain, [prompt_of("Hi")], None, 200).ids
    assert plain.decode(ids[0]) == "Hi\n\n"


def test_an_over_long_prompt_is_named(llama):
    prompts = [prompt_of("Hi"), Prompt("abc123", [{"role": "user", "content": "long " * 100}])]
    assert len(encode_prompts(llama, prompts[:1], None, 40).ids) == 1
    with pytest.raises(UserError, match=r"prompt abc123 .*sampling\.max_new_tokens leaves 40\..*data\.overlong=skip"):
        encode_prompts(llama, prompts, None, 40)
    length = len(encode_prompts(llama, prompts, None, 1000).ids[1])
    assert len(encode_prompts(llama, prompts, None, length).ids[1]) == length  # just fits
