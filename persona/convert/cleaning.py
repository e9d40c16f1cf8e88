"""Cleaning of texts: what every text goes through, what the options ask for, and the key of a conversation.

Nothing is changed in silence: each repair is counted by its name, and what cannot be repaired is a RecordFault.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from persona.convert.draft import Draft, Message
from persona.convert.options import Options
from persona.records import CHARACTER_MACRO, SURROGATE, USER_MACRO, RecordFault, control_token, surrogate_fault

_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL_SEQUENCE = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # colours whole
_CONTROL_SHARE = 0.05  # with more control characters it is not text
_ODD_SPACE = re.compile("[\t\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")  # of cleaned texts
_TEMPLATED = re.compile(r"<\|(?:im_start|start_header_id|user|assistant|system)\|>|\[INST\]|<start_of_turn>")


def clean_text(text: str, path: str, repairs: Counter[str]) -> str:
    """`text` with LF line ends, without control characters and outer white space; a RecordFault if it is unusable."""
    stripped = text.strip()
    if len(stripped) != len(text):
        repairs["white space at the ends removed"] += 1
    return stripped if is_clean(stripped) else _clean(stripped, path, repairs)


def is_clean(text: str) -> bool:
    """Whether a text needs no cleaning, as most do not; five times as fast as the patterns."""
    return "<" not in text and "[" not in text and text.replace("\n", " ").isprintable()


def fill(draft: Draft, texts: Iterable[tuple[str, str]], path: str = "$") -> Draft:
    """The draft with these roles and texts, cleaned, as its messages; or with the fault of the first unusable one."""
    try:
        draft.messages = [{"role": role, "content": clean_text(text, path, draft.repairs)} for role, text in texts]
    except RecordFault as fault:
        draft.fault = fault
    return draft


def _clean(text: str, path: str, repairs: Counter[str]) -> str:
    if not text.isascii() and SURROGATE.search(text):
        raise surrogate_fault(path)
    if token := control_token(text):
        fix = "delete it or write it differently: the model would read it as a command of its chat template"
        if _TEMPLATED.search(text):
            fix = "a chat template was applied to this text already: give the conversation without the template"
        raise RecordFault("CONTROL_TOKEN", path, f'found the control token "{token}"', fix)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        repairs["line ends changed to LF"] += 1
    if _CONTROL_CHARACTER.search(text):
        cleaned, removed = _CONTROL_SEQUENCE.subn("", text)
        if len(text) - len(cleaned) > _CONTROL_SHARE * len(text) and len(text) > 100:
            reason = f"{len(text) - len(cleaned)} of {len(text)} characters are control characters"
            raise RecordFault("BINARY", path, reason, "this is not text: export it again")
        repairs["control characters removed"] += removed
        return _clean(cleaned.strip(), path, repairs)  # removed characters may have split a token
    return text


def fold(text: str) -> str:
    """One form of all texts that differ only in Unicode form (NFC) and white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def fold_conversation(messages: Sequence[Message], plain: bool = False) -> str:
    """Roles and texts in turn, folded, with zeros between: equal for two conversations that count as duplicates.

    `plain` promises texts without outer white space, and without white space other than spaces and line ends.
    """
    parts = [part for message in messages for part in (message["role"], message["content"])]
    if not plain:
        parts = [part.strip() for part in parts]
    # no text holds a zero; replacing empty lines at once saves the loop half of its work
    text = "\0".join(parts).replace("\n\n", " ").replace("\n", " ")
    if not plain and _ODD_SPACE.search(text):
        return fold(text)
    while "  " in text:
        text = text.replace("  ", " ")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def conversation_key(folded: str) -> str:
    """The key of a folded conversation."""
    return hashlib.sha256(folded.encode("utf-8")).hexdigest()


def replies_of(folded: str) -> list[str]:
    """The replies of a folded conversation."""
    parts = folded.split("\0")  # roles and texts in turn, so that every fourth part is a reply
    return parts[5 if parts[0] == "system" else 3 :: 4]


_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}")
_DIGITS = re.compile(r"(?<![\dA-Za-z.])\+?\(?\d(?:[ -]?[\d()]){6,24}[Xx]?(?![\dA-Za-z])")
_KEY = re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
_PHONE = re.compile(
    r"(?:\+?86)?1[3-9]\d{9}|\+\d{8,15}|0\d{9,11}|400\d{7}|\(\d{3}\)\d{7}|\d{3}-\d{3}-\d{4}|\d{3} \d{3} \d{4}"
)


def redact(text: str, repairs: Counter[str]) -> str:
    """`text` with e-mail addresses, keys, phone, identity and bank card numbers replaced by [email], [key], ..."""
    if "@" in text:
        text, count = _EMAIL.subn("[email]", text)
        _count(repairs, "email", count)
    if any(mark in text for mark in ("sk-", "hf_", "gh", "AKIA")):
        text, count = _KEY.subn("[key]", text)
        _count(repairs, "key", count)

    def masked(match: re.Match[str]) -> str:
        kind = _kind(match[0])
        _count(repairs, str(kind), kind is not None)
        return f"[{kind}]" if kind else match[0]

    return _DIGITS.sub(masked, text)


def _count(repairs: Counter[str], kind: str, count: int) -> None:
    if count:
        repairs[f"personal data masked: {kind}"] += count


def personal_data(text: str) -> Counter[str]:
    """How many pieces of personal data of each kind `text` holds."""
    masked: Counter[str] = Counter()
    redact(text, masked)
    return Counter({name.rpartition(" ")[2]: count for name, count in masked.items()})


def _kind(written: str) -> str | None:
    """The kind of a run of digits: "id", "card" (of a bank), "phone", or None for a plain number."""
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


def refine(draft: Draft, options: Options) -> list[Draft]:
    """The draft after the options were applied; several with --too-long split. A fault is set in the draft."""
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
    """`text` with {{user}} and {{char}} replaced by names, if the options name them."""
    count = 0
    if options.user_name is not None:
        text, count = USER_MACRO.subn(lambda _: options.user_name or "", text)
    if options.characters:
        text, more = CHARACTER_MACRO.subn(lambda _: options.characters[0], text)
        count += more
    if count:
        repairs["placeholders replaced by names"] += count
    return text


_GARBLED = re.compile(r"[ÃÂâåæäçèé][\x80-\xbf\u0152-\u0178\u2013-\u2122]|[\u0080-\u009f]|鈥|锛|銆|鐨|浣犲")


def garbled(text: str) -> bool:
    """Whether a text looks like mojibake: UTF-8 that was read in another encoding."""
    return not text.isascii() and ("锟斤拷" in text or _GARBLED.search(text) is not None)


def mend(text: str, repairs: Counter[str]) -> str:
    """`text` before its UTF-8 was read as Windows-1252, Latin-1 or GBK, if undoing that gives clean text."""
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
            reason = f"found a reply of {len(message['content'])} characters, fewer than --min-chars {minimum}"
            return RecordFault("TOO_SHORT", f"$.messages[{index}].content", reason, "lower --min-chars to keep it")
    return None


def _shortened(draft: Draft, options: Options) -> list[Draft]:
    """The conversation without turns that are too long: its first part, or all parts; a turn is never cut."""
    long = [i for i, message in enumerate(draft.messages) if len(message["content"]) > options.max_chars]
    reason = f"found {len(draft.messages[long[0]]['content']):,} characters in a turn, more than {options.max_chars:,}"
    fix = "--too-long truncate keeps the turns before it, --too-long split also those after it; or raise --max-chars"
    fault = RecordFault("TOO_LONG", f"$.messages[{long[0]}].content", reason, fix)
    system = draft.messages[:1] if draft.messages[0]["role"] == "system" else []
    parts = _parts(draft.messages[len(system) :], options)
    if options.too_long == "reject" or not parts or 0 in long[: len(system)]:
        return [replace(draft, fault=fault)]
    name = "conversation cut before a turn that is too long"
    if options.too_long == "truncate":
        parts = parts[:1]
    drafts = [
        Draft([*system, *part], Counter({name: 1}), draft.meta, draft.group, draft.line, draft.path, part=True)
        for part in parts
    ]
    drafts[0].repairs += draft.repairs
    drafts[0].learned, drafts[0].context, drafts[0].fresh = draft.learned, draft.context, draft.fresh
    return drafts


def _parts(messages: list[Message], options: Options) -> list[list[Message]]:
    """The exchanges between turns that are too long."""
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
