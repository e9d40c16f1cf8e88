"""The report page: every number on it stands in evaluation.json, text of others stays text, any browser shows it."""

import json
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser

import pytest
from making import evaluations
from making.browser import Opened, chromium, contrast, luminance

from persona.evaluate.page.charts import Line, curves, decimal, histogram, hundredths, nice_ticks, percent, whole
from persona.evaluate.page.page import report_page, write_report_page
from persona.evaluate.page.sections import marked
from persona.evaluate.results import Estimate, Evaluation, Span, read_evaluation, write_evaluation

WHOLE, CHINESE = evaluations.whole(), evaluations.chinese()
LEAST = Evaluation("nothing", "adapter", 0, "en")
CASES = {"whole": WHOLE, "chinese": CHINESE, "least": LEAST}
VOID = {"meta", "link", "img", "br", "hr", "input"}
# Elements whose text is quoted as it stands in evaluation.json: names, sentences, replies, settings, classes of a chart
QUOTED = {"said", "said-inline", "words", "name", "fact", "label", "pairs", "axis", "best", "role"}
# Numbers in our own words: not measured, but part of what a measure means; the last is of an unfolding list
OUR_OWN = [
    "95 %",
    r"0 to 100\b",
    r"\bto 100$",
    "of 8 or more",
    "1 is as long",
    "below 1 is",
    "above 1 has",
    "distinct-[12]$",
]
OUR_OWN += ["SHA-256", r"^\d+ more$"]


class Page(HTMLParser):
    """What a page says: its numbers, and its other words with the classes and elements around them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.numbers, self.drawn, self.words, self.elements = [], [], [], [], []
        self.feed(text)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag == "data":
            self.numbers.append([found["data-at"], json.loads(found["value"]), ""])
        elif "data-at" in found:
            self.drawn.append((found["data-at"], json.loads(found["data-value"]), found))
        if tag not in VOID:
            self.open.append((tag, found.get("class", "").split()))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, text):
        tags = [tag for tag, _ in self.open]
        if "data" in tags:
            self.numbers[-1][2] += text
        elif text.strip() and "style" not in tags:
            classes = {name for _, names in self.open for name in names}
            self.words.append((text, classes, tags))


def stored(evaluation, tmp_path):
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    return json.loads((tmp_path / "evaluation.json").read_text("utf-8"))


def at(value, place):
    """The value at a place such as `scores.0.tokens`; keys may have dots in them."""
    if not place:
        return value
    if isinstance(value, list):
        head, _, rest = place.partition(".")
        return at(value[int(head)], rest)
    key = max((key for key in value if place == key or place.startswith(key + ".")), key=len)
    return at(value[key], place[len(key) + 1 :])


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_that_of_the_file(name, tmp_path):
    content = stored(CASES[name], tmp_path)
    page = Page(report_page(CASES[name]))
    for place, value, shown in page.numbers:
        assert at(content, place) == value, place
        digits = re.fullmatch(r"-?[\d,]+(?:\.(\d+))?( %)?", shown)
        assert digits, (place, shown)
        rounded = float(shown.removesuffix(" %").replace(",", "")) / (100 if digits[2] else 1)
        allowed = 0.5001 * 10.0 ** -len(digits[1] or "") / (100 if digits[2] else 1)
        assert abs(rounded - value) <= allowed, (place, value, shown)
    for place, value, _ in page.drawn:
        assert at(content, place) == value, place
    assert len(page.numbers) >= {"whole": 130, "chinese": 30, "least": 1}[name]


def test_no_number_is_on_the_page_without_its_place():
    for evaluation in CASES.values():
        for text, classes, tags in Page(report_page(evaluation)).words:
            if classes & QUOTED or {"code", "q", "title", "figcaption"} & set(tags):
                continue
            rest = re.sub("|".join(OUR_OWN), "", text)
            assert not re.search(r"\d", rest), text


def leaves(value, place=""):
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in leaves(one, f"{place}{key}.").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, one in enumerate(value) for k, v in leaves(one, f"{place}{i}.").items()}
    return {place[:-1]: value}


def test_the_whole_evaluation_is_on_the_page(tmp_path):
    """Every number and every text of the file can be found; what is drawn only counts too."""
    page = Page(report_page(WHOLE))
    places = {place for place, _, _ in page.numbers} | {place for place, _, _ in page.drawn}
    text = " ".join(text for text, _, _ in page.words)
    squeezed = re.sub(r"\s+", "", text)
    left_out, count = [], 0
    for place, value in leaves(stored(WHOLE, tmp_path)).items():
        count += 1
        drawn = any(place == one or place.startswith(one + ".") for one in places)
        written = isinstance(value, str) and re.sub(r"\s+", "", value) in squeezed
        if value is None or drawn or written or str(value) in text:
            continue
        left_out.append(place)
    # the words for a kind, the class of a finding, a path whose file name is shown, rare classes of a distribution
    known = "|".join(
        [
            r"kind|format|verdict\.\d\.code|scores\.\d\.(file|role|characters|sha256)|copying\.base\..*",
            r"exchanges\.\d+\.copied\..*|recall\.facts_given|recall\.questions\.\d\.trained",
            r"style\.distributions\.3\..*",
        ]
    )
    assert not [place for place in left_out if not re.fullmatch(known, place)]
    assert count > 500


def test_missing_parts_are_named_with_the_way_to_get_them():
    text = report_page(LEAST)
    for part in ("Perplexity", "Forgetting", "Replies", "Style", "Memory", "Copying", "Curves", "Configuration"):
        assert f"<th>{part}" in text, part
    assert "--control" in text
    assert "Not measured" not in report_page(WHOLE)
    optional = [
        field.name for field in fields(Evaluation) if field.name not in ("name", "kind", "seed", "language", "format")
    ]
    assert len(optional) == 12
    for name in optional:
        without = replace(WHOLE, **{name: getattr(LEAST, name)})
        Page(report_page(without))
    for name in ("replies", "copying"):
        sides = getattr(WHOLE, name)
        Page(report_page(replace(WHOLE, **{name: replace(sides, base=None)})))


def test_a_base_that_was_measured_in_part_only():
    style = WHOLE.style
    first, *others = style.distances
    partly = replace(style, distances=(replace(first, distance=replace(first.distance, base=None)), *others))
    phrase, *more = style.phrases
    partly = replace(partly, phrases=(replace(phrase, rate=replace(phrase.rate, base=None)), *more))
    dash = '<span class="none">–</span>'
    assert report_page(replace(WHOLE, style=partly)).count(dash) == report_page(WHOLE).count(dash) + 2


def test_texts_without_prompts_and_targets_stand_alone():
    bare = replace(CHINESE.exchanges[0], prompt="", target="")
    page = report_page(replace(CHINESE, exchanges=(bare,) * 30))
    assert 'class="said prompt"' not in page
    assert "(no reply)" not in page
    assert "24 more" in page
    assert "--base-texts" in page


def test_a_headline_may_lie_outside_and_have_no_interval():
    for headline in (Estimate(-0.3, -0.8, 0.1), Estimate(1.2, 1.0, 1.4), Estimate(0.5)):
        page = report_page(replace(WHOLE, style=replace(WHOLE.style, headline=headline)))
        places = [float(place) for place in re.findall(r'class="at" style="left:([\d.-]+)%', page)]
        assert len(places) == 1
        assert 0 <= places[0] <= 100
        assert ("95 % interval" in page) == (headline.low is not None)


def test_text_of_others_is_escaped():
    page = Page(report_page(WHOLE))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe"}
    assert sum(evaluations.EVIL in text for text, _, _ in page.words) >= 2
    assert not [
        name for _, found in page.elements for name in found if name.startswith("on") or name in ("src", "href")
    ]


def test_copied_spans_are_marked_once_and_in_place():
    text = "aé<b>&日本cd"
    spans = (Span(7, 99, "z"), Span(1, 5, "x"), Span(3, 6, "y"), Span(4, 4, "w"))
    html = marked(text, spans)
    assert html == ('a<mark title="x">é&lt;b&gt;</mark><mark title="y">&amp;</mark>日<mark title="z">本cd</mark>')
    assert marked(text, ()) == "aé&lt;b&gt;&amp;日本cd"


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.3, 4.1), (0.0001, 0.0009), (-3, 7), (5, 5), (0, 0), (20.3, 52.31), (1e5, 3e7)]
)
def test_ticks_are_round_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 10) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert len(steps) == 1
    assert re.fullmatch(r"[125]0*|0\.0*[125]", f"{steps.pop():.10f}".rstrip("0").rstrip("."))


def places(svg, kind):
    found = re.search(rf'<polyline class="[a-z ]*{kind}" points="([^"]*)"', svg)[1]
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def straight(pairs):
    """Whether all pairs lie on one line, in both senses of the drawing's accuracy of a tenth of a unit."""
    (x0, y0), (x1, y1) = min(pairs), max(pairs)
    slope = (y1 - y0) / (x1 - x0)
    return all(abs(y0 + slope * (x - x0) - y) <= 0.11 for x, y in pairs)


def test_a_curve_is_drawn_to_scale():
    points = [(0, 52.3), (9, 30.1), (18, 24.0), (54, 20.3)]
    svg = curves([Line("a", "tuned", points, "x", marked=True)], "loss", (54, 20.3), "best 20.3 at update 54")
    drawn = places(svg, "tuned")
    assert straight([(step, x) for (step, _), (x, _) in zip(points, drawn, strict=True)])
    assert straight([(value, y) for (_, value), (_, y) in zip(points, drawn, strict=True)])
    assert drawn[0][1] < drawn[-1][1], "higher values stand higher"
    assert f'<circle class="best" cx="{drawn[-1][0]:.1f}" cy="{drawn[-1][1]:.1f}"' in svg
    assert 'class="tuned first"' in svg


def test_a_histogram_is_drawn_to_scale():
    shares = [(0, 0.1), (1, 0.6), (2, 0.3), (3, 0.0)]
    drawn = places(histogram("abcd", [Line("a", "author", shares, "x")], "length"), "author")
    tops = [drawn[1 + 2 * i] for i in range(3)]
    assert straight([(value, y) for (_, value), (_, y) in zip(shares[:3], tops, strict=True)])
    assert drawn[0][1] == drawn[-1][1], "it stands on zero"
    assert len(drawn) == 2 + 2 * 3, "the empty bin at the end is not drawn"


def test_curves_of_one_point_and_none():
    for curve in (
        replace(WHOLE.curve, train=(), best=0, held_out=((0, 3.5),)),
        replace(WHOLE.curve, held_out=(), best=None),
    ):
        Page(report_page(replace(WHOLE, curve=curve)))
    empty = replace(WHOLE.curve, train=(), held_out=(), best=None)
    assert "<svg" not in report_page(replace(WHOLE, curve=empty, style=None))
    long = replace(WHOLE.curve, train=tuple((step, 3.0 + step % 7) for step in range(100_000)))
    assert len(report_page(replace(WHOLE, curve=long))) < 300_000
    steep = replace(WHOLE.curve, held_out=((0, 3.0), (9, 900.0)), best=0)
    assert "inf" not in report_page(replace(WHOLE, curve=steep)).replace("information", "")


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [(decimal, 0, "0"), (decimal, 0.12345, "0.123"), (decimal, 20.28, "20.3"), (decimal, 1234.5, "1,234")]
    + [(percent, 0.6213, "62 %"), (percent, 0.0213, "2.1 %"), (percent, 0, "0 %"), (percent, 1, "100 %")]
    + [(percent, -0.3, "-30 %"), (whole, 1234, "1,234"), (hundredths, 0.385, "0.39")],
)  # fmt: skip
def test_numbers_are_rounded_for_a_person(form, value, shown):
    assert form(value) == shown


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("报告 report")
    for name, evaluation in CASES.items():
        write_report_page(evaluation, folder / f"{name}.html")
    return folder


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [("whole", size, scheme) for size in ("desktop", "phone") for scheme in ("light", "dark")]
    + [("chinese", "phone", "light"), ("least", "phone", "dark")],
)
def test_the_page_fits_and_can_be_read(browser, pages, name, size, scheme):
    opened = Opened(browser, pages / f"{name}.html", size, scheme)
    page = opened.page
    assert opened.width() <= page.viewport_size["width"]
    back, ink = luminance(page)
    assert (back > ink) == (scheme == "light")
    for selector in (
        "h1",
        ".quiet",
        ".hint",
        ".interval",
        ".legend",
        ".headline b",
        ".warn",
        "mark",
        ".fact.yes",
        ".reply .role",
    ):
        if page.locator(selector).count():
            assert contrast(page, selector) >= 4.5, selector
    for chart in page.locator("svg").all():
        box = chart.bounding_box()
        assert box["width"] >= 300
        assert box["height"] >= 150
        type_size = chart.locator("text").first.evaluate("t => t.getBoundingClientRect().height")
        assert type_size >= 9, "labels can be read on a phone too"
    assert opened.faults == []
    opened.context.close()


def test_what_is_folded_opens_by_keyboard(browser, pages):
    opened = Opened(browser, pages / "whole.html")
    page = opened.page
    assert not page.is_visible(".question .reply")
    page.locator(".question summary").first.focus()
    page.keyboard.press("Enter")
    assert page.is_visible(".question .reply")
    assert opened.faults == []
    opened.context.close()


def test_it_is_written_whole_and_the_same_from_the_file(tmp_path):
    write_evaluation(tmp_path / "evaluation.json", WHOLE)
    again = read_evaluation(tmp_path / "evaluation.json")
    write_report_page(again, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == report_page(WHOLE)
    assert asdict(again) == asdict(WHOLE)
