"""The turns of one conversation, in the spellings that files have, made into messages that can be learned."""

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
from persona.files import JsonObject
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
_SWITCHES = ("weight", "train", "loss", "masked")  # flags by which other tools leave a turn out of the loss
_TOOL_FIX = "only plain speech is learned: --tools drop leaves out the exchanges with tools"
_SPEAKER = re.compile(r"(?P<name>[^\s:：,，。.!?！？“”\"「」]{1,15})[:：]\s*")
_IN_TURN = ["user", "assistant"] * 500
_MERGE = "--merge-consecutive joins turns of one role into one"


@dataclass(slots=True)
class Turn:
    """One message with the JSON path of its text."""

    role: str
    content: str
    path: str


def plain_messages(turns: Sequence[Any], role_key: str, text_key: str, options: Options) -> list[Message] | None:
    """The messages of turns that need no repair, as most do not; None for all others, which `to_messages` reads."""
    try:
        roles = [_SPOKEN[turn[role_key]] for turn in turns if len(turn) == 2]
        texts = [turn[text_key] for turn in turns]
        joined = "\n".join(texts)
    except (TypeError, KeyError):  # not an object, a missing key, an unknown role, not a text
        return None
    first = roles[:1] == ["system"]
    in_turn = len(roles) == len(turns) and len(roles) % 2 == first and roles[first:] == _IN_TURN[: len(roles) - first]
    if not in_turn or len(roles) < 2 or options.strip_speaker or options.role_map:
        return None
    if not is_clean(joined) or not all(texts) or texts != [text.strip() for text in texts]:
        return None
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def opening(text: str) -> str:
    """Placeholder user turn before an opening line, in that line's language."""
    return "（对话开始）" if is_chinese(text) else "(The conversation begins.)"


def role_of(value: object, path: str, options: Options) -> str:
    """The role for a name, whatever its case and outer spaces; `tool` only with --tools drop."""
    role = _ROLES.get(value) if isinstance(value, str) else None
    if role is None or options.role_map:
        folded = value.strip().casefold() if isinstance(value, str) else ""
        role = options.role_map.get(folded) or _ROLES.get(folded)
    if role is None:
        shown = excerpt(repr(value), 40)
        fix = (
            f"""say who that is with --role-map '{{{json.dumps(value, ensure_ascii=False)}: "assistant"}}'"""
            if isinstance(value, str) and len(value) <= 30
            else "write human, gpt or system; if this is a text, the columns of roles and texts are swapped"
        )
        raise RecordFault("UNKNOWN_ROLE", path, f"found the role {shown}", fix)
    if role == "tool" and options.tools != "drop":
        raise RecordFault("TOOLS", path, f"found a turn by {excerpt(repr(value), 40)}", _TOOL_FIX)
    return role


def calls_tool(turn: JsonObject, path: str, options: Options) -> bool:
    """Whether a turn calls a tool; a RecordFault without --tools drop."""
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            if options.tools != "drop":
                raise RecordFault("TOOLS", f"{path}.{key}", "found a tool call", _TOOL_FIX)
            return True
    return False


def check_switches(turn: JsonObject, role: str, path: str) -> None:
    """Raise a RecordFault for a reply that is marked as not to be learned: here every reply is learned."""
    for key in _SWITCHES:
        if key in turn and role == "assistant" and bool(turn[key]) == (key == "masked") and turn[key] is not None:
            fix = "every reply is learned here: delete this turn, or end the conversation before it"
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
        shown = "nothing (null)" if value is None else excerpt(repr(value), 40)
        raise RecordFault("CONTENT", path, f"found {shown}", "write text in quotes, or delete the turn")
    return clean_text(text, path, repairs)


def optional_text(row: JsonObject, key: str, repairs: Counter[str]) -> str:
    """The cleaned text under `key`, or "" if the row has none."""
    return "" if row.get(key) is None else content_of(row[key], f"$.{key}", repairs)


def history_turns(history: object, repairs: Counter[str]) -> list[Turn]:
    """The turns of [["question", "answer"], ...]."""
    if history in (None, "", "[]"):
        return []
    if not isinstance(history, list):
        raise RecordFault("HISTORY", "$.history", f"found {str(history)[:40]!r}", 'write [["q", "a"], ...]')
    turns = []
    for index, pair in enumerate(history):
        path = f"$.history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordFault("HISTORY", path, f"found {str(pair)[:40]!r}", "write a question and its answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, content_of(pair[side], f"{path}[{side}]", repairs), f"{path}[{side}]"))
    return turns


def _part_text(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    fix = "only text can be learned: keep the text parts"
    raise RecordFault("NOT_TEXT", path, f"found a part of type {excerpt(repr(kind), 40)}", fix)


def to_messages(turns: list[Turn], system: str, path: str, repairs: Counter[str], options: Options) -> list[Message]:
    """Messages with alternating roles. What can only be dropped is dropped and counted; ambiguous turns are refused."""
    roles = [turn.role for turn in turns]
    if "system" in roles:
        system, turns = _system_of(turns, system, repairs, options)
    if options.tools == "drop":
        turns = _without_tools(turns, repairs)
    spoken = _edges(turns, repairs, options)
    if not spoken:
        fix = "write a user turn and the assistant's reply to it"
        raise RecordFault("NO_REPLY", path, "found no reply to a user turn", fix)
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
            raise RecordFault("CONSECUTIVE", turn.path, f"found two {turn.role} turns in a row", _MERGE)
    return messages


def _system_of(turns: list[Turn], system: str, repairs: Counter[str], options: Options) -> tuple[str, list[Turn]]:
    systems = [turn for turn in turns if turn.role == "system"]
    spoken = [turn for turn in turns if turn.role != "system"]
    texts = list(dict.fromkeys(text for text in (system, *(turn.content for turn in systems)) if text))
    late = systems[-1] is not turns[0]
    if late or len(texts) > 1:
        if not options.lenient:
            reason = "found a system turn after the first turn" if late else "found two different system prompts"
            fix = "write one system turn at the beginning; --lenient joins them there"
            raise RecordFault("SYSTEM", systems[-1].path, reason, fix)
        repairs["system turns joined at the beginning"] += 1
    return "\n".join(texts), spoken


def _without_tools(turns: list[Turn], repairs: Counter[str]) -> list[Turn]:
    """The turns without exchanges that use a tool; an exchange goes from a user turn to the next."""
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
    """The turns from the first user turn to the last reply."""
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
    fix = "write the text, or delete the row"
    fix += "; --allow-empty-user writes a placeholder" if turn.role == "user" else ""
    raise RecordFault("EMPTY", turn.path, f"found an empty {turn.role} turn", fix)


def _without_speaker(turn: Turn, content: str, repairs: Counter[str], options: Options) -> str:
    speaker = _SPEAKER.match(content)
    if speaker is None or speaker.end() == len(content):
        return content
    if turn.role == "assistant" and options.characters and speaker["name"] not in options.characters:
        return content
    repairs["name before the words removed"] += 1
    return content[speaker.end() :]
