"""Chats: messages with a sender and a time, cut into conversations at pauses; and the plain text of QQ and WhatsApp.

QQ writes the sender on a line above the words, WhatsApp both on one line. For JSON and tables see `chat_rows`.
"""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from persona.convert.formats.format import Text, TextFormat
from persona.convert.formats.scenes import Script, Speech
from persona.convert.options import Options

SYSTEM_LINE = "notice of the chat program"
MEDIA = "picture, voice message or file"
NO_TEXT = "message without text"
BOT = "message of a bot"
_MEDIA = re.compile(
    r"\[?(?:图片|圖片|语音|視頻|视频|文件|表情|动画表情|位置|名片|链接|红包|转账|语音通话|视频通话|聊天记录|小程序|闪照|"
    r"Photo|Image|Video|Voice|Sticker|File|GIF)\]"
    r"|<(?:Media omitted|省略多媒体文件|媒体文件已忽略|img[^>]*|attached: [^>]*)>"
    r"|(?:image|video|audio|sticker|GIF|document|Contact card) omitted|.{0,200}\((?:file attached|文件已附加)\)",
    re.IGNORECASE,
)
_NOTICE = re.compile(
    r".{0,40}撤回了一条消息.{0,20}|.{0,40}(?:加入|退出)了?群聊.{0,20}|.{0,40}邀请.{0,60}加入了群聊.{0,20}|.{0,40}拍了拍.{0,60}"
    r"|This message was deleted\.?|You deleted this message\.?|.{0,60}end-to-end encrypted.{0,200}"
    r"|.{0,60}(?:recalled|unsent) a message\.?",
    re.IGNORECASE,
)
_MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")  # invisible direction marks that exports add
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
_TIME = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})\s+(\d{1,2}):(\d{1,2})(?::(\d{1,2}))?")


@dataclass(slots=True)
class ChatMessage:
    """One message; `left_out` is the reason why it is not a speech."""

    speaker: str
    text: str
    line: int
    time: float | None = None  # seconds
    left_out: str | None = None


def without_marks(text: str) -> str:
    """`text` without invisible direction marks."""
    return text if text.isascii() else _MARKS.sub("", text)


def seconds(value: object) -> float | None:
    """A time, in any form that chat programs write, in seconds; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value / 1000 if abs(value) > 1e11 else float(value)
    text = str(value or "").strip()
    if re.fullmatch(r"\d{9,13}(?:\.\d{1,9})?", text):
        return seconds(float(text))
    try:
        if match := _TIME.fullmatch(text):
            time = datetime(*map(int, match.groups("0")), tzinfo=UTC)
        else:
            time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time.replace(tzinfo=time.tzinfo or UTC).timestamp()  # only differences count


def to_script(messages: list[ChatMessage], options: Options) -> Script:
    """The speeches of a chat; a pause longer than --max-gap ends a scene."""
    speeches: list[Speech] = []
    left_out: Counter[str] = Counter()
    scene, last = 0, None
    pauses = 0
    for message in messages:
        if message.time is not None and last is not None and abs(message.time - last) > 60 * options.max_gap:
            scene += 1
            pauses += 1
        last = message.time if message.time is not None else last
        text = without_marks(message.text).strip()
        if why := message.left_out or _why_left_out(text):
            left_out[why] += 1
        else:
            speeches.append(Speech(without_marks(message.speaker).strip() or "(unknown)", text, message.line, scene))
    timed = any(message.time is not None for message in messages)
    layout = f"cut at pauses of more than {options.max_gap:g} minutes ({pauses:,})" if timed else "without times"
    return Script(speeches, timed, layout=layout, left_out=left_out)


def _why_left_out(text: str) -> str | None:
    if not text:
        return NO_TEXT
    if _MEDIA.fullmatch(text):
        return MEDIA
    return SYSTEM_LINE if _NOTICE.fullmatch(text) else None


def _is_qq(text: Text, _options: Options) -> str | None:
    headers = [match for line in text.head.split("\n")[:200] if (match := _QQ.fullmatch(line.strip()))]
    numbered = sum(bool(match["id"] or match["mail"]) for match in headers)
    if numbered >= 2:
        return "a QQ export: headers of the form 2017-02-25 10:40:20 NAME(12345)"
    names = {match["name"] for match in headers}  # a chat with a friend has no numbers; lines of a log recur less
    return "a QQ export: headers of the form 2017-02-25 10:40:20 NAME" if len(headers) >= 2 * len(names) > 0 else None


def _qq(text: Text, options: Options) -> Script:
    """The speeches of a QQ export; a sender is known by the name in the header."""
    messages: list[tuple[ChatMessage, list[str]]] = []
    for number, line in enumerate(text.whole().split("\n"), 1):
        if header := _QQ.fullmatch(line.strip()):
            notice = header["name"] in _QQ_NOTICES or header["id"] in _QQ_NOTICES
            name = header["name"].strip() or header["id"] or header["mail"]
            time = seconds(header["time"])
            messages.append((ChatMessage(name, "", number, time, SYSTEM_LINE if notice else None), []))
        elif messages and not _QQ_HEAD.fullmatch(line.strip()):
            messages[-1][1].append(line)
    for message, lines in messages:
        message.text = "\n".join(lines).strip()
    return to_script([message for message, _ in messages], options)


def _is_whatsapp(text: Text, _options: Options) -> str | None:
    lines = [without_marks(line) for line in text.head.split("\n")[:200]]
    matches = [match for line in lines if (match := _WHATSAPP.fullmatch(line.strip()))]
    named = sum(_NAMED.fullmatch(match["rest"]) is not None for match in matches)
    return "a WhatsApp export: lines of the form [31/12/23, 23:59:59] NAME: words" if named >= 2 else None


def _whatsapp(text: Text, options: Options) -> Script:
    """The speeches of a WhatsApp export; a line without a time belongs to the message before it."""
    messages: list[ChatMessage] = []
    whole = text.whole()
    day_first = _day_first(whole)
    for number, raw in enumerate(whole.split("\n"), 1):
        line = without_marks(raw).rstrip("\r")
        if match := _WHATSAPP.fullmatch(line):
            named = _NAMED.fullmatch(match["rest"])
            time = _time(match["date"], match["clock"], day_first)
            if named:
                messages.append(ChatMessage(named["name"].strip(" ~"), named["text"], number, time))
            else:
                messages.append(ChatMessage("", match["rest"], number, time, SYSTEM_LINE))
        elif messages:
            messages[-1].text += f"\n{line}"
    return to_script(messages, options)


def _day_first(text: str) -> bool:
    """Whether dates begin with the day: some first number is above 12, or no second number is."""
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


QQ = TextFormat("qq", _is_qq, _qq)
WHATSAPP = TextFormat("whatsapp", _is_whatsapp, _whatsapp)
