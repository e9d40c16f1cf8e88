"""The table of the report page: every figure of the replies, base and tuned model beside each other."""

from collections.abc import Callable
from html import escape

from persona.evaluation.figures import Estimate, FileScore, Sides
from persona.evaluation.numerals import Form, decimal, estimate, hundredths, number, percent, whole
from persona.evaluation.results import Evaluation


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
