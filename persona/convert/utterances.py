"""Dialogue rows: one utterance a row, {"role": "阿虚", "text": "你好"}, or an array of utterances a row."""

from collections import Counter
from typing import Any

from persona.convert.dialogue import NARRATOR, Script, Speech, strip_quotes
from persona.convert.json_input import Row
from persona.convert.options import Options
from persona.strict_json import scan_json

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
