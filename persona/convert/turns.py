"""The turns of one conversation, as files bring them, made into messages in the order that can be learned."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from persona.console import excerpt
from persona.convert.clean import clean_text
from persona.convert.draft import Message
from persona.records import RecordFault

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), "assistant"),
    "system": "system",
}
_TOOL_ROLES = {"function_call", "function", "observation", "tool", "tool_call", "tool_response", "ipython"}
_SWITCHES = ("weight", "train", "loss", "masked")  # flags with which other tools leave a turn out of the loss
_TOOL_FIX = "this toolkit learns plain speech: delete the turns with tools, or leave the conversation out"


@dataclass(frozen=True)
class Turn:
    """One message with its place in the row."""

    role: str
    content: str
    path: str


def role_of(value: object, path: str) -> str:
    """The role that a name stands for, case and outer spaces aside."""
    folded = value.strip().casefold() if isinstance(value, str) else ""
    if folded in _TOOL_ROLES:
        raise RecordFault("TOOLS", path, f'found a turn of "{folded}"', _TOOL_FIX)
    if folded not in _ROLES:
        fix = "write human, gpt or system; lines of named characters go into a text file as NAME: line"
        raise RecordFault("UNKNOWN_ROLE", path, f"found the role {excerpt(repr(value), 40)}", fix)
    return _ROLES[folded]


def check_switches(turn: dict[str, Any], path: str) -> None:
    """Refuse turns that call tools or carry a flag which would change what is learned."""
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise RecordFault("TOOLS", f"{path}.{key}", "found a call of a tool", _TOOL_FIX)
    for key in _SWITCHES:
        if key in turn:
            fix = "every reply is learned: delete the flag, or the turns that must not be learned"
            raise RecordFault("UNKNOWN_KEY", f"{path}.{key}", f'found the flag "{key}"', fix)


def content_of(value: object, path: str, repairs: Counter[str]) -> str:
    """The cleaned text of a content: a string, a number, or a list of text parts."""
    if isinstance(value, list) and value:
        value = "\n".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(value))
        repairs["text parts joined"] += 1
    if isinstance(value, bool | int | float):
        value = str(value)
        repairs["number written as text"] += 1
    if not isinstance(value, str):
        found = "nothing (null)" if value is None else excerpt(repr(value), 40)
        raise RecordFault("CONTENT", path, f"found {found}", "write text in quotes, or delete the turn")
    return clean_text(value, path, repairs)


def _part_text(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise RecordFault(
        "NOT_TEXT",
        path,
        f"found a part of the kind {excerpt(repr(kind), 40)}",
        "this is a text tool: keep text parts only",
    )


def to_messages(turns: list[Turn], system: str, path: str, repairs: Counter[str]) -> list[Message]:
    """Messages in turn: a reply with nothing before it and a question without reply are dropped, runs are joined."""
    systems = [turn for turn in turns if turn.role == "system"]
    if len(systems) > 1 or (systems and turns[0].role != "system"):
        reason = "a system turn that is not the first turn"
        raise RecordFault("SYSTEM", systems[-1].path, reason, "put one system turn at the beginning")
    if systems and system and systems[0].content != system:
        raise RecordFault("SYSTEM", systems[0].path, "two different system prompts", "keep one of them")
    system = system or (systems[0].content if systems else "")
    spoken = _drop_edges(turns[len(systems) :], repairs)
    if not spoken:
        raise RecordFault("NO_REPLY", path, "no reply to a question", "a conversation needs a user turn and its reply")
    for turn in spoken:
        if not turn.content:
            raise RecordFault("EMPTY", turn.path, f"the {turn.role} says nothing", "write the words, or delete the row")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in spoken:
        if messages and messages[-1]["role"] == turn.role:
            messages[-1]["content"] += f"\n{turn.content}"
            repairs["turns of one role joined"] += 1
        else:
            messages.append({"role": turn.role, "content": turn.content})
    return messages


def _drop_edges(turns: list[Turn], repairs: Counter[str]) -> list[Turn]:
    first, last = 0, len(turns)
    while first < last and turns[first].role == "assistant":
        first += 1
    while last > first and turns[last - 1].role == "user":
        last -= 1
    if last > first:
        repairs["leading assistant turn dropped"] += first
        repairs["last user turn without reply dropped"] += len(turns) - last
    return turns[first:last]
