"""The values of a JSON file, read piece by piece: the elements of an array, or of the list in {"data": [...]}.

Memory holds one piece and one value, whatever the size of the file. A fault is reported with its line and column.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

from persona.convert.formats import lenient as lenient_json
from persona.convert.formats.json_rows import HEAD, WRAPPERS, Row, explain, skip_space, too_long, unsafe
from persona.convert.inputs import CHUNK
from persona.errors import DataError
from persona.files import scan_json
from persona.records import RecordFault

_EXPLAINING = 64  # characters
_MARGIN = 16  # characters; a fault so near to the end of a piece may come from the cut


class _Window:
    """The piece of the text that is in memory, with the line and column of what was dropped before it."""

    def __init__(self, stream: TextIO, name: str, limit: int) -> None:
        self.stream, self.name, self.limit = stream, name, limit
        self.text = stream.read(CHUNK).removeprefix("\ufeff")
        self.position = 0
        self.ended = False
        self._line, self._marked = 1, 0  # the line at a place, from which lines are counted on
        self._column = 0  # characters of the first line of the piece that were dropped

    def more(self) -> None:
        """Append as much text as is unread, and drop the text that was read except a little, to explain faults."""
        line = self.line()
        if len(self.text) - self.position > self.limit:
            raise too_long(self.name, line, self.limit)
        kept = min(self.position, _EXPLAINING)
        dropped, self.text = self.text[: self.position - kept], self.text[self.position - kept :]
        cut = dropped.rfind("\n")
        self._column = len(dropped) - cut - 1 if cut >= 0 else self._column + len(dropped)
        self.position = self._marked = kept
        added = self.stream.read(max(CHUNK, len(self.text)))
        self.ended = not added
        self.text += added

    def line(self) -> int:
        """The line of the position, from 1."""
        self._line += self.text.count("\n", self._marked, self.position)
        self._marked = self.position
        return self._line

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of a place after the position, both from 1."""
        before = self.text.rfind("\n", 0, position)
        column = position - before if before >= 0 else position + self._column + 1
        return self._line + self.text.count("\n", self._marked, position), column

    def mark(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            self.position = skip_space(self.text, self.position)
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()

    def value(self) -> tuple[Any, int, str | None]:
        """The value at the position and where it ends; reads until the value is whole."""
        while True:
            try:
                value, end, fault = scan_json(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _MARGIN or error.msg.startswith("Unterminated")
                if self.ended or not cut:
                    raise
            else:
                if end < len(self.text) or self.ended:
                    return value, end, fault
            self.more()

    def all(self) -> None:
        """Read up to the limit, for lenient reading, which needs all of a value."""
        while not self.ended and len(self.text) - self.position < self.limit // 2:
            self.more()


class Values:
    """The rows of a file: each value, each element of an array, each element of the lists in a wrapper."""

    def __init__(self, stream: TextIO, name: str, limit: int, lenient: bool, repairs: Counter[str]) -> None:
        self.window = _Window(stream, name, limit)
        self.name, self.lenient, self.repairs = name, lenient, repairs
        self.index = 0

    def rows(self, wrapped: bool) -> Iterator[Row]:
        """All rows; a DataError names the place of broken JSON."""
        first = True
        while (mark := self._next()) != "":
            if mark == "[":
                self.window.position += 1
                yield from self._elements("$", None)
            elif wrapped and first:
                self.window.position += 1
                yield from self._members()
            else:
                yield self._row(f"$[{self.index}]" if self.index else "$", None)
            first = False

    def _next(self) -> str:
        """The next character of a value; --lenient skips comments and placeholders."""
        mark = self.window.mark()
        while self.lenient and mark and mark in "/#.…":
            self.window.all()
            end = lenient_json.skip(self.window.text, self.window.position, self.repairs)
            if end == self.window.position:
                break
            self.window.position = end
            mark = self.window.mark()
        return mark

    def _elements(self, path: str, split: str | None) -> Iterator[Row]:
        """The elements of an array after its opening bracket."""
        index, comma = 0, True
        while True:
            mark = self._next()
            if mark == "]" and (self.lenient or not comma or index == 0):
                self.repairs["JSON: comma before a closing bracket dropped"] += comma and index > 0
                self.window.position += 1
                return
            if mark == "" and self.lenient and index:
                self.repairs["JSON: missing closing bracket added"] += 1
                return
            if not comma and not self.lenient:
                raise self._missing(",")
            row = self._row(f"{path}[{index}]", split)
            yield row
            if row.fault and row.fault.code == "TRUNCATED":
                return
            index += 1
            comma = self._next() == ","
            self.window.position += comma

    def _members(self) -> Iterator[Row]:
        """The rows of {"train": [...], "test": [...]} after its opening brace."""
        while self.window.mark() == '"':
            key, self.window.position, _ = self._strict()
            if self.window.mark() != ":":
                raise self._missing(":")
            self.window.position += 1
            if self.window.mark() == "[" and key in WRAPPERS:
                self.window.position += 1
                yield from self._elements(f"$.{key}", key)
            else:
                self.window.position = self._strict()[1]
            if self.window.mark() != ",":
                break
            self.window.position += 1
        if self.window.mark() != "}":
            raise self._missing(",")
        self.window.position += 1

    def _strict(self) -> tuple[Any, int, str | None]:
        try:
            return self.window.value()
        except json.JSONDecodeError as error:
            raise self._fault(error) from None

    def _row(self, path: str, split: str | None) -> Row:
        window, repairs = self.window, Counter[str]()
        try:
            value, end, fault = window.value()
        except json.JSONDecodeError as error:
            if not self.lenient:
                raise self._fault(error) from None
            window.all()
            try:
                value, end = lenient_json.read(window.text, window.position, repairs)
                fault = None
            except lenient_json.Unreadable as unreadable:
                return self._tail(unreadable, path, error)
        line = window.line()
        text = window.text[window.position : min(end, window.position + HEAD)]
        window.position = end
        self.index += 1
        return Row(value, line, path, text, unsafe(fault), repairs or None, split)

    def _tail(self, unreadable: lenient_json.Unreadable, path: str, error: json.JSONDecodeError) -> Row:
        """The rejected row for the rest of a file that was cut off; an error for a fault in the middle."""
        window = self.window
        if unreadable.position < len(window.text.rstrip()) and "ends inside" not in unreadable.reason:
            raise self._fault(error)
        line = window.line()
        fix = "the records before it are kept; copy the file again for the rest"
        text = window.text[window.position : window.position + HEAD]
        window.position = len(window.text)
        return Row(None, line, path, text, RecordFault("TRUNCATED", "$", "the file ends inside this record", fix))

    def _missing(self, mark: str) -> DataError:
        error = json.JSONDecodeError(f"Expecting '{mark}' delimiter", self.window.text, self.window.position)
        return self._fault(error)

    def _fault(self, error: json.JSONDecodeError) -> DataError:
        line, column = self.window.place(error.pos)
        reason, fix = explain(error)
        if self.index and "ends inside" in reason:
            fix += f"; the {self.index:,} records before it are whole, and --lenient keeps them"
        return DataError(f"{self.name}:{line}:{column}  {reason}. {fix}.")
