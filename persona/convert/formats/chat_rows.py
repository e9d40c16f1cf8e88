"""Chats as JSON or tables: WeChat, Discord, Telegram, SillyTavern; and rows of a speech with its speaker each."""

from collections import Counter

from persona.convert.formats.chat_texts import BOT, MEDIA, NO_TEXT, SYSTEM_LINE, ChatMessage, seconds, to_script
from persona.convert.formats.dialogue import strip_quotes
from persona.convert.formats.format import FileFormat, Row
from persona.convert.formats.scenes import NARRATOR, Script, Speech
from persona.convert.options import Options
from persona.files import JsonObject

ME = "我"
_TEXT_TYPES = {"1", "文本", "text", "文字"}
_NOTICE_TYPES = {"10000", "10002", "系统消息", "系统", "系统通知"}
_WECHAT = (  # the columns of different programs
    ("IsSender", "CreateTime", "StrContent"),
    ("is_sender", "CreateTime", "msg"),
    ("Time", "SenderName", "Content"),
    ("talker", "isSelf", "content", "time"),
)
_NAMES = ("role", "speaker", "name", "from", "character", "角色", "说话人", "人物")
_TEXTS = ("text", "dialogue", "content", "line", "value", "台词", "对白", "内容")
_SCENES = ("scene", "scene_id", "source_title", "chapter", "episode")
_OTHER_ROLES = {"user", "assistant", "system", "human", "gpt", "bot", "model", "tool", "chatgpt", "prompter"}


def _is_wechat(first: list[JsonObject]) -> str | None:
    columns = next((names for names in _WECHAT if set(names) <= first[0].keys()), None)
    return f"WeChat export, with {', '.join(columns)}" if columns else None


def _wechat(rows: list[Row], options: Options) -> Script:
    """The speeches of a WeChat export; the owner of the phone is 我, or --user-name."""
    me = options.user_name or ME
    return to_script([_wechat_message(row.value, row.line, me) for row in rows], options)


def _wechat_message(row: JsonObject, line: int, me: str) -> ChatMessage:
    if "IsSender" in row:
        kind, mine, text, name = row.get("Type"), row["IsSender"], row.get("StrContent"), None
    elif "is_sender" in row:
        kind, mine, text, name = row.get("type_name", row.get("type")), row["is_sender"], row.get("msg"), None
    elif "SenderName" in row:
        kind, mine, text, name = row.get("Type"), row.get("IsSelf"), row.get("Content"), row["SenderName"]
    else:
        kind, mine, text, name = row.get("type"), row.get("isSelf"), row.get("content"), row.get("senderName")
    mine = str(mine).strip().casefold() in ("1", "true", "是")
    name = name or row.get("NickName") or row.get("Remark") or row.get("sender") or row.get("talker")
    name = name or row.get("TalkerId") or row.get("StrTalker") or "对方"
    time = seconds(row.get("CreateTime", row.get("Time", row.get("time"))))
    kind = str(1 if kind in (None, "") else kind).strip().casefold()
    left_out = None if kind in _TEXT_TYPES else SYSTEM_LINE if kind in _NOTICE_TYPES else MEDIA
    return ChatMessage(me if mine else str(name), _text(text), line, time, left_out)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _messages(values: list[JsonObject]) -> list[tuple[int, JsonObject]]:
    """The numbered messages of an export: of one chat, or of the chats that Telegram exports together."""
    messages: list[object] = []
    for value in values:
        chats = value.get("chats")
        several = chats.get("list") if isinstance(chats, dict) else None
        for chat in several if isinstance(several, list) else [value]:
            listed = chat.get("messages") if isinstance(chat, dict) else None
            messages += listed if isinstance(listed, list) else []
    return [(number, message) for number, message in enumerate(messages, 1) if isinstance(message, dict)]


def _first_message(first: list[JsonObject]) -> JsonObject:
    return next((message for number, message in _messages(first) if number == 1), {}) if len(first) == 1 else {}


def _is_discord(first: list[JsonObject]) -> str | None:
    message = _first_message(first)
    if isinstance(message.get("author"), dict) and "content" in message and "timestamp" in message:
        return "Discord export: messages with author, content and timestamp"
    return None


def _discord(rows: list[Row], options: Options) -> Script:
    """The speeches of an export by DiscordChatExporter, without bots and notices."""
    messages: list[ChatMessage] = []
    for line, message in _messages([row.value for row in rows]):
        author = message.get("author")
        author = author if isinstance(author, dict) else {}
        text = _text(message.get("content"))
        left_out = BOT if author.get("isBot") else None
        if message.get("type", "Default") not in ("Default", "Reply", 0, 19):
            left_out = SYSTEM_LINE
        elif not text.strip() and message.get("attachments"):
            left_out = left_out or MEDIA
        name = _text(author.get("nickname") or author.get("name"))
        messages.append(ChatMessage(name, text, line, seconds(message.get("timestamp")), left_out))
    return to_script(messages, options)


def _is_telegram(first: list[JsonObject]) -> str | None:
    keys = _first_message(first).keys()
    if "date" in keys and ("from" in keys or "actor" in keys) and ("text" in keys or "action" in keys):
        return "Telegram export: messages with from, date and text"
    return None


def _telegram(rows: list[Row], options: Options) -> Script:
    """The speeches of Telegram's result.json, without service messages and media."""
    messages: list[ChatMessage] = []
    for line, message in _messages([row.value for row in rows]):
        parts = message.get("text")
        parts = parts if isinstance(parts, list) else [parts]
        text = "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in parts)
        left_out = SYSTEM_LINE if message.get("type", "message") != "message" else None
        if not text.strip() and (message.get("media_type") or message.get("photo") or message.get("file")):
            left_out = left_out or MEDIA
        time = seconds(message.get("date_unixtime") or message.get("date"))
        messages.append(ChatMessage(_text(message.get("from")) or "(deleted account)", text, line, time, left_out))
    return to_script(messages, options)


def _is_tavern(first: list[JsonObject]) -> str | None:
    if {"user_name", "character_name"} <= first[0].keys():
        return "SillyTavern chat: a first line with user_name and character_name"
    if all("mes" in row or "swipes" in row for row in first) and any("is_user" in row for row in first):
        return "SillyTavern chat: lines with name, is_user and mes"
    return None


def _tavern(rows: list[Row], options: Options) -> Script:
    """The speeches of a SillyTavern chat with the chosen one of several answers, without system lines."""
    messages: list[ChatMessage] = []
    for row in rows:
        value = row.value
        if "user_name" in value and "mes" not in value:
            continue
        text, swipes, chosen = value.get("mes"), value.get("swipes"), value.get("swipe_id")
        if text is None and isinstance(swipes, list) and swipes:
            chosen = chosen if isinstance(chosen, int) and 0 <= chosen < len(swipes) else 0
            text = swipes[chosen]
        left_out = SYSTEM_LINE if value.get("is_system") else None if _text(text).strip() else NO_TEXT
        messages.append(ChatMessage(_text(value.get("name")) or "(unknown)", _text(text), row.line, None, left_out))
    script = to_script(messages, options)
    name = rows[0].value.get("character_name") if rows else None
    script.character = name if isinstance(name, str) and name in script.speakers else None
    return script


def _are_utterances(first: list[JsonObject]) -> str | None:
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


def _keys(row: JsonObject) -> tuple[str, str] | None:
    folded = {key.strip().casefold(): key for key, value in row.items() if isinstance(value, str)}
    name = next((folded[key] for key in _NAMES if key in folded), None)
    text = next((folded[key] for key in _TEXTS if key in folded and folded[key] != name), None)
    return (name, text) if name and text else None


def _utterances(rows: list[Row], options: Options) -> Script:
    """The speeches of rows; an array of utterances is a scene, and so is each value of a scene column."""
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
            here = next((row.value[key] for key in _SCENES if key in row.value), None)
            if here != mark:
                scene, mark, bordered = scene + (bordered or mark is not None), here, True
        for value in values:
            keys = _keys(value) if isinstance(value, dict) else None
            if keys is None:
                left_out["not an utterance with a name and a text"] += 1
                continue
            speeches.append(_speech(value, keys, row.line, scene, repairs, options))
    layout = "an utterance a row" + (", scenes as the rows have them" if bordered else "")
    return Script(speeches, bordered, +repairs, layout=layout, left_out=left_out)


def _speech(
    value: JsonObject, keys: tuple[str, str], line: int, scene: int, repairs: Counter[str], options: Options
) -> Speech:
    text = value[keys[1]].replace("\r\n", "\n").replace("\r", "\n").strip()
    text = text if options.keep_quotes else strip_quotes(text, repairs)
    speaker = NARRATOR if value.get("if_scene") is True else value[keys[0]].strip() or NARRATOR
    return Speech(speaker, text, line, scene)


DISCORD = FileFormat("discord", _is_discord, _discord)
TELEGRAM = FileFormat("telegram", _is_telegram, _telegram)
TAVERN = FileFormat("sillytavern", _is_tavern, _tavern)
WECHAT = FileFormat("wechat", _is_wechat, _wechat, header=lambda row, _: _is_wechat([row]))
UTTERANCES = FileFormat(
    "utterances", _are_utterances, _utterances, header=lambda row, _: _are_utterances([row]), of_lists=True
)
