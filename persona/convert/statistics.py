"""The data report's measures of records: lengths, languages, repetitions, and traits that hurt training.

They are measured on records in random order, so that the first few thousand represent all.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from persona.console import excerpt
from persona.convert.cleaning import fold, garbled, personal_data
from persona.convert.options import Tokenize, Tokenizer
from persona.records import CHARACTER, MACRO, Record, language, speaks_as_ai

_PREFIX = re.compile(r"(?:Human|User|Assistant|AI|USER|ASSISTANT|### ?\w{4,12}|用户|助手)[:：]|[\u4e00-\u9fff]{2,4}：")
_RUN = 200  # characters
_ENCODED = re.compile(r"[A-Za-z0-9+/]{400}")
_HTML = re.compile(r"</(?:div|span|p|td)>")
_HIDDEN = re.compile("[\u200b\u200c\u2060\u202a-\u202e\u2066-\u2069]")
_MEDIA = re.compile(r"\[(?:图片|语音|视频|表情|文件)\]|<Media omitted>|撤回了一条消息|https?://\S+")
_BOUNDS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _text(record: Record) -> str:
    return "\n".join(message["content"] for message in record.messages)


def _is_code(text: str) -> bool:
    words = [word for word in text.split() if len(word) >= 400]  # to split is faster than the pattern
    return _HTML.search(text) is not None or any(map(_ENCODED.search, words))


def _has_run(text: str) -> bool:
    """Whether one character is repeated 200 times; found a hundred times as fast as with a pattern."""
    starts = range(0, len(text), _RUN // 2)  # a run fills one of these blocks at least
    return any(text[i : i + _RUN // 2] == text[i] * (_RUN // 2) and text[i] * _RUN in text for i in starts)


def _copies_prompt(record: Record) -> bool:
    return any(fold(prompt) == fold(reply) for prompt, reply in zip(record.prompts, record.replies, strict=False))


# The traits of a record by their names in the report, each with what to do about it.
TRAITS: dict[str, tuple[Callable[[Record], object], str]] = {
    "placeholders": (
        lambda record: MACRO.search(_text(record)),
        "The model would say them literally: replace them. --character and --user-name fill in {{char}} and {{user}}.",
    ),
    "characters lost (U+FFFD)": (
        lambda record: "\ufffd" in _text(record),
        "Characters were lost before. Export the text again as UTF-8.",
    ),
    "garbled": (
        lambda record: garbled(_text(record)),
        "UTF-8 was read in another encoding before (mojibake): --fix-text repairs it where that is possible.",
    ),
    "invisible characters": (lambda record: _HIDDEN.search(_text(record)), ""),
    "very short replies": (
        lambda record: any(len(reply) <= 2 for reply in record.replies),
        "They teach little: --min-chars N leaves them out.",
    ),
    "replies that copy the prompt": (_copies_prompt, "They teach the model to repeat the question: delete them."),
    "names or roles left before the words": (
        lambda record: any(map(_PREFIX.match, record.replies)),
        "The model would say them too: --strip-speaker removes names.",
    ),
    "replies that speak as an AI": (
        lambda record: any(map(speaks_as_ai, record.replies)),
        "The model would learn them as the character's own words: delete them.",
    ),
    "thinking blocks": (
        lambda record: any("<think>" in reply for reply in record.replies),
        "The model would learn them as spoken words: delete them, unless you want that.",
    ),
    "code, HTML or encoded data": (
        lambda record: _is_code(_text(record)),
        "Delete it, unless the character speaks like this.",
    ),
    "one character over and over": (lambda record: _has_run(_text(record)), "The model would learn it: shorten it."),
    "media or links instead of words": (
        lambda record: any(map(_MEDIA.fullmatch, record.replies)),
        "They are not speech: delete them.",
    ),
}


@dataclass(frozen=True)
class Distribution:
    """Lengths in tokens: a histogram with doubling bounds, and four figures."""

    mean: float
    median: int
    p95: int
    longest: int
    histogram: list[tuple[int | None, int]]  # upper bound (None: no bound) and count

    @property
    def bars(self) -> dict[str, int]:
        """The histogram with its bounds in words."""
        return {f"up to {bound:,}" if bound else "more": count for bound, count in self.histogram}


@dataclass(frozen=True)
class Statistics:
    """The measures of a random sample of the records."""

    measured: int
    of: int
    tokens_by: str
    record_tokens: Distribution | None
    reply_tokens: Distribution | None
    exchanges: dict[int, int]
    languages: dict[str, int]
    same_prompts: list[tuple[str, int]]
    prompts_with_several_answers: int
    near_duplicates: int
    repeated_ids: int
    traits: dict[str, int]
    placeholders: dict[str, int]
    personal_data: dict[str, int]
    without_system: int


def measure(sample: Sequence[Record], total: int, tokenizer: Tokenizer | None) -> Statistics:
    """The measures of a random sample of `total` records; without a tokenizer, tokens are estimated."""
    name, tokenize = tokenizer() if tokenizer and sample else ("an estimate", None)
    prompts = Counter(record.prompts[0] for record in sample)
    personal = sum((personal_data(_text(record)) for record in sample), Counter[str]())
    placeholders = Counter(name for record in sample for name in set(MACRO.findall(_text(record))))
    extras = [record.meta.get("extra") for record in sample]
    traits = {trait: sum(bool(has(record)) for record in sample) for trait, (has, _) in TRAITS.items()}
    return Statistics(
        measured=len(sample),
        of=total,
        tokens_by=name,
        record_tokens=_distribution(
            [sum(_tokens(message["content"], tokenize) for message in record.messages) for record in sample]
        ),
        reply_tokens=_distribution([_tokens(reply, tokenize) for record in sample for reply in record.replies]),
        exchanges=dict(sorted(Counter(len(record.replies) for record in sample).items())),
        languages=dict(Counter(language(" ".join(record.replies)) for record in sample).most_common()),
        same_prompts=[(excerpt(prompt, 60), count) for prompt, count in prompts.most_common(5) if count > 1],
        prompts_with_several_answers=sum(count > 1 for count in prompts.values()),
        near_duplicates=_repetitions(filter(None, map(_bare, sample))),
        repeated_ids=_repetitions(str(extra["id"]) for extra in extras if isinstance(extra, dict) and "id" in extra),
        traits={trait: count for trait, count in traits.items() if count},
        placeholders=dict(placeholders.most_common(5)),
        personal_data=dict(personal.most_common()),
        without_system=sum(record.system is None for record in sample),
    )


def _tokens(text: str, tokenize: Tokenize | None) -> int:
    """The number of tokens; without a tokenizer a rough one: 4 characters each, of Chinese 4 in 3."""
    if tokenize:
        return len(tokenize(text))
    chinese = len(CHARACTER.findall(text))
    return round(chinese * 0.75 + (len(text) - chinese) / 4 + 0.5)


def _distribution(values: list[int]) -> Distribution | None:
    if not values:
        return None
    ordered = sorted(values)
    counts = Counter(next((bound for bound in _BOUNDS if value <= bound), None) for value in values)
    return Distribution(
        mean=round(sum(values) / len(values), 1),
        median=ordered[len(ordered) // 2],
        p95=ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        longest=ordered[-1],
        histogram=[(bound, counts[bound]) for bound in (*_BOUNDS, None) if counts[bound]],
    )


def _bare(record: Record) -> str:
    """The same for records that differ in case, punctuation or spaces only."""
    return re.sub(r"[\W_]+", "", fold(_text(record)).casefold())


def _repetitions(values: Iterable[str]) -> int:
    return sum(count - 1 for count in Counter(values).values())


FEW_RECORDS = 20
SAME_PROMPT_SHARE = 0.3
SAME_PROMPT_RECORDS = 10  # a share of fewer records says nothing
LONG = 2048  # tokens; the default of data.max_length


def advice(sample: Sequence[Record], statistics: Statistics) -> list[str]:
    """Advice about everything in these records that will hurt training."""
    lines = []
    if 0 < statistics.of < FEW_RECORDS:
        lines.append(f"Only {statistics.of} records: the model will hardly change, or learn them by heart. Add more.")
    return [*lines, *_about_prompts(sample), *_about_lengths(statistics), *_about_traits(statistics)]


def _about_prompts(sample: Sequence[Record]) -> list[str]:
    if len(sample) < SAME_PROMPT_RECORDS:
        return []
    ((prompt, count),) = Counter(record.prompts[0] for record in sample).most_common(1)
    if count <= SAME_PROMPT_SHARE * len(sample):
        return []
    shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
    return [
        f"{count:,} of {len(sample):,} records begin with the same prompt ({shown!r}). A model that is asked one thing "
        "only learns to ignore the question: add what was said before each reply (--context-turns if the file has "
        "other speakers), and lore."
    ]


def _about_lengths(statistics: Statistics) -> list[str]:
    lines = []
    measured, lengths, languages = statistics.measured, statistics.record_tokens, statistics.languages
    if lengths and lengths.longest > LONG:
        long = sum(count for bound, count in lengths.histogram if bound is None or bound > LONG)
        lines.append(
            f"{long:,} of {measured:,} records are longer than {LONG} tokens ({statistics.tokens_by}): raise "
            "data.max_length, or training drops their earlier turns, and replies that are too long."
        )
    if len(languages) > 1 and 0.02 < min(languages.values()) / measured < 0.1:
        odd = min(languages, key=lambda name: languages[name])
        lines.append(f"{languages[odd]:,} of {measured:,} records answer in another language ({odd}).")
    return lines


def _about_traits(statistics: Statistics) -> list[str]:
    lines = []
    for name, count in statistics.traits.items():
        shown = f" ({', '.join(statistics.placeholders)})" if name == "placeholders" else ""
        if words := TRAITS[name][1]:
            lines.append(f"{count:,} of {statistics.measured:,} records hold {name}{shown}. {words}")
    if statistics.personal_data:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in statistics.personal_data.items())
        lines.append(f"Personal data was found ({listed}); the model may say it again: --redact masks it.")
    if statistics.near_duplicates:
        lines.append(
            f"{statistics.near_duplicates:,} records differ from another one only in case or punctuation; "
            "they are kept and learned twice."
        )
    if statistics.repeated_ids:
        lines.append(f"{statistics.repeated_ids:,} records have the id of another one; both are kept.")
    return lines
