"""Readers' answers to a blind sheet, and their score; refuses answers that are broken, partial or to another sheet."""

import codecs
import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from persona.console import excerpt, safe, table
from persona.errors import DataError, UsageError
from persona.evaluate.blind.sheet import KEY_FORMAT, KEY_NAME, SHEET_NAME
from persona.evaluate.intervals import Preference, binomial_p, cohen_kappa, preference
from persona.files import JsonObject, whole_json

ANSWERS_FORMAT = "ab-answers-1"  # as ab_sheet.js writes it
CHOICES = ("left", "right", "tie")
_COLUMNS = ("sheet", "rater", "id", "choice", "comment")
_EXPORT = f"Give the file that {SHEET_NAME} saved at its end, as JSON or CSV."


@dataclass(frozen=True)
class Key:
    """The place of each side on a sheet."""

    sheet: str
    names: tuple[str, str]
    left: dict[str, str]
    """The name of the side on the left, by pair."""
    predictions: dict[str, int]
    """The place of a pair in the predictions, from 0."""
    identical: int


@dataclass(frozen=True)
class Answers:
    """One reader's choices by pair, as they were clicked, and the comments."""

    rater: str
    choices: dict[str, str]
    comments: dict[str, str]


def read_key(path: Path) -> Key:
    """The key of a sheet; raises `UsageError` for any other file."""
    wanted = f"Give the {KEY_NAME} that was written beside {SHEET_NAME} as the last argument."
    try:
        value = whole_json(_text(path))
    except ValueError:
        raise UsageError(f"{path} is not a key. {wanted}") from None
    if not isinstance(value, dict) or value.get("format") != KEY_FORMAT:
        raise UsageError(f"{path} is not a key of this version ({KEY_FORMAT}). {wanted}")
    try:
        names = (str(value["names"][0]), str(value["names"][1]))
        left = {pair["id"]: str(pair["left"]) for pair in value["pairs"]}
        predictions = {pair["id"]: int(pair["prediction"]) for pair in value["pairs"]}
        key = Key(str(value["sheet"]), names, left, predictions, len(value["identical"]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise UsageError(f"{path} is damaged: a part of the key is missing. {wanted}") from None
    if not left or not set(left.values()) <= set(names) or names[0] == names[1]:
        raise UsageError(f"{path} is damaged: its pairs do not name its two sides. {wanted}")
    return key


def read_answers(paths: Sequence[Path], key: Key) -> list[Answers]:
    """Each reader's answers to the key's sheet; raises `DataError` for a file that is partial or of another sheet."""
    found = [_answers(path, key) for path in paths]
    for name, count in Counter(answers.rater for answers in found).items():
        if count > 1:
            raise DataError(
                f"{count} files are of the rater {excerpt(name, 40)!r}, whose choices would count {count} times. "
                "Give each reader's file once; readers of one name need different ones (a row's or file's rater)."
            )
    return found


def _answers(path: Path, key: Key) -> Answers:
    text = _text(path)
    if text.lstrip()[:9].lower() in ("<!doctype", "<html"):
        raise DataError(f"{path} is a page, not the answers to one. {_EXPORT}")
    sheet, rater, rows = _from_json(path, text) if text.lstrip()[:1] in ("{", "[") else _from_csv(path, text)
    if sheet != key.sheet:
        raise DataError(
            f"{path} answers the sheet {excerpt(sheet, 20)!r}, but the key is of the sheet {key.sheet!r}: "
            "they do not belong together. Each sheet can be scored only with the key that was made with it."
        )
    choices: dict[str, str] = {}
    for place, row in rows:
        name, choice = row["id"], row["choice"]
        if name not in key.left:
            raise DataError(f"{place}: the sheet has no pair {excerpt(name, 20)!r}. {_EXPORT}")
        if choice not in CHOICES:
            raise DataError(f"{place}: a choice is left, right or tie, found {excerpt(choice, 20)!r}. {_EXPORT}")
        if name in choices:
            raise DataError(f"{place}: the pair {name!r} is answered a second time. {_EXPORT}")
        choices[name] = choice
    if len(choices) < len(key.left):
        raise DataError(
            f"{path}: {len(choices)} of {len(key.left)} pairs are answered. Open the sheet again in the same browser; "
            "it goes on where it was left. A sheet that is scored before its end can be stopped when the score pleases."
        )
    comments = {row["id"]: row["comment"] for _, row in rows if row["comment"].strip()}
    return Answers(rater.strip() or path.stem, choices, comments)


Rows = list[tuple[str, dict[str, str]]]  # each with its place for messages


def _from_json(path: Path, text: str) -> tuple[str, str, Rows]:
    try:
        value = whole_json(text)
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}). {_EXPORT}") from None
    if isinstance(value, dict) and value.get("format") == KEY_FORMAT:
        raise UsageError(f"{path} is a key, not answers. Give the answers first and one key last.")
    if not isinstance(value, dict) or value.get("format") != ANSWERS_FORMAT:
        raise DataError(f"{path} does not hold answers of this version ({ANSWERS_FORMAT}). {_EXPORT}")
    entries = value.get("answers")
    if not isinstance(entries, list):
        raise DataError(f'{path}: no list under "answers". {_EXPORT}')
    rows = []
    for number, entry in enumerate(entries, 1):
        place = f"{path}: answer {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: expected an object, found {excerpt(repr(entry), 40)}. {_EXPORT}")
        rows.append((place, {name: _string(entry, name, place) for name in ("id", "choice", "comment")}))
    return _string(value, "sheet", str(path)), _string(value, "rater", str(path)), rows


def _string(entry: JsonObject, name: str, place: str) -> str:
    value = entry.get(name, "")
    if not isinstance(value, str):
        raise DataError(f'{place}: "{name}" must be text, found {excerpt(repr(value), 40)}. {_EXPORT}')
    return value


def _from_csv(path: Path, text: str) -> tuple[str, str, Rows]:
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)  # a spreadsheet saves with its country's
    rows: Rows = []
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if not reader.fieldnames or {"sheet", "id", "choice"} - {name.strip() for name in reader.fieldnames}:
        raise DataError(
            f"{path}: expected JSON or the columns {', '.join(_COLUMNS)}, found {excerpt(head, 60)!r}. {_EXPORT}"
        )
    sheets, raters = Counter[str](), Counter[str]()
    try:
        for row in reader:
            cells = {(name or "").strip(): (value or "") for name, value in row.items() if name is not None}
            if not any(value.strip() for value in cells.values()):
                continue
            full = {name: cells.get(name, "") for name in _COLUMNS}
            stripped = full | {name: full[name].strip() for name in ("sheet", "rater", "id", "choice")}
            sheets[stripped["sheet"]] += 1
            raters[stripped["rater"]] += 1
            rows.append((f"{path}:{reader.line_num}", stripped))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV ({error}). {_EXPORT}") from None
    if not rows:
        raise DataError(f"{path} has no answers in it. {_EXPORT}")
    if len(sheets) > 1 or len(raters) > 1:
        what = "sheets" if len(sheets) > 1 else "raters"
        raise DataError(f"{path} holds the answers of several {what}. Give each reader's file by itself.")
    return next(iter(sheets)), next(iter(raters)), rows


def _text(path: Path) -> str:
    """The text of a file as a browser (UTF-8) or a spreadsheet (UTF-16, GB18030) saves it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. {_EXPORT}") from None
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path} is not text. {_EXPORT}")


# --- preference -------------------------------------------------------------------------------------------------------
# The preference of each reader and of all together, and whether readers agree.


_POSITION_P = 0.01  # below it a reader's habit of one side is reported


@dataclass(frozen=True)
class Rater:
    """One reader's preference, and how often the reply on the left was taken."""

    name: str
    preference: Preference
    left: int
    """Wins and losses in which the reply on the left was chosen; by chance half of them."""


@dataclass(frozen=True)
class Agreement:
    """The agreement of two readers on the same pairs, by their clicks: left, right or tie."""

    raters: tuple[str, str]
    share: float
    """Pairs with the same answer over all pairs."""
    kappa: float | None
    """Cohen's kappa over left, right and tie. Sides are random, so two readers who prefer the tuned model do not look
    as if they agreed by chance. None if both gave one and the same answer throughout."""


@dataclass(frozen=True)
class Comment:
    """A reader's comment on a pair."""

    rater: str
    prediction: int
    """The pair's place in the predictions, from 0."""
    preferred: str
    """The side's name, or `tie`."""
    text: str


@dataclass(frozen=True)
class SheetScore:
    """A scored sheet. With several readers a pair counts once, by their majority, so that counts are independent."""

    sheet: str
    names: tuple[str, str]
    pairs: int
    identical: int
    """Pairs of the same two replies, which readers were not asked about; they are in no figure."""
    overall: Preference
    raters: tuple[Rater, ...]
    agreement: tuple[Agreement, ...]
    comments: tuple[Comment, ...]


def score_sheet(answers: Sequence[Path], key: Path) -> SheetScore:
    """Score readers' answers to one sheet; raises `UsageError` and `DataError` as `answers` does."""
    solution = read_key(key)
    readers = read_answers(answers, solution)
    sides = [_sides(reader, solution) for reader in readers]
    raters = tuple(
        Rater(reader.rater, _preference(list(side.values()), solution.names), Counter(reader.choices.values())["left"])
        for reader, side in zip(readers, sides, strict=True)
    )
    majorities = [_majority([side[pair] for side in sides]) for pair in solution.left]
    comments = (
        Comment(reader.rater, solution.predictions[pair], side[pair], text)
        for reader, side in zip(readers, sides, strict=True)
        for pair, text in reader.comments.items()
    )
    return SheetScore(
        solution.sheet,
        solution.names,
        len(solution.left),
        solution.identical,
        _preference(majorities, solution.names),
        raters,
        tuple(_agreement(one, other, solution) for one, other in combinations(readers, 2)),
        tuple(sorted(comments, key=lambda comment: comment.prediction)),
    )


def _sides(reader: Answers, key: Key) -> dict[str, str]:
    """The preferred side's name, or `tie`, by pair."""
    first, second = key.names
    other = {first: second, second: first}
    return {
        pair: choice if choice == "tie" else key.left[pair] if choice == "left" else other[key.left[pair]]
        for pair, choice in reader.choices.items()
    }


def _preference(sides: Sequence[str], names: tuple[str, str]) -> Preference:
    return preference(sides.count(names[0]), sides.count(names[1]), sides.count("tie"))


def _majority(sides: Sequence[str]) -> str:
    """The side that most readers chose; a tie if the first two are equal."""
    ranked = Counter(sides).most_common(2)
    return "tie" if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _agreement(one: Answers, other: Answers, key: Key) -> Agreement:
    first, second = ([reader.choices[pair] for pair in key.left] for reader in (one, other))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return Agreement((one.rater, other.rater), same / len(first), cohen_kappa(first, second))


# --- in words --------------------------------------------------------------------------------------------------------


def describe(score: SheetScore) -> str:
    """The score as text for the terminal."""
    first, second = map(safe, score.names)
    lines = [sentence(score.overall, first, second)]
    if len(score.raters) > 1:
        lines[0] += f" A pair counts once, by the majority of the {len(score.raters)} readers."
        lines.append(table((excerpt(rater.name, 30), _counts(rater.preference)) for rater in score.raters))
    if score.identical:
        lines.append(f"{score.identical} more pairs had the same two replies, so readers were not asked.")
    lines += [_agreed(agreement) for agreement in score.agreement]
    lines += filter(None, map(_habit, score.raters))
    lines += [
        f"  pair {said.prediction + 1}, {excerpt(said.rater, 30)} ({safe(said.preferred)}): {excerpt(said.text, 200)}"
        for said in score.comments
    ]
    return "\n".join(lines)


def sentence(found: Preference, first: str, second: str) -> str:
    """One preference with its numbers, in words."""
    decided = found.wins + found.losses
    if found.rate is None or found.rate_low is None or found.rate_high is None:
        return f"All {found.ties} pairs are ties: readers could not tell {first} from {second}."
    interval = f"{_percent(found.rate_low)} to {_percent(found.rate_high)}"
    odds = f"{found.log_odds:+.2f} ({found.log_odds_low:+.2f} to {found.log_odds_high:+.2f})"
    sure = "" if found.p < 0.05 else " That may be chance: more pairs or readers would tell."
    return (
        f"{first} was preferred to {second} in {found.wins} of {decided} decided pairs: {_percent(found.rate)}, 95 % "
        f"interval {interval}, exact p = {_p(found.p)}; {found.ties} ties. "
        f"Log odds {odds}, odds {math.exp(found.log_odds):.2f}."
        f"{sure}"
    )


def _counts(found: Preference) -> str:
    rate = "" if found.rate is None else f", {_percent(found.rate)} (p = {_p(found.p)})"
    return f"{found.wins} won, {found.losses} lost, {found.ties} ties{rate}"


def _agreed(agreement: Agreement) -> str:
    first, second = (excerpt(name, 30) for name in agreement.raters)
    kappa = "not defined, as both gave one answer only" if agreement.kappa is None else f"{agreement.kappa:.2f}"
    return (
        f"{first} and {second} gave the same answer to {_percent(agreement.share)} of the pairs; Cohen's kappa {kappa}."
    )


def _habit(rater: Rater) -> str | None:
    decided = rater.preference.wins + rater.preference.losses
    p = binomial_p(rater.left, decided)
    if p >= _POSITION_P:
        return None
    return (
        f"note: {excerpt(rater.name, 30)} took the left reply in {rater.left} of {decided} decided pairs "
        f"(p = {_p(p)}): a habit that hides a preference; sides are balanced, so it favours neither."
    )


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
