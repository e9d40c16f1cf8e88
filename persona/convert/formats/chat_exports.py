"""Chats exported as tables or JSON: WeChat, Discord, Telegram and SillyTavern, each recognised by its keys."""

from collections import Counter
from typing import Any

from persona.convert.formats.chats import BOT, MEDIA, NO_TEXT, SYSTEM_LINE, Said, seconds, to_script
from persona.convert.formats.dialogue import NARRATOR, Script, Speech, strip_quotes
from persona.convert.formats.json_rows import Row
from persona.convert.options import Options
from persona.files import scan_json

Values = list[dict[str, Any]]
ME = "我"
_TEXT_TYPES = {"1", "文本", "text", "文字"}
_NOTICE_TYPES = {"10000", "10002", "系统消息", "系统", "系统通知"}


def recognise_wechat(first: Values) -> str | None:
    """Why rows are a WeChat export, or None; `first` are the first rows of the file."""
    keys = set(first[0])
    for needed, name in (
        ({"IsSender", "CreateTime", "StrContent"}, "localId, IsSender, StrContent"),
        ({"is_sender", "msg", "CreateTime"}, "is_sender, talker, msg"),
        ({"Time", "SenderName", "Content"}, "Time, SenderName, Content"),
        ({"talker", "isSelf", "content", "time"}, "talker, isSelf, content"),
    ):
        if needed <= keys:
            return f"WeChat export, with {name}"
    return None


def read_wechat(rows: list[Row], options: Options) -> Script:
    """The speeches of a WeChat export; the owner of the phone is 我, or --user-name."""
    me = options.user_name or ME
    return to_script([_wechat(row.value, row.line, me) for row in rows], options)


def _wechat(row: dict[str, Any], line: int, me: str) -> Said:
    if "IsSender" in row:
        kind, mine, text, name = row.get("Type"), row["IsSender"], row["StrContent"], None
    elif "is_sender" in row:
        kind, mine, text, name = row.get("type_name", row.get("type")), row["is_sender"], row["msg"], None
    elif "SenderName" in row:
        kind, mine, text, name = row.get("Type"), row.get("IsSelf"), row["Content"], row["SenderName"]
    else:
        kind, mine, text, name = row.get("type"), row["isSelf"], row["content"], row.get("senderName")
    mine = str(mine).strip().casefold() in ("1", "true", "是")
    name = name or row.get("NickName") or row.get("Remark") or row.get("sender") or row.get("talker")
    name = name or row.get("TalkerId") or row.get("StrTalker") or "对方"
    time = seconds(row.get("CreateTime", row.get("Time", row.get("time"))))
    kind = str(1 if kind in (None, "") else kind).strip().casefold()
    left_out = None if kind in _TEXT_TYPES else SYSTEM_LINE if kind in _NOTICE_TYPES else MEDIA
    return Said(me if mine else str(name), _text(text), line, time, left_out)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def recognise_discord(first: Values) -> str | None:
    """Why a file is an export of DiscordChatExporter, or None."""
    message = _first_message(first)
    author = message.get("author")
    if isinstance(author, dict) and "content" in message and "timestamp" in message:
        return "Discord export: messages with author, content and timestamp"
    return None


def read_discord(rows: list[Row], options: Options) -> Script:
    """The speeches of a Discord export; bots and notices are left out."""
    said: list[Said] = []
    for message, line in _messages(rows):
        author = message.get("author")
        author = author if isinstance(author, dict) else {}
        left_out = BOT if author.get("isBot") else None
        if message.get("type", "Default") not in ("Default", "Reply", 0, 19):
            left_out = SYSTEM_LINE
        text = _text(message.get("content"))
        if not text.strip() and message.get("attachments"):
            left_out = left_out or MEDIA
        name = _text(author.get("nickname") or author.get("name"))
        said.append(Said(name, text, line, seconds(message.get("timestamp")), left_out))
    return to_script(said, options)


def recognise_telegram(first: Values) -> str | None:
    """Why a file is Telegram's result.json, or None."""
    message = _first_message(first)
    if "date" in message and ("from" in message or "actor" in message) and ("text" in message or "action" in message):
        return "Telegram export: messages with from, date and text"
    return None


def read_telegram(rows: list[Row], options: Options) -> Script:
    """The speeches of a Telegram export; service messages and media are left out."""
    said: list[Said] = []
    for message, line in _messages(rows):
        parts = message.get("text")
        parts = parts if isinstance(parts, list) else [parts]
        text = "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in parts)
        left_out = SYSTEM_LINE if message.get("type", "message") != "message" else None
        if not text.strip() and (message.get("media_type") or message.get("photo") or message.get("file")):
            left_out = left_out or MEDIA
        time = seconds(message.get("date_unixtime") or message.get("date"))
        said.append(Said(_text(message.get("from")) or "(deleted account)", text, line, time, left_out))
    return to_script(said, options)


def _first_message(first: Values) -> dict[str, Any]:
    messages = first[0].get("messages")
    if len(first) == 1 and isinstance(messages, list) and messages and isinstance(messages[0], dict):
        return messages[0]
    return {}


def _messages(rows: list[Row]) -> list[tuple[dict[str, Any], int]]:
    found = [message for row in rows for message in row.value.get("messages") or []]
    return [(message, number) for number, message in enumerate(found, 1) if isinstance(message, dict)]


def recognise_tavern(first: Values) -> str | None:
    """Why rows are a SillyTavern chat, or None."""
    if {"user_name", "character_name"} <= first[0].keys():
        return "SillyTavern chat: a first line with user_name and character_name"
    if all("mes" in row or "swipes" in row for row in first) and any("is_user" in row for row in first):
        return "SillyTavern chat: lines with name, is_user and mes"
    return None


def read_tavern(rows: list[Row], options: Options) -> Script:
    """The speeches of a SillyTavern chat: of several answers the one that was chosen, system lines left out."""
    said: list[Said] = []
    for row in rows:
        value = row.value
        if "user_name" in value and "mes" not in value:
            continue
        text, swipes, chosen = value.get("mes"), value.get("swipes"), value.get("swipe_id")
        if text is None and isinstance(swipes, list) and swipes:
            chosen = chosen if isinstance(chosen, int) and 0 <= chosen < len(swipes) else 0
            text = swipes[chosen]
        left_out = SYSTEM_LINE if value.get("is_system") else None if _text(text).strip() else NO_TEXT
        said.append(Said(_text(value.get("name")) or "(unknown)", _text(text), row.line, None, left_out))
    return to_script(said, options)


# --- utterances -------------------------------------------------------------------------------------------------------
# Dialogue rows: one utterance a row, {"role": "阿虚", "text": "你好"}, or an array of utterances a row.


_NAMES = ("role", "speaker", "name", "from", "character", "角色", "说话人", "人物")
_TEXTS = ("text", "dialogue", "content", "line", "value", "台词", "对白", "内容")
_SCENES = ("scene", "scene_id", "source_title", "chapter", "episode")
_OTHER_ROLES = {"user", "assistant", "system", "human", "gpt", "bot", "model", "tool", "chatgpt", "prompter"}


def recognise(first: list[dict[str, Any]]) -> str | None:
    """Why rows are utterances of named speakers, or None."""
    for row in first:
        inner = row.get("dialogue")
        sample = inner[0] if isinstance(inner, list) and inner and isinstance(inner[0], dict) else row
        keys = _keys(sample)
        if keys is None or len(sample) > 6:
            return None
        if str(sample[keys[0]]).strip().casefold() in _OTHER_ROLES:
            return None
    name, text = _keys(first[0]) or ("role", "dialogue")
    return f'an utterance a row, with "{name}" and "{text}"'


def one_scene_a_line(head: str) -> bool:
    """Whether the first line is an array of utterances, and so a scene by itself."""
    line = head.removeprefix("\ufeff").lstrip().partition("\n")[0]
    if not line.startswith("[{") or not line.rstrip().endswith("]"):
        return False
    try:
        value, end, _ = scan_json(line)
    except ValueError:
        return False
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return end == len(line.rstrip()) and bool(turns) and (
        recognise([{"dialogue": value}]) is not None and len(head.strip()) > len(line.rstrip())
    )  # fmt: skip


def _keys(row: dict[str, Any]) -> tuple[str, str] | None:
    folded = {key.strip().casefold(): key for key, value in row.items() if isinstance(value, str)}
    name = next((folded[key] for key in _NAMES if key in folded), None)
    text = next((folded[key] for key in _TEXTS if key in folded and folded[key] != name), None)
    return (name, text) if name and text else None


def read(rows: list[Row], options: Options) -> Script:
    """The speeches of utterance rows; an array of utterances is a scene, and so is each value of a scene column."""
    speeches: list[Speech] = []
    repairs: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    scene, mark, bordered = 0, None, False
    for row in rows:
        inner = row.value.get("dialogue") if isinstance(row.value, dict) else row.value
        if isinstance(inner, list):
            scene, bordered = scene + 1, True
            values = inner
        else:
            values = [row.value]
            found = next((row.value[key] for key in _SCENES if key in row.value), None)
            if found != mark:
                scene, mark, bordered = scene + (bordered or mark is not None), found, True
        for value in values:
            keys = _keys(value) if isinstance(value, dict) else None
            if keys is None:
                left_out["not an utterance with a name and a text"] += 1
                continue
            speeches.append(_speech(value, keys, row.line, scene, repairs, options))
    layout = "an utterance a row" + (", scenes as the rows have them" if bordered else "")
    return Script(speeches, bordered, layout, +repairs, left_out=left_out)


def _speech(
    value: dict[str, Any], keys: tuple[str, str], line: int, scene: int, repairs: Counter[str], options: Options
) -> Speech:
    text = value[keys[1]].replace("\r\n", "\n").replace("\r", "\n").strip()
    text = text if options.keep_quotes else strip_quotes(text, repairs)
    speaker = NARRATOR if value.get("if_scene") is True else value[keys[0]].strip() or NARRATOR
    return Speech(speaker, text, line, scene)
