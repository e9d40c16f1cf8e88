"""Texts on the report page, to be read and not only counted: replies side by side, and answers about the settings."""

from collections.abc import Sequence
from html import escape

from persona.evaluation.figures import Answer, Exchange, Question, Recall, Sides, Span
from persona.evaluation.numerals import estimate, percent

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
    """Memory of the settings: the shares, then each question with the facts that were and were not in the answers."""
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
        for order in [_sides(found.with_system)]
    ]
    head = "".join(f'<th class="n">{escape(names[side])}</th>' for side in _sides(found.with_system))
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


def _sides(sides: Sides) -> list[str]:
    return ["tuned"] if sides.base is None else ["base", "tuned"]


def _question(question: Question, names: dict[str, str]) -> str:
    answers = []
    for label, sides in (("", question.with_system), (", no system prompt", question.without_system)):
        answers += [
            _answer(side, names[side] + label, getattr(sides, side), question.facts) for side in reversed(_sides(sides))
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
