"""Chats exported as plain text: QQ, with the sender on a line above the words, and WhatsApp, with both on one line."""

import re

from persona.convert.chats import SYSTEM_LINE, Said, seconds, to_script, without_marks
from persona.convert.dialogue import Script
from persona.convert.options import Options

_QQ = re.compile(
    r"(?P<time>\d{4}[-/]\d{1,2}[-/]\d{1,2} \d{1,2}:\d{2}:\d{2}) (?:【[^】]{1,20}】)?(?P<name>.*?)"
    r"(?:\((?P<id>\d{4,12}|[^()\s]{1,64}@[^()\s]{1,64})\)|<(?P<mail>[^<>\s]{1,64}@[^<>\s]{1,64})>)?\s*"
)
_QQ_HEAD = re.compile(r"={10,}|消息(?:分组|对象)[:：].*")  # before the messages of each friend
_WHATSAPP = re.compile(
    r"\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),? "
    r"(?P<clock>\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:[ \u202f\u00a0]?[AaPp]\.?[Mm]\.?)?)"
    r"(?:\] ?| - )(?P<rest>.*)"
)
_NAMED = re.compile(r"(?P<name>[^:]{1,60}?): (?P<text>.*)", re.DOTALL)
_QQ_NOTICES = ("系统消息", "10000", "1000000")


def recognise_qq(head: str) -> str | None:
    """Why the text is a QQ export, or None."""
    found = [match for line in head.split("\n")[:200] if (match := _QQ.fullmatch(line.strip()))]
    numbered = sum(bool(match["id"] or match["mail"]) for match in found)
    if numbered >= 2:
        return "a QQ export: headers of the form 2017-02-25 10:40:20 NAME(12345)"
    names = {match["name"] for match in found}  # a friend's chat has no numbers; lines of a log recur less
    return "a QQ export: headers of the form 2017-02-25 10:40:20 NAME" if len(found) >= 2 * len(names) > 0 else None


def recognise_whatsapp(head: str) -> str | None:
    """Why the text is a WhatsApp export, or None."""
    lines = [without_marks(line) for line in head.split("\n")[:200]]
    found = [match for line in lines if (match := _WHATSAPP.fullmatch(line.strip()))]
    named = sum(_NAMED.fullmatch(match["rest"]) is not None for match in found)
    return "a WhatsApp export: lines of the form [31/12/23, 23:59:59] NAME: words" if named >= 2 else None


def read_qq(text: str, options: Options) -> Script:
    """The speeches of a QQ export; senders are told apart by their names as they stand there."""
    messages: list[Said] = []
    words: list[str] | None = None
    kept: list[tuple[Said, list[str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if head := _QQ.fullmatch(line.strip()):
            notice = head["name"] in _QQ_NOTICES or head["id"] in _QQ_NOTICES
            name = head["name"].strip() or head["id"] or head["mail"]
            said = Said(name, "", number, seconds(_padded(head["time"])), SYSTEM_LINE if notice else None)
            words = []
            kept.append((said, words))
            messages.append(said)
        elif words is not None and not _QQ_HEAD.fullmatch(line.strip()):
            words.append(line)
    for said, lines in kept:
        said.text = "\n".join(lines).strip()
    return to_script(messages, options)


def _padded(time: str) -> str:
    date, clock = time.replace("/", "-").split(" ")
    year, month, day = date.split("-")
    return f"{year}-{month:0>2}-{day:0>2} {clock:0>8}"


def read_whatsapp(text: str, options: Options) -> Script:
    """The speeches of a WhatsApp export; lines without a time go on with the message before them."""
    messages: list[Said] = []
    day_first = _day_first(text)
    for number, raw in enumerate(text.split("\n"), 1):
        line = without_marks(raw).rstrip("\r")
        if match := _WHATSAPP.fullmatch(line):
            named = _NAMED.fullmatch(match["rest"])
            time = _time(match["date"], match["clock"], day_first)
            if named:
                messages.append(Said(named["name"].strip(" ~"), named["text"], number, time))
            else:
                messages.append(Said("", match["rest"], number, time, SYSTEM_LINE))
        elif messages:
            messages[-1].text += f"\n{line}"
    return to_script(messages, options)


def _day_first(text: str) -> bool:
    """Whether dates begin with the day: some first number is above 12, or no second one is."""
    dates = [re.split(r"[./-]", match["date"]) for match in _WHATSAPP.finditer(without_marks(text)[:1_000_000])]
    return any(int(date[0]) > 12 for date in dates) or not any(int(date[1]) > 12 for date in dates)


def _time(date: str, clock: str, day_first: bool) -> float | None:
    first, second, third = re.split(r"[./-]", date)
    year, month, day = (third, second, first) if day_first else (third, first, second)
    if len(first) == 4:
        year, month, day = first, second, third
    parts = re.findall(r"\d+", clock)
    hour = int(parts[0]) % 12 + 12 * ("p" in clock.lower()) if "m" in clock.lower() else int(parts[0])
    rest = ":".join(parts[1:]) if len(parts) > 2 else f"{parts[1]}:00"
    return seconds(f"{int(year) + 2000 * (len(year) == 2)}-{month:0>2}-{day:0>2} {hour:02}:{rest}")
