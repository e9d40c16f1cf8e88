"""What a data report counts: lengths, languages, repetitions, and traces of what went wrong before.

Measured on the records in their random order, so that the first few thousand stand for all; each trait is a function of
one record.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from persona.console import excerpt
from persona.convert.cleaning import fold, garbled, personal_data
from persona.convert.options import Tokenize
from persona.records import CHARACTER, MACRO, language, speaks_as_ai

_PREFIX = re.compile(r"(?:Human|User|Assistant|AI|USER|ASSISTANT|### ?\w{4,12}|用户|助手)[:：]|[\u4e00-\u9fff]{2,4}：")
_REPEATED = re.compile(r"(.)\1{199}", re.DOTALL)
_CODE = re.compile(r"[A-Za-z0-9+/]{400}|</(?:div|span|p|td)>")
_HIDDEN = re.compile("[\u200b\u200c\u2060\u202a-\u202e\u2066-\u2069]")
_MEDIA = re.compile(r"\[(?:图片|语音|视频|表情|文件)\]|<Media omitted>|撤回了一条消息|https?://\S+")
_ROUND = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SHORT = 2  # characters; a reply of one or two teaches little


def _replies(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"] if message["role"] == "assistant"]


def _prompts(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"] if message["role"] == "user"]


def _text(record: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in record["messages"])


# Each says whether a record has the trait; the names are those of the report.
TRAITS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "placeholders": lambda record: MACRO.search(_text(record)) is not None,
    "characters lost (U+FFFD)": lambda record: "\ufffd" in _text(record),
    "garbled": lambda record: garbled(_text(record)),
    "invisible characters": lambda record: _HIDDEN.search(_text(record)) is not None,
    "very short replies": lambda record: any(len(reply) <= SHORT for reply in _replies(record)),
    "replies that copy the prompt": lambda record: any(
        fold(prompt) == fold(reply) for prompt, reply in zip(_prompts(record), _replies(record), strict=False)
    ),
    "names or roles left before the words": lambda record: any(_PREFIX.match(reply) for reply in _replies(record)),
    "replies that speak as an AI": lambda record: any(speaks_as_ai(reply) for reply in _replies(record)),
    "thinking blocks": lambda record: any("<think>" in reply for reply in _replies(record)),
    "code, HTML or encoded data": lambda record: _CODE.search(_text(record)) is not None,
    "one character over and over": lambda record: _REPEATED.search(_text(record)) is not None,
    "media or links instead of words": lambda record: any(_MEDIA.fullmatch(reply) for reply in _replies(record)),
}


def measure(
    sample: Sequence[dict[str, Any]], total: int, tokenizer: Callable[[], tuple[str, Tokenize]] | None
) -> dict[str, Any]:
    """The numbers of the data report, from a random sample of the records."""
    name, tokenize = tokenizer() if tokenizer and sample else ("an estimate", None)
    lengths = [sum(_tokens(message["content"], tokenize) for message in record["messages"]) for record in sample]
    replies = [_tokens(reply, tokenize) for record in sample for reply in _replies(record)]
    prompts = Counter(_prompts(record)[0] for record in sample)
    found: Counter[str] = Counter()
    for record in sample:
        found.update(personal_data(_text(record)))
    return {
        "measured": len(sample),
        "of": total,
        "tokens_by": name,
        "record_tokens": _distribution(lengths),
        "reply_tokens": _distribution(replies),
        "exchanges": dict(sorted(Counter(len(_replies(record)) for record in sample).items())),
        "languages": dict(Counter(language(" ".join(_replies(record))) for record in sample).most_common()),
        "same_prompts": [[excerpt(prompt, 60), count] for prompt, count in prompts.most_common(5) if count > 1],
        "prompts_with_several_answers": sum(count > 1 for count in prompts.values()),
        "near_duplicates": _near_duplicates(sample),
        "repeated_ids": _repeated_ids(sample),
        "traits": {name: count for name, has in TRAITS.items() if (count := sum(map(has, sample)))},
        "placeholders": dict(_placeholders(sample).most_common(5)),
        "personal_data": dict(found.most_common()),
        "without_system": sum(record["messages"][0]["role"] != "system" for record in sample),
    }


def _tokens(text: str, tokenize: Tokenize | None) -> int:
    return len(tokenize(text)) if tokenize else estimate(text)


def estimate(text: str) -> int:
    """About how many tokens a text has: 4 characters each, of Chinese 4 in 3."""
    chinese = len(CHARACTER.findall(text))
    return round(chinese * 0.75 + (len(text) - chinese) / 4 + 0.5)


def _distribution(values: list[int]) -> dict[str, Any]:
    """A histogram with doubling bounds, and what stands out of it."""
    if not values:
        return {}
    ordered = sorted(values)
    bounds = [*_ROUND, None]
    counts = [0] * len(bounds)
    for value in values:
        counts[next(i for i, bound in enumerate(bounds) if bound is None or value <= bound)] += 1
    return {
        "mean": round(sum(values) / len(values), 1),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "longest": ordered[-1],
        "histogram": [[bound, count] for bound, count in zip(bounds, counts, strict=True) if count],
    }


def _near_duplicates(sample: Sequence[dict[str, Any]]) -> int:
    """Records that differ from another one in case, punctuation or spaces only."""
    keys = Counter(re.sub(r"[\W_]+", "", fold(_text(record)).casefold()) for record in sample)
    return sum(count - 1 for key, count in keys.items() if key)


def _repeated_ids(sample: Sequence[dict[str, Any]]) -> int:
    extras = [record["meta"].get("extra") for record in sample]
    ids = Counter(str(extra["id"]) for extra in extras if isinstance(extra, dict) and "id" in extra)
    return sum(count - 1 for count in ids.values())


def _placeholders(sample: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(name for record in sample for name in set(MACRO.findall(_text(record))))
