"""The one format on disk: JSONL of {"messages": [...], "meta": {...}}; reading, writing and weighting it.

A record that was read here can be trained on, so no other module checks it again.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from persona.console import excerpt
from persona.errors import DataError
from persona.files import JsonObject, scan_json

ROLES = ("system", "user", "assistant")
_KEYS = {"role", "content"}
SHOWN_FAULTS = 20
SURROGATE = re.compile("[\ud800-\udfff]")


class RecordFault(ValueError):
    """Why a record cannot be used: a code, the JSON path, the reason, and the fix."""

    def __init__(self, code: str, path: str, reason: str, fix: str) -> None:
        super().__init__(f"{path}: {reason}; {fix}")
        self.code, self.path, self.reason, self.fix = code, path, reason, fix


@dataclass(frozen=True)
class Record:
    """A conversation and where it comes from."""

    messages: tuple[dict[str, str], ...]
    meta: JsonObject = field(default_factory=dict)

    @property
    def system(self) -> str | None:
        """The text of the system message, or None."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def turns(self) -> tuple[dict[str, str], ...]:
        """The messages without the system message: user and assistant in turn."""
        return self.messages if self.system is None else self.messages[1:]

    @property
    def replies(self) -> tuple[str, ...]:
        """The texts of the assistant, which are learned."""
        return tuple(message["content"] for message in self.messages if message["role"] == "assistant")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts of the user, one before each reply."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")

    def encoded(self) -> bytes:
        """The record as one line of JSON in UTF-8, without the newline; a RecordFault for half of a character."""
        content = {"messages": self.messages, "meta": self.meta}
        try:
            return orjson.dumps(content)
        except orjson.JSONEncodeError:  # half of a character, or a whole number of more than 64 bits
            text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError:
            texts = enumerate(message["content"] for message in self.messages)
            places = (f"$.messages[{number}].content" for number, text in texts if SURROGATE.search(text))
            raise surrogate_fault(next(places, "$.meta")) from None


def surrogate_fault(path: str) -> RecordFault:
    """The fault of a text with half of a character in it."""
    reason, fix = "half of a character (a lone surrogate)", "export the text again as UTF-8"
    return RecordFault("SURROGATE", path, reason, fix)


def check_messages(messages: object) -> tuple[dict[str, str], ...]:
    """`messages` if they form a conversation that can be learned; raises a RecordFault for others."""
    if not isinstance(messages, list | tuple) or not messages:
        fix = "write a list of at least a user and an assistant"
        raise RecordFault("NO_MESSAGES", "$.messages", f"found {_show(messages)}", fix)
    if _is_plain(messages):
        return tuple(messages)
    checked = tuple(_check_message(message, f"$.messages[{number}]") for number, message in enumerate(messages))
    first = 1 if checked[0]["role"] == "system" else 0
    for number, message in enumerate(checked[first:]):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            path, reason = f"$.messages[{first + number}].role", f'found "{message["role"]}", expected "{wanted}"'
            raise RecordFault("ORDER", path, reason, "an optional system message, then user and assistant in turn")
    if (role := checked[-1]["role"]) != "assistant":
        path = f"$.messages[{len(checked) - 1}].role"
        raise RecordFault("NO_REPLY", path, f'the last message is from "{role}"', "end with an assistant message")
    return checked


def check_type(meta: JsonObject) -> None:
    """Raise a RecordFault for the old name of a lore type, by which no lore would be weighted or asked for."""
    kind = str(meta.get("type", ""))
    if kind.startswith("settings_"):
        new = kind.replace("settings_", "lore_")
        raise RecordFault("OLD_TYPE", "$.meta.type", f'found "{kind}"', f'write "{new}", its name now')


def _is_plain(messages: Sequence[Any]) -> bool:
    """Whether messages are certainly good, as nearly all are; the others are checked one by one."""
    wanted = "user"
    for message in messages:
        if not isinstance(message, dict) or len(message) != 2:
            return False
        content, role = message.get("content"), message.get("role")
        if role != wanted and (role != "system" or message is not messages[0]):
            return False
        if not isinstance(content, str) or not content or content.isspace():
            return False
        if not (content.isascii() or content.replace("\n", "").isprintable()):  # it may hold a surrogate
            return False
        wanted = "assistant" if role == "user" else "user"
    return messages[-1]["role"] == "assistant"


def _check_message(message: object, path: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RecordFault("MESSAGE", path, f"found {_show(message)}", 'write {"role": ..., "content": ...}')
    if unknown := sorted(str(key) for key in message.keys() - _KEYS):
        raise RecordFault("UNKNOWN_KEY", path, f'unknown key "{unknown[0]}"', 'keep only "role" and "content"')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RecordFault("UNKNOWN_ROLE", f"{path}.role", f"found {_show(role)}", f"write one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RecordFault("CONTENT", f"{path}.content", f"found {_show(content)}", "write text in quotes")
    if not content.strip():
        raise RecordFault("EMPTY", f"{path}.content", "found no text", "write the words, or delete the conversation")
    if not content.isascii() and SURROGATE.search(content):
        raise surrogate_fault(f"{path}.content")
    return message


def _show(value: object) -> str:
    return "nothing" if value is None else excerpt(json.dumps(value, ensure_ascii=True, default=str), 40)


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a JSONL file; a DataError names every line that cannot be used."""
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file() raises for a name longer than a file's may be
        fault = "is not a file" if os.path.exists(path) else "does not exist"
        raise DataError(f"{path} {fault}. Make it with: python convert_dataset.py INPUT --output {path.parent}")
    records: list[Record] = []
    faults: list[str] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):  # bytes are split at b"\n" only; U+2028 may stand inside a text
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            try:
                records.append(_record_of(line))
            except RecordFault as fault:
                faults.append(f"{path}:{number}  {fault.path}  {fault.reason}; {fault.fix}")
    if faults:
        rest = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        head = f"{path}: {len(faults)} of {len(faults) + len(records)} records cannot be used"
        raise DataError("\n".join([head, *faults[:SHOWN_FAULTS], *rest]))
    if not records:
        raise DataError(f'{path} is empty: it must hold one {{"messages": [...]}} object a line.')
    return records


def _record_of(line: bytes) -> Record:
    foreign = "if the file comes from elsewhere, run python convert_dataset.py on it"
    try:
        text = line.decode("utf-8").strip(" \t\r\n")
        value, end, fault = scan_json(text)
    except UnicodeDecodeError as error:
        raise RecordFault("ENCODING", "$", f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise RecordFault("NOT_JSON", "$", f"not JSON at column {error.colno}: {error.msg}", foreign) from None
    if end < len(text):
        raise RecordFault("NOT_JSON", "$", f"more text after column {end}", "write one object a line")
    if fault:
        raise RecordFault("UNSAFE_JSON", "$", fault, "write each key once, and plain numbers")
    if not isinstance(value, dict) or "messages" not in value:
        raise RecordFault("NO_MESSAGES", "$", f"found {_show(value)}", f'write {{"messages": [...]}}; {foreign}')
    if unknown := sorted(value.keys() - {"messages", "meta"}):
        reason = f'unknown key "{excerpt(unknown[0], 40)}"'
        raise RecordFault("UNKNOWN_KEY", "$", reason, f"move it into meta; {foreign}")
    meta = value.get("meta", {})
    if not isinstance(meta, dict):
        raise RecordFault("META", "$.meta", f"found {_show(meta)}", "write an object, or leave it out")
    check_type(meta)
    record = Record(check_messages(value["messages"]), meta)
    if "\\u" in text:  # UTF-8 holds half of a character only as an escape
        record.encoded()
    return record


def rank(seed: int, key: str) -> str:
    """A key's place in a seeded order, the same whatever the other keys are."""
    return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "backslashreplace")).hexdigest()


def repeat_weighted(records: Sequence[Record], weight: float, seed: int) -> list[Record]:
    """Every record floor(weight) times, and a seeded choice of them once more for the fraction of the weight."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be a number of at least 0, not {weight}")
    whole = math.floor(weight)
    places = [rank(seed, record.encoded().decode("utf-8")) for record in records]
    ranked = sorted(range(len(records)), key=lambda index: (places[index], index))
    once_more = set(ranked[: round((weight - whole) * len(records))])
    return [record for index, record in enumerate(records) for _ in range(whole + (index in once_more))]


# --- texts ------------------------------------------------------------------------------------------------------------

# Han with its extensions, and kana: scripts that are written without spaces
UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CHARACTER = re.compile(f"[{UNSPACED}]")
WORD = re.compile(f"(?:(?![{UNSPACED}])[^\\W_])+(?:['’](?:(?![{UNSPACED}])[^\\W_])+)*")
_KANA = re.compile("[\u3040-\u30ff]")
# Placeholders of role-play front ends (SillyTavern's macros), which they replace by names
CHARACTER_MACRO = re.compile(r"\{\{\s*char\s*\}\}|<(?:BOT|CHAR)>", re.IGNORECASE)
USER_MACRO = re.compile(r"\{\{\s*user\s*\}\}|<USER>", re.IGNORECASE)
MACRO = re.compile(r"\{\{\s*\w{1,40}\s*\}\}|<(?:USER|BOT|CHAR)>", re.IGNORECASE)
# Strings that tokenizers of the Llama, Qwen, Mistral, Gemma and DeepSeek families turn into control ids
CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,64}\|>|<｜[^｜<>\n]{1,64}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>"
)
_AS_AI = re.compile(
    r"作为(?:一个|一名|一款)?\s*(?:大型|大)?\s*(?:AI|人工智能|语言模型|机器人|智能助手)|语言模型|人工智能助手"
    r"|\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b|\blanguage model\b"
    r"|\bI(?:'|’)?\s?a?m (?:just |only )?an? (?:AI|artificial intelligence|chatbot|virtual assistant)\b"
    r"|\bI(?:'|’)?m sorry, but I can(?:'|’|no)t (?:assist|help|comply|fulfill|provide)\b",
    re.IGNORECASE,
)
# one of these is in every text that the pattern finds
_AS_AI_WORDS = ("作为", "语言模型", "人工智能", " ai", "artificial", "model", "chatbot", "assistant", "sorry, but")


def is_chinese(*texts: str) -> bool:
    """Whether there is more than one Chinese character for every five words, so that Latin names do not count."""
    characters = sum(len(CHARACTER.findall(text)) for text in texts)
    return characters > 0 and characters * 5 > sum(len(WORD.findall(text)) for text in texts)  # words are slow to count


def language(text: str) -> str:
    """The language of a text by its letters: Chinese, Japanese, Latin letters, or other."""
    if is_chinese(text):
        characters = len(CHARACTER.findall(text))
        return "Japanese" if len(_KANA.findall(text)) > 0.2 * characters else "Chinese"
    return "Latin letters" if re.search(r"[A-Za-z\u00c0-\u024f]{2}", text) else "other"


def control_token(text: str) -> str | None:
    """The first string in `text` that a tokenizer may turn into a control id, or None."""
    if "<" not in text and "[" not in text:  # ten times as fast as the pattern, and true of most texts
        return None
    match = CONTROL_TOKEN.search(text)
    return match[0] if match else None


def speaks_as_ai(text: str) -> str | None:
    """The words with which a reply speaks or refuses as a language model, or None."""
    lower = text.lower()
    if not any(word in lower for word in _AS_AI_WORDS):  # ten times as fast as the pattern, and true of most texts
        return None
    match = _AS_AI.search(text)
    return match[0] if match else None
