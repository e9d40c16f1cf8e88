"""The report page: every number on it stands in evaluation.json, text of others stays text, any browser shows it."""

import json
import re
from base64 import b64decode, b64encode
from dataclasses import asdict, fields, replace
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO

import pytest
from jinja2 import UndefinedError
from making import evaluations
from making.browser import Opened, chromium, contrast, luminance
from PIL import Image

from persona.evaluate.page import FORMS, histogram, look_up, marked, nice_ticks, quoted, report_page
from persona.evaluate.results import Estimate, Evaluation, Span, write_evaluation
from persona.pages import asset
from persona.pages import environment as environment_of
from persona.pages import page as page_of
from persona.speak.rounding import Rounding
from persona.train.curves import DARK, LIGHT

WHOLE, CHINESE = evaluations.whole(), evaluations.chinese()
LEAST = Evaluation("nothing", "adapter", 0, "en")
CASES = {"whole": WHOLE, "chinese": CHINESE, "least": LEAST}
EVIL_JSON = "</script><script>alert(1)</script>"
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}
# Elements whose text is quoted as it is in evaluation.json: names, sentences, replies, settings, classes of a chart
QUOTED = {"said", "said-inline", "words", "name", "fact", "label", "pairs", "axis", "role"}
# Numbers in our own words: not measured, but part of what a measure means; the last is of an unfolding list
OUR_OWN = [
    "95 %",
    r"0 to 100\b",
    r"\bto 100$",
    "of 8 or more",
    "1 is as long",
    "below 1 is",
    "above 1 has",
    "SHA-256",
    r"^\d+ more$",
]


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
    assert len(page.drawn) >= {"whole": 80, "chinese": 30, "least": 0}[name]
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
    # the words for a kind, the class of a finding, a path whose file name is shown, rare classes of a distribution,
    # and the losses, which are in the picture
    known = "|".join(
        [
            r"kind|format|verdict\.\d\.kind|scores\.\d\.(role|characters|sha256)",
            r"exchanges\.\d+\.copied\..*|recall\.facts_given|recall\.questions\.\d\.trained",
            r"style\.distributions\.3\..*|curve\.(train|held_out)\..*",
        ]
    )
    assert not [place for place in left_out if not re.fullmatch(known, place)]
    assert count > 500


def test_missing_parts_are_named_with_the_way_to_get_them():
    text = report_page(LEAST)
    for part in ("Perplexity", "Forgetting", "Replies", "Style", "Memory", "Copying", "Curves", "Settings"):
        assert f"<th>{part}" in text, part
    assert "--control" in text
    assert "Not measured" not in report_page(WHOLE)
    optional = [
        field.name for field in fields(Evaluation) if field.name not in ("name", "kind", "seed", "language", "format")
    ]
    assert len(optional) == 13
    for name in optional:
        without = replace(WHOLE, **{name: getattr(LEAST, name)})
        Page(report_page(without))
    alone = replace(WHOLE.copying, side=replace(WHOLE.copying.side, base=None))
    for parts in ({"replies": replace(WHOLE.replies, base=None)}, {"copying": alone}):
        Page(report_page(replace(WHOLE, **parts)))


def test_advice_is_a_sentence_of_its_own_below_its_finding():
    page = Page(report_page(WHOLE))
    advice = [text for text, classes, _ in page.words if "advice" in classes]
    assert advice == [f"To change it: {finding.advice}" for finding in WHOLE.verdict if finding.advice]
    assert len(advice) == 2
    assert not [text for text, _, tags in page.words if "code" in tags and "Raise" in text]


def test_the_plain_measures_of_the_style_are_shown():
    page = Page(report_page(WHOLE))
    shown = {place for place, _, _ in page.numbers}
    for field in ("levels", "diversity"):
        for i, level in enumerate(getattr(WHOLE.style, field)):
            assert any(level.name == text for text, _, tags in page.words if "th" in tags), level.name
            for side in ("author", "side.base", "side.tuned"):
                assert {f"style.{field}.{i}.{side}.{end}" for end in ("value", "low", "high")} <= shown


def test_a_base_that_was_measured_in_part_only():
    style = WHOLE.style
    first, *others = style.distances
    unknown = replace(first.distance, base=Estimate(None, reason="too little"))
    partly = replace(style, distances=(replace(first, distance=unknown), *others))
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
    assert not tags & {"script", "link", "iframe"}
    assert sum(evaluations.EVIL in text for text, _, _ in page.words) >= 2
    addresses = [value for _, found in page.elements for name, value in found.items() if name in ("src", "srcset")]
    assert len(addresses) == 2, "the loss curve in light and in dark"
    assert all(value.startswith("data:image/png;base64,") for value in addresses)
    assert not [name for _, found in page.elements for name in found if name.startswith("on") or name == "href"]


def test_every_template_escapes_and_misses_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("persona.pages._FOLDER", tmp_path)
    environment = environment_of.__wrapped__()
    (tmp_path / "a.html").write_text("<p title='{{ text }}'>{{ text }}</p>", encoding="utf-8")
    evil = "<script>'\"&"
    shown = environment.get_template("a.html").render(text=evil)
    assert "<script>" not in shown
    assert shown.count("&#39;") == shown.count("&#34;") == 2
    with pytest.raises(UndefinedError, match="text"):
        environment.get_template("a.html").render()


def test_the_policy_of_a_page_allows_its_own_script_only():
    sheet = page_of("ab_sheet.html", sheet={"sheet": EVIL_JSON})
    report = report_page(LEAST)
    policies = [re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1] for text in (sheet, report)]
    script = re.findall(r"<script>(.*?)</script>", sheet, re.DOTALL)
    assert len(script) == 1
    digest = b64encode(sha256(script[0].encode()).digest()).decode()
    assert policies[0].endswith(f"script-src 'sha256-{digest}'")
    assert policies[1].endswith("script-src 'none'")
    for policy in policies:
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert EVIL_JSON not in sheet


def test_copied_spans_are_marked_once_and_in_place():
    text = "aé<b>&日本cd"
    spans = (Span(7, 99, "z"), Span(1, 5, "x"), Span(3, 6, "y"), Span(4, 4, "w"))
    html = marked(text, spans)
    assert html == ('a<mark title="x">é&lt;b&gt;</mark><mark title="y">&amp;</mark>日<mark title="z">本cd</mark>')
    assert marked(text, ()) == "aé&lt;b&gt;&amp;日本cd"


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("highest", [1, 0.6, 4.1, 0.0009, 7, 5, 52.31, 3e7])
def test_ticks_are_round_and_reach_the_highest(highest):
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest > ticks[-2]
    assert 3 <= len(ticks) <= 7
    steps = {round(b - a, 10) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert len(steps) == 1
    assert re.fullmatch(r"[125]0*|0\.0*[125]", f"{steps.pop():.10f}".rstrip("0").rstrip("."))


def straight(pairs):
    """Whether all pairs lie on one line, in both senses of the drawing's accuracy of a tenth of a unit."""
    (x0, y0), (x1, y1) = min(pairs), max(pairs)
    slope = (y1 - y0) / (x1 - x0)
    return all(abs(y0 + slope * (x - x0) - y) <= 0.11 for x, y in pairs)


def test_a_histogram_is_drawn_to_scale():
    shares = [0.1, 0.6, 0.3, 0.0]
    drawn = histogram("abcd", [shares])
    points = [tuple(map(float, pair.split(","))) for pair in drawn.outlines[0].split()]
    tops = [points[1 + 2 * i] for i in range(3)]
    assert straight([(value, y) for value, (_, y) in zip(shares[:3], tops, strict=True)])
    assert straight([(float(text), y) for y, text in drawn.ticks] + [(0.6, tops[1][1])]), "and to its axis"
    assert tops[1][1] < tops[0][1], "higher values are drawn higher"
    assert (drawn.ticks[0][0], drawn.ticks[-1][0]) == (206, 14), "the axis fills the drawing"
    assert points[0][1] == points[-1][1] == drawn.ticks[0][0], "it begins and ends at zero"
    assert len(points) == 2 + 2 * 3, "the empty bin at the end is not drawn"
    assert [at for _, _, at in drawn.bins] == [0, 1, 2]


def pictures(evaluation):
    """The pictures of a page, decoded, by the colour scheme they are for."""
    page = report_page(evaluation)
    found = {"dark": r'srcset="data:image/png;base64,([^"]*)"', "light": r'src="data:image/png;base64,([^"]*)"'}
    return {
        name: Image.open(BytesIO(b64decode(re.search(pattern, page)[1]))).convert("RGB")
        for name, pattern in found.items()
    }


def test_the_loss_curve_is_drawn_in_the_colours_of_the_page():
    for name, image in pictures(WHOLE).items():
        colours = {colour for _, colour in image.getcolors(maxcolors=10**6)}
        theme = {"light": LIGHT, "dark": DARK}[name]
        for colour in (theme.paper, theme.ink, theme.evaluation, theme.train):
            assert tuple(bytes.fromhex(colour[1:])) in colours, (name, colour)
        assert image.getpixel((0, 0)) == tuple(bytes.fromhex(theme.paper[1:]))
    css = asset("page.css") + asset("report.css")
    for theme in (LIGHT, DARK):
        for colour in (theme.paper, theme.ink, theme.quiet, theme.grid, theme.train, theme.evaluation):
            assert colour in css


def test_curves_of_one_point_and_none():
    for curve in (
        replace(WHOLE.curve, train=(), best=0, held_out=((0, 3.5),)),
        replace(WHOLE.curve, held_out=(), best=None),
    ):
        Page(report_page(replace(WHOLE, curve=curve)))
    empty = replace(WHOLE.curve, train=(), held_out=(), best=None)
    assert "<picture" not in report_page(replace(WHOLE, curve=empty))
    assert "<picture" in report_page(WHOLE)
    long = replace(WHOLE.curve, train=tuple((step, 3.0 + step % 7) for step in range(100_000)))
    assert len(report_page(replace(WHOLE, curve=long))) < 600_000
    steep = replace(WHOLE.curve, held_out=((0, 3.0), (9, 900.0)), best=0)
    assert set(pictures(replace(WHOLE, curve=steep))) == {"light", "dark"}


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [("decimal", 0, "0"), ("decimal", 0.12345, "0.123"), ("decimal", 20.28, "20.3"), ("decimal", 1234.5, "1,234")]
    + [("percent", 0.6213, "62 %"), ("percent", 0.0213, "2.1 %"), ("percent", 0, "0 %"), ("percent", 1, "100 %")]
    + [("percent", -0.3, "-30 %"), ("whole", 1234, "1,234"), ("hundredths", 0.385, "0.39")]
    + [("small", 0, "0"), ("small", 0.000056, "0.000056"), ("small", 0.0421, "0.0421"), ("small", 0.001, "0.001")],
)  # fmt: skip
def test_numbers_are_rounded_for_a_person(form, value, shown):
    assert FORMS[form](value) == shown


def test_the_page_says_how_the_replies_were_decoded():
    def words(rounding):
        page = re.sub(r"<[^>]+>", "", report_page(replace(WHOLE, rounding=rounding)))
        return re.search(r"Replies were decoded.*--batch-size\.|$", page)[0]

    alone, at_all = (
        "in a batch a logit differed from that of the reply alone by",
        "So no reply depends on --batch-size.",
    )
    again = "Choices closer than 0.001 were made again from a pass over that reply alone."
    assert words(None) == ""
    assert words(Rounding(0.0, 0.0, 8)) == f"Replies were decoded in passes of 8 rows; {alone} 0 at most. {at_all}"
    assert (
        words(Rounding(5e-5, 1e-3, None))
        == f"Replies were decoded in batches; {alone} 0.00005 at most. {again} {at_all}"
    )
    assert words(Rounding(None, 0.0, 1)) == f"Replies were decoded one at a time. {at_all}"


def test_a_number_is_quoted_with_its_place_and_a_missing_one_is_a_dash():
    place = ("scores", 0, "ratio")
    low, value, high = WHOLE.scores[0].ratio.low, WHOLE.scores[0].ratio.value, WHOLE.scores[0].ratio.high
    html = quoted(WHOLE, "hundredths", place)
    assert html.startswith(f'<data value="{value}" data-at="scores.0.ratio.value">0.39</data>')
    assert f'<data value="{low}" data-at="scores.0.ratio.low">0.35</data> to <data value="{high}"' in html
    assert look_up(WHOLE, ("data", 0, "types", "dialogue")) == 160
    for missing in (("data", 1, "types", "lore_qa"), ("copying", "side", "tuned", "share", "reason")):
        assert look_up(WHOLE, missing) is None
        assert quoted(WHOLE, "whole", missing) == '<span class="none">–</span>'
    assert look_up(LEAST, ("replies", "tuned", "bleu")) is None
    with pytest.raises(AttributeError):
        look_up(WHOLE, ("replies", "tuned", "blue"))


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("报告 report")
    for name, evaluation in CASES.items():
        (folder / f"{name}.html").write_text(report_page(evaluation), encoding="utf-8")
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
        ".advice",
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_loss_curve_is_that_of_the_scheme(browser, pages, scheme):
    opened = Opened(browser, pages / "whole.html", "phone", scheme)
    curve = opened.page.locator("img.curve")
    shown = curve.evaluate("image => image.currentSrc")
    wanted = pictures(WHOLE)[scheme]
    assert Image.open(BytesIO(b64decode(shown.partition(",")[2]))).convert("RGB").tobytes() == wanted.tobytes()
    assert 300 <= curve.bounding_box()["width"] <= 360
    assert opened.faults == []
    opened.context.close()


def test_it_is_the_same_from_the_file(tmp_path):
    write_evaluation(tmp_path / "evaluation.json", WHOLE)
    again = evaluations.stored(tmp_path / "evaluation.json")
    assert asdict(again) == asdict(WHOLE)
    assert report_page(again) == report_page(WHOLE)
