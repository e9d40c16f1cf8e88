"""Broken JSON explained: what a person did to it, and how to mend it."""

import json
import re

_SYMPTOMS = (
    (r"//|/\*|#", "a comment", "JSON has none: delete it, and the placeholder it may stand for"),
    (r"\.\.|…", "the placeholder ...", "it comes from a documentation: delete it"),
    (r"'", "single quotes", 'write "double quotes" (json.dump writes them)'),
    (r"[“”‘’]", "curly quotes", 'write straight "double quotes"; a word processor has changed them'),
    (r"(?:True|False|None)\b", "a Python value", "write true, false or null (json.dump writes them)"),
    (r"\{|\[|\"", "a value with no comma before it", "write a comma between two values"),
    (r"[A-Za-z_]", "a word without quotes", 'write every key and text in "double quotes"'),
)


def explain(error: json.JSONDecodeError) -> tuple[str, str]:
    """What a person did to make this JSON broken, and how to mend it."""
    rest = error.doc[error.pos :].lstrip(", \t\r\n")
    before = error.doc[: error.pos + 1].rstrip("]} \t\r\n")
    if error.msg.startswith("Nested"):
        return error.msg.lower(), "this is no conversation: check the export"
    if error.doc[error.pos : error.pos + 1] == "," and before.rstrip(",").endswith("}"):
        return "a comma between objects", "put [ and ] around all of them, or delete the commas between the lines"
    if error.msg.startswith("Invalid control"):
        return "a line break or tab inside a text", r"write \n or \t instead"
    if error.msg.startswith("Invalid \\"):
        return "a backslash that begins nothing", r"write \\ for a backslash"
    if not rest or error.msg.startswith("Unterminated"):
        return "the file or line ends inside a value", "it was cut off, or a closing quote is missing: copy it again"
    if rest[0] in "]}" and before.endswith(","):
        return "a comma before a closing bracket", "delete the last comma"
    for pattern, found, fix in _SYMPTOMS:
        if re.match(pattern, rest):
            return f"found {found}", fix
    return f"not JSON ({error.msg.lower()})", "check the brackets, commas and quotes before this place"
