"""What chat programs have in common: messages with a sender and a time, cut into conversations where nobody spoke."""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from persona.convert.dialogue import Script, Speech
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
_TIMES = ("%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y/%m/%d %H:%M")


@dataclass(slots=True)
class Said:
    """One message; `left_out` says why it is no speech."""

    speaker: str
    text: str
    line: int
    time: float | None = None  # seconds
    left_out: str | None = None


def without_marks(text: str) -> str:
    """`text` without invisible direction marks."""
    return text if text.isascii() else _MARKS.sub("", text)


def seconds(value: object) -> float | None:
    """A time as programs write it, in seconds; None where it is no time."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value / 1000 if abs(value) > 1e11 else float(value)
    text = str(value or "").strip()
    if re.fullmatch(r"\d{9,13}(?:\.\d{1,9})?", text):
        return seconds(float(text))
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = next((time for pattern in _TIMES if (time := _read(text, pattern))), None)
    if found is None:
        return None
    aware = found if found.tzinfo else found.replace(tzinfo=UTC)  # only differences count
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()


def _read(text: str, pattern: str) -> datetime | None:
    try:
        return datetime.strptime(text, pattern)
    except ValueError:
        return None


def to_script(messages: list[Said], options: Options) -> Script:
    """The speeches of a chat; a pause longer than --max-gap is the border of a scene."""
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
    return Script(speeches, timed, layout, left_out=left_out)


def _why_left_out(text: str) -> str | None:
    if not text:
        return NO_TEXT
    if _MEDIA.fullmatch(text):
        return MEDIA
    return SYSTEM_LINE if _NOTICE.fullmatch(text) else None
