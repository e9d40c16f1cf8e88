"""Texts on the report page, to be read and not only counted: replies side by side, and answers about the lore."""

import re
from collections.abc import Callable, Sequence
from html import escape

from persona.evaluate.page.charts import (
    Form,
    Line,
    decimal,
    dots,
    estimate,
    histogram,
    hundredths,
    legend,
    number,
    percent,
    whole,
)
from persona.evaluate.results import (
    Answer,
    Distance,
    Distribution,
    Estimate,
    Evaluation,
    Exchange,
    FileScore,
    Question,
    Recall,
    Sides,
    Span,
    StyleReport,
)

_OPEN, _QUESTIONS = 6, 20  # exchanges and questions shown at once; the others unfold


def exchanges(found: Sequence[Exchange], names: dict[str, str], language: str) -> str:
    """Each prompt with what the author, the base and the tuned model said, copied stretches marked."""
    shown = [_exchange(exchange, names) for exchange in found]
    return _folded(shown, _OPEN, language) if shown else ""


def _folded(shown: Sequence[str], at_once: int, language: str) -> str:
    """The first `at_once` of them, and the others to unfold."""
    rest = shown[at_once:]
    more = f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    return f'<div lang="{escape(language)}">{"".join(shown[:at_once])}{more}</div>'


def _exchange(exchange: Exchange, names: dict[str, str]) -> str:
    columns = [_reply("author", names["author"], escape(exchange.target))] if exchange.target else []
    if exchange.said.base is not None:
        columns.append(_reply("base", names["base"], escape(exchange.said.base)))
    columns.append(_reply("tuned", names["tuned"], marked(exchange.said.tuned, exchange.copied)))
    sources = sorted({span.source for span in exchange.copied})
    copied = f'<p class="quiet">Copied from: <q>{"</q>, <q>".join(map(escape, sources))}</q></p>' if sources else ""
    prompt = f'<div class="said prompt">{escape(exchange.prompt)}</div>' if exchange.prompt else ""
    return f'<article class="exchange">{prompt}<div class="columns">{"".join(columns)}</div>{copied}</article>'


def _reply(kind: str, name: str, inner: str) -> str:
    return (
        f'<div class="reply {kind}"><span class="role">{escape(name)}</span>'
        f'<div class="said">{inner or "<i>(no reply)</i>"}</div></div>'
    )


def marked(text: str, spans: Sequence[Span]) -> str:
    """`text` as HTML with its spans marked; where spans overlap the earlier one keeps what both cover."""
    parts, done = [], 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        start, end = max(done, span.start), min(span.end, len(text))
        if start < end:
            parts.append(escape(text[done:start]))
            parts.append(f'<mark title="{escape(span.source)}">{escape(text[start:end])}</mark>')
            done = end
    return "".join(parts) + escape(text[done:])


def recall(found: Recall, names: dict[str, str], language: str) -> str:
    """Memory of the lore: the shares, then each question with the facts that were and were not in the answers."""
    rows = [
        f"<tr><th>{label}</th>"
        + "".join(
            f'<td class="n">{estimate(getattr(sides, side), f"recall.{at}.{side}", percent)}</td>' for side in order
        )
        + "</tr>"
        for label, at, sides in (
            ("with the system prompt", "with_system", found.with_system),
            ("without it", "without_system", found.without_system),
        )
        for order in [_sides_of_replies(found.with_system)]
    ]
    head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in _sides_of_replies(found.with_system))
    facts = (
        "The key facts are the keywords given with the questions."
        if found.facts_given
        else "Where no keywords were given with a question, its key facts are the rare words of the reference."
    )
    questions = _folded([_question(question, names) for question in found.questions], _QUESTIONS, language)
    return (
        f'<div class="wide-table"><table><tr><th>key facts in the answers</th>{head}</tr>{"".join(rows)}</table></div>'
        f'<p class="quiet">{facts}</p>{questions}'
    )


def _sides_of_replies(sides: Sides) -> list[str]:
    return ["tuned"] if sides.base is None else ["base", "tuned"]


def _question(question: Question, names: dict[str, str]) -> str:
    answers = []
    for label, sides in (("", question.with_system), (", no system prompt", question.without_system)):
        answers += [
            _answer(side, names[side] + label, getattr(sides, side), question.facts)
            for side in reversed(_sides_of_replies(sides))
        ]
    tuned = question.with_system.tuned
    learned = "learned as it stands" if question.trained else "held out"
    return (
        f'<details class="question"><summary><span class="said-inline">{escape(question.question)}</span> '
        f'<span class="facts">{_facts(question.facts, tuned)}</span></summary>'
        f'<p class="quiet">{learned}; reference: <q>{escape(question.reference)}</q></p>'
        f'<div class="columns">{"".join(answers)}</div></details>'
    )


def _answer(kind: str, name: str, answer: Answer, facts: Sequence[str]) -> str:
    return (
        f'<div class="reply {kind}"><span class="role">{escape(name)}</span>'
        f'<div class="said">{escape(answer.text)}</div><span class="facts">{_facts(facts, answer)}</span></div>'
    )


def _facts(facts: Sequence[str], answer: Answer) -> str:
    found = set(answer.found)
    return "".join(
        f'<span class="fact {"yes" if fact in found else "no"}">{"✓" if fact in found else "✗"} {escape(fact)}</span>'
        for fact in facts
    )


# --- style section ----------------------------------------------------------------------------------------------------
# Style on the report page: how far each side is from the author by each measure, and what their texts are made of.


_ROWS = 16  # classes of one distribution that are drawn, the author's most frequent


def style(report: StyleReport, names: dict[str, str]) -> str:
    """The distances, the distributions drawn over each other, and the catch-phrases."""
    about = (
        f'<p class="quiet">From {number(report.texts, "style.texts", whole)} texts of each (words: '
        f"<q>{escape(report.words)}</q>). A distance is judged beside two others: the author’s own halves from each "
        "other, than which nothing can be nearer, and the base.</p>"
    )
    drawn = "".join(
        _distribution(found, f"style.distributions.{i}", names) for i, found in enumerate(report.distributions)
    )
    return (
        _notes(report.notes)
        + about
        + _distances(report.distances, names)
        + (f'<h3>What the texts are made of</h3><div class="charts">{drawn}</div>' if drawn else "")
        + _phrases(report, names)
        + _diversity(report, names)
    )


def _notes(notes: Sequence[str]) -> str:
    lines = [f'<p class="words">{escape(note)}</p>' for note in notes]
    more = f"<details><summary>{len(lines) - 1} more</summary>{''.join(lines[1:])}</details>" if len(lines) > 1 else ""
    return f'<div class="warn">{lines[0]}{more}</div>' if lines else ""


def _sides(found: Sequence[Sides[float]]) -> list[str]:
    return ["base", "tuned"] if any(sides.base is not None for sides in found) else ["tuned"]


def _distances(found: Sequence[Distance], names: dict[str, str]) -> str:
    if not found:
        return ""
    sides = _sides([distance.distance for distance in found])
    head = f'<th class="n">{escape(names["author"])}’s halves</th>'
    head += "".join(f'<th class="n">{escape(names[side])}</th>' for side in sides)
    rows = []
    for i, distance in enumerate(found):
        at = f"style.distances.{i}"
        cells = "".join(
            f'<td class="n">{number(getattr(distance.distance, side), f"{at}.distance.{side}")}</td>' for side in sides
        )
        values = [value for side in sides if (value := getattr(distance.distance, side)) is not None]
        largest = max(distance.author.value, *values)
        marks = [(names["author"], "author", distance.author.value, f"{at}.author.value")]
        marks += [(names[side], side, getattr(distance.distance, side), f"{at}.distance.{side}") for side in sides]
        rows.append(
            f'<tr><th class="words">{escape(distance.name)}</th>'
            f'<td class="n">{estimate(distance.author, f"{at}.author", decimal)}</td>{cells}'
            f'<td class="strip">{dots("", marks, largest)}</td></tr>'
        )
    return (
        f'<div class="wide-table"><table class="distances"><tr><th>distance from the author</th>{head}'
        f'<th class="strip"></th></tr>{"".join(rows)}</table></div>{_key(names, sides)}'
    )


def _key(names: dict[str, str], sides: Sequence[str]) -> str:
    return legend([(names[side], side) for side in ("author", *sides)])


def _distribution(found: Distribution, at: str, names: dict[str, str]) -> str:
    series = [("author", found.author, f"{at}.author"), ("tuned", found.side.tuned, f"{at}.side.tuned")]
    if found.side.base is not None:
        series.insert(1, ("base", found.side.base, f"{at}.side.base"))
    if found.labels and all(re.search(r"\d", label) for label in found.labels):  # lengths, which have an order
        lines = [Line(names[kind], kind, tuple(enumerate(values)), place) for kind, values, place in series]
        return histogram(found.labels, lines, found.name)
    ranked = sorted(range(len(found.labels)), key=lambda i: -found.author[i])[:_ROWS]
    largest = max((values[i] for _, values, _ in series for i in ranked), default=1)
    rows = "".join(
        dots(
            found.labels[i], [(names[kind], kind, values[i], f"{place}.{i}") for kind, values, place in series], largest
        )
        for i in ranked
    )
    of = f", the author’s {len(ranked)} most frequent of {len(found.labels)}" * (len(ranked) < len(found.labels))
    key = legend([(names[kind], kind) for kind, _, _ in series])
    return f'<figure class="chart"><figcaption>{escape(found.name)}{of}</figcaption>{rows}{key}</figure>'


def _phrases(report: StyleReport, names: dict[str, str]) -> str:
    if not report.phrases:
        return ""
    sides = _sides([phrase.rate for phrase in report.phrases])
    head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in ("author", *sides))
    rows = "".join(
        f"<tr><td><q>{escape(phrase.text)}</q></td>"
        f'<td class="n">{number(phrase.author, f"style.phrases.{i}.author")}</td>'
        + "".join(
            f'<td class="n">{number(getattr(phrase.rate, side), f"style.phrases.{i}.rate.{side}")}</td>'
            for side in sides
        )
        + "</tr>"
        for i, phrase in enumerate(report.phrases)
    )
    return (
        '<h3>Catch-phrases</h3><div class="wide-table">'
        f"<table><tr><th>the author’s own</th>{head}</tr>{rows}</table></div>"
        '<p class="quiet">Times in a thousand words (characters for Chinese).</p>'
    )


def _diversity(report: StyleReport, names: dict[str, str]) -> str:
    sides = {"author": (report.author_diversity, "style.author_diversity")}
    if report.diversity.base is not None:
        sides["base"] = report.diversity.base, "style.diversity.base"
    sides["tuned"] = report.diversity.tuned, "style.diversity.tuned"
    head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in sides)
    rows = []
    for label, hint, name, form in (
        ("distinct-1", "different words among all words", "distinct_1", hundredths),
        ("distinct-2", "different pairs of words", "distinct_2", hundredths),
        ("moving type-token ratio", "different words in a window", "mattr", hundredths),
        ("self-BLEU", "how alike the replies are, to 100", "self_bleu", decimal),
    ):
        cells = "".join(
            f'<td class="n">{number(getattr(found, name), f"{at}.{name}", form)}</td>' for found, at in sides.values()
        )
        rows.append(f'<tr><th>{label}<span class="hint">{hint}</span></th>{cells}</tr>')
    return (
        '<h3>Variety</h3><div class="wide-table">'
        f"<table><tr><th>at equal length</th>{head}</tr>{''.join(rows)}</table></div>"
    )


def headline(report: StyleReport) -> str:
    """How much of the way from base to author the tuned model has come, as words and as a scale."""
    found = report.headline
    if found is None:
        return ""
    low = found.value if found.low is None else found.low
    high = found.value if found.high is None else found.high
    start, end = min(0.0, low) - 0.06, max(1.0, high) + 0.06

    def place(value: float) -> str:
        return f"{100 * (value - start) / (end - start):.2f}%"

    band = f'<i class="band" style="left:{place(low)};right:calc(100% - {place(high)})"></i>' if low < high else ""
    sure = ""
    if found.low is not None and found.high is not None:
        ends = [number(end, f"style.headline.{at}", percent) for end, at in ((found.low, "low"), (found.high, "high"))]
        sure = f'<p class="quiet">95 % interval {ends[0]} to {ends[1]}</p>'
    return (
        f'<section class="headline"><p><b>{number(found.value, "style.headline.value", percent)}</b> '
        f"of the way from the base model to the author, by style</p>"
        f'<div class="scale"><span class="end" style="left:{place(0)}">base</span>'
        f'<span class="end" style="left:{place(1)}">author</span><span class="rail"></span>{band}'
        f'<i class="at" style="left:{place(found.value)}"></i></div>{sure}</section>'
    )


# --- numbers section --------------------------------------------------------------------------------------------------
# The table of the report page: every figure of the replies, base and tuned model beside each other.


class _Table:
    """Rows of a measure and its figures of the base and the tuned model."""

    def __init__(self, with_base: bool) -> None:
        self.sides = ("base", "tuned") if with_base else ("tuned",)
        self.rows: list[str] = []

    def group(self, title: str) -> None:
        self.rows.append(f'<tr class="group"><th colspan="{1 + len(self.sides)}">{title}</th></tr>')

    def row(self, label: str, hint: str, cells: dict[str, str]) -> None:
        shown = "".join(f'<td class="n">{cells.get(side, "")}</td>' for side in self.sides)
        self.rows.append(f'<tr><th>{label}<span class="hint">{hint}</span></th>{shown}</tr>')

    def figures(self, label: str, hint: str, at: str, sides: Sides, name: str, form: Form) -> None:
        """A row of the field `name` of both sides."""
        cells: dict[str, str] = {}
        for side in self.sides:
            if (found := getattr(sides, side)) is None:
                continue
            value = getattr(found, name)
            quote: Callable[..., str] = estimate if isinstance(value, Estimate) else number
            cells[side] = quote(value, f"{at}.{side}.{name}", form)
        self.row(label, hint, cells)

    def html(self, names: dict[str, str]) -> str:
        head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in self.sides)
        return (
            f'<div class="wide-table"><table class="numbers"><tr><th></th>{head}</tr>{"".join(self.rows)}</table></div>'
        )


def numbers(evaluation: Evaluation, names: dict[str, str]) -> str:
    """The table, or nothing where nothing was measured."""
    measured = [found.score for found in evaluation.scores] + [
        found for found in (evaluation.replies, evaluation.copying) if found
    ]
    if not measured:
        return ""
    table = _Table(any(sides.base is not None for sides in measured))
    for i, found in enumerate(evaluation.scores):
        _score(table, found, f"scores.{i}")
    if evaluation.replies:
        _replies(table, evaluation)
    if copying := evaluation.copying:
        table.group("Copying from the training data")
        hint = "of the reply’s tokens, in copied runs of 8 or more"
        table.figures("copied", hint, "copying", copying, "share", percent)
        table.figures("longest run", "tokens", "copying", copying, "longest", whole)
    longest = ""
    if evaluation.copying and evaluation.copying.tuned.longest:
        copied = evaluation.copying.tuned
        run, source = escape(copied.text), escape(copied.source)
        longest = f'<p class="quiet">The longest copied run: <q>{run}</q>, from <q>{source}</q></p>'
    return table.html(names) + longest


def _score(table: _Table, found: FileScore, at: str) -> None:
    what = "Held-out replies" if found.role == "held_out" else "Control, which should not get worse"
    # training measures in its own precision, so that its perplexity may differ in the third digit
    computed = f", computed in <code>{escape(found.precision)}</code>" if found.precision else ""
    table.group(
        f"{what}: <code>{escape(found.file)}</code> "
        f'<span class="hint">{number(found.replies, f"{at}.replies", whole)} replies in '
        f"{number(found.conversations, f'{at}.conversations', whole)} conversations, "
        f"{number(found.tokens, f'{at}.tokens', whole)} tokens{computed}</span>"
    )
    place = f"{at}.score"
    table.figures("perplexity", "lower is better", place, found.score, "perplexity", decimal)
    table.figures(
        "bits per character",
        "the same, comparable between models",
        place,
        found.score,
        "bits_per_character",
        hundredths,
    )
    if found.ratio:
        good = "below 1 is better" if found.role == "held_out" else "above 1 has forgotten"
        table.row("perplexity, tuned to base", good, {"tuned": estimate(found.ratio, f"{at}.ratio", hundredths)})
    for left_out in found.left_out:
        table.rows.append(
            f'<tr><td colspan="{1 + len(table.sides)}" class="warn said-inline">{escape(left_out)}</td></tr>'
        )


def _replies(table: _Table, evaluation: Evaluation) -> None:
    replies = evaluation.replies
    if replies is None:
        return
    table.group("Replies to the held-out prompts")
    for label, hint, name, form in (
        ("replies", "", "count", whole),
        ("stop by themselves", "before the limit", "stops", percent),
        ("length", "1 is as long as the author’s", "length_ratio", hundredths),
        ("break character", "speak as a machine or as somebody else", "breaks_character", percent),
        ("chrF", "0 to 100, likeness to the author’s reply", "chrf", decimal),
        ("BLEU", "0 to 100", "bleu", decimal),
        ("ROUGE-L", "0 to 100", "rouge_l", decimal),
    ):
        table.figures(label, hint, "replies", replies, name, form)
