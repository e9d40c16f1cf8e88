"""Questions and answers: rows of {"question", "context", "answer"} in their many spellings, from JSON or a table."""

from collections import Counter
from typing import Any

from persona.convert.draft import Draft, extras
from persona.convert.options import Options
from persona.convert.turns import Turn, content_of, to_messages
from persona.records import RecordFault

PROMPTS = ("question", "prompt", "query", "input", "user", "问题", "提问", "问")
RESPONSES = ("answer", "response", "target", "output", "completion", "reply", "回答", "答案", "答")
CONTEXTS = ("context", "background", "上下文", "背景")
_SYSTEM = "system"
_HISTORY = "history"


def columns_of(keys: list[str], options: Options) -> tuple[str, str, str | None] | None:
    """The columns of prompt, response and context, by the options or by their names; None where one is missing."""
    folded = {key.strip().casefold(): key for key in reversed(keys)}
    given = (options.prompt_col, options.response_col, options.context_col)
    names = [
        folded.get(chosen.strip().casefold()) if chosen else next((folded[n] for n in known if n in folded), None)
        for chosen, known in zip(given, (PROMPTS, RESPONSES, CONTEXTS), strict=True)
    ]
    prompt, response, context = names
    if prompt is None or response is None or (options.context_col and context is None):
        return None
    return prompt, response, context


def recognise(row: dict[str, Any], options: Options) -> str | None:
    """Why the row is a question with its answer, or None."""
    if "chosen" in row and "rejected" in row:
        return None
    found = columns_of(list(row), options)
    return f'rows have "{found[0]}" and "{found[1]}"' if found else None


def convert(row: dict[str, Any], options: Options) -> Draft:
    """The conversation of one row: history, then the context and the question, then the answer."""
    repairs: Counter[str] = Counter()
    found = columns_of(list(row), options)
    if found is None:
        reason = f"found the columns {', '.join(map(str, row))[:80]}"
        raise RecordFault("COLUMNS", "$", reason, "name them with --prompt-col, --response-col and --context-col")
    prompt, response, context = found
    turns = history_turns(row.get(_HISTORY), repairs)
    parts = [_cell(row.get(context), f"$.{context}", repairs)] if context else []
    parts.append(_cell(row[prompt], f"$.{prompt}", repairs))
    turns.append(Turn("user", "\n".join(part for part in parts if part), f"$.{prompt}"))
    turns.append(Turn("assistant", _cell(row[response], f"$.{response}", repairs), f"$.{response}"))
    system = _cell(row.get(_SYSTEM), "$.system", repairs)
    known = frozenset(name for name in (prompt, response, context, _SYSTEM, _HISTORY, "split") if name)
    return Draft(to_messages(turns, system, "$", repairs, options), repairs, extras(row, known, repairs))


def _cell(value: object, path: str, repairs: Counter[str]) -> str:
    """The text of a cell; an empty one is "" and never the word NaN."""
    if value is None or value == "":
        if path != "$.system":
            repairs["empty cells"] += 1
        return ""
    return content_of(value, path, repairs)


def history_turns(history: object, repairs: Counter[str]) -> list[Turn]:
    """The turns of [["question", "answer"], ...]."""
    if history in (None, "", "[]"):
        return []
    if not isinstance(history, list):
        raise RecordFault("HISTORY", "$.history", f"found {str(history)[:40]!r}", 'write [["q", "a"], ...]')
    turns = []
    for index, pair in enumerate(history):
        path = f"$.history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordFault("HISTORY", path, f"found {str(pair)[:40]!r}", "write a question and its answer")
        for side, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, content_of(pair[side], f"{path}[{side}]", repairs), f"{path}[{side}]"))
    return turns
