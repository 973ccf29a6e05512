"""A real browser, without a network, and everything that goes wrong in it."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Dialog, Page


def missing_chromium() -> str | None:
    """Return what keeps tests from opening a page, or None."""
    try:
        import playwright.sync_api  # noqa: F401, PLC0415 - is it there?
    except ImportError:
        return "Playwright is not installed"
    return None if find_chromium() else "there is no Chromium"


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


needs_chromium = pytest.mark.skipif(missing_chromium() is not None, reason=missing_chromium() or "")


class Opened:
    """A page in the browser, and what was said and asked for while it was open."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("dialog", self._dismiss)
        page.on("request", lambda request: self.requests.append(request.url))

    def _dismiss(self, dialog: Dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser, and close it in the end."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - it may be missing

    # Chromium's sandbox is not to be had by root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    """Open a report without a network, wait until all is drawn, and close it in the end."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
    try:
        shown = Opened(context.new_page())
        shown.page.goto(path.as_uri())
        shown.page.evaluate("window.dirtylog.then(() => null)")
        yield shown
    finally:
        context.close()
