"""The turns of one conversation, as files bring them, made into messages in the order that can be learned."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona.console import excerpt
from persona.convert.cleaning import clean_text, is_clean
from persona.convert.draft import Message
from persona.convert.options import Options
from persona.records import RecordFault, is_chinese

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(
        ("function_call", "function", "observation", "tool", "tool_call", "tool_response", "ipython"), "tool"
    ),
}
_SPOKEN = {name: role for name, role in _ROLES.items() if role != "tool"}
_SWITCHES = ("weight", "train", "loss", "masked")  # flags with which other tools leave a turn out of the loss
_TOOL_FIX = "this toolkit learns plain speech: --tools drop leaves out the exchanges with tools"
_SPEAKER = re.compile(r"(?P<name>[^\s:：,，。.!?！？“”\"「」]{1,15})[:：]\s*")
_IN_TURN = ["user", "assistant"] * 500
_MERGE = "joined turns of one role are learned as one: --merge-consecutive does that"


@dataclass(slots=True)
class Turn:
    """One message with the JSON path of its text."""

    role: str
    content: str
    path: str


def plain_messages(turns: Sequence[Any], role_key: str, text_key: str, options: Options) -> list[Message] | None:
    """The messages of turns that need no second look, as most do: known roles in turn, clean texts, nothing else."""
    try:
        roles = [_SPOKEN[turn[role_key]] for turn in turns if len(turn) == 2]
        texts = [turn[text_key] for turn in turns]
        joined = "\n".join(texts)
    except (TypeError, KeyError):  # no object, a key that is missing, a role that is not known, a text that is none
        return None
    first = roles[:1] == ["system"]
    in_turn = len(roles) == len(turns) and len(roles) % 2 == first and roles[first:] == _IN_TURN[: len(roles) - first]
    if not in_turn or len(roles) < 2 or options.strip_speaker or options.role_map:
        return None
    if not is_clean(joined) or not all(texts) or texts != [text.strip() for text in texts]:
        return None
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def opening(text: str) -> str:
    """The user's turn that stands for nothing said, in the language of what follows."""
    return "（对话开始）" if is_chinese(text) else "(The conversation begins.)"


def role_of(value: object, path: str, options: Options) -> str:
    """The role that a name stands for, case and outer spaces aside; `tool` only where such turns are dropped."""
    role = _ROLES.get(value) if isinstance(value, str) else None
    if role is None or options.role_map:
        folded = value.strip().casefold() if isinstance(value, str) else ""
        role = options.role_map.get(folded) or _ROLES.get(folded)
    if role is None:
        shown = excerpt(repr(value), 40)
        fix = (
            f"""say who that is with --role-map '{{{json.dumps(value, ensure_ascii=False)}: "assistant"}}'"""
            if isinstance(value, str) and len(value) <= 30
            else "write human, gpt or system; if texts stand where roles belong, the two columns are swapped"
        )
        raise RecordFault("UNKNOWN_ROLE", path, f"found the role {shown}", fix)
    if role == "tool" and options.tools != "drop":
        raise RecordFault("TOOLS", path, f"found a turn of {excerpt(repr(value), 40)}", _TOOL_FIX)
    return role


def calls_tool(turn: dict[str, Any], path: str, options: Options) -> bool:
    """Whether a turn calls a tool; a RecordFault where that is not allowed."""
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            if options.tools != "drop":
                raise RecordFault("TOOLS", f"{path}.{key}", "found a call of a tool", _TOOL_FIX)
            return True
    return False


def check_switches(turn: dict[str, Any], role: str, path: str) -> None:
    """Refuse a reply that must not be learned; every reply is learned here."""
    for key in _SWITCHES:
        if key in turn and role == "assistant" and bool(turn[key]) == (key == "masked") and turn[key] is not None:
            fix = "every reply is learned: delete the turns that must not be, or end the conversation before them"
            raise RecordFault("NOT_LEARNED", f"{path}.{key}", f'found a reply with "{key}": {turn[key]!r:.20}', fix)


def content_of(value: object, path: str, repairs: Counter[str]) -> str:
    """The cleaned text of a content: a string, a number, or a list of text parts."""
    if isinstance(value, str):
        return clean_text(value, path, repairs)
    if isinstance(value, list) and value:
        text = "\n".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(value))
        repairs["text parts joined"] += 1
    elif isinstance(value, bool | int | float):
        text = str(value)
        repairs["number written as text"] += 1
    else:
        found = "nothing (null)" if value is None else excerpt(repr(value), 40)
        raise RecordFault("CONTENT", path, f"found {found}", "write text in quotes, or delete the turn")
    return clean_text(text, path, repairs)


def _part_text(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    fix = "this is a text tool: keep text parts only"
    raise RecordFault("NOT_TEXT", path, f"found a part of the kind {excerpt(repr(kind), 40)}", fix)


def to_messages(turns: list[Turn], system: str, path: str, repairs: Counter[str], options: Options) -> list[Message]:
    """Messages in turn: what can only be dropped is dropped and counted, what could mean two things is refused."""
    roles = [turn.role for turn in turns]
    if "system" in roles:
        system, turns = _system_of(turns, system, repairs, options)
    if options.tools == "drop":
        turns = _without_tools(turns, repairs)
    spoken = _edges(turns, repairs, options)
    if not spoken:
        raise RecordFault("NO_REPLY", path, "no reply to a question", "a conversation needs a user turn and its reply")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    before = ""
    for turn in spoken:
        content = turn.content or _empty(turn, repairs, options)
        if options.strip_speaker:
            content = _without_speaker(turn, content, repairs, options)
        if turn.role != before:
            messages.append({"role": turn.role, "content": content})
            before = turn.role
        elif options.merge_consecutive or options.lenient:
            messages[-1]["content"] += f"\n{content}"
            repairs["turns of one role joined"] += 1
        else:
            raise RecordFault("CONSECUTIVE", turn.path, f"two turns of the {turn.role} running", _MERGE)
    return messages


def _system_of(turns: list[Turn], system: str, repairs: Counter[str], options: Options) -> tuple[str, list[Turn]]:
    systems = [turn for turn in turns if turn.role == "system"]
    spoken = [turn for turn in turns if turn.role != "system"]
    texts = list(dict.fromkeys(text for text in (system, *(turn.content for turn in systems)) if text))
    if len(systems) > 1 or turns[0].role != "system" or len(texts) > 1:
        if not options.lenient:
            odd = systems[-1] if len(systems) > 1 or turns[0].role != "system" else systems[0]
            reason = (
                "a system turn that is not the first turn" if odd is not turns[0] else "two different system prompts"
            )
            fix = "put one system turn at the beginning; --lenient joins them there"
            raise RecordFault("SYSTEM", odd.path, reason, fix)
        repairs["system turns joined at the beginning"] += 1
    return "\n".join(texts), spoken


def _without_tools(turns: list[Turn], repairs: Counter[str]) -> list[Turn]:
    """The turns without the exchanges, from a question to the next, in which a tool takes part."""
    kept: list[Turn] = []
    exchange: list[Turn] = []
    for turn in [*turns, None]:
        if (turn is None or turn.role == "user") and exchange:
            if any(one.role == "tool" for one in exchange):
                repairs["exchanges with tools dropped"] += 1
            else:
                kept += exchange
            exchange = []
        if turn is not None:
            exchange.append(turn)
    return kept


def _edges(turns: list[Turn], repairs: Counter[str], options: Options) -> list[Turn]:
    """The turns from the first question to the last reply."""
    first, last = 0, len(turns)
    while first < last and turns[first].role == "assistant":
        first += 1
    while last > first and turns[last - 1].role == "user":
        last -= 1
    if first and options.leading_assistant == "keep":
        repairs["leading assistant turn kept as a greeting"] += 1
        return [Turn("user", opening(turns[0].content), turns[0].path), *turns[: max(last, first)]]
    if last > first:
        if first:
            repairs["leading assistant turn dropped"] += first
        if last < len(turns):
            repairs["last user turn without reply dropped"] += len(turns) - last
    return turns[first:last]


def _empty(turn: Turn, repairs: Counter[str], options: Options) -> str:
    if turn.role == "user" and options.allow_empty_user:
        repairs["empty user turn filled in"] += 1
        return opening("")
    fix = "write the words, or delete the row" + ("; --allow-empty-user fills in" if turn.role == "user" else "")
    raise RecordFault("EMPTY", turn.path, f"the {turn.role} says nothing", fix)


def _without_speaker(turn: Turn, content: str, repairs: Counter[str], options: Options) -> str:
    found = _SPEAKER.match(content)
    if found is None or found.end() == len(content):
        return content
    if turn.role == "assistant" and options.characters and found["name"] not in options.characters:
        return content
    repairs["name before the words removed"] += 1
    return content[found.end() :]
