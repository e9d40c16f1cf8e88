"""Formats in which a row is one conversation: OpenAI messages, ShareGPT, Alpaca, ChatGPT's export, pairs of lines."""

import json
import re
from collections import Counter
from typing import Any

from persona.console import excerpt
from persona.convert.draft import Draft, extras
from persona.convert.formats.dialogue import strip_quotes
from persona.convert.formats.format import RowFormat
from persona.convert.formats.turns import (
    Turn,
    calls_tool,
    check_switches,
    content_of,
    history_turns,
    optional_text,
    plain_messages,
    role_of,
    to_messages,
)
from persona.convert.options import Options
from persona.files import JsonObject, scan_json
from persona.records import RecordFault

_LISTS = ("conversations", "messages", "conversation", "dialogue", "items")
_ROLE_KEYS = ("from", "role", "speaker")
_TEXT_KEYS = ("value", "content", "text")
_READ_BESIDES = ("weight", "tool_calls", "function_call")
_SHAREGPT = frozenset((*_LISTS, "system", "tools", "meta"))
_MESSAGES = frozenset(("messages", "meta", "tools"))
_ALPACA = frozenset(("instruction", "input", "output", "system", "history"))
_PAIRS = frozenset(("role_A", "role_B", "query", "response", "answer", "chat_history", "context", "source"))
_NAMED = re.compile(r"(?P<name>[^\s:：「“\"]{1,20})\s*[:：]\s*(?P<text>\S.*)", re.DOTALL)


def _is_sharegpt(row: JsonObject, _options: Options) -> str | None:
    return next((f'rows have "{key}"' for key in _LISTS if key in row), None)


def _sharegpt(row: JsonObject, options: Options) -> Draft:
    """The conversation under one of many keys, each turn in one of many spellings."""
    repairs: Counter[str] = Counter()
    lists = [key for key in _LISTS if row.get(key) is not None]
    if len(lists) != 1 and (not lists or any(row[key] != row[lists[0]] for key in lists)):
        reason = f"found {', '.join(lists) or 'no list of turns'}"
        raise RecordFault("NO_TURNS", "$", reason, 'write one list of turns under "conversations"')
    path = f"$.{lists[0]}"
    listed = _turn_list(row[lists[0]], path, repairs)
    system = optional_text(row, "system", repairs)
    messages = None if system else plain_messages(listed, "from", "value", options)
    plain = messages is not None
    if messages is None:
        turns = [_turn(turn, None, f"{path}[{index}]", repairs, options) for index, turn in enumerate(listed)]
        messages = to_messages(turns, system, path, repairs, options)
    return Draft(messages, repairs, _extras(row, _SHAREGPT, repairs), plain=plain)


def _turn_list(value: object, path: str, repairs: Counter[str]) -> list[object]:
    fix = "write a list of turns"
    if isinstance(value, str):
        try:
            value, end, fault = scan_json(text := value.strip())
        except json.JSONDecodeError:
            raise RecordFault("NO_TURNS", path, "found a text", fix) from None
        if fault or end < len(text):
            raise RecordFault("NO_TURNS", path, fault or "found a text", fix)
        repairs["turns given as JSON inside a text"] += 1
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
        repairs["list inside a list opened"] += 1
    if not isinstance(value, list) or not value:
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(value), 40)}", fix)
    return value


def _turn(turn: Any, keys: tuple[str, str] | None, path: str, repairs: Counter[str], options: Options) -> Turn:
    """One turn, with role and text under `keys`, or under the keys that it has."""
    if not isinstance(turn, dict):
        role_key, text_key = keys or ("from", "value")
        fix = f'write {{"{role_key}": "user", "{text_key}": "..."}}'
        raise RecordFault("NO_TURNS", path, f"found {excerpt(repr(turn), 40)}", fix)
    if not keys:
        keys = ("from", "value") if "from" in turn and "value" in turn else _keys(turn, path, repairs)
    role = role_of(turn.get(keys[0]), f"{path}.{keys[0]}", options)
    if len(turn) > 2:
        check_switches(turn, role, path)
        if calls_tool(turn, path, options):
            role = "tool"
        for key, value in turn.items():
            if key not in keys and value is not None and key not in _READ_BESIDES:
                repairs["other keys of a turn dropped"] += 1
                break
    text_path = f"{path}.{keys[1]}"
    return Turn(role, "" if role == "tool" else content_of(turn.get(keys[1]), text_path, repairs), text_path)


def _keys(turn: JsonObject, path: str, repairs: Counter[str]) -> tuple[str, str]:
    """The keys of a turn's role and text."""
    folded = {key.strip().casefold(): key for key in turn}
    role_key = next((folded[key] for key in _ROLE_KEYS if key in folded), None)
    text_key = next((folded[key] for key in _TEXT_KEYS if key in folded), None)
    if role_key is None or text_key is None:
        reason = f"found the keys {excerpt(', '.join(turn), 60) or '(none)'}"
        raise RecordFault("NO_TURNS", path, reason, 'write {"from": "human", "value": "..."}')
    if role_key not in _ROLE_KEYS or text_key not in _TEXT_KEYS:
        repairs["odd spelling of a key read"] += 1
    return role_key, text_key


def _extras(row: JsonObject, known: frozenset[str], repairs: Counter[str]) -> JsonObject:
    if row.get("tools") not in (None, "", "[]", []):
        repairs["list of tools that nobody calls dropped"] += 1
    return extras(row, known, repairs)


def _is_messages(row: JsonObject, _options: Options) -> str | None:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    return 'rows have "messages" with role and content' if {"role", "content"} <= messages[0].keys() else None


def _messages(row: JsonObject, options: Options) -> Draft:
    """The conversation of OpenAI's format and of our own records, whose `meta` stays as it is."""
    repairs: Counter[str] = Counter()
    listed, meta = row.get("messages"), row.get("meta")
    if not isinstance(listed, list) or not listed:
        raise RecordFault("NO_TURNS", "$.messages", f"found {excerpt(repr(listed), 40)}", "write a list of messages")
    if meta is not None and not isinstance(meta, dict):
        raise RecordFault("META", "$.meta", f"found {excerpt(repr(meta), 40)}", "write an object, or leave it out")
    keys = ("role", "content")
    messages = plain_messages(listed, *keys, options)
    plain = messages is not None
    if messages is None:
        turns = [_turn(turn, keys, f"$.messages[{index}]", repairs, options) for index, turn in enumerate(listed)]
        messages = to_messages(turns, "", "$.messages", repairs, options)
    kept = {**(meta or {}), **_extras(row, _MESSAGES, repairs)}
    return Draft(messages, repairs, kept, plain=plain, fresh=meta is None)


def _is_alpaca(row: JsonObject, _options: Options) -> str | None:
    return 'rows have "instruction"' if "instruction" in row else None


def _alpaca(row: JsonObject, options: Options) -> Draft:
    """The exchanges of `history`, then the instruction with its input, and the output."""
    repairs: Counter[str] = Counter()
    for key in ("instruction", "output"):
        if row.get(key) is None:
            raise RecordFault("MISSING", f"$.{key}", "found nothing", f'write the text under "{key}"')
    system = optional_text(row, "system", repairs)
    parts = (content_of(row["instruction"], "$.instruction", repairs), optional_text(row, "input", repairs))
    turns = history_turns(row.get("history"), repairs)
    turns.append(Turn("user", "\n".join(part for part in parts if part), "$.instruction"))
    turns.append(Turn("assistant", content_of(row["output"], "$.output", repairs), "$.output"))
    return Draft(to_messages(turns, system, "$", repairs, options), repairs, extras(row, _ALPACA, repairs))


def _is_pair(row: JsonObject, _options: Options) -> str | None:
    if "query" not in row or not ("response" in row or "answer" in row):
        return None
    if "role_A" in row or "role_B" in row:
        return 'rows have "role_A", "role_B", "query" and the response'
    return 'rows have "query", the answer and "chat_history"' if "chat_history" in row else None


def _pair(row: JsonObject, options: Options) -> Draft:
    """The history, the question and the answer of a role-play set; each text may begin with its speaker's name."""
    repairs: Counter[str] = Counter()
    reply_key = "response" if "response" in row else "answer"
    speaker, reply = _words(row.get(reply_key), f"$.{reply_key}", repairs, options)
    if isinstance(row.get("role_B"), str):
        speaker = row["role_B"].strip() or speaker
    if options.characters and speaker and speaker not in options.characters:
        fix = "only replies of --character are learned; name this speaker too if it is the same character"
        raise RecordFault("OTHER_SPEAKER", "$", f'"{speaker[:30]}" speaks the reply', fix)
    turns: list[Turn] = []
    for index, line in enumerate(_history(row.get("chat_history"))):
        path = f"$.chat_history[{index}]"
        name, text = _words(line, path, repairs, options)
        role = "assistant" if name and name == speaker else "user"
        if turns and turns[-1].role == role:
            turns[-1].content += f"\n{text}"
        else:
            turns.append(Turn(role, text, path))
    question = _words(row.get("query"), "$.query", repairs, options)[1]
    if turns and turns[-1].role == "user":
        question = f"{turns.pop().content}\n{question}"
    turns += [Turn("user", question, "$.query"), Turn("assistant", reply, f"$.{reply_key}")]
    meta = extras(row, _PAIRS, repairs)
    if speaker:
        meta["character"] = speaker
    return Draft(to_messages(turns, "", "$", repairs, options), repairs, meta)


def _history(value: object) -> list[object]:
    if value in (None, "", []):
        return []
    if isinstance(value, str):
        return [line for line in value.split("\n") if line.strip()]
    if not isinstance(value, list):
        fix = 'write ["甲:「...」", "乙:「...」"]'
        raise RecordFault("HISTORY", "$.chat_history", f"found {excerpt(repr(value), 40)}", fix)
    return [line for item in value for line in (item if isinstance(item, list) else [item])]


def _words(value: object, path: str, repairs: Counter[str], options: Options) -> tuple[str, str]:
    """The speaker's name, or "", and the words without name and quotes."""
    name, text = "", content_of(value, path, repairs)
    named = _NAMED.fullmatch(text)
    if named and named["text"][0] in '「『“"':
        name, text = named["name"], named["text"]
        repairs["name before the words removed"] += 1
    return name, text if options.keep_quotes else strip_quotes(text, repairs)


def _is_chatgpt(row: JsonObject, _options: Options) -> str | None:
    return 'rows have "mapping" (ChatGPT export)' if isinstance(row.get("mapping"), dict) else None


def _chatgpt(row: JsonObject, options: Options) -> Draft:
    """The messages on the path from the root of the tree `mapping` to the current node."""
    repairs: Counter[str] = Counter()
    turns: list[Turn] = []
    mapping = row.get("mapping")
    if not isinstance(mapping, dict):
        raise RecordFault("NO_TURNS", "$", 'found no "mapping"', "export the conversation again")
    for node in _path(mapping, row.get("current_node")):
        message = mapping[node].get("message")
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


def _path(mapping: JsonObject, current: object) -> list[str]:
    if current is None:
        leaves = [node for node, value in mapping.items() if isinstance(value, dict) and not value.get("children")]
        current = leaves[-1] if leaves else None
    path: list[str] = []
    while isinstance(current, str) and isinstance(mapping.get(current), dict) and current not in path:
        path.append(current)
        current = mapping[current].get("parent")
    if not path:
        raise RecordFault("NO_TURNS", "$.mapping", "found no path of messages", "export the conversation again")
    return path[::-1]


MESSAGES = RowFormat("messages", _is_messages, _messages)
SHAREGPT = RowFormat("sharegpt", _is_sharegpt, _sharegpt)
ALPACA = RowFormat("alpaca", _is_alpaca, _alpaca, header=lambda row, _: {"instruction", "output"} <= row.keys())
CHATGPT = RowFormat("chatgpt", _is_chatgpt, _chatgpt)
PAIRS = RowFormat("pairs", _is_pair, _pair)
