"""Cleaning of one text, and the key by which two conversations count as the same."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from persona.convert.draft import Draft, Message
from persona.convert.options import Options
from persona.records import SURROGATE, RecordFault, control_token

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


# --- privacy ----------------------------------------------------------------------------------------------------------
# Personal data in texts: found for the report, masked under --redact. Nothing of it leaves the machine.

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}")
_DIGITS = re.compile(r"(?<![\dA-Za-z.])\+?\(?\d(?:[ -]?[\d()]){6,24}[Xx]?(?![\dA-Za-z])")
_KEY = re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
_PHONE = re.compile(
    r"(?:\+?86)?1[3-9]\d{9}|\+\d{8,15}|0\d{9,11}|400\d{7}|\(\d{3}\)\d{7}|\d{3}-\d{3}-\d{4}|\d{3} \d{3} \d{4}"
)


def redact(text: str, repairs: Counter[str]) -> str:
    """`text` with phone numbers, addresses, identity and card numbers and keys replaced by their names in brackets."""
    if "@" in text:
        text, count = _EMAIL.subn("[email]", text)
        _count(repairs, "email", count)
    if any(mark in text for mark in ("sk-", "hf_", "gh", "AKIA")):
        text, count = _KEY.subn("[key]", text)
        _count(repairs, "key", count)

    def masked(match: re.Match[str]) -> str:
        kind = _kind(match[0])
        if kind is None:
            return match[0]
        _count(repairs, kind, 1)
        return f"[{kind}]"

    return _DIGITS.sub(masked, text)


def _count(repairs: Counter[str], kind: str, count: int) -> None:
    if count:
        repairs[f"personal data masked: {kind}"] += count


def personal_data(text: str) -> Counter[str]:
    """How many pieces of personal data of each kind stand in `text`."""
    found: Counter[str] = Counter()
    redact(text, found)
    return Counter({name.rpartition(" ")[2]: count for name, count in found.items()})


def _kind(written: str) -> str | None:
    """What a run of digits is: an identity number, a bank card, a phone number, or None for a mere number."""
    digits = re.sub(r"[ ()-]", "", written)
    bare = digits.lstrip("+")
    if len(bare) == 18 and bare[:17].isdigit() and _is_identity(bare):
        return "id"
    if 13 <= len(bare) <= 19 and bare.isdigit() and bare[0] in "3456" and _luhn(bare):
        return "card"
    return "phone" if _PHONE.fullmatch(digits) or _PHONE.fullmatch(written) else None


def _is_identity(digits: str) -> bool:
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, digits, strict=False))
    return "10X98765432"[total % 11] == digits[17].upper()


def _luhn(digits: str) -> bool:
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(n - 9 if n > 9 else n for n in doubled)) % 10 == 0


# --- refine -----------------------------------------------------------------------------------------------------------
# What options ask of a conversation's texts after it was read: mended, masked, filled in, cut, or refused.


_USER = re.compile(r"\{\{\s*user\s*\}\}|<USER>", re.IGNORECASE)
_CHARACTER = re.compile(r"\{\{\s*char\s*\}\}|<(?:BOT|CHAR)>", re.IGNORECASE)


def refine(draft: Draft, options: Options) -> list[Draft]:
    """The draft as the options want it: one, or with --too-long split several; a fault stands in the draft."""
    if draft.fault:
        return [draft]
    if options.fix_text or options.redact or options.characters or options.user_name is not None:
        for message in draft.messages:
            message["content"] = _refined(message["content"], draft.repairs, options)
        draft.plain = False
    if options.min_chars:
        draft.fault = _too_short(draft, options.min_chars)
    if not draft.fault and max([len(message["content"]) for message in draft.messages], default=0) > options.max_chars:
        return _shortened(draft, options)
    return [draft]


def _refined(text: str, repairs: Counter[str], options: Options) -> str:
    if options.fix_text and not text.isascii():
        text = mend(text, repairs)
    if "{{" in text or "<" in text:
        text = fill_in(text, repairs, options)
    return redact(text, repairs) if options.redact else text


def fill_in(text: str, repairs: Counter[str], options: Options) -> str:
    """The placeholders of role-play cards replaced by names, where the names are given."""
    count = 0
    if options.user_name is not None:
        text, count = _USER.subn(lambda _: options.user_name or "", text)
    if options.characters:
        text, more = _CHARACTER.subn(lambda _: options.characters[0], text)
        count += more
    if count:
        repairs["placeholders replaced by names"] += count
    return text


_GARBLED = re.compile(r"[ÃÂâåæäçèé][\x80-\xbf\u0152-\u0178\u2013-\u2122]|[\u0080-\u009f]|鈥|锛|銆|鐨|浣犲")


def garbled(text: str) -> bool:
    """Whether a text looks like UTF-8 that was read as another encoding."""
    return not text.isascii() and ("锟斤拷" in text or _GARBLED.search(text) is not None)


def mend(text: str, repairs: Counter[str]) -> str:
    """`text` as it was before UTF-8 was read as Windows-1252, Latin-1 or GBK, where that gives clean text again."""
    if not garbled(text):
        return text
    for encoding in ("cp1252", "latin-1", "gb18030"):
        try:
            mended = text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        if "\ufffd" not in mended and not garbled(mended):
            repairs["text read in the wrong encoding mended"] += 1
            return mended
    return text


def _too_short(draft: Draft, minimum: int) -> RecordFault | None:
    for index, message in enumerate(draft.messages):
        if message["role"] == "assistant" and len(message["content"]) < minimum:
            reason = f"a reply of {len(message['content'])} characters, fewer than --min-chars {minimum}"
            return RecordFault("TOO_SHORT", f"$.messages[{index}].content", reason, "lower --min-chars to keep it")
    return None


def _shortened(draft: Draft, options: Options) -> list[Draft]:
    """Without the turns that are too long: the part before the first, or every part, and never a part of a turn."""
    long = [i for i, message in enumerate(draft.messages) if len(message["content"]) > options.max_chars]
    reason = f"{len(draft.messages[long[0]]['content']):,} characters in one turn, more than {options.max_chars:,}"
    fix = "--too-long truncate keeps the turns before it, split those after it too; --max-chars allows more"
    fault = RecordFault("TOO_LONG", f"$.messages[{long[0]}].content", reason, fix)
    system = draft.messages[:1] if draft.messages[0]["role"] == "system" else []
    parts = _parts(draft.messages[len(system) :], options)
    if options.too_long == "reject" or not parts or 0 in long[: len(system)]:
        return [replace(draft, fault=fault)]
    name = "conversation cut before a turn that is too long"
    if options.too_long == "truncate":
        parts = parts[:1]
    counted = [
        Draft([*system, *part], Counter({name: 1}), draft.meta, draft.group, draft.line, draft.path) for part in parts
    ]
    for draft_part in counted:
        draft_part.part = True
    counted[0].repairs += draft.repairs
    counted[0].learned, counted[0].context, counted[0].fresh = draft.learned, draft.context, draft.fresh
    return counted


def _parts(messages: list[Message], options: Options) -> list[list[Message]]:
    """The runs of whole exchanges between turns that are too long."""
    parts: list[list[Message]] = []
    current: list[Message] = []
    for question, reply in zip(messages[::2], messages[1::2], strict=False):
        if max(len(question["content"]), len(reply["content"])) > options.max_chars:
            parts.append(current)
            current = []
        else:
            current += [question, reply]
    parts.append(current)
    return [part for part in parts if part]
