"""Self-contained web pages: one file that opens from disk in any browser and asks nothing of the network."""

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def asset(name: str) -> str:
    """The text of a style sheet, script or piece of HTML that lies beside this module."""
    return (_FOLDER / name).read_text(encoding="utf-8").strip()


def document(title: str, body: str, *styles: str, script: str = "", lang: str = "en") -> str:
    """A whole page: `body` is HTML, `styles` name style sheets beside this module that follow the common one.

    The page's own policy (https://www.w3.org/TR/CSP3/) forbids every connection, and every script but `script` itself:
    text of others that slipped into the page could not run.
    """
    digest = b64encode(sha256(f"\n{script}\n".encode()).digest()).decode("ascii")
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    style = "\n".join(asset(name) for name in ("page.css", *styles))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="{escape(lang)}">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}\n</style></head>",
            f"<body>\n{body}",
            *([f"<script>\n{script}\n</script>"] if script else []),
            "</body></html>\n",
        ]
    )


def embedded(name: str, value: Any) -> str:
    """`value` as JSON that a page's script can read; nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'
