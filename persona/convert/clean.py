"""Cleaning of one text, and the key by which two conversations count as the same."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from persona.convert.draft import Message
from persona.records import SURROGATE, RecordFault

# Strings that tokenizers of the Llama, Qwen, Mistral, Gemma and DeepSeek families turn into control ids.
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\n]{1,64}\|>|<｜[^｜<>\n]{1,64}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<[be]os>"
)
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL_SEQUENCE = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # colours whole
_CONTROL_SHARE = 0.05  # more control characters than that are no text
_ODD_SPACE = re.compile("[\t\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")  # of cleaned texts
_TEMPLATED = re.compile(r"<\|(?:im_start|start_header_id|user|assistant|system)\|>|\[INST\]|<start_of_turn>")


def clean_text(text: str, path: str, repairs: Counter[str]) -> str:
    """`text` with LF line ends, no control characters, no outer white space; a RecordFault for what cannot stay."""
    stripped = text.strip()
    if len(stripped) != len(text):
        repairs["white space at the ends removed"] += 1
    return stripped if is_clean(stripped) else _clean(stripped, path, repairs)


def is_clean(text: str) -> bool:
    """Whether nothing is to be done to a text, told five times as fast as by patterns, and true of most."""
    return "<" not in text and "[" not in text and text.replace("\n", " ").isprintable()


def _clean(text: str, path: str, repairs: Counter[str]) -> str:
    if not text.isascii() and SURROGATE.search(text):
        reason, fix = "half of a character (a lone surrogate)", "export the text again as UTF-8"
        raise RecordFault("SURROGATE", path, reason, fix)
    if token := control_token(text):
        fix = "delete it, or write it differently: the model would read it as a command of its template"
        if _TEMPLATED.search(text):
            fix = "the text was written through a chat template before: give the conversation without it"
        raise RecordFault("CONTROL_TOKEN", path, f'found the control token "{token}"', fix)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        repairs["line ends changed to LF"] += 1
    if _CONTROL_CHARACTER.search(text):
        cleaned, removed = _CONTROL_SEQUENCE.subn("", text)
        if len(text) - len(cleaned) > _CONTROL_SHARE * len(text) and len(text) > 100:
            reason = f"{len(text) - len(cleaned)} of {len(text)} characters are control characters"
            raise RecordFault("BINARY", path, reason, "this is no text: export it again")
        repairs["control characters removed"] += removed
        return _clean(cleaned.strip(), path, repairs)  # which may hold a token now that they had split
    return text


def control_token(text: str) -> str | None:
    """The first control token in `text`, or None."""
    if "<" not in text and "[" not in text:  # ten times as fast as the pattern, and true of most texts
        return None
    found = _CONTROL_TOKEN.search(text)
    return found[0] if found else None


def fold(text: str) -> str:
    """The same for texts that differ only in Unicode form (NFC) and white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def fold_conversation(messages: Sequence[Message], plain: bool = False) -> str:
    """Role, text, role, text, ... with zeros between, the texts folded: the same for what counts as a duplicate.

    `plain` says that there is no white space but spaces and line ends, and none around a text.
    """
    parts = [part for message in messages for part in (message["role"], message["content"])]
    if not plain:
        parts = [part.strip() for part in parts]
    # a zero is no white space, and never stands in a text; empty lines at once save the loop half of its work
    text = "\0".join(parts).replace("\n\n", " ").replace("\n", " ")
    if not plain and _ODD_SPACE.search(text):
        return fold(text)
    while "  " in text:
        text = text.replace("  ", " ")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def conversation_key(folded: str) -> str:
    """The key of a conversation that was folded."""
    return hashlib.sha256(folded.encode("utf-8")).hexdigest()


def replies_of(folded: str) -> list[str]:
    """The replies of a conversation that was folded."""
    parts = folded.split("\0")  # roles and texts in turn, so that every fourth part is a reply
    return parts[5 if parts[0] == "system" else 3 :: 4]
