"""The sheet as a reader uses it, in a real browser: keyboard, thumb, interruption, export, and back to the score."""

import json

import pytest
from making.browser import Opened, chromium, contrast, luminance

from persona.evaluate.blind import sheet as blind
from persona.evaluate.blind.scoring import score_sheet
from persona.evaluate.predictions import Prediction

COUNT = 5
EVIL = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def predictions(replies):
    return [Prediction(f"Question {i}?\n" + "And more of it. " * 12, text, "") for i, text in enumerate(replies)]


def make_sheet(first, second, folder, about=None, examples=()):
    options = {"names": ("tuned", "base"), "about": about, "examples": examples, "limit": None}
    return blind.make_sheet(first, second, folder, "secret", **options)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ab") / "我的 sheet"
    tuned = [f"Aye, little barnacle, {i}. " * 6 for i in range(COUNT)]
    base = [EVIL, "", "w" * 300, "As an assistant, " * 60, "Certainly."]
    return make_sheet(predictions(tuned), predictions(base), folder, about="Tamsin", examples=["Mind the tide."])


@pytest.fixture(scope="module")
def chinese_sheet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zh")
    tuned = [f"哼，你管得着吗？第{i}次了。" for i in range(COUNT)]
    base = [f"作为一个人工智能助手，我很乐意帮助你。{i}" for i in range(COUNT)]
    return make_sheet(predictions(tuned), predictions(base), folder)


@pytest.fixture
def opened(browser, sheet):
    """The sheet on the desktop; after the test nothing may have gone wrong on it."""
    found = Opened(browser, sheet.sheet)
    yield found
    found.context.close()
    assert found.faults == []


def begin(opened, name="Zoë"):
    opened.page.keyboard.type(name)  # the field has the focus
    opened.page.keyboard.press("Enter")
    ready(opened.page)


def ready(page):
    """Past the time in which a second click is taken for a slip."""
    page.wait_for_timeout(260)


def progress(page):
    return page.inner_text("#count")


def test_by_keyboard_alone_from_the_name_to_the_score(opened, sheet, tmp_path):
    page = opened.page
    begin(opened)
    for number, key in enumerate(("ArrowLeft", "ArrowRight", "0", "1", "2"), 1):
        assert progress(page) == f"{number - 1} / {COUNT}"
        page.keyboard.press(key)
        ready(page)
    assert "Thank you" in page.inner_text("#done")
    assert "5 pairs: 2 × Left, 2 × Right, 1 × Tie." in page.inner_text("#summary")
    files = []
    for button, name in (("#json", "a.json"), ("#csv", "a.csv")):
        with page.expect_download() as download:
            page.click(button)
        assert download.value.suggested_filename.endswith(f"-Zoë.{name[2:]}")
        download.value.save_as(tmp_path / name)
        files.append(tmp_path / name)
    assert page.input_value("#out") == files[0].read_text("utf-8")
    one, other = (score_sheet([path], sheet.key) for path in files)
    assert one == other
    assert [rater.name for rater in one.raters] == ["Zoë"]
    assert one.overall.ties == 1
    assert one.raters[0].left == 2
    key = json.loads(sheet.key.read_text("utf-8"))
    chosen = [key["pairs"][i][side] for i, side in ((0, "left"), (1, "right"), (3, "left"), (4, "right"))]
    assert (one.overall.wins, one.overall.losses) == (chosen.count("tuned"), chosen.count("base"))


def test_comment_undo_and_return(opened, sheet):
    page = opened.page
    begin(opened)
    page.keyboard.press("c")
    page.keyboard.type('c 1 0 "so, so" ')  # keys that mean something elsewhere
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Backspace")
    assert progress(page) == f"0 / {COUNT}"
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    ready(page)
    assert page.input_value("#note") == ""
    page.keyboard.press("Backspace")
    assert page.input_value("#note") == 'c 1 0 "so, so'
    assert page.get_attribute("#choices [data-choice=left]", "aria-pressed") == "true"
    ready(page)
    page.keyboard.press("ArrowRight")
    ready(page)
    assert progress(page) == f"1 / {COUNT}"
    prompt = page.inner_text("#prompt")
    page.reload()  # the browser was closed in between
    assert progress(page) == f"1 / {COUNT}"
    assert page.inner_text("#begin .main") == "Go on"
    page.keyboard.press("Enter")
    assert page.inner_text("#prompt") == prompt
    assert page.get_attribute("#choices [data-choice=right]", "aria-pressed") == "false"
    kept = page.evaluate("result()")
    assert kept["rater"] == "Zoë"
    assert [(answer["choice"], answer["comment"]) for answer in kept["answers"]] == [("right", 'c 1 0 "so, so')]
    assert '"c 1 0 ""so, so"\r\n' in page.evaluate("asCsv()")


def test_another_reader_at_the_same_computer_begins_anew(opened):
    page = opened.page
    assert not page.is_visible(".anew")
    begin(opened, "Ada")
    page.keyboard.press("ArrowLeft")
    page.reload()
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.click("#begin .anew")
    assert progress(page) == f"1 / {COUNT}"
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#begin .anew")
    assert progress(page) == f"0 / {COUNT}"
    assert page.input_value("#rater") == ""
    assert page.evaluate("result()")["answers"] == []


def test_slips_answer_nothing(opened):
    page = opened.page
    begin(opened)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # at once: the second press of one gesture
    page.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', repeat: true}))")
    page.keyboard.press("Control+ArrowLeft")
    assert progress(page) == f"1 / {COUNT}"


def test_another_tab_and_another_sheet_share_nothing_wrong(opened, browser, sheet, chinese_sheet):
    begin(opened)
    other = opened.tab()
    opened.page.keyboard.press("ArrowLeft")
    other.wait_for_function(f"document.getElementById('count').textContent === '1 / {COUNT}'")
    stranger = opened.context.new_page()
    stranger.goto(chinese_sheet.sheet.as_uri())
    assert progress(stranger) == f"0 / {COUNT}"


def test_text_of_others_is_text(opened):
    page = opened.page
    begin(opened)
    seen = set()
    for _ in range(COUNT):
        seen |= {page.inner_text("#left"), page.inner_text("#right")}
        assert page.locator("#pair img, #pair script").count() == 0
        page.keyboard.press("0")
        ready(page)
    assert EVIL in seen
    assert "(no reply)" in seen


def test_a_browser_that_keeps_nothing_says_so(browser, sheet):
    opened = Opened(browser, sheet.sheet)
    opened.context.add_init_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    page = opened.tab()
    assert "keeps nothing" in page.inner_text("#trouble")
    page.click("#begin button")
    ready(page)
    page.keyboard.press("0")
    assert progress(page) == f"1 / {COUNT}"
    opened.context.close()


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "dark"), ("phone", "light")])
def test_every_screen_fits_and_can_be_read(browser, sheet, size, scheme):
    opened = Opened(browser, sheet.sheet, size, scheme)
    page = opened.page
    window = page.viewport_size["width"]
    assert opened.width() <= window
    back, ink = luminance(page)
    assert (back > ink) == (scheme == "light")
    page.click("#begin button")
    for number in range(COUNT):
        assert opened.width() <= window, number
        for selector in ("#prompt", "#left", "#question", "#choices [data-choice=left]", "label[for=note]"):
            assert contrast(page, selector) >= 4.5, selector
        boxes = [page.locator(f"#choices [data-choice={side}]").bounding_box() for side in ("left", "tie", "right")]
        assert all(box["height"] >= 44 and box["width"] >= 44 for box in boxes)  # a thumb's (WCAG 2.2, 2.5.5)
        assert boxes[2]["x"] + boxes[2]["width"] <= window
        stacked = page.locator(".reply").nth(0).bounding_box()["x"] == page.locator(".reply").nth(1).bounding_box()["x"]
        assert stacked == (size == "phone")
        ready(page)
        (page.tap if size == "phone" else page.click)("#choices [data-choice=right]")
    assert opened.width() <= window
    assert contrast(page, "#json") >= 4.5
    assert opened.faults == []
    opened.context.close()


@pytest.mark.parametrize(("language", "expected"), [("zh-CN", "zh-CN"), ("en-US", "en"), ("de-DE", "en")])
def test_the_language_is_the_browsers(browser, sheet, language, expected):
    opened = Opened(browser, sheet.sheet, language=language)
    assert opened.page.get_attribute("html", "lang") == expected
    assert opened.page.inner_text("#begin button") == {"zh-CN": "开始", "en": "Start"}[expected]
    opened.page.click("#language")
    opened.page.reload()
    assert opened.page.get_attribute("html", "lang") != expected
    assert opened.faults == []
    opened.context.close()


def test_chinese_replies_make_a_chinese_page(browser, chinese_sheet):
    opened = Opened(browser, chinese_sheet.sheet)
    begin(opened, "小王")
    assert opened.page.inner_text("#question") == "哪个回答更像本人？"
    assert opened.page.get_attribute("#left", "lang") == "zh"
    for _ in range(COUNT):
        opened.page.keyboard.press("ArrowLeft")
        ready(opened.page)
    with opened.page.expect_download() as download:
        opened.page.click("#json")
    assert download.value.suggested_filename.endswith("-小王.json")
    score = score_sheet([download.value.path()], chinese_sheet.key)
    assert score.raters[0].name == "小王"
    assert opened.faults == []
    opened.context.close()
