"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]} and its many spellings."""

import json
from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, small_extras
from persona.convert.turns import Turn, check_switches, content_of, role_of, to_messages
from persona.records import RecordFault, scan_json

_CONVERSATION_KEYS = ("conversations", "messages", "conversation", "dialogue", "items")
_ROLE_KEYS = ("from", "role", "speaker")
_TEXT_KEYS = ("value", "content", "text")
_KNOWN = frozenset((*_CONVERSATION_KEYS, "system", "tools", "meta"))


def recognise(row: dict[str, Any]) -> str | None:
    """Why the row is ShareGPT, or None."""
    return next((f'rows have "{key}"' for key in _CONVERSATION_KEYS if key in row), None)


def convert(row: dict[str, Any]) -> Draft:
    """The conversation of one row."""
    repairs: Counter[str] = Counter()
    found = [key for key in _CONVERSATION_KEYS if row.get(key) is not None]
    if not found or any(row[key] != row[found[0]] for key in found):
        reason = f"found {', '.join(found) or 'no list of turns'}"
        raise RecordFault("NO_TURNS", "$", reason, 'write one list of turns under "conversations"')
    path = f"$.{found[0]}"
    turns = [
        _turn(turn, f"{path}[{index}]", repairs) for index, turn in enumerate(_turn_list(row[found[0]], path, repairs))
    ]
    system = "" if row.get("system") is None else content_of(row["system"], "$.system", repairs)
    messages = to_messages(turns, system, path, repairs)
    if row.get("tools") not in (None, "", "[]", []):
        repairs["list of tools that nobody calls dropped"] += 1
    extras = small_extras(row, _KNOWN)
    return Draft(messages, repairs, {"extra": extras} if extras else {})


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


def _turn(turn: object, path: str, repairs: Counter[str]) -> Turn:
    if not isinstance(turn, dict):
        fix = 'write {"from": "human", "value": "..."}'
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(turn), 40)}", fix)
    check_switches(turn, path)
    keys = {key.strip().casefold(): key for key in turn}
    role_key = next((keys[key] for key in _ROLE_KEYS if key in keys), None)
    text_key = next((keys[key] for key in _TEXT_KEYS if key in keys), None)
    if role_key is None or text_key is None:
        reason = f"found the keys {excerpt(', '.join(turn), 60) or '(none)'}"
        raise RecordFault("NO_TURNS", path, reason, 'write {"from": "human", "value": "..."}')
    role = role_of(turn[role_key], f"{path}.{role_key}")
    if len(turn) > 2:
        repairs["other keys of a turn dropped"] += 1
    return Turn(role, content_of(turn[text_key], f"{path}.{text_key}", repairs), f"{path}.{text_key}")
