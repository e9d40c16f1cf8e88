"""JSON read strictly: what Python's own module lets pass, such as a key that stands twice, is named."""

import json
import math
from collections import Counter
from typing import Any

from persona.console import excerpt

MAX_DEPTH = 64  # deeper JSON is an attack or an accident; Python's own limit would end in a RecursionError
MAX_DIGITS = 1000  # Python refuses to read or print integers of more than 4,300 digits


def scan_json(text: str, start: int = 0) -> tuple[Any, int, str | None]:
    """The JSON value at `start`, where it ends, and what forbids its use (duplicate keys, NaN, depth) or None.

    Broken syntax raises json.JSONDecodeError.
    """
    if _FAULTS:
        _FAULTS.clear()
    try:
        value, end = _STRICT.raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError(f"Nested deeper than {MAX_DEPTH} levels", text, start) from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        _FAULTS.append(f"it is nested deeper than {MAX_DEPTH} levels")
    return value, end, _FAULTS[0] if _FAULTS else None


# One decoder for all values: to build one takes as long as to read a short record. It notes here what Python's json
# module lets pass, and goes on, so that the end of the value is found.
_FAULTS: list[str] = []


def _collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        _FAULTS.append(f'the key "{excerpt(key, 40)}" stands {count} times in one object')
    return found


def _constant(name: str) -> None:
    _FAULTS.append(f"{name} is not JSON")


def _real(digits: str) -> float:
    if math.isinf(value := float(digits)):
        _FAULTS.append(f"the number {excerpt(digits, 20)} is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        _FAULTS.append(f"a number has {len(digits)} digits")
        return 0
    return int(digits)


_STRICT = json.JSONDecoder(object_pairs_hook=_collect, parse_constant=_constant, parse_float=_real, parse_int=_integer)


def _deeper_than(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)
