"""The part of Go's template language that our Modelfiles use, said in Jinja and rendered as Ollama would render it.

Ollama's TEMPLATE is a text/template of Go's standard library. A template written for it is tried here before anyone
else has to: text, comments, `if`, `else if`, `else`, `range $i, $m := LIST`, variables, fields, string literals, and
the functions `eq`, `len`, `not` and `slice` (https://pkg.go.dev/text/template).
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import Environment, StrictUndefined, Template
from jinja2.utils import Namespace

# The code of an action; `{{- ` and ` -}}` take away the white space on their side
_ACTION = re.compile(
    r'(?:[ \t\r\n]*\{\{- |\{\{)\s*((?:"(?:\\.|[^"\\])*"|/\*.*?\*/|[^"}]|\}(?!\}))*?)\s*(?: -\}\}[ \t\r\n]*|\}\})',
    re.DOTALL,
)
_WORD = re.compile(r'\s*("(?:\\.|[^"\\])*"|\d+|\(|\)|\$?[\w.]+|\$)')
_SET = re.compile(r"\$(\w+)\s*:?=\s*(.*)", re.DOTALL)
_RANGE = re.compile(r"range\s+\$(\w+)\s*,\s*\$\w+\s*:=\s*(.*)", re.DOTALL)
_FUNCTIONS = {"eq": lambda first, *others: first in others, "len": len, "slice": lambda values, start: values[start:]}
_JINJA = Environment(  # marks that no chat template writes
    block_start_string="\0%", block_end_string="%\0", variable_start_string="\0{", variable_end_string="}\0",
    comment_start_string="\0#", comment_end_string="#\0", keep_trailing_newline=True, undefined=StrictUndefined,
)  # fmt: skip


def render(template: str, system: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that Ollama makes of `messages` (with `role` and `content`) and the system prompt.

    As in Ollama a system prompt is both .System and the first message. Raises `ValueError` for unknown syntax.
    """
    first = [{"role": "system", "content": system}] if system else []
    listed = [{"Role": message["role"], "Content": message["content"]} for message in (*first, *messages)]
    root = {"System": system, "Messages": listed}
    return _in_jinja(template).render(root=root, dot=root, variables=Namespace(), **_FUNCTIONS)


@lru_cache(1)  # one template is tried on many conversations
def _in_jinja(template: str) -> Template:
    ends: list[str] = []  # of the open blocks, the innermost last

    def action(match: re.Match[str]) -> str:
        code = match[1]
        if code.startswith("/*"):
            return ""
        if code in ("end", "else") or code.startswith("else if "):
            if not ends:
                raise ValueError(f"{{{{ {code} }}}} has no beginning")
            condition = f" {_value(code[8:])}" if code[5:] else ""
            return f"\0% {ends.pop() if code == 'end' else 'elif' if condition else 'else'}{condition} %\0"
        if code.startswith("if "):
            ends.append("endif")
            return f"\0% if {_value(code[3:])} %\0"
        if loop := _RANGE.fullmatch(code):
            ends.append("endfor")
            return f"\0% for dot in {_value(loop[2])} %\0\0% set variables.{loop[1]} = loop.index0 %\0"
        if assigned := _SET.fullmatch(code):
            return f"\0% set variables.{assigned[1]} = {_value(assigned[2])} %\0"
        return f"\0{{ {_value(code)} }}\0"

    if "{{" in (rest := _ACTION.sub("\0", template)):
        raise ValueError(f"an action is not closed: {rest[rest.index('{{') :][:40]!r}")
    text = _ACTION.sub(action, template)
    if ends:
        raise ValueError("a block has no {{ end }}")
    return _JINJA.from_string(text)


def _value(code: str) -> str:
    """Go's expression in Jinja: `eq (len $.Messages) 1` is `eq(len(root.Messages), 1)`."""
    words = _WORD.findall(code)
    value = _expression(words)
    if words or _WORD.sub("", code).strip():
        raise ValueError(f"not understood: {code!r}")
    return value


def _expression(words: list[str]) -> str:
    """A function with its arguments, or a single operand; takes its words from the list."""
    if not words:
        raise ValueError("a value is missing")
    word = words.pop(0)
    if word in (*_FUNCTIONS, "not"):
        arguments = []
        while words and words[0] != ")":
            arguments.append(_expression(words))
        return f"{word}({', '.join(arguments)})"
    if word == "(":
        value = _expression(words)
        if not words or words.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return value
    if word[0] == '"' or word.isdecimal() or word in ("true", "false"):
        return word
    if word[0] not in ".$":
        raise ValueError(f"not understood: {word!r}")
    head, _, field = word.partition(".")
    start = {"": "dot", "$": "root"}.get(head, f"variables.{head[1:]}")
    return f"{start}.{field}" if field else start
