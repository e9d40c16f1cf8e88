"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]} and its many spellings."""

import json
from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, extras
from persona.convert.options import Options
from persona.convert.turns import Turn, calls_tool, check_switches, content_of, plain_messages, role_of, to_messages
from persona.records import RecordFault
from persona.strict_json import scan_json

_CONVERSATION_KEYS = ("conversations", "messages", "conversation", "dialogue", "items")
_ROLE_KEYS = ("from", "role", "speaker")
_TEXT_KEYS = ("value", "content", "text")
_KNOWN = frozenset((*_CONVERSATION_KEYS, "system", "tools", "meta"))


def recognise(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is ShareGPT, or None."""
    for key in _CONVERSATION_KEYS:
        if key in row:
            return f'rows have "{key}"'
    return None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row."""
    repairs: Counter[str] = Counter()
    found = [key for key in _CONVERSATION_KEYS if row.get(key) is not None]
    if len(found) != 1 and (not found or any(row[key] != row[found[0]] for key in found)):
        reason = f"found {', '.join(found) or 'no list of turns'}"
        raise RecordFault("NO_TURNS", "$", reason, 'write one list of turns under "conversations"')
    path = f"$.{found[0]}"
    listed = _turn_list(row[found[0]], path, repairs)
    system = "" if row.get("system") is None else content_of(row["system"], "$.system", repairs)
    messages = None if system else plain_messages(listed, "from", "value", options)
    plain = messages is not None
    if messages is None:
        turns = [_turn(turn, f"{path}[{index}]", repairs, options) for index, turn in enumerate(listed)]
        messages = to_messages(turns, system, path, repairs, options)
    if row.get("tools") not in (None, "", "[]", []):
        repairs["list of tools that nobody calls dropped"] += 1
    return Draft(messages, repairs, extras(row, _KNOWN, repairs), plain=plain)


def _turn_list(value: object, path: str, repairs: Counter[str]) -> list[object]:
    if isinstance(value, str):
        try:
            value, end, fault = scan_json(text := value.strip())
        except json.JSONDecodeError:
            raise RecordFault("NO_TURNS", path, "found a text", "write a list of turns") from None
        if fault or end < len(text):
            raise RecordFault("NO_TURNS", path, fault or "found a text", "write a list of turns")
        repairs["turns given as JSON inside a text"] += 1
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
        repairs["list inside a list opened"] += 1
    if not isinstance(value, list) or not value:
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(value), 40)}", "write a list of turns")
    return value


def _turn(turn: object, path: str, repairs: Counter[str], options: Options) -> Turn:
    if not isinstance(turn, dict):
        fix = 'write {"from": "human", "value": "..."}'
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(turn), 40)}", fix)
    role_key, text_key = ("from", "value") if "from" in turn and "value" in turn else _keys(turn, path, repairs)
    role = role_of(turn[role_key], f"{path}.{role_key}", options)
    if len(turn) > 2:
        check_switches(turn, role, path)
        if calls_tool(turn, path, options):
            role = "tool"
        repairs["other keys of a turn dropped"] += 1
    text_path = f"{path}.{text_key}"
    return Turn(role, "" if role == "tool" else content_of(turn[text_key], text_path, repairs), text_path)


def _keys(turn: dict[str, Any], path: str, repairs: Counter[str]) -> tuple[str, str]:
    """The keys under which a turn has its role and its text."""
    folded = {key.strip().casefold(): key for key in turn}
    role_key = next((folded[key] for key in _ROLE_KEYS if key in folded), None)
    text_key = next((folded[key] for key in _TEXT_KEYS if key in folded), None)
    if role_key is None or text_key is None:
        reason = f"found the keys {excerpt(', '.join(turn), 60) or '(none)'}"
        raise RecordFault("NO_TURNS", path, reason, 'write {"from": "human", "value": "..."}')
    if role_key not in _ROLE_KEYS or text_key not in _TEXT_KEYS:
        repairs["odd spelling of a key read"] += 1
    return role_key, text_key
