"""The part of Go's template language that our Modelfiles use, rendered as Ollama would render it.

Ollama's TEMPLATE is a text/template of Go's standard library. A template written for it is tried here before anyone
else has to: text, comments, `if`, `else if`, `else`, `range $i, $m := LIST`, variables, fields, string literals, and
the functions `eq`, `len`, `not` and `slice` (https://pkg.go.dev/text/template).
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ACTION = re.compile(r'\{\{(- )?\s*((?:"(?:\\.|[^"\\])*"|/\*.*?\*/|[^"}]|\}(?!\}))*?)\s*( -)?\}\}', re.DOTALL)
_WORD = re.compile(r'\s*("(?:\\.|[^"\\])*"|\d+|\(|\)|:=|=|,|\$?[\w.]+|\$)')
_DECLARED = re.compile(r"(\$\w+)\s*(:?=)\s*(.*)", re.DOTALL)
_RANGE = re.compile(r"range\s+(\$\w+)\s*,\s*(\$\w+)\s*:=\s*(.*)", re.DOTALL)
_SPACE = " \t\r\n"
Scope = dict[str, Any]  # variables by name; `$` is the whole of what the template is given


@dataclass(frozen=True)
class _Action:
    code: str


@dataclass(frozen=True)
class _If:
    branches: list[tuple[str, "Block"]]  # condition (empty for else) and body


@dataclass(frozen=True)
class _Range:
    index: str
    code: str
    body: "Block"


Block = list[str | _Action | _If | _Range]  # str is text


def render(template: str, system: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that Ollama makes of `messages` (with `role` and `content`) and the system prompt.

    As in Ollama a system prompt is both .System and the first message. Raises `ValueError` for unknown syntax.
    """
    block, closing = _block(_pieces(template))
    if closing:
        raise ValueError(f"{{{{ {closing} }}}} has no beginning")
    first = [{"role": "system", "content": system}] if system else []
    listed = [{"Role": message["role"], "Content": message["content"]} for message in (*first, *messages)]
    root = {"System": system, "Messages": listed}
    return "".join(_run(block, root, {"$": root}))


def _pieces(template: str) -> Iterator[str | _Action]:
    """Text and actions in turn; `{{- ` and ` -}}` take away the white space on their side."""
    texts = _ACTION.split(template)  # text, then left mark, code, right mark and text of each action
    for place in range(0, len(texts), 4):
        text = texts[place]
        if "{{" in text:
            raise ValueError(f"an action is not closed: {text[text.index('{{') :][:40]!r}")
        text = text.lstrip(_SPACE) if place and texts[place - 1] else text
        left, code = texts[place + 1 : place + 3] or (None, "/*")
        yield text.rstrip(_SPACE) if left else text
        if not code.startswith("/*"):
            yield _Action(code)


def _block(pieces: Iterator[str | _Action]) -> tuple[Block, str]:
    """The pieces up to the `end` or `else` that closes this block, and that action; empty at the template's end."""
    block: Block = []
    for piece in pieces:
        code = piece.code if isinstance(piece, _Action) else ""
        if code == "end" or code.startswith("else"):
            return block, code
        if code.startswith("if "):
            branches: list[tuple[str, Block]] = []
            while code != "end":
                condition = code.removeprefix("else").strip().removeprefix("if ")
                body, code = _closed(pieces)
                branches.append((condition, body))
            block.append(_If(branches))
        elif match := _RANGE.fullmatch(code):
            block.append(_Range(match[1], match[3], _closed(pieces)[0]))
        else:
            block.append(piece)
    return block, ""


def _closed(pieces: Iterator[str | _Action]) -> tuple[Block, str]:
    block, closing = _block(pieces)
    if not closing:
        raise ValueError("a block has no {{ end }}")
    return block, closing


def _run(block: Block, dot: Any, scope: Scope) -> Iterator[str]:
    for node in block:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _If):
            chosen = (body for condition, body in node.branches if not condition or _value(condition, dot, scope))
            yield from _run(next(chosen, []), dot, scope)
        elif isinstance(node, _Range):
            for index, element in enumerate(_value(node.code, dot, scope)):
                scope[node.index] = index
                yield from _run(node.body, element, scope)
        elif match := _DECLARED.fullmatch(node.code):
            scope[match[1]] = _value(match[3], dot, scope)
        else:
            yield str(_value(node.code, dot, scope))


def _value(code: str, dot: Any, scope: Scope) -> Any:
    words = _WORD.findall(code)
    value = _call(words, dot, scope)
    if words or _WORD.sub("", code).strip():
        raise ValueError(f"not understood: {code!r}")
    return value


def _call(words: list[str], dot: Any, scope: Scope) -> Any:
    """The value of a function with its arguments, or of a single operand; takes its words from the list."""
    if not words or words[0] not in ("eq", "len", "slice", "not"):
        return _operand(words, dot, scope)
    name, arguments = words.pop(0), []
    while words and words[0] != ")":
        arguments.append(_operand(words, dot, scope))
    if name == "eq":
        return arguments[0] in arguments[1:]
    if name == "not":
        return not arguments[0]
    return len(arguments[0]) if name == "len" else arguments[0][arguments[1] :]


def _operand(words: list[str], dot: Any, scope: Scope) -> Any:
    if not words:
        raise ValueError("a value is missing")
    word = words.pop(0)
    if word == "(":
        value = _call(words, dot, scope)
        if not words or words.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return value
    if word[0] == '"' or word.isdecimal():
        return ast.literal_eval(word)
    if word in ("true", "false"):
        return word == "true"
    head, _, field = word.partition(".")
    start = scope.get(head) if head else dot
    if start is None:
        raise ValueError(f"not understood: {word!r}")
    return start[field] if field else start
