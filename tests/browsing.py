"""A headless Chromium for tests; they are skipped where there is none."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Opened:
    """A page that was opened from the file system, without a network.

    Attributes:
        page: of playwright.
        problems: what the browser complained about.
        requests: URLs that were asked for.
        seconds: until everything was loaded.
    """

    def __init__(self, browser, file: Path, **options) -> None:
        self.page = browser.new_context(offline=True, **options).new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        begin = time.monotonic()
        self.page.goto(file.resolve().as_uri())
        self.seconds = time.monotonic() - begin

    def check(self) -> None:
        """Fail if the browser complained, or asked for anything but files."""
        assert self.problems == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []

    def text(self) -> str:
        """Return all visible text."""
        return self.page.inner_text("body")

    def run(self, script: str):
        """Return what JavaScript returns."""
        return self.page.evaluate(script)


@contextmanager
def chromium() -> Iterator:
    """Start a browser, or skip the test."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
