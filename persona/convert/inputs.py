"""The encoding of a file, decided over all of its bytes before any is converted, so that no text is half guessed.

Reading it again gives the same bytes or an error: a file that changes meanwhile is refused.
"""

import codecs
import glob
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from persona.console import excerpt
from persona.convert.draft import printable
from persona.errors import DataError, EnvironmentFault, UsageError

CHUNK = 1 << 18  # bytes; fits into a processor's cache, where 1 MiB took half as long again
_HEAD = 1 << 20  # characters by which a format is recognised
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    ((codecs.BOM_UTF8,), "utf-8-sig"),
    ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16"),
)
_SIGNATURES = (
    (b"PK\x03\x04", "a ZIP archive or an Excel or Word file", "unpack it, or save the sheet as CSV UTF-8"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"PAR1", "a Parquet file", "save it as JSONL first (pandas: to_json with orient='records', lines=True)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save it as CSV UTF-8"),
    (b"SQLite format 3", "a database", "export its table as CSV"),
    (b"%PDF", "a PDF file", "copy its text into a text file"),
)
_FOREIGN_WORDS = re.compile(r"[^\x00-\x7f][^\r\n]{0,19}")  # samples, which show whether the guess was right
_BINARY_SHARE = 0.02  # of zero bytes; text has none, UTF-16 without a mark has about half
_COMMON = 0.6  # share of a Chinese text's characters that stand in the common half of its character set


class Foreign(DataError):
    """The file holds no conversations of a kind known here; in a folder it is passed over with a line."""


@dataclass(frozen=True)
class Probe:
    """How the bytes of a file are to be read, and their digest."""

    size: int
    digest: str
    encoding: str = "utf-8"
    label: str = "utf-8"
    notice: str | None = None


def probe(path: Path, name: str, forced: str | None = None) -> Probe:
    """The encoding of a file; a DataError names the first byte that is not text."""
    size, zeros, blank, is_utf8 = 0, 0, True, True
    digest = hashlib.sha256()
    decode = codecs.getincrementaldecoder("utf-8")().decode
    head = b""
    for chunk in chain(chunks(path), [b""]):
        head = head or chunk
        digest.update(chunk)
        size += len(chunk)
        zeros += chunk.count(0) if 0 in chunk else 0
        blank = blank and not chunk.strip()
        try:
            _ = is_utf8 and decode(chunk, not chunk)
        except UnicodeDecodeError:
            is_utf8 = False
    if blank:
        raise DataError(f"{name} is empty. Give a file that holds conversations.")
    return Probe(size, digest.hexdigest(), *_encoding(path, name, forced, head, zeros / size, is_utf8))


def _encoding(
    path: Path, name: str, forced: str | None, head: bytes, zeros: float, is_utf8: bool
) -> tuple[str, str, str | None]:
    if forced:
        _demand(path, name, forced)
        return forced, forced, None
    for marks, encoding in _MARKS:
        if head.startswith(marks):
            _demand(path, name, encoding)
            return encoding, f"{encoding.removesuffix('-sig')} with a byte order mark", None
    for signature, what, fix in _SIGNATURES:
        if head.startswith(signature):
            raise Foreign(f"{name}: it is {what}, not text: {fix}.")
    if zeros and (guess := _unmarked(path, head)):
        return guess, guess, f"read as {guess.upper()} without a byte order mark: {_samples(path, guess)}"
    if zeros > _BINARY_SHARE:
        raise Foreign(f"{name}: it holds zero bytes, so it is not text, or UTF-16 without its mark. Save it as UTF-8.")
    return ("utf-8", "utf-8", None) if is_utf8 else _guessed(path, name, bool(zeros))


def _guessed(path: Path, name: str, zeros: bool) -> tuple[str, str, str | None]:
    """GB18030 if the bytes can be that; a DataError with the first byte that is not UTF-8 for the rest."""
    fault = f"{name}{_fault(path, 'utf-8')}"
    if _fault(path, "gb18030"):
        if zeros:
            raise Foreign(f"{name}: it is not text. Convert it to text first.")
        possible = [one for one in ("big5", "shift_jis", "euc_kr") if not _fault(path, one)][:1]
        raise DataError(fault + "".join(f" It may be {one}: try --encoding {one}." for one in possible))
    if hint := _other_guess(path):
        raise DataError(f"{fault} It reads like {hint}: try --encoding {hint}.")
    samples = _samples(path, "gb18030")
    return "gb18030", "gb18030", f"read as GB18030; if this looks wrong, save the file as UTF-8: {samples}"


def _demand(path: Path, name: str, encoding: str) -> None:
    try:
        "".encode(encoding)  # unlike codecs.lookup refuses hex, rot13 and others that are not of text
    except (LookupError, ValueError):
        raise UsageError(f"--encoding {encoding} is not known. Examples: utf-8, gb18030, big5, shift_jis.") from None
    if fault := _fault(path, encoding.removesuffix("-sig")):
        raise DataError(name + fault)


def _fault(path: Path, encoding: str) -> str:
    """The line and the byte where the file stops being text in `encoding`, with the fix; "" if it is text."""
    decoder = codecs.getincrementaldecoder(encoding)()
    seen = lines = 0
    pending = b""
    for chunk in chain(chunks(path), [b""]):
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            data = pending + chunk
            start = min(error.start, len(data) - 1)
            line, offset, byte = lines + data.count(b"\n", 0, start) + 1, seen - len(pending) + start, data[start]
            return _broken(line, byte, offset, encoding)
        except UnicodeError:  # the utf-16 codec finds no mark
            return _broken(1, 0, 0, encoding)
        pending = decoder.getstate()[0]
        seen += len(chunk)
        lines += chunk.count(b"\n")
    return ""


def _broken(line: int, byte: int, offset: int, encoding: str) -> str:
    reason = f"byte 0x{byte:02x} at offset {offset} is not {encoding.upper()}"
    return f":{line}  {reason}. Save the file as UTF-8 (in Notepad: Save as, Encoding UTF-8)."


def _unmarked(path: Path, head: bytes) -> str | None:
    """UTF-16 without its mark, if every zero byte is on the same side of a pair and the text is readable."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even and odd:
        return None
    encoding = "utf-16-be" if even else "utf-16-le"
    if max(even, odd) < 3 or _fault(path, encoding):
        return None
    text = head[: len(head) & ~1].decode(encoding, "replace")
    readable = sum(character.isprintable() or character in "\r\n\t\u3000" for character in text)
    return encoding if readable > 0.98 * len(text) else None


def _other_guess(path: Path) -> str | None:
    """Big5 or Shift-JIS, if the bytes are rather that than GB18030, which accepts most of both."""
    data = next(chunks(path))
    high = [(data[i], data[i + 1]) for i in range(len(data) - 1) if data[i] >= 0x81]
    if _kana(data) or not high:
        return "shift_jis" if high else None
    text = data.decode("gb18030", "ignore")
    wide = [character for character in text if character >= "\u2e80"]
    common = sum(0xB0 <= character.encode("gb18030")[0] <= 0xD7 for character in wide)
    if not wide or common >= _COMMON * len(wide) or _fault(path, "big5"):
        return None
    traditional = [character for character in data.decode("big5", "ignore") if character >= "\u2e80"]
    frequent = sum(0xA1 <= character.encode("big5")[0] <= 0xC6 for character in traditional)
    return "big5" if frequent > 0.9 * len(traditional) else None


def _kana(data: bytes) -> bool:
    try:
        text = data.decode("shift_jis")
    except UnicodeDecodeError:
        return False
    wide = [character for character in text if character >= "\u2e80"]
    return sum("\u3040" <= character <= "\u30ff" for character in wide) > 0.3 * max(1, len(wide))


def _samples(path: Path, encoding: str) -> str:
    text = codecs.getincrementaldecoder(encoding)().decode(next(chunks(path)))
    return " / ".join(match[0] for match in islice(_FOREIGN_WORDS.finditer(text), 3))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """An EnvironmentFault if the file cannot be read."""
    try:
        yield
    except OSError as error:
        fix = "Check its permissions and the disk."
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}. {fix}") from error


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, piece by piece."""
    with _explained(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


class _Digested(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = self.file.readinto(buffer) or 0
        self.digest.update(buffer[:count])
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def open_text(path: Path, name: str, probed: Probe, newline: str = "\n") -> Iterator[TextIO]:
    """The text of a file that was probed; a DataError if the bytes are not those of the probe any more."""
    changed = f"{name} changed while it was read. Wait until nothing writes to it, and run the command again."
    with _explained(path):
        raw = _Digested(path)
        with io.TextIOWrapper(io.BufferedReader(raw, CHUNK), encoding=probed.encoding, newline=newline) as stream:
            stream._CHUNK_SIZE = CHUNK  # pyright: ignore[reportAttributeAccessIssue]  # 8 kB cost a tenth of all time
            try:
                yield stream
                while stream.read(CHUNK):  # the rest, for the digest
                    pass
            except UnicodeDecodeError:
                raise DataError(changed) from None
        if raw.digest.hexdigest() != probed.digest:
            raise DataError(changed)


def read_head(path: Path, probed: Probe) -> str:
    """The first characters of a file, line ends as they are."""
    with path.open(encoding=probed.encoding, newline="") as stream:
        return stream.read(_HEAD).removeprefix("\ufeff")


def read_text(path: Path, name: str, probed: Probe) -> str:
    """The whole text of a file, with LF line ends."""
    with open_text(path, name, probed, newline="") as stream:
        text = stream.read()
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


_LEFT_OUT = {
    **dict.fromkeys(
        ("report.json", "rejected.jsonl", "report.html", "dataset_stats.json"), "written by an earlier conversion"
    ),
    "meta.json": "says something about the article beside it",
}
_LEFT_OUT_STEMS = {"readme": "a description"} | dict.fromkeys(("目录", "合集", "目錄"), "an index")


@dataclass(frozen=True)
class Source:
    """A file, and the name that stands for it in records: unique, without its folders."""

    path: Path
    name: str
    label: str
    from_folder: bool


def find_sources(inputs: Iterable[str]) -> tuple[list[Source], list[str]]:
    """The files to convert, each once and in order, and the lines that say which files of a folder are left out."""
    files: dict[Path, tuple[Path, bool]] = {}
    skipped: list[str] = []
    for path in (path for pattern in inputs for path in _expand(pattern)):
        if path.is_dir():
            inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
            for inner in sorted(inside, key=lambda inner: inner.parts):
                if why := _left_out(inner):
                    skipped.append(f"{inner}: {why}")
                else:
                    files.setdefault(inner.resolve(), (inner, True))
        elif path.is_file():
            files.setdefault(path.resolve(), (path, False))
        else:  # /dev/zero would never end, a pipe never begin
            raise UsageError(f"{path} is neither a file nor a folder. Give text or JSON files.")
    if not files:
        raise DataError(f"No input files in {', '.join(inputs)}." + "".join(f"\n  skipped {line}" for line in skipped))
    sources: list[Source] = []
    seen: Counter[str] = Counter()
    for path, from_folder in files.values():
        name = printable(path.name)
        seen[name] += 1
        sources.append(Source(path, name, name if seen[name] == 1 else f"{name}~{seen[name]}", from_folder))
    return sources, skipped


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    try:
        path = path.expanduser()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{excerpt(pattern)} cannot be opened: {error}. Check the name and its permissions.") from None
    else:
        return [path]
    matches = sorted(glob.glob(str(path)))  # shells on Windows leave patterns to the program
    if not matches:
        raise UsageError(f"{pattern} does not exist. Check the name; the command runs in {Path.cwd()}.")
    return [Path(match) for match in matches]


def _left_out(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    why = _LEFT_OUT.get(path.name) or _LEFT_OUT_STEMS.get(path.stem.casefold())
    return why or (None if path.is_file() else "not a regular file")
