"""Articles: Markdown or plain text of one author, cleaned, cut into chunks, and asked for by three templates.

All articles of a run are read together, because lines that recur in many of them are no words of the author.
"""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona.console import excerpt
from persona.convert.cleaning import clean_text
from persona.convert.draft import Draft, Message
from persona.convert.ledger import Account
from persona.convert.options import Options, Tokenize
from persona.convert.reading import Opened
from persona.errors import DataError, UsageError
from persona.records import RecordFault, rank

# --- chunking ---------------------------------------------------------------------------------------------------------
# A text cut into chunks of so many tokens, at the best border there is; joined again they are the text.
#
# Borders are taken in this order: paragraphs, sentences, double spaces and line ends, commas, and between any two
# tokens.


_CLOSE = r"[”」』’\"')）】》]*"
_LEVELS = (
    re.compile(r"\n\s*\n"),
    re.compile(rf"[。！？；…]+{_CLOSE}\s*|[.!?;]+{_CLOSE}(?:\s+|$)"),
    re.compile(r"[ \u3000]{2,}|\u3000|\n"),
    re.compile(r"[，、,：:]\s*"),
)
_SLACK = 8  # tokens; a chunk by itself may be cut into a few tokens more or fewer than in its text


def cut(text: str, tokenize: Tokenize, low: int, high: int) -> list[str]:
    """The chunks of `text`, of `low` to `high` tokens each; a text that is shorter is one chunk."""
    starts = [start for start, _ in tokenize(text)]
    slack = _SLACK if high - low > 6 * _SLACK else 0
    low, high = low + slack, high - slack
    borders = [[match.end() for match in level.finditer(text)] for level in _LEVELS]
    chunks: list[str] = []
    position = 0
    while (left := len(starts) - _token(starts, position)) > high:
        first = _token(starts, position)
        most = min(high, left - low) if left - low >= low else high  # so that the last chunk is long enough
        end = _border(starts, borders, first, min(low, most), most)
        chunks.append(text[position:end])
        position = end
    if position < len(text) or not chunks:
        chunks.append(text[position:])
    return chunks


def _token(starts: list[int], position: int) -> int:
    return bisect_left(starts, position)


def _border(starts: list[int], borders: list[list[int]], first: int, low: int, high: int) -> int:
    """The place to cut: of the best kind of border in the window the one nearest to its middle."""
    earliest, latest = starts[first + low], starts[first + high]
    middle = starts[first + (low + high) // 2]
    for level in borders:
        inside = level[bisect_left(level, earliest) : bisect_left(level, latest + 1)]
        if inside:
            return min(inside, key=lambda place: abs(place - middle))
    return max(middle, starts[first] + 1)


def halves(text: str) -> tuple[str, str]:
    """The text cut near its middle, at the best border within its middle third."""
    third, middle = len(text) // 3, len(text) // 2
    for level in _LEVELS:
        inside = [match.end() for match in level.finditer(text) if third <= match.end() <= len(text) - third]
        if inside:
            place = min(inside, key=lambda end: abs(end - middle))
            return text[:place], text[place:]
    return text[:middle], text[middle:]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without outer white space."""
    ends = [match.end() for match in _LEVELS[1].finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [line.strip() for part in parts for line in part.split("\n") if line.strip()]


# --- templates --------------------------------------------------------------------------------------------------------
# What is asked of an author's model: to go on, to write about something, to say something in the author's own voice.
#
# The prompt of a rewriting never holds a stretch of its answer, for that would teach copying.


CONTINUE = "请用我的风格续写下面的文字："
EXPAND = "用我的写作风格，围绕以下内容写一段文字："
REWRITE = "用我的口吻改写下面这段材料："
SPAN = 20  # characters that a prompt must not have in common with its answer
_PIECE = 14  # characters of a clause in a plain version
_PARTICLES = re.compile(r"[啊呢吧嘛呀哦啦哇哎唉噢喔哈咯]+(?=[，。！？；、…\s]|$)|^[啊哎唉哦噢哈嘿喂]+[，、！]?")
_ORNAMENTS = re.compile(r"[~～●★☆♪♥❤✨]+|[\U0001f300-\U0001faff]|\*+|…+|—{2,}")
_EXCLAMATIONS = re.compile(r"[！!]+")
_CLAUSES = re.compile(r"[，。！？；：、,.!?;:\s“”「」『』\"（）()]+")
_STOP = set("的了是在我你他她它们这那有和就不都也很到说要去会着没看好自己上下里个一为以而于与及其之但还又被把让从对")


def continuation(chunk: str) -> tuple[str, str] | None:
    """The first half as the prompt, the second as the answer."""
    first, second = halves(chunk)
    return (f"{CONTINUE}\n{first.strip()}", second.strip()) if first.strip() and second.strip() else None


def expansion(chunk: str, title: str) -> tuple[str, str] | None:
    """A title, keywords and the sentence that says most as the prompt, the chunk as the answer."""
    words = keywords(chunk)
    key = _key_sentence(chunk, words)
    parts = [
        f"标题：{title}" if title else "",
        f"关键词：{'、'.join(words)}" if words else "",
        f"要点：{key}" if key else "",
    ]
    outline = "\n".join(part for part in parts if part)
    return (f"{EXPAND}\n{outline}", chunk.strip()) if outline else None


def rewriting(chunk: str) -> tuple[str, str] | None:
    """A plainer version as the prompt, the chunk as the answer; None where the two have a stretch in common."""
    material = f"{REWRITE}\n{plain(chunk)}"
    return None if shares_span(material, chunk) else (material, chunk.strip())


def plain(chunk: str) -> str:
    """The chunk without its voice: particles, exclamations and ornaments removed, clauses split and reordered."""
    lines = []
    for sentence in sentences(chunk):
        text = _EXCLAMATIONS.sub("。", _ORNAMENTS.sub("", sentence))
        clauses = [_PARTICLES.sub("", clause) for clause in _CLAUSES.split(text)]
        pieces = [piece for clause in clauses for piece in _pieces(clause) if piece]
        if pieces:  # the second before the first, the fourth before the third: facts stay near, the wording goes
            order = [i + 1 if i % 2 == 0 and i + 1 < len(pieces) else i - i % 2 for i in range(len(pieces))]
            lines.append("；".join(pieces[i] for i in order) + "。")
    return "\n".join(lines)


def _pieces(clause: str) -> list[str]:
    if clause.isascii():
        words = clause.split()
        return [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]
    return [clause[i : i + _PIECE] for i in range(0, len(clause), _PIECE)]


def shares_span(prompt: str, answer: str, span: int = SPAN) -> bool:
    """Whether `prompt` and `answer` have a stretch of `span` characters in common."""
    spans = {answer[i : i + span] for i in range(len(answer) - span + 1)}
    return any(prompt[i : i + span] in spans for i in range(len(prompt) - span + 1))


def keywords(chunk: str, count: int = 6) -> list[str]:
    """The words that a chunk says most often: pairs of Chinese characters, and Latin words of four letters and more."""
    found: Counter[str] = Counter(word.lower() for word in re.findall(r"[A-Za-z]{4,}", chunk))
    for run in re.findall(r"[\u4e00-\u9fff]{2,}", chunk):
        found.update(run[i : i + 2] for i in range(len(run) - 1) if not _STOP & set(run[i : i + 2]))
    ranked = sorted((word for word, times in found.items() if times > 1), key=lambda word: (-found[word], word))
    return ranked[:count]


def _key_sentence(chunk: str, words: list[str]) -> str:
    """The sentence of at most 40 characters that holds the most keywords."""
    short = [sentence for sentence in sentences(chunk) if 6 <= len(sentence) <= 40]
    return max(short, key=lambda sentence: sum(word in sentence.lower() for word in words), default="")


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
        "continue": continuation(chunk),
        "expand": expansion(chunk, title),
        "rewrite": rewriting(chunk),
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
