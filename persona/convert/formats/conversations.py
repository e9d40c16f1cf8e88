"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]} and its many spellings."""

import json
import re
from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, extras
from persona.convert.formats.dialogue import strip_quotes
from persona.convert.formats.tables import history_turns
from persona.convert.formats.turns import (
    Turn,
    calls_tool,
    check_switches,
    content_of,
    plain_messages,
    role_of,
    to_messages,
)
from persona.convert.options import Options
from persona.files import scan_json
from persona.records import RecordFault

_CONVERSATION_KEYS = ("conversations", "messages", "conversation", "dialogue", "items")
_ROLE_KEYS = ("from", "role", "speaker")
_TEXT_KEYS = ("value", "content", "text")
_SHAREGPT_KEYS = frozenset((*_CONVERSATION_KEYS, "system", "tools", "meta"))


def recognise_sharegpt(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is ShareGPT, or None."""
    for key in _CONVERSATION_KEYS:
        if key in row:
            return f'rows have "{key}"'
    return None


def convert_sharegpt(row: dict[str, Any], options: Options) -> Draft:
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
    return Draft(messages, repairs, extras(row, _SHAREGPT_KEYS, repairs), plain=plain)


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


# --- messages ---------------------------------------------------------------------------------------------------------
# Messages with plain text: OpenAI's {"messages": [{"role", "content"}]}, and our own JSONL, which passes unchanged.


_MESSAGES_KEYS = frozenset(("messages", "meta", "tools"))
_MESSAGE = frozenset(("role", "content", "weight", "tool_calls", "function_call"))
_FIX = 'write {"role": "user", "content": "..."}'


def recognise_messages(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row holds messages, or None."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    return 'rows have "messages" with role and content' if {"role", "content"} <= messages[0].keys() else None


def convert_messages(row: dict[str, Any], options: Options) -> Draft:
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
        turns = [_messages_turn(turn, f"$.messages[{index}]", repairs, options) for index, turn in enumerate(messages)]
        made = to_messages(turns, "", "$.messages", repairs, options)
    if row.get("tools") not in (None, "", "[]", []):
        repairs["list of tools that nobody calls dropped"] += 1
    kept = {**(meta or {}), **extras(row, _MESSAGES_KEYS, repairs)}
    return Draft(made, repairs, kept, plain=plain, fresh=meta is None)


def _messages_turn(message: object, path: str, repairs: Counter[str], options: Options) -> Turn:
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


# --- alpaca -----------------------------------------------------------------------------------------------------------
# Alpaca: {"instruction", "input", "output"}, with `system` and `history` where a file has them.


_ALPACA_KEYS = frozenset(("instruction", "input", "output", "system", "history"))


def recognise_alpaca(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is Alpaca, or None."""
    return 'rows have "instruction"' if "instruction" in row else None


def convert_alpaca(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row: the exchanges of `history`, then the instruction and its output."""
    repairs: Counter[str] = Counter()
    for key in ("instruction", "output"):
        if row.get(key) is None:
            raise RecordFault("MISSING", f"$.{key}", "found nothing", f'write the text under "{key}"')
    system = _optional(row, "system", repairs)
    parts = (content_of(row["instruction"], "$.instruction", repairs), _optional(row, "input", repairs))
    turns = history_turns(row.get("history"), repairs)
    turns.append(Turn("user", "\n".join(part for part in parts if part), "$.instruction"))
    turns.append(Turn("assistant", content_of(row["output"], "$.output", repairs), "$.output"))
    return Draft(to_messages(turns, system, "$", repairs, options), repairs, extras(row, _ALPACA_KEYS, repairs))


def _optional(row: dict[str, Any], key: str, repairs: Counter[str]) -> str:
    return "" if row.get(key) is None else content_of(row[key], f"$.{key}", repairs)


# --- pairs ------------------------------------------------------------------------------------------------------------
# Pair rows of role-play sets: {"role_A", "role_B", "query": "「...」", "response": "「...」"}, and questions with
# `chat_history` whose texts begin with the speaker's name.


_PAIRS_KEYS = frozenset(("role_A", "role_B", "query", "response", "answer", "chat_history", "context", "source"))
_NAMED = re.compile(r"(?P<name>[^\s:：「“\"]{1,20})\s*[:：]\s*(?P<text>\S.*)", re.DOTALL)


def recognise_pairs(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is a pair of named speakers, or None."""
    if "query" not in row or not ("response" in row or "answer" in row):
        return None
    if "role_A" in row or "role_B" in row:
        return 'rows have "role_A", "role_B", "query" and the response'
    return 'rows have "query", the answer and "chat_history"' if "chat_history" in row else None


def convert_pairs(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row: the history, the question, the answer."""
    repairs: Counter[str] = Counter()
    reply_key = "response" if "response" in row else "answer"
    speaker, reply = _words(row[reply_key], f"$.{reply_key}", repairs, options)
    speaker = _name(row.get("role_B")) or speaker
    _check_speaker(speaker, options)
    turns: list[Turn] = []
    for index, said in enumerate(_history(row.get("chat_history"))):
        path = f"$.chat_history[{index}]"
        name, text = _words(said, path, repairs, options)
        role = "assistant" if name and name == speaker else "user"
        if turns and turns[-1].role == role:
            turns[-1].content += f"\n{text}"
        else:
            turns.append(Turn(role, text, path))
    question = _words(row["query"], "$.query", repairs, options)[1]
    if turns and turns[-1].role == "user":
        question = f"{turns.pop().content}\n{question}"
    turns += [Turn("user", question, "$.query"), Turn("assistant", reply, f"$.{reply_key}")]
    meta = extras(row, _PAIRS_KEYS, repairs)
    if speaker:
        meta["character"] = speaker
    return Draft(to_messages(turns, "", "$", repairs, options), repairs, meta)


def _check_speaker(speaker: str, options: Options) -> None:
    if options.characters and speaker and speaker not in options.characters:
        fix = "only replies of --character are learned; add this name to learn it too"
        raise RecordFault("OTHER_SPEAKER", "$", f'the reply is spoken by "{speaker[:30]}"', fix)


def _name(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _history(value: object) -> list[object]:
    if value in (None, "", []):
        return []
    if isinstance(value, str):
        return [line for line in value.split("\n") if line.strip()]
    if not isinstance(value, list):
        raise RecordFault("HISTORY", "$.chat_history", "found no list of texts", 'write ["甲:「...」", "乙:「...」"]')
    return [said for item in value for said in (item if isinstance(item, list) else [item])]


def _words(value: object, path: str, repairs: Counter[str], options: Options) -> tuple[str, str]:
    """The speaker's name, "" without one, and the words without name and quotes."""
    text = content_of(value, path, repairs)
    named = _NAMED.fullmatch(text)
    if named and named["text"][0] in '「『“"':
        name, text = named["name"], named["text"]
        repairs["name before the words removed"] += 1
    else:
        name = ""
    return name, text if options.keep_quotes else strip_quotes(text, repairs)


# --- chatgpt ----------------------------------------------------------------------------------------------------------
# ChatGPT's own export: a conversation is a tree of messages under `mapping`, and its path to the last was said.


def recognise_chatgpt(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is a conversation of ChatGPT's export, or None."""
    return 'rows have "mapping" (ChatGPT export)' if isinstance(row.get("mapping"), dict) else None


def convert_chatgpt(row: dict[str, Any], options: Options) -> Draft:
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
