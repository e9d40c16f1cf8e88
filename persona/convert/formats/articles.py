"""Articles: Markdown or plain text of one author, cleaned, cut into chunks, and asked for by three templates.

All articles of a conversion are looked at together first, because lines that recur in many of them are footers and not
the author's words. A text is cut at paragraphs if it can be, else at sentences, double spaces and line ends, commas, or
between any two tokens; the chunks joined are the text again. The templates ask to continue a text, to write about
something, or to rewrite something; a prompt never holds a passage of its reply, for that would teach copying.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from persona.console import excerpt
from persona.convert.cleaning import fill
from persona.convert.draft import Draft
from persona.convert.formats.format import Contents, Text, TextFormat
from persona.convert.ledger import Counts
from persona.convert.options import Options, Tokenize
from persona.errors import DataError, UsageError
from persona.files import JsonObject, read_json
from persona.records import rank

_CLOSE = r"[”」』’\"')）】》]*"
_LEVELS = (
    re.compile(r"\n\s*\n"),
    re.compile(rf"[。！？；…]+{_CLOSE}\s*|[.!?;]+{_CLOSE}(?:\s+|$)"),
    re.compile(r"[ \u3000]{2,}|\u3000|\n"),
    re.compile(r"[，、,：:]\s*"),
)
_SLACK = 8  # tokens; the same chunk may have a few more or fewer tokens alone than within its text


def cut(text: str, tokenize: Tokenize, low: int, high: int) -> list[str]:
    """The chunks of `text`, `low` to `high` tokens each; a shorter text is one chunk."""
    starts = [start for start, _ in tokenize(text)]
    slack = _SLACK if high - low > 6 * _SLACK else 0
    low, high = low + slack, high - slack
    borders = _borders(text)
    chunks: list[str] = []
    position = 0
    while (left := len(starts) - bisect_left(starts, position)) > high:
        first = bisect_left(starts, position)
        most = min(high, left - low) if left - low >= low else high  # so that the last chunk is long enough
        least = min(low, most)
        middle = starts[first + (least + most) // 2]
        end = _nearest(borders, starts[first + least], starts[first + most], middle) or max(middle, starts[first] + 1)
        chunks.append(text[position:end])
        position = end
    if position < len(text) or not chunks:
        chunks.append(text[position:])
    return chunks


def _borders(text: str) -> list[list[int]]:
    """The places where a text can be cut, by the kinds of borders."""
    return [[match.end() for match in level.finditer(text)] for level in _LEVELS]


def _nearest(borders: list[list[int]], earliest: int, latest: int, middle: int) -> int | None:
    """The border of the best kind that is nearest to the middle of the window."""
    inside = (level[bisect_left(level, earliest) : bisect_left(level, latest + 1)] for level in borders)
    return next((min(level, key=lambda place: abs(place - middle)) for level in inside if level), None)


def halves(text: str) -> tuple[str, str]:
    """The text cut near its middle, at the best border within its middle third."""
    third, middle = len(text) // 3, len(text) // 2
    place = _nearest(_borders(text), third, len(text) - third, middle) or middle
    return text[:place], text[place:]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without outer white space."""
    ends = [match.end() for match in _LEVELS[1].finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [line.strip() for part in parts for line in part.split("\n") if line.strip()]


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
    """A title, keywords and the sentence with most of them as the prompt, the chunk as the answer."""
    words = keywords(chunk)
    parts = {"标题": title, "关键词": "、".join(words), "要点": _key_sentence(chunk, words)}
    outline = "\n".join(f"{name}：{text}" for name, text in parts.items() if text)
    return (f"{EXPAND}\n{outline}", chunk.strip()) if outline else None


def rewriting(chunk: str) -> tuple[str, str] | None:
    """A plainer version as the prompt, the chunk as the answer; None if the two share a passage."""
    material = f"{REWRITE}\n{plain(chunk)}"
    return None if shares_span(material, chunk) else (material, chunk.strip())


def plain(chunk: str) -> str:
    """The chunk without its voice: particles, exclamations and ornaments removed, clauses split and reordered."""
    lines = []
    for sentence in sentences(chunk):
        text = _EXCLAMATIONS.sub("。", _ORNAMENTS.sub("", sentence))
        clauses = [_PARTICLES.sub("", clause) for clause in _CLAUSES.split(text)]
        pieces = [piece for clause in clauses for piece in _pieces(clause) if piece]
        if pieces:  # the second before the first, the fourth before the third
            order = [i + 1 if i % 2 == 0 and i + 1 < len(pieces) else i - i % 2 for i in range(len(pieces))]
            lines.append("；".join(pieces[i] for i in order) + "。")
    return "\n".join(lines)


def _pieces(clause: str) -> list[str]:
    if clause.isascii():
        words = clause.split()
        return [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]
    return [clause[i : i + _PIECE] for i in range(0, len(clause), _PIECE)]


def shares_span(prompt: str, answer: str) -> bool:
    """Whether `prompt` and `answer` share a passage of SPAN characters."""
    spans = {answer[i : i + SPAN] for i in range(len(answer) - SPAN + 1)}
    return any(prompt[i : i + SPAN] in spans for i in range(len(prompt) - SPAN + 1))


def keywords(chunk: str) -> list[str]:
    """The six most frequent words of a chunk: pairs of Chinese characters, and Latin words of four letters and more."""
    counts: Counter[str] = Counter(word.lower() for word in re.findall(r"[A-Za-z]{4,}", chunk))
    for run in re.findall(r"[\u4e00-\u9fff]{2,}", chunk):
        counts.update(run[i : i + 2] for i in range(len(run) - 1) if not _STOP & set(run[i : i + 2]))
    return sorted((word for word, times in counts.items() if times > 1), key=lambda word: (-counts[word], word))[:6]


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
_RECURRING = 3  # articles, and a third of all: a line in so many of them is a footer
_SHORTEST = 20  # tokens; shorter articles are dropped
_LOOKS_LIKE_MARKDOWN = re.compile(r"#{1,6} \S|\[[^\]\n]+\]\([^)\n]+\)|!\[")
_SENTENCE = re.compile(r"[。！？!?.…](?=\s|$|[”」』\"])|[。！？]")
_ARTICLE = 300  # characters; shorter texts are notes


def clean(text: str) -> str:
    """The words of an article without Markdown: no images, addresses, heading marks and list numbers."""
    text = _TAG.sub("", _LINK.sub(r"\1", _IMAGE.sub("", text)))
    text = _BOLD.sub("", _LIST.sub("", _HEADING.sub("", _QUOTE.sub("", text))))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def recurring_lines(texts: Sequence[str]) -> set[str]:
    """The lines of at least three articles and a third of all."""
    counts = Counter(line for text in texts for line in {line.strip() for line in text.split("\n")} if line)
    return {line for line, count in counts.items() if count >= max(_RECURRING, len(texts) / 3)}


def without_footers(text: str, recurring: set[str], dropped: Counter[str]) -> str:
    """`text` without footers and ornaments, each counted."""
    kept = []
    for line in text.split("\n"):
        if line.strip() in recurring:
            dropped["lines that recur in many articles"] += 1
        elif line.strip() and _FOOTER.fullmatch(line):
            dropped["footers and ornaments"] += 1
        else:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


@dataclass
class Tally:
    """Counts of all articles of a conversion, for dataset_stats.json."""

    tokenizer: str
    tokenize: Tokenize
    recurring: set[str]  # lines
    articles: int = 0
    chunks: int = 0
    chunk_tokens: tuple[int, int] = (0, 0)
    dropped: Counter[str] = field(default_factory=Counter)
    outside: int = 0  # chunks that are longer or shorter than --chunk-tokens
    samples: Counter[str] = field(default_factory=Counter)
    years: Counter[str] = field(default_factory=Counter)

    def to_json(self, written: int, train: int, val: int) -> JsonObject:
        """The counts under their names in dataset_stats.json."""
        return {
            "total_articles": self.articles,
            "years": dict(sorted(self.years.items())),
            "sample_templates": dict(sorted(self.samples.items())),
            "chunks": self.chunks,
            "chunk_tokens": list(self.chunk_tokens),
            "chunks_outside": self.outside,
            "dropped": dict(sorted(self.dropped.items())),
            "tokenizer": self.tokenizer,
            "total_samples": written,
            "train_samples": train,
            "val_samples": val,
            "train_ratio": round(train / max(1, train + val), 4),
        }

    def summary(self) -> str:
        """The counts in a line."""
        low, high = self.chunk_tokens
        counts = f"{self.articles:,} in {self.chunks:,} chunks, {self.outside:,} outside {low}-{high} tokens"
        dropped = "".join(f", {name}: {count:,}" for name, count in sorted(self.dropped.items()))
        return f"articles: {counts} (counted by {self.tokenizer}){dropped}"


@dataclass
class Article(Contents):
    """One article; `tally` is set when all articles were looked at together."""

    text: str
    meta: JsonObject
    tally: Tally | None = None

    def drafts(self, options: Options, counts: Counts) -> Iterator[Draft]:
        """A draft for each chunk and template."""
        tally = self.tally
        if tally is None:  # a file of this conversion has faults, so nothing will be written
            return
        heading = re.search(r"^#{1,2}\s+(\S.*)$", self.text, re.MULTILINE)
        title = str(self.meta.get("title") or (heading[1] if heading else "")).strip()
        body = without_footers(clean(self.text), tally.recurring, tally.dropped)
        if len(tally.tokenize(body)) < _SHORTEST:
            tally.dropped["articles too short"] += 1
            return
        tally.articles += 1
        if year := _year(self.meta):
            tally.years[year] += 1
        low, high = options.chunk_tokens
        for index, chunk in enumerate(cut(body, tally.tokenize, low, high)):
            tally.chunks += 1
            tally.outside += not low <= len(tally.tokenize(chunk)) <= high
            line = body.count("\n", 0, body.find(chunk[:40])) + 1
            for template, (prompt, answer) in _samples(chunk, title, options, tally):
                path = f"$.chunk[{index}]"
                meta = {"type": f"style_{template}"} | ({"title": excerpt(title, 80)} if title else {})
                draft = Draft([], Counter(), meta, "article", line, path, None, answer[:300])
                system = options.system or options.author_prompt
                yield fill(draft, (("system", system), ("user", prompt), ("assistant", answer)), path)


def _samples(chunk: str, title: str, options: Options, tally: Tally) -> Iterator[tuple[str, tuple[str, str]]]:
    """Prompt and answer by each template that the seed chooses for this chunk."""
    templates = {"continue": continuation, "expand": partial(expansion, title=title), "rewrite": rewriting}
    for template, ask in templates.items():
        place = int(rank(options.seed, f"{template} {chunk}")[:8], 16) / 16**8
        if place >= options.templates[template]:
            continue
        if sample := ask(chunk):
            tally.samples[template] += 1
            yield template, sample
        else:
            tally.dropped[f"{template}: prompt would hold its answer, or be empty"] += 1


def _year(meta: JsonObject) -> str:
    dates = (str(meta.get(key) or "") for key in ("year", "date", "publish_time"))
    return next((match[0] for date in dates if (match := re.search(r"(?:19|20)\d{2}", date))), "")


def _recognise(text: Text, _options: Options) -> str | None:
    """Prose of some length, or Markdown, or a text with a meta.json beside it."""
    if len(text.head.strip()) < 20:
        return None
    if (text.path.parent / "meta.json").is_file():
        return "a text with meta.json beside it"
    if len(text.head) < _ARTICLE:
        return None
    if _LOOKS_LIKE_MARKDOWN.search(text.head):
        return "Markdown of some length"
    return "prose of some length" if len(_SENTENCE.findall(text.head)) >= 3 else None


def _read(text: Text, _options: Options) -> Article:
    path = text.path.parent / "meta.json"
    try:
        return Article(text.whole(), read_json(path, "Repair or delete it.") if path.is_file() else {})
    except UsageError as error:
        raise DataError(str(error)) from None


def _together(articles: Sequence[Article], options: Options) -> Tally:
    if options.load_tokenizer is None:
        raise UsageError("Articles are cut by tokens. Name the model whose tokens count with --tokenizer MODEL.")
    name, tokenize = options.load_tokenizer()
    recurring = recurring_lines([clean(article.text) for article in articles])
    tally = Tally(name, tokenize, recurring, chunk_tokens=options.chunk_tokens)
    for article in articles:
        article.tally = tally
    return tally


ARTICLES = TextFormat(
    "articles",
    _recognise,
    _read,
    prose=True,
    together=_together,
    names={"train.jsonl": "sft_train.jsonl", "val.jsonl": "sft_val.jsonl"},
    statistics="dataset_stats.json",
)
