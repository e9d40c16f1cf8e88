"""Pair rows of role-play sets: {"role_A", "role_B", "query": "「...」", "response": "「...」"}, and questions with
`chat_history` whose texts begin with the speaker's name."""

import re
from collections import Counter
from typing import Any

from persona.convert.dialogue import strip_quotes
from persona.convert.draft import Draft, extras
from persona.convert.options import Options
from persona.convert.turns import Turn, content_of, to_messages
from persona.records import RecordFault

_KNOWN = frozenset(("role_A", "role_B", "query", "response", "answer", "chat_history", "context", "source"))
_NAMED = re.compile(r"(?P<name>[^\s:：「“\"]{1,20})\s*[:：]\s*(?P<text>\S.*)", re.DOTALL)


def recognise(row: dict[str, Any], _options: Options) -> str | None:
    """Why the row is a pair of named speakers, or None."""
    if "query" not in row or not ("response" in row or "answer" in row):
        return None
    if "role_A" in row or "role_B" in row:
        return 'rows have "role_A", "role_B", "query" and the response'
    return 'rows have "query", the answer and "chat_history"' if "chat_history" in row else None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row: the history, the question, the answer."""
    repairs: Counter[str] = Counter()
    reply_key = "response" if "response" in row else "answer"
    speaker, reply = _words(row[reply_key], f"$.{reply_key}", repairs, options)
    speaker = _name(row.get("role_B")) or speaker
    _check_speaker(speaker, options)
    turns: list[Turn] = []
    for index, said in enumerate(_history(row.get("chat_history"))):
        path = f"$.chat_history[{index}]"
        name, text = _words(said, path, repairs, options)
        role = "assistant" if name and name == speaker else "user"
        if turns and turns[-1].role == role:
            turns[-1].content += f"\n{text}"
        else:
            turns.append(Turn(role, text, path))
    question = _words(row["query"], "$.query", repairs, options)[1]
    if turns and turns[-1].role == "user":
        question = f"{turns.pop().content}\n{question}"
    turns += [Turn("user", question, "$.query"), Turn("assistant", reply, f"$.{reply_key}")]
    meta = extras(row, _KNOWN, repairs)
    if speaker:
        meta["character"] = speaker
    return Draft(to_messages(turns, "", "$", repairs, options), repairs, meta)


def _check_speaker(speaker: str, options: Options) -> None:
    if options.characters and speaker and speaker not in options.characters:
        fix = "only replies of --character are learned; add this name to learn it too"
        raise RecordFault("OTHER_SPEAKER", "$", f'the reply is spoken by "{speaker[:30]}"', fix)


def _name(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _history(value: object) -> list[object]:
    if value in (None, "", []):
        return []
    if isinstance(value, str):
        return [line for line in value.split("\n") if line.strip()]
    if not isinstance(value, list):
        raise RecordFault("HISTORY", "$.chat_history", "found no list of texts", 'write ["甲:「...」", "乙:「...」"]')
    return [said for item in value for said in (item if isinstance(item, list) else [item])]


def _words(value: object, path: str, repairs: Counter[str], options: Options) -> tuple[str, str]:
    """The speaker's name, "" without one, and the words without name and quotes."""
    text = content_of(value, path, repairs)
    named = _NAMED.fullmatch(text)
    if named and named["text"][0] in '「『“"':
        name, text = named["name"], named["text"]
        repairs["name before the words removed"] += 1
    else:
        name = ""
    return name, text if options.keep_quotes else strip_quotes(text, repairs)
