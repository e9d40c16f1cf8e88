"""Self-contained web pages: one file that opens from disk in any browser and asks nothing of the network."""

import json
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_FOLDER = Path(__file__).parent


def page(template: str, **values: Any) -> str:
    """The whole page of a template in this folder. Every value is escaped, and one that is missing is an error.

    The template extends frame.html and sets `title`, `styles` (style sheets of this folder that follow page.css) and
    `script` (a script of this folder, or an empty string).
    """
    return environment().get_template(template).render(**values)


@cache
def environment() -> Environment:
    """The jinja2 environment of all pages."""
    pages = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    pages.globals |= {"asset": asset, "policy": policy, "embedded": embedded}
    return pages


@cache
def asset(name: str) -> Markup:
    """The text of a style sheet or script in this folder."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8").strip())


def policy(script: str) -> Markup:
    """The page's content security policy (https://www.w3.org/TR/CSP3/).

    It forbids every connection and every script but the named one: foreign text that slipped into the page cannot run.
    """
    digest = b64encode(sha256(f"\n{asset(script)}\n".encode()).digest()).decode("ascii") if script else ""
    allowed = f"'sha256-{digest}'" if script else "'none'"
    return Markup(f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}")


def embedded(name: str, value: Any) -> Markup:
    """`value` as JSON that a page's script can read; nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{name}">{text}</script>')
