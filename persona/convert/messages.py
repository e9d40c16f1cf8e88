"""Messages with plain text: OpenAI's {"messages": [{"role", "content"}]}, and our own JSONL, which passes unchanged."""

from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, small_extras
from persona.convert.turns import Turn, check_switches, content_of, role_of, to_messages
from persona.records import RecordFault

_KNOWN = frozenset(("messages", "meta", "tools"))
_FIX = 'write {"role": "user", "content": "..."}'


def recognise(row: dict[str, Any]) -> str | None:
    """Why the row holds messages, or None."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    return 'rows have "messages" with role and content' if {"role", "content"} <= messages[0].keys() else None


def convert(row: dict[str, Any]) -> Draft:
    """The conversation of one row; `meta` stays as it is."""
    repairs: Counter[str] = Counter()
    messages, meta = row.get("messages"), row.get("meta")
    if not isinstance(messages, list) or not messages:
        raise RecordFault("NO_TURNS", "$.messages", f"found {excerpt(repr(messages), 40)}", "write a list of messages")
    if meta is not None and not isinstance(meta, dict):
        raise RecordFault("META", "$.meta", f"found {excerpt(repr(meta), 40)}", "write an object, or leave it out")
    turns = [_turn(message, f"$.messages[{index}]", repairs) for index, message in enumerate(messages)]
    if row.get("tools") not in (None, "", "[]", []):
        repairs["list of tools that nobody calls dropped"] += 1
    extras = small_extras(row, _KNOWN)
    kept = dict(meta or {})
    if extras:
        kept["extra"] = extras
    return Draft(to_messages(turns, "", "$.messages", repairs), repairs, kept)


def _turn(message: object, path: str, repairs: Counter[str]) -> Turn:
    if not isinstance(message, dict):
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(message), 40)}", _FIX)
    check_switches(message, path)
    unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if unknown:
        fix = "only role and content are learned: delete it"
        raise RecordFault("UNKNOWN_KEY", path, f'found the key "{excerpt(unknown[0], 40)}"', fix)
    role = role_of(message.get("role"), f"{path}.role")
    return Turn(role, content_of(message.get("content"), f"{path}.content", repairs), f"{path}.content")
