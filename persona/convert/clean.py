"""Cleaning of one text, and the key by which two conversations count as the same."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from persona.convert.draft import Message
from persona.records import SURROGATE, RecordFault

# Strings that tokenizers of the Llama, Qwen, Mistral, Gemma and DeepSeek families turn into control ids.
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,64}\|>|<｜[^｜<>\n]{1,64}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<[be]os>"
)
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL_SEQUENCE = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # colours whole


def clean_text(text: str, path: str, repairs: Counter[str]) -> str:
    """`text` with LF line ends, no control characters, no outer white space; a RecordFault for what cannot stay."""
    if not text.isascii() and SURROGATE.search(text):
        reason, fix = "half of a character (a lone surrogate)", "export the text again as UTF-8"
        raise RecordFault("SURROGATE", path, reason, fix)
    if token := control_token(text):
        fix = "delete it, or write it differently: the model would read it as a command of its template"
        raise RecordFault("CONTROL_TOKEN", path, f'found the control token "{token}"', fix)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        repairs["line ends changed to LF"] += 1
    if _CONTROL_CHARACTER.search(text):
        text, removed = _CONTROL_SEQUENCE.subn("", text)
        repairs["control characters removed"] += removed
        return clean_text(text, path, repairs)  # which may hold a token now that they had split
    stripped = text.strip()
    if stripped != text:
        repairs["white space at the ends removed"] += 1
    return stripped


def control_token(text: str) -> str | None:
    """The first control token in `text`, or None."""
    if "<" not in text and "[" not in text:  # ten times as fast as the pattern, and true of most texts
        return None
    found = _CONTROL_TOKEN.search(text)
    return found[0] if found else None


def conversation_key(messages: Iterable[Message]) -> str:
    """The same for conversations that differ only in Unicode form (NFC) and white space."""
    folded = "\0".join(
        f"{message['role']}\0{' '.join(unicodedata.normalize('NFC', message['content']).split())}"
        for message in messages
    )
    return hashlib.sha256(folded.encode("utf-8")).hexdigest()
