"""The part of Go's template language that our Modelfiles use, rendered as Ollama would render it.

Ollama's TEMPLATE is a text/template of Go's standard library. What is written for it is tried here before anyone else
has to: text, comments, `if`, `else if`, `else`, `range $i, $m := LIST`, variables, fields, string literals, and the
functions `eq`, `len` and `slice` (https://pkg.go.dev/text/template).
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Node = Any  # str (text), _Action, _If or _Range
_ACTION = re.compile(r'\{\{(- )?\s*((?:"(?:\\.|[^"\\])*"|/\*.*?\*/|[^"}]|\}(?!\}))*?)\s*( -)?\}\}', re.DOTALL)
_WORD = re.compile(r'\s*("(?:\\.|[^"\\])*"|\d+|\(|\)|:=|=|,|\$?[\w.]+|\$)')
_DECLARED = re.compile(r"(\$\w+)\s*(:?=)\s*(.*)", re.DOTALL)
_RANGE = re.compile(r"range\s+(\$\w+)\s*,\s*(\$\w+)\s*:=\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class _Action:
    code: str


@dataclass(frozen=True)
class _If:
    branches: list[tuple[str | None, list[Node]]]  # the condition, None for else


@dataclass(frozen=True)
class _Range:
    index: str
    code: str
    body: list[Node]


def render(template: str, system: str, messages: Sequence[dict[str, str]]) -> str:
    """The text that Ollama makes of `messages` (with `role` and `content`) and the system prompt.

    As in Ollama a system prompt is both .System and the first message. Raises `ValueError` for what is not understood.
    """
    nodes, rest = _block(list(_pieces(template)), 0)
    if rest:
        raise ValueError(f"{{{{ {rest} }}}} has no beginning")
    listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    if system:
        listed.insert(0, {"Role": "system", "Content": system})
    root = {"System": system, "Messages": listed}
    return "".join(_run(nodes, root, {"$": root}))


def _pieces(template: str) -> Iterator[str | _Action]:
    """Text and actions in turn; `{{- ` and ` -}}` take the white space on their side away."""
    place, strip = 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        if "{{" in text:
            break
        text = text.lstrip(" \t\r\n") if strip else text
        yield text.rstrip(" \t\r\n") if match[1] else text
        if not match[2].startswith("/*"):
            yield _Action(match[2])
        place, strip = match.end(), match[3] is not None
    if "{{" in template[place:]:
        raise ValueError(f"an action is not closed: {template[place : place + 40]!r}")
    yield template[place:].lstrip(" \t\r\n") if strip else template[place:]


def _block(pieces: list[str | _Action], depth: int) -> tuple[list[Node], str]:
    """The nodes up to the `end` or `else` that closes this block, which is returned too; consumes `pieces`."""
    nodes: list[Node] = []
    while pieces:
        piece = pieces.pop(0)
        if isinstance(piece, str):
            nodes.append(piece)
        elif piece.code == "end" or piece.code.startswith("else"):
            return nodes, piece.code
        elif piece.code.startswith("if "):
            nodes.append(_if(piece.code.removeprefix("if "), pieces, depth))
        elif match := _RANGE.fullmatch(piece.code):
            body, _ = _block(pieces, depth + 1)
            nodes.append(_Range(match[1], match[3], body))
        else:
            nodes.append(piece)
    if depth:
        raise ValueError("a block has no {{ end }}")
    return nodes, ""


def _if(condition: str, pieces: list[str | _Action], depth: int) -> _If:
    branches: list[tuple[str | None, list[Node]]] = []
    current: str | None = condition
    while True:
        body, closing = _block(pieces, depth + 1)
        branches.append((current, body))
        if closing == "end":
            return _If(branches)
        current = closing.removeprefix("else").strip().removeprefix("if ") or None


def _run(nodes: list[Node], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Action):
            match = _DECLARED.fullmatch(node.code)
            if match:
                variables[match[1]] = _value(match[3], dot, variables)
            else:
                yield str(_value(node.code, dot, variables))
        elif isinstance(node, _If):
            chosen = (body for test, body in node.branches if test is None or _value(test, dot, variables))
            yield from _run(next(chosen, []), dot, variables)
        else:
            for index, element in enumerate(_value(node.code, dot, variables)):
                variables[node.index] = index
                yield from _run(node.body, element, variables)


def _value(code: str, dot: Any, variables: dict[str, Any]) -> Any:
    words = _WORD.findall(code)
    if "".join(words) != re.sub(r'("(?:\\.|[^"\\])*")|\s+', r"\1", code):
        raise ValueError(f"not understood: {code!r}")
    value = _call(words, dot, variables)
    if words:
        raise ValueError(f"not understood: {code!r}")
    return value


def _call(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    """A function with its arguments, or a single operand; takes its words from the list."""
    if words and words[0] in ("eq", "len", "slice", "not"):
        name, arguments = words.pop(0), []
        while words and words[0] != ")":
            arguments.append(_operand(words, dot, variables))
        if name == "eq":
            return arguments[0] in arguments[1:]
        if name == "not":
            return not arguments[0]
        return len(arguments[0]) if name == "len" else arguments[0][arguments[1] :]
    return _operand(words, dot, variables)


def _operand(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    if not words:
        raise ValueError("a value is missing")
    word = words.pop(0)
    if word == "(":
        value = _call(words, dot, variables)
        if not words or words.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return value
    if word[0] == '"' or word.isdecimal():
        return ast.literal_eval(word)
    if word in ("true", "false"):
        return word == "true"
    head, _, field = word.partition(".")
    start = variables.get(head) if head else dot
    if start is None:
        raise ValueError(f"not understood: {word!r}")
    return start[field] if field else start
