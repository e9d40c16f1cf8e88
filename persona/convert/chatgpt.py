"""ChatGPT's own export: a conversation is a tree of messages under `mapping`, and its path to the last was said."""

from collections import Counter
from typing import Any

from persona.convert.draft import Draft
from persona.convert.options import Options
from persona.convert.turns import Turn, content_of, role_of, to_messages
from persona.records import RecordFault


def recognise(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is a conversation of ChatGPT's export, or None."""
    return 'rows have "mapping" (ChatGPT export)' if isinstance(row.get("mapping"), dict) else None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation on the path from the root to the current node."""
    repairs: Counter[str] = Counter()
    turns: list[Turn] = []
    for node in _path(row["mapping"], row.get("current_node")):
        message = row["mapping"][node].get("message")
        if not isinstance(message, dict):
            continue
        author, content = message.get("author"), message.get("content")
        role = role_of(author.get("role") if isinstance(author, dict) else None, f"$.mapping.{node}", options)
        parts = content.get("parts") if isinstance(content, dict) else None
        path = f"$.mapping.{node}.message.content"
        text = "" if role == "tool" else content_of(parts or "", path, repairs)
        if text or role != "system":  # the export begins with an empty system message
            turns.append(Turn(role, text, path))
    repairs.pop("text parts joined", None)  # every message of the export is a list of parts
    meta = {"extra": {"title": row["title"][:200]}} if isinstance(row.get("title"), str) and row["title"] else {}
    return Draft(to_messages(turns, "", "$.mapping", repairs, options), repairs, meta)


def _path(mapping: dict[str, Any], current: object) -> list[str]:
    if current is None:
        leaves = [node for node, value in mapping.items() if isinstance(value, dict) and not value.get("children")]
        current = leaves[-1] if leaves else None
    path: list[str] = []
    while isinstance(current, str) and isinstance(mapping.get(current), dict) and current not in path:
        path.append(current)
        current = mapping[current].get("parent")
    if not path:
        raise RecordFault("NO_TURNS", "$.mapping", "no path of messages", "export the conversation again")
    return path[::-1]
