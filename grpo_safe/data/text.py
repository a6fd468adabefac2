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


@dataclass(frozen=True)
class Encoded:
    """Prompts and their tokens, up to where the assistant speaks; one that is left out is in neither list."""

    prompts: list[Prompt]
    ids: list[list[int]]
    kept: list[int]  # their places among the prompts that were given
    notes: list[str]  # what was done to them, a sentence each, for the run's log


def encode_prompts(
    tokenizer: Any, prompts: list[Prompt], system_prompt: str | None, max_tokens: int, overlong: str = "error",
    bound: str = "the context beside sampling.max_new_tokens", key: str = "policy.start",
) -> Encoded:  # fmt: skip
    """The prompts as the policy reads them.

    overlong: what becomes of a prompt of more than `max_tokens`: error, skip (left out) or cut (the left side of its text goes). bound: what
    sets max_tokens; key: whose tokenizer it is, for messages. Raises UserError naming the prompt that is too long, or that the chat template
    refuses, and where none is left.
    """
    encoded = Encoded([], [], [], [])
    skipped = cut = folded = 0
    for place, prompt in enumerate(prompts):
        messages = with_system(prompt.messages, system_prompt)
        ids = _opening(tokenizer, messages, f"{key}, prompt {prompt.id} ({prompt.text!r:.60})")
        if len(ids) > max_tokens and overlong == "skip":
            skipped += 1
            continue
        if len(ids) > max_tokens and overlong == "error":
            raise UserError(
                f"prompt {prompt.id} ({prompt.text!r:.60}) has {len(ids)} tokens; {bound} leaves {max_tokens}. Shorten it, remove it, change that "
                "bound, or set data.overlong=skip (leave it out) or cut (its left side)"
            )
        if len(ids) > max_tokens:
            cut += 1
            prompt, ids = _cut_prompt(tokenizer, prompt, system_prompt, max_tokens, bound, key)
        folded += _folds(tokenizer, messages)
        encoded.prompts.append(prompt)
        encoded.ids.append(ids)
        encoded.kept.append(place)
    if prompts and not encoded.prompts:
        raise UserError(
            f"data.overlong=skip: all {len(prompts)} prompts have more than {max_tokens} tokens, which {bound} leaves"
        )
    for count, what in (
        (skipped, f"have more than {max_tokens} tokens ({bound}) and are left out"),
        (cut, f"had more than {max_tokens} tokens ({bound}) and lost the left side of their text"),
        (folded, "bring a system text that the chat template does not take: it opens their first user turn"),
    ):
        if count:
            encoded.notes.append(f"{count} of {len(prompts)} prompts {what}")
    return encoded


def _opening(tokenizer: Any, messages: list[Message], where: str) -> list[int]:
    """Tokens up to where the assistant speaks."""
    if tokenizer.chat_template:
        return chat_ids(tokenizer, messages, where, opening=True)
    ids = list(tokenizer(conversation_text(messages) + "\n\n")["input_ids"])  # a base model: plain text, as it was trained
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text: an answer must still follow
        ids.pop()
    return ids


def chat_ids(tokenizer: Any, messages: list[Message], where: str, opening: bool) -> list[int]:
    """The messages through the chat template; a system text opens the first user turn where the template takes none.

    opening: up to where the assistant speaks. Raises UserError that starts with `where` for messages that the template refuses.
    """
    fitted = folded_system(messages) if _folds(tokenizer, messages) else messages
    try:
        whole = tokenizer.apply_chat_template(fitted, add_generation_prompt=opening, tokenize=True, return_dict=True)
    except Exception as error:  # of jinja2, or of what a template calls
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"{where}: the chat template refuses its messages ({roles}): {str(error).strip():.200}") from error
    return list(whole["input_ids"])


def _folds(tokenizer: Any, messages: list[Message]) -> bool:
    """Whether these messages open with a system text that the chat template would refuse or leave out."""
    if not tokenizer.chat_template or not messages or messages[0]["role"] != "system":
        return False
    return not _takes_system(tokenizer, str(tokenizer.chat_template))


_TAKES_SYSTEM: dict[str, bool] = {}  # by template: rendered once, not once a prompt


def _takes_system(tokenizer: Any, template: str) -> bool:
    if template not in _TAKES_SYSTEM:
        probe = [{"role": "system", "content": "Mind the gap."}, {"role": "user", "content": "Hi"}]
        try:
            _TAKES_SYSTEM[template] = "Mind the gap." in tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # raise_exception of the template, or a role that it does not know
            _TAKES_SYSTEM[template] = False
    return _TAKES_SYSTEM[template]


def folded_system(messages: list[Message]) -> list[Message]:
    """The messages with the system text in front of the first user turn's."""
    system, rest = messages[0]["content"], [dict(m) for m in messages[1:]]
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system}\n\n{message['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]


def _cut_prompt(
    tokenizer: Any, prompt: Prompt, system_prompt: str | None, max_tokens: int, bound: str, key: str
) -> tuple[Prompt, list[int]]:
    """The prompt without the left side of its text, as much of it as does not fit, and its tokens; its id stays.

    The earliest turn goes first, then the next; roles stay, as templates count them.
    """
    messages = [dict(m) for m in prompt.messages]
    for message in (m for m in messages if m["role"] != "system"):
        while True:
            ids = _opening(tokenizer, with_system(messages, system_prompt), f"{key}, prompt {prompt.id}")
            if len(ids) <= max_tokens:
                return Prompt(prompt.id, messages, prompt.kind), ids
            text = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            if len(text) <= 1:
                break
            shorter = tokenizer.decode(text[min(len(ids) - max_tokens, len(text) - 1) :]).lstrip("\ufffd")  # half a character
            message["content"] = shorter if len(shorter) < len(message["content"]) else message["content"][1:]
    raise UserError(
        f"prompt {prompt.id} ({prompt.text!r:.60}): data.overlong=cut cannot make it fit: {bound} leaves {max_tokens} tokens, and the system prompt "
        "and the chat template need more"
    )


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
        ids = chat_ids(tokenizer, messages, f"the reward model's prompt {prompt.id}", opening=False)
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
    return len(chat_ids(tokenizer, list(prompt.messages), f"the reward model's prompt {prompt.id}", opening=True))


def _encode_pair(tokenizer: Any, prompt: str, response: str, max_length: int) -> ScoringInput:
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) is written in Python and cannot join prompt and answer as "
            "the reward model reads them; expected backbone.start=MODEL with a fast tokenizer (tokenizer.json)"
        )
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
