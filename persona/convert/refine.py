"""What options ask of a conversation's texts after it was read: mended, masked, filled in, cut, or refused."""

import re
from collections import Counter
from dataclasses import replace

from persona.convert.draft import Draft, Message
from persona.convert.options import Options
from persona.convert.privacy import redact
from persona.records import RecordFault

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
