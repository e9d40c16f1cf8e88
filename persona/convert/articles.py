"""Articles: Markdown or plain text of one author, cleaned, cut into chunks, and asked for by three templates.

All articles of a run are read together, because lines that recur in many of them are no words of the author.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona.console import excerpt
from persona.convert import templates
from persona.convert.account import Account
from persona.convert.chunking import cut
from persona.convert.clean import clean_text
from persona.convert.draft import Draft, Message
from persona.convert.options import Options, Tokenize
from persona.convert.reading import Opened
from persona.errors import DataError, UsageError
from persona.records import RecordFault, rank

_IMAGE = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)|<img\b[^>\n]*>", re.IGNORECASE)
_LINK = re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)")
_TAG = re.compile(r"</?(?:p|br|div|span|section|strong|em|b|i|u|font|center)\b[^>\n]*>", re.IGNORECASE)
_HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]+", re.MULTILINE)
_LIST = re.compile(r"^[ \t]*(?:[-*+]|\d{1,3}[.)、])[ \t]+", re.MULTILINE)
_QUOTE = re.compile(r"^[ \t]*>[ \t]?", re.MULTILINE)
_BOLD = re.compile(r"\*\*|__(?=\S)|(?<=\S)__")
_FOOTER = re.compile(r".*\bgh_[0-9a-z]{6,}\b.*|[●○•·\s]*●[●○•·\s]*|[-*_=—]{3,}")
_RECURRING = 3  # articles, and a third of all: a line that stands in so many is a footer
_SHORTEST = 20  # tokens of an article that is kept at all


@dataclass
class Tally:
    """What dataset_stats.json says."""

    articles: int = 0
    chunks: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    exceptions: int = 0  # chunks outside the wanted number of tokens
    samples: Counter[str] = field(default_factory=Counter)
    years: Counter[str] = field(default_factory=Counter)


def clean(text: str) -> str:
    """The words of an article without Markdown: no images, addresses, heading marks and list numbers."""
    text = _TAG.sub("", _LINK.sub(r"\1", _IMAGE.sub("", text)))
    text = _BOLD.sub("", _LIST.sub("", _HEADING.sub("", _QUOTE.sub("", text))))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def recurring_lines(texts: Sequence[str]) -> set[str]:
    """The lines that stand in at least three articles and in a third of all."""
    counts = Counter(line for text in texts for line in {line.strip() for line in text.split("\n")} if line)
    return {line for line, count in counts.items() if count >= max(_RECURRING, len(texts) / 3)}


def read(files: Sequence[Opened], options: Options, account: Account) -> list[dict[str, Any]]:
    """The chunks of all articles settled, the statistics written; the files' entries in the report."""
    if options.tokenizer is None:
        raise UsageError("Articles are cut by tokens: --tokenizer MODEL says whose.")
    name, tokenize = options.tokenizer()
    cleaned = [clean(file.article) for file in files]
    recurring = recurring_lines(cleaned)
    tally, entries = Tally(), []
    for file, text in zip(files, cleaned, strict=True):
        before = account.outcome.copy()
        for number, draft in enumerate(drafts(file, text, recurring, tokenize, options, tally), 1):
            account.settle(draft, file.source, number)
        counts = {key: account.outcome[key] - before[key] for key in ("read", "written", "rejected", "duplicates")}
        entries.append(
            {
                "file": file.source.name,
                "formats": {"articles": counts["read"]},
                "why": file.why,
                "encoding": file.found.label,
                "bytes": file.found.size,
                "sha256": file.found.digest,
                **counts,
                "notes": file.notes,
            }
        )
    account.articles = {
        "total_articles": tally.articles,
        "years": dict(sorted(tally.years.items())),
        "sample_templates": dict(sorted(tally.samples.items())),
        "chunks": tally.chunks,
        "chunk_tokens": list(options.chunk_tokens),
        "chunks_outside": tally.exceptions,
        "dropped": dict(sorted(tally.dropped.items())),
        "tokenizer": name,
    }
    return entries


def drafts(
    file: Opened, text: str, recurring: set[str], tokenize: Tokenize, options: Options, tally: Tally
) -> Iterator[Draft]:
    """The drafts of one article."""
    meta = _meta(file)
    title = str(meta.get("title") or _title(file.article) or "").strip()
    body = without_footers(text, recurring, tally.dropped)
    if len(tokenize(body)) < _SHORTEST:
        tally.dropped["articles too short"] += 1
        return
    tally.articles += 1
    if year := _year(meta):
        tally.years[year] += 1
    low, high = options.chunk_tokens
    for index, chunk in enumerate(cut(body, tokenize, low, high)):
        tally.chunks += 1
        tally.exceptions += not low <= len(tokenize(chunk)) <= high
        for template, made in _asked(chunk, title).items():
            place = int(rank(options.seed, f"{template} {chunk}")[:8], 16) / 16**8
            if place >= options.templates[template]:
                continue
            if made is None:
                tally.dropped[f"{template}: prompt would hold its answer, or be empty"] += 1
                continue
            tally.samples[template] += 1
            yield _draft(made, template, title, index, body.count("\n", 0, body.find(chunk[:40])) + 1, options)


def _asked(chunk: str, title: str) -> dict[str, tuple[str, str] | None]:
    return {
        "continue": templates.continuation(chunk),
        "expand": templates.expansion(chunk, title),
        "rewrite": templates.rewriting(chunk),
    }


def without_footers(text: str, recurring: set[str], dropped: Counter[str]) -> str:
    """`text` without the lines that are no words of the author, each counted."""
    kept = []
    for line in text.split("\n"):
        if line.strip() in recurring:
            dropped["lines that recur in many articles"] += 1
        elif line.strip() and _FOOTER.fullmatch(line):
            dropped["footers and ornaments"] += 1
        else:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _draft(made: tuple[str, str], template: str, title: str, index: int, line: int, options: Options) -> Draft:
    repairs: Counter[str] = Counter()
    fault, messages = None, list[Message]()
    path = f"$.chunk[{index}]"
    try:
        texts = (("system", options.system or options.author_prompt), ("user", made[0]), ("assistant", made[1]))
        messages = [{"role": role, "content": clean_text(text, path, repairs)} for role, text in texts]
    except RecordFault as found:
        fault = found
    meta: dict[str, Any] = {"type": f"style_{template}"} | ({"title": excerpt(title, 80)} if title else {})
    return Draft(messages, repairs, meta, "article", line, path, fault, made[1][:300])


def _title(text: str) -> str:
    first = re.search(r"^#{1,2}\s+(\S.*)$", text, re.MULTILINE)
    return first[1] if first else ""


def _meta(file: Opened) -> dict[str, Any]:
    """What meta.json beside the article says; a DataError when it cannot be read."""
    path = file.source.path.parent / "meta.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.parent.name}/meta.json cannot be read: {error}. Mend it, or delete it.") from None
    return value if isinstance(value, dict) else {}


def _year(meta: dict[str, Any]) -> str:
    for key in ("year", "date", "publish_time"):
        if found := re.search(r"(?:19|20)\d{2}", str(meta.get(key) or "")):
            return found[0]
    return ""
