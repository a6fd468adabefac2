"""Conversations -> token ids: prompts for the policy, prompt-and-answer for the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_safe.errors import UserError
from grpo_safe.records import Message, Prompt, conversation_text


def with_system(messages: list[Message] | tuple[Message, ...], system_prompt: str | None) -> list[Message]:
    """The messages, with the system prompt first where they bring none of their own."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def encode_prompts(tokenizer: Any, prompts: list[Prompt], system_prompt: str | None, max_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, up to where the assistant speaks.

    Raises UserError naming the prompt that is longer than `max_tokens`.
    """
    encoded = []
    for prompt in prompts:
        messages = with_system(prompt.messages, system_prompt)
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        else:  # a base model: plain text, as it was trained
            ids = tokenizer(conversation_text(messages) + "\n\n")["input_ids"]
        if len(ids) > max_tokens:
            raise UserError(
                f"prompt {prompt.id} ({prompt.text!r:.60}) has {len(ids)} tokens; the context leaves {max_tokens} beside "
                "sampling.max_new_tokens. Shorten it, remove it, or lower sampling.max_new_tokens"
            )
        encoded.append(list(ids))
    return encoded


@dataclass(frozen=True)
class ScoringInput:
    """One answer as the reward model reads it."""

    ids: list[int]
    type_ids: list[int] | None
    cut: int  # tokens of the prompt's left side that did not fit


def formatter_of(tokenizer: Any) -> str:
    """chat: the tokenizer's template; pair: an encoder's two segments; plain: prompt, blank line, answer."""
    if tokenizer.chat_template:
        return "chat"
    return "pair" if tokenizer.sep_token_id is not None else "plain"


def encode_for_scoring(tokenizer: Any, prompt: Prompt, response: str, max_length: int) -> ScoringInput:
    """Prompt and answer as one input of at most `max_length` tokens; what does not fit goes from the prompt's left side.

    Only an answer that is longer than the whole input loses its own end.
    """
    formatter = formatter_of(tokenizer)
    if formatter == "pair":
        return _encode_pair(tokenizer, prompt.text, response, max_length)
    if formatter == "chat":
        messages = [*prompt.messages, {"role": "assistant", "content": response}]
        ids = list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    else:
        ids = list(tokenizer(f"{prompt.text}\n\n{response}")["input_ids"])
    if len(ids) <= max_length:
        return ScoringInput(ids, None, 0)
    cut = min(len(ids) - max_length, _prompt_tokens(tokenizer, prompt, formatter))
    return ScoringInput(ids[cut:][:max_length], None, cut)


def _prompt_tokens(tokenizer: Any, prompt: Prompt, formatter: str) -> int:
    """How many tokens stand before the answer."""
    if formatter == "plain":
        return len(tokenizer(f"{prompt.text}\n\n")["input_ids"])
    opening = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(opening["input_ids"])


def _encode_pair(tokenizer: Any, prompt: str, response: str, max_length: int) -> ScoringInput:
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # some published tokenizer files pad and cut on their own
    backend.no_truncation()
    first = backend.encode(prompt, add_special_tokens=False)
    second = backend.encode(response, add_special_tokens=False)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    second.truncate(room)
    cut = max(0, len(first) + len(second) - room)
    if cut:
        first.truncate(len(first) - cut, direction="left")
    whole = backend.post_process(first, second, add_special_tokens=True)
    return ScoringInput(whole.ids, whole.type_ids, cut)
