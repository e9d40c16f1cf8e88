"""Messages with plain text: OpenAI's {"messages": [{"role", "content"}]}, and our own JSONL, which passes unchanged."""

from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, extras
from persona.convert.options import Options
from persona.convert.turns import Turn, calls_tool, check_switches, content_of, plain_messages, role_of, to_messages
from persona.records import RecordFault

_KNOWN = frozenset(("messages", "meta", "tools"))
_MESSAGE = frozenset(("role", "content", "weight", "tool_calls", "function_call"))
_FIX = 'write {"role": "user", "content": "..."}'


def recognise(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row holds messages, or None."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    return 'rows have "messages" with role and content' if {"role", "content"} <= messages[0].keys() else None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row; `meta` stays as it is."""
    repairs: Counter[str] = Counter()
    messages, meta = row.get("messages"), row.get("meta")
    if not isinstance(messages, list) or not messages:
        raise RecordFault("NO_TURNS", "$.messages", f"found {excerpt(repr(messages), 40)}", "write a list of messages")
    if meta is not None and not isinstance(meta, dict):
        raise RecordFault("META", "$.meta", f"found {excerpt(repr(meta), 40)}", "write an object, or leave it out")
    made = plain_messages(messages, "role", "content", options)
    plain = made is not None
    if made is None:
        turns = [_turn(turn, f"$.messages[{index}]", repairs, options) for index, turn in enumerate(messages)]
        made = to_messages(turns, "", "$.messages", repairs, options)
    if row.get("tools") not in (None, "", "[]", []):
        repairs["list of tools that nobody calls dropped"] += 1
    kept = {**(meta or {}), **extras(row, _KNOWN, repairs)}
    return Draft(made, repairs, kept, plain=plain, fresh=meta is None)


def _turn(message: object, path: str, repairs: Counter[str], options: Options) -> Turn:
    if not isinstance(message, dict):
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(message), 40)}", _FIX)
    role = role_of(message.get("role"), f"{path}.role", options)
    if len(message) > 2:
        check_switches(message, role, path)
        if calls_tool(message, path, options):
            role = "tool"
        if any(value is not None for key, value in message.items() if key not in _MESSAGE):
            repairs["other keys of a turn dropped"] += 1
    text_path = f"{path}.content"
    return Turn(role, "" if role == "tool" else content_of(message.get("content"), text_path, repairs), text_path)
