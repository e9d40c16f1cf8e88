"""An installed Chromium without a network, for the tests of our pages; they are skipped where there is none."""

import os
import re
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
SIZES = {"desktop": (1200, 800), "phone": (360, 740)}


@contextmanager
def chromium():
    """A headless browser; skips the test with a reason where none is found. BROWSER_PATH names another one."""
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip(f"no browser found: none of {', '.join(NAMES)} on the PATH, and BROWSER_PATH is not set")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        # Root, as in a container, has no sandbox; everything shown here is our own
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page opened from disk, and everything that should not have happened on it."""

    def __init__(self, browser, file, size="desktop", scheme="light", language="en-US"):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            locale=language,
            is_mobile=size == "phone",
            has_touch=size == "phone",
            accept_downloads=True,
        )
        self.faults = []
        self.file = file
        self.page = self.tab()

    def tab(self):
        """Another tab with the same page."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        page.on("console", lambda message: self.faults.append(f"console: {message.type} {message.text}"))
        page.on("request", lambda request: self.requested(request.url))
        page.goto(self.file.as_uri())
        return page

    def requested(self, url):
        if url != self.file.as_uri() and not url.startswith("blob:"):
            self.faults.append(f"request: {url}")

    def width(self):
        """How wide the content is, in the unit of the window's width."""
        return self.page.evaluate("document.documentElement.scrollWidth")


def luminance(page, selector="body"):
    """Relative luminance from 0 to 1 of an element's background and of its text (WCAG 2.2)."""
    script = """element => {
        const behind = (one) => !one ? "rgb(255, 255, 255)" : /, 0\\)/.test(getComputedStyle(one).backgroundColor)
            ? behind(one.parentElement) : getComputedStyle(one).backgroundColor;
        return [behind(element), getComputedStyle(element).color];
    }"""
    found = []
    for colour in page.locator(selector).first.evaluate(script):
        parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        found.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return found


def contrast(page, selector):
    """Contrast of an element's text, from 1 to 21; body text needs 4.5 (WCAG 2.2, 1.4.3)."""
    low, high = sorted(luminance(page, selector))
    return (high + 0.05) / (low + 0.05)
