"""Bytes to text, and whether the text is JSON; by content, never by the file's ending."""

import codecs
import re

from persona.errors import DataError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN_WORDS = re.compile(r"[^\x00-\x7f][^\n]{0,19}")  # what shows a person whether the guess was right
_BINARY_SHARE = 0.02  # of zero bytes; text has none, UTF-16 without a mark has about half
# What may follow an opening bracket of JSON, broken JSON included; `[Enter HAMLET]` and `[12:30]` are text.
_JSON_START = re.compile(
    r"""(?:\s*+(?>//[^\n]*|/\*.*?\*/|\.{3,}|…+))*+\s*+(?:\[\s*+(?:[{\["'\]/.…]|$)|\{\s*+(?:["'}/“”.…]|$))""", re.DOTALL
)


class Foreign(DataError):
    """The file holds no conversations of a kind known here; in a folder it is passed over with a line."""


def decode(data: bytes, name: str) -> tuple[str, str, str | None]:
    """The text of a file, the encoding found, and a notice for the person when it had to be guessed."""
    if not data.strip():
        raise DataError(f"{name} is empty. Give a file that holds conversations.")
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding).removeprefix("\ufeff"), f"{encoding} with a byte order mark", None
            except UnicodeDecodeError as error:
                raise DataError(_broken(data, name, encoding, error)) from None
    if data.count(0) > _BINARY_SHARE * len(data):
        raise Foreign(f"{name}: it holds zero bytes, so it is not text, or UTF-16 without its mark. Save it as UTF-8.")
    try:
        return data.decode("utf-8"), "utf-8", None
    except UnicodeDecodeError as error:
        first = error
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        if 0 in data:
            raise Foreign(f"{name}: it is not text. Convert it to text first.") from None
        raise DataError(_broken(data, name, "utf-8", first)) from None
    samples = [match[0] for _, match in zip(range(3), _FOREIGN_WORDS.finditer(text), strict=False)]
    return text, "gb18030", "read as GB18030; if this looks wrong, save the file as UTF-8: " + " / ".join(samples)


def _broken(data: bytes, name: str, encoding: str, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    found = f"byte 0x{data[error.start]:02x} at offset {error.start} is not {encoding.upper()}"
    return f"{name}:{line}  {found}. Save the file as UTF-8 (in Notepad: Save as, Encoding UTF-8)."


def is_json(text: str) -> bool:
    """Whether the text means to be JSON, well-formed or not."""
    return _JSON_START.match(text[:10_000]) is not None
