"""Conversation -> examples in token ids: the one place that decides what the model learns and what chat feeds it.

A reply is learned in exactly the context in which it will be spoken: the prompt is the chat template applied to the
messages before it, with the generation prompt, and the reply is what the template would write there up to the token
that ends the turn. Rendering the whole conversation and masking it instead trains on contexts that never occur in chat:
many templates move the system prompt, rewrite earlier turns, or lack in training text what the generation prompt adds.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from persona.errors import DataError, UsageError
from persona.model.template import NO_THINKING, SENT, Sent, fixed, with_opening, with_system_folded
from persona.model.token_cache import Encoder

Message = dict[str, str]

# For a base model without a template of its own
BUILTIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
_SYSTEM, _QUESTION, _REPLY, _SECOND = "Zsystemz Ztextz", "Zquestionz Zonez", "Zreplyz Ztextz", "Zquestionz Ztwoz"
_OPEN_THOUGHT = re.compile(r"<([a-z:_]*think[a-z]*)>(?!.*</\1>)", re.DOTALL)
_ASKED: tuple[Message, ...] = ({"role": "user", "content": _QUESTION},)
_TALK: tuple[Message, ...] = (
    {"role": "system", "content": _SYSTEM},
    *_ASKED,
    {"role": "assistant", "content": _REPLY},
    {"role": "user", "content": _SECOND},
)
# Errors of a template that cannot render a conversation
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
# transformers marks the control tokens that people typed with such characters, and drops them from their texts
_PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")


class Untrainable(DataError):
    """One conversation that cannot be learned as it is, with the reason."""


@dataclass(frozen=True)
class Example:
    """One reply in its chat context; `reply_ids` ends with the token that ends the turn; all of it is supervised."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatFormat:
    """A model's chat template and the results of probing it."""

    tokenizer: Any
    """Its chat template is the one that is exported: it gives the trained prompt whatever a runtime sends."""
    encoder: Encoder
    lead: str
    """White space that the template writes before a reply."""
    frame: tuple[str, str]
    """The template's text before and after the reply to one question; shows which ends of a reply it strips."""
    end_text: str
    """The template's text after a last reply, up to and including the token that ends the turn."""
    end_id: int
    tail: str
    """End of every prompt, the context in which a reply is tokenized."""
    control: frozenset[str]
    """Tokens that steer the model; people's text is never encoded to them."""
    typed: re.Pattern[str]
    """Finds the tokens of `control`."""
    notes: tuple[str, ...]
    """Sentences about this template for a person."""


def chat_format(tokenizer: Any) -> ChatFormat:
    """Probe `tokenizer`'s chat template, and make it the exported one (see `persona.model.template`).

    Raises `UsageError` with the reason when replies cannot be trained exactly.
    """
    notes = []
    _fix_switches(tokenizer)
    if not _has_system_role(tokenizer):
        tokenizer.chat_template = with_system_folded(tokenizer.chat_template)
        notes.append("the template has no system role: the system prompt goes in front of the first user message")
    elif injected := _injected_system(tokenizer):
        notes.append(f"without a system prompt the template writes its own: {injected!r}")
    _check_history(tokenizer)
    before, _, after = _apply(tokenizer, [*_ASKED, _said(_REPLY)], False).rpartition(_REPLY)
    lead, opening, tail = _reply_opening(tokenizer, before, notes)
    if opening:
        tokenizer.chat_template = with_opening(tokenizer.chat_template, opening)
    end_text, end_id = _reply_end(tokenizer, after, notes)
    control = _control_tokens(tokenizer)
    tokenizer.chat_control_tokens = sorted(control)  # read by sanitize_control_tokens
    typed = re.compile("|".join(map(re.escape, sorted(control))) or "(?!)")
    encoder = Encoder(tokenizer, _apply(tokenizer, _TALK, True))
    return ChatFormat(tokenizer, encoder, lead, (before, after), end_text, end_id, tail, control, typed, tuple(notes))


def _fix_switches(tokenizer: Any) -> None:
    """Give `tokenizer` the template whose switches are fixed, which has to say what its own says without thinking."""
    conversations = (_TALK, _TALK[1:], _TALK[1:2])
    own = [_attempt(tokenizer, messages, NO_THINKING) for messages in conversations]
    if own[-1] is None:
        _apply(tokenizer, _ASKED, True)  # refused in the template's own words
    special = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    tokenizer.chat_template = fixed(tokenizer.chat_template, special)
    for sent in SENT:
        if [_attempt(tokenizer, messages, sent) for messages in conversations] != own:
            raise UsageError(
                "The chat template reads a switch in a way that cannot be fixed, so other programs would write another "
                "prompt than the trained one. Take a template without thinking as model.chat_template."
            )


def _attempt(tokenizer: Any, messages: Sequence[Message], sent: Sent) -> str | None:
    try:
        return _text(tokenizer, messages, True, sent)
    except _REFUSALS:
        return None


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _control_tokens(tokenizer: Any) -> frozenset[str]:
    # Special tokens, and added ones that are written around people's text, except white space (Gemma has "\n\n" among
    # its added tokens)
    return frozenset(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in tokenizer.chat_template and not token.content.isspace())
    )


def _apply(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    """The template's text; raises `UsageError` with the template's own words when it refuses."""
    try:
        return _text(tokenizer, messages, generation_prompt)
    except _REFUSALS as error:
        roles = " ".join(message["role"] for message in messages)
        raise UsageError(f"The chat template refuses a conversation of {roles}: {error}") from None


def _text(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool, sent: Sent = SENT[0]) -> str:
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=generation_prompt, **sent
    )


def _has_system_role(tokenizer: Any) -> bool:
    try:
        return all(_SYSTEM in _apply(tokenizer, _TALK[:end], True) for end in (2, 4))
    except UsageError:
        return False


def _injected_system(tokenizer: Any) -> str | None:
    with_system = _apply(tokenizer, [{"role": "system", "content": _SYSTEM}, *_ASKED], True)
    without = _apply(tokenizer, _ASKED, True)
    head = with_system.partition(_SYSTEM)[0]
    tail_of_system = with_system.partition(_SYSTEM)[2].partition(_QUESTION)[0]
    body, tail, _ = without.removeprefix(head).partition(tail_of_system)
    return body.strip() if without.startswith(head) and tail and body.strip() and _QUESTION not in body else None


def _check_history(tokenizer: Any) -> None:
    texts = [f"Z{kind}z Z{number}z" for number in range(8) for kind in ("question", "reply")][:-1]
    conversation = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    _apply(tokenizer, _ASKED, True)  # so that a refusal names the shortest conversation that is refused
    prompt = _apply(tokenizer, conversation, True)
    if any(text not in prompt for text in texts):
        raise UsageError("The chat template drops messages of the conversation; replies cannot be trained with it.")


def _reply_opening(tokenizer: Any, before: str, notes: list[str]) -> tuple[str, str, str]:
    """The template's text between a prompt and its reply: white space, other text, and the end of the prompt."""
    prompt = _apply(tokenizer, _ASKED, True)
    between = before[len(prompt) :] if before.startswith(prompt) else ""
    lead, opening = ("", between) if between.strip() else (between, "")
    generation = prompt.rpartition(_QUESTION)[2]
    if not opening and (thought := _OPEN_THOUGHT.search(generation)):
        opening = ("" if generation.endswith("\n") else "\n") + f"\n</{thought[1]}>\n\n"
        notes.append(f"the template opens a <{thought[1]}> block that cannot be switched off: an empty one is written")
    elif opening:
        notes.append(f"the reply is opened with {opening!r}, as the template writes it before a reply")
    return lead, opening, generation + opening


def _reply_end(tokenizer: Any, after: str, notes: list[str]) -> tuple[str, int]:
    """The text that ends a reply, and the id of the token that ends the turn."""
    tokens = [token for token in tokenizer.added_tokens_encoder if not token.isspace()]
    ends = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    match = re.match(rf"\s*({ends})", after) if ends else None
    if match:
        end_text, end = match[0], match[1]
    elif not after.strip() and tokenizer.eos_token:
        end_text = end = tokenizer.eos_token
        notes.append(f"the template writes nothing that ends a reply: {end!r} is added")
    else:
        raise UsageError(
            f"The chat template ends a reply with {after[:40]!r}, which is not an end token of this tokenizer: the "
            "model could never stop. Template and tokenizer do not belong together; check model.chat_template."
        )
    ids = tokenizer.encode(end, add_special_tokens=False)
    if len(ids) != 1:
        raise UsageError(f"The end token {end!r} is not one token of this tokenizer but {len(ids)}.")
    return end_text, ids[0]


def _is_marked(text: str, fmt: ChatFormat) -> bool:
    """Whether transformers would mark something in `text`, so that it is not encoded as it is."""
    return fmt.typed.search(text) is not None or not (text.isascii() or _PRIVATE_USE.search(text) is None)


def prompt_text(messages: Sequence[Message], fmt: ChatFormat) -> str:
    """The text that chat feeds the model before it replies; raises `UsageError` if the template refuses."""
    return _apply(fmt.tokenizer, messages, True)


def prompt_ids(messages: Sequence[Message], fmt: ChatFormat) -> list[int]:
    """The ids that chat feeds the model before it replies to `messages`, which end with a user turn.

    Control tokens in the messages' own text are encoded as plain text, never as control ids.
    """
    try:
        if any(_is_marked(text, fmt) for message in messages for text in message.values()):
            return fmt.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
            )
        return fmt.encoder.encode(_text(fmt.tokenizer, messages, True))
    except _REFUSALS as error:
        roles = " ".join(message["role"] for message in messages)
        raise Untrainable(f"the chat template refuses a conversation of {roles}: {error}") from None


def reply_ids(reply: str, fmt: ChatFormat) -> list[int]:
    """The ids of `reply` as the template writes it, ending with the token that ends the turn.

    Raises `Untrainable` when the tokenizer cannot write the reply back exactly.
    """
    text = fmt.lead + as_written(reply, fmt)
    if fmt.typed.search(text) and (typed := [token for token in fmt.control if token in text]):
        raise Untrainable(f"the reply contains the model's control token {typed[0]!r}; take it out of the text")
    ids = fmt.encoder.encode_behind(fmt.tail, text)
    written = fmt.encoder.decode_behind(fmt.tail, ids)
    if written not in (text, unicodedata.normalize("NFC", text)):  # Qwen's tokenizers fold to NFC
        place = next((i for i, (a, b) in enumerate(zip(written, text, strict=False)) if a != b), len(written))
        raise Untrainable(
            f"the tokenizer cannot write this reply back: at character {place + 1} {text[place : place + 20]!r} "
            f"becomes {written[place : place + 20]!r}"
        )
    return [*ids, *fmt.encoder.encode(fmt.end_text)[:-1], fmt.end_id]


def as_written(reply: str, fmt: ChatFormat) -> str:
    """`reply` without the white space that the template strips from its ends."""
    if reply == reply.strip():
        return reply
    text = _apply(fmt.tokenizer, [*_ASKED, _said(reply)], False)
    return text.removeprefix(fmt.frame[0]).removesuffix(fmt.frame[1])


def fit(messages: Sequence[Message], fmt: ChatFormat, limit: int) -> tuple[list[int], int]:
    """The prompt for `messages` in at most `limit` tokens, and how many of the oldest exchanges were dropped for it.

    Whole exchanges go, never the system prompt and never the last user turn; raises `Untrainable` when those alone are
    too long.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    ids: list[int] = []
    for dropped in range(0, len(messages) - start, 2):
        ids = prompt_ids([*messages[:start], *messages[start + dropped :]], fmt)
        if len(ids) <= limit:
            return ids, dropped // 2
    raise Untrainable(f"system prompt and last message alone take {len(ids)} tokens, over the limit of {limit}")


def prompt_room(max_length: int) -> int:
    """Tokens that a prompt may have, in training and in chat alike; the rest of `max_length` is for the reply."""
    return max_length * 3 // 4


def render(messages: Sequence[Message], fmt: ChatFormat, max_length: int) -> list[Example]:
    """One example for each assistant reply in `messages`, in order; raises `Untrainable` with the reason."""
    examples = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        reply = reply_ids(message["content"], fmt)
        prompt, _ = fit(messages[:position], fmt, prompt_room(max_length))
        if len(prompt) + len(reply) > max_length:
            raise Untrainable(
                f"a reply of {len(reply)} tokens behind {len(prompt)} of context does not fit into data.max_length "
                f"{max_length}"
            )
        examples.append(Example(tuple(prompt), tuple(reply)))
    return examples
