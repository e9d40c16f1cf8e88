"""Replies to held-out prompts beside the true ones: predictions.json, texts of other tools, and their figures."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona.console import excerpt
from persona.errors import DataError
from persona.evaluate.results import Exchange, Replies, Sides, Span
from persona.evaluate.style.words import units
from persona.files import whole_json, write_json
from persona.records import Record, speaks_as_ai

PREDICTIONS, BASE_PREDICTIONS = "predictions.json", "predictions_base.json"
# Names of the three parts here, in LLaMA-Factory's generated_predictions.jsonl, and in other tools' files
_NAMES = {
    "input": ("input", "prompt", "instruction", "question"),
    "predict": ("predict", "prediction", "generated", "response", "output", "completion"),
    "target": ("target", "label", "reference", "answer"),
}
_LABEL = re.compile(r"^[ \t]*([^\s:：][^:：\n]{0,39}?)[ \t]*[:：][ \t]*\S", re.MULTILINE)
_ROLES = frozenset({"user", "assistant", "system", "human", "ai", "用户", "助手", "系统"})


@dataclass(frozen=True)
class Prediction:
    """The last user turn, a model's reply to it, and the true reply."""

    input: str
    predict: str
    target: str


def asked(records: Sequence[Record]) -> list[Prediction]:
    """A prediction without a reply for each of `records`, in their order; the record's last reply is the target."""
    return [Prediction(record.turns[-2]["content"], "", record.turns[-1]["content"]) for record in records]


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write `predictions` as a JSON list, whole or not at all."""
    write_json(path, [asdict(prediction) for prediction in predictions])


def read_predictions(path: Path) -> list[Prediction]:
    """Replies from any tool: our predictions.json, JSONL with such keys, or plain text.

    Plain text holds one reply per paragraph if there are blank lines, otherwise one per line, without input and target.
    Raises `DataError` with the place.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if text.lstrip()[:1] in ("[", "{") and (entries := _json_entries(path, text)):
        return [_prediction(value, place) for place, value in entries]
    parted = re.split(r"\n[ \t]*\n", text.strip("\n"))
    replies = parted if len(parted) > 1 else text.split("\n")
    found = [Prediction("", reply.strip(), "") for reply in replies if reply.strip()]
    if not found:
        raise DataError(f"{path} is empty: expected a reply per paragraph, a reply per line, or JSON.")
    return found


def _json_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    """The objects of a JSON list or of JSONL; none if a text only begins like JSON (“[laughs] ...”)."""
    if text.lstrip().startswith("["):
        try:
            values = whole_json(text)
        except json.JSONDecodeError as error:
            if path.suffix == ".json":
                raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None
            return []
        except ValueError as fault:
            raise DataError(f"{path}: {fault}.") from None
        return [(f"{path}: entry {number}", value) for number, value in enumerate(values, 1)]
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append((f"{path}:{number}", whole_json(line)))
            except json.JSONDecodeError as error:
                if path.suffix not in (".json", ".jsonl"):
                    return []
                raise DataError(f"{path}:{number}: not JSON: {error.msg}; write one object per line.") from None
            except ValueError as fault:
                raise DataError(f"{path}:{number}: {fault}.") from None
    return entries


def _prediction(value: Any, place: str) -> Prediction:
    if isinstance(value, str):
        return Prediction("", value, "")
    expected = 'expected {"input": ..., "predict": ..., "target": ...}'
    if not isinstance(value, dict):
        raise DataError(f"{place}: {expected}, found {excerpt(json.dumps(value), 40)}.")
    found = {}
    for part, names in _NAMES.items():
        name = next((name for name in names if isinstance(value.get(name), str)), None)
        if name is None and part == "predict":
            keys = ", ".join(value) or "nothing"
            raise DataError(f"{place}: {expected}, found no reply under {', '.join(names)} but {excerpt(keys, 60)}.")
        found[part] = value[name] if name is not None else ""
    return Prediction(**found)


# --- figures ---------------------------------------------------------------------------------------------------------


def reply_figures(
    predictions: Sides[list[Prediction]], ended: Sides[list[bool]] | None, language: str, others: Collection[str]
) -> Sides[Replies] | None:
    """The figures of both sides; None without targets to compare with. `others` are speakers as in `figures_of`."""
    base = predictions.base
    if not any(prediction.target for prediction in predictions.tuned):
        return None
    tuned = figures_of(predictions.tuned, language, others, ended and ended.tuned)
    if base is None or not any(prediction.target for prediction in base):
        return Sides(tuned)
    return Sides(tuned, figures_of(base, language, others, ended and ended.base))


def exchanges(predictions: Sides[list[Prediction]], spans: Sequence[tuple[Span, ...]] | None) -> tuple[Exchange, ...]:
    """The predictions of both sides beside each other, copied spans marked in the tuned ones."""
    base = predictions.base or []
    return tuple(
        Exchange(
            one.input,
            one.target,
            Sides(one.predict, base[at].predict if at < len(base) else None),
            () if spans is None else spans[at],
        )
        for at, one in enumerate(predictions.tuned)
    )


def figures_of(
    predictions: Sequence[Prediction], language: str, others: Collection[str], ended: Sequence[bool] | None
) -> Replies:
    """The figures of `predictions` that have a target; a reply under the name of one of `others` breaks character.

    BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's, so that they compare between papers.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    said = [prediction.predict for prediction in predictions]
    wanted = [prediction.target for prediction in predictions]
    bleu = BLEU(tokenize="zh" if language == "zh" else "13a")
    broken = sum(breaks_character(reply, others) is not None for reply in said)
    return Replies(
        count=len(predictions),
        bleu=_exact(bleu.corpus_score(said, [wanted]).score),
        chrf=_exact(CHRF().corpus_score(said, [wanted]).score),
        rouge_l=100 * sum(map(rouge_l, said, wanted)) / len(predictions),
        length_ratio=sum(map(len, said)) / max(sum(map(len, wanted)), 1),
        breaks_character=broken / len(predictions),
        stops=None if ended is None else sum(ended) / len(ended),
    )


def _exact(score: float) -> float:
    return min(max(float(score), 0.0), 100.0)  # a perfect one is 100.00000000000004


def rouge_l(said: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words, or of characters in scripts without spaces (Lin 2004)."""
    left, right = (_units(text) for text in (said, wanted))
    if not left or not right:
        return float(left == right)
    row = [0] * (len(right) + 1)
    for unit in left:
        above, row = row, [0]
        for place, other in enumerate(right, 1):
            row.append(above[place - 1] + 1 if unit == other else max(above[place], row[-1]))
    precision, recall = row[-1] / len(left), row[-1] / len(right)
    return 2 * precision * recall / (precision + recall) if row[-1] else 0.0


def _units(text: str) -> list[str]:
    folded = text.casefold()
    return [folded[start:end] for start, end in units(folded)]


def breaks_character(reply: str, others: Collection[str]) -> str | None:
    """The words by which `reply` breaks character: as a language model, or as one of `others`; else None."""
    return speaks_as_ai(reply) or next(
        (match[1] for match in _LABEL.finditer(reply) if match[1].casefold() in others), None
    )


def other_speakers(records: Iterable[Record]) -> frozenset[str]:
    """The names, folded, before a colon in the user's turns, and the names of roles."""
    own, names = set(), set(_ROLES)
    for record in records:
        own.add(str(record.meta.get("character", "")).casefold())
        names |= {match[1].casefold() for text in record.prompts for match in _LABEL.finditer(text)}
    return frozenset(names - own)
