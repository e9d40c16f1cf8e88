"""Blind comparison of two sides' replies: the sheet that readers fill in, and the key that its maker keeps.

Everything random in a sheet (order of the pairs, the side on the left, the identifiers) is a keyed hash of a secret
that only the key has, so that nothing in the sheet tells the sides apart but the replies themselves.
"""

import hashlib
import hmac
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.errors import DataError, UsageError
from persona.evaluate.predictions import Prediction
from persona.files import JsonObject, check_folder, read_json, write_json, write_text
from persona.pages import page
from persona.records import CONTROL_TOKEN, is_chinese

SHEET_NAME, KEY_NAME = "ab_sheet.html", "ab_key.json"
KEY_FORMAT = "ab-key-1"
_LETTERS = "bcdfghjkmnpqrstvwxyz"  # without vowels no words, without digits no numbers that Excel rewrites

# Traces of a chat template or of a habit, by which a reader would see at a glance which side wrote a reply
_MARKUP = (
    (re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE), ""),
    (CONTROL_TOKEN, ""),
    (re.compile(r"^[ \t]*```.*(?:\n|$)", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*#{1,6}[ \t]+", re.MULTILINE), ""),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"[\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\u00ad]"), ""),
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r" ?\n ?"), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Sheet:
    """The files of a sheet and of its key."""

    sheet: Path
    key: Path
    pairs: int
    identical: int
    """Pairs of the same two replies, which readers are not asked about."""


@dataclass(frozen=True)
class _Pair:
    prediction: int  # its place in the predictions, from 0
    prompt: str
    replies: tuple[str, str]  # of the first and of the second side


def make_sheet(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    folder: Path,
    secret: str,
    *,
    names: tuple[str, str],
    about: str | None,
    examples: Sequence[str],
    limit: int | None,
) -> Sheet:
    """Write ab_sheet.html and ab_key.json for two sides' replies to the same prompts, in the same order.

    The same predictions and `secret` give the same two files; whoever can guess it can tell the sides apart. `about` is
    the character's name for the question, `examples` are true lines of the character for readers who do not know it,
    and `limit` draws that many pairs at random.

    Raises `DataError` if the predictions do not belong together or no pair differs, `UsageError` if the folder holds
    the key of another sheet.
    """
    pairs = _pairs(first, second, names)
    asked = [pair for pair in pairs if "".join(pair.replies[0].split()) != "".join(pair.replies[1].split())]
    if not asked:
        raise DataError(
            f"All {len(pairs)} pairs of replies are identical, so there is nothing to compare. "
            f"Are both predictions of the same side?"
        )
    shown = sorted(asked, key=lambda pair: _hash(secret, "order", pair.prediction))[:limit]
    on_left = _first_on_left(secret, shown)
    ids = {pair.prediction: _name(_hash(secret, "pair", pair.prediction), 8) for pair in shown}
    if len(set(ids.values())) < len(ids):
        raise DataError("Two pairs got the same identifier, which is rarer than one sheet in millions. Make it again.")
    content: JsonObject = {
        "language": "zh" if is_chinese(*(reply for pair in shown for reply in pair.replies)) else "en",
        "about": _plain(about or ""),
        "examples": [_plain(text) for text in examples],
        "pairs": [_placed(pair, ids[pair.prediction], pair.prediction in on_left) for pair in shown],
    }
    name = _name(_hash(secret, "sheet", json.dumps(content, ensure_ascii=False)), 12)
    key = {
        "format": KEY_FORMAT,
        "sheet": name,
        "seed": secret,
        "names": list(names),
        "pairs": [
            {
                "id": ids[pair.prediction],
                "prediction": pair.prediction,
                "left": names[pair.prediction not in on_left],
                "right": names[pair.prediction in on_left],
            }
            for pair in shown
        ],
        "identical": sorted({pair.prediction for pair in pairs} - {pair.prediction for pair in asked}),
    }
    check_folder(folder, "--output")
    _refuse_other_key(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SHEET_NAME, page("ab_sheet.html", sheet={"sheet": name} | content))
    write_json(folder / KEY_NAME, key)
    return Sheet(folder / SHEET_NAME, folder / KEY_NAME, len(shown), len(pairs) - len(asked))


def _pairs(first: Sequence[Prediction], second: Sequence[Prediction], names: tuple[str, str]) -> list[_Pair]:
    again = "Predict both with the same file: python evaluate_model.py predict"
    if len(first) != len(second):
        raise DataError(f"{len(first)} predictions of {names[0]} but {len(second)} of {names[1]}. {again}")
    if not first:
        raise DataError(f"There are no predictions to compare. {again}")
    pairs = []
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if one.input != other.input:
            raise DataError(
                f"Prediction {number + 1} of {names[0]} and of {names[1]} answer different prompts. {again}"
            )
        pairs.append(_Pair(number, _plain(one.input), (_plain(one.predict), _plain(other.predict))))
    return pairs


def _plain(text: str) -> str:
    """`text` without markup, invisible characters and odd spacing."""
    text = _CONTROLS.sub("", unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")))
    for pattern, instead in _MARKUP:
        text = pattern.sub(instead, text)
    return text.strip()


def _first_on_left(secret: str, shown: Sequence[_Pair]) -> set[int]:
    """The pairs with the first side on the left: a random half, so that a reader's preference for one side cancels."""
    shuffled = sorted(shown, key=lambda pair: _hash(secret, "side", pair.prediction))
    odd = _hash(secret, "side", "odd")[0] % 2
    return {pair.prediction for pair in shuffled[: (len(shown) + odd) // 2]}


def _placed(pair: _Pair, name: str, first_on_left: bool) -> dict[str, str]:
    left, right = pair.replies if first_on_left else reversed(pair.replies)
    return {"id": name, "prompt": pair.prompt, "left": left, "right": right}


def _hash(secret: str, purpose: str, of: int | str) -> bytes:
    return hmac.digest(secret.encode(), f"{purpose}\0{of}".encode(), hashlib.sha256)


def _name(digest: bytes, length: int) -> str:
    number, letters = int.from_bytes(digest, "big"), []
    for _ in range(length):
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)


def _refuse_other_key(folder: Path, name: str) -> None:
    path = folder / KEY_NAME
    if not path.exists():
        return
    try:
        kept = read_json(path)["sheet"] == name
    except (UsageError, KeyError):
        kept = False
    if not kept:
        raise UsageError(
            f"{path} is the key of another sheet, whose answers could never be scored without it. "
            "Choose another folder, or delete the key if no answers are to come."
        )
