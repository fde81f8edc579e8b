"""The example shop as a visitor sees it: the buttons, and what the counters say."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from tests.examples.conftest import Served

pytestmark = pytest.mark.browser

STEPS = ("placed", "reserved", "charged", "emailed")
PATIENCE = 60_000
"""Milliseconds for what the page is to say next."""
TAKEN_OVER = 12.0
"""Seconds that the work of a killed process rests."""


@pytest.fixture
def page(chromium: str, served: Served, absent: Callable[[str], NoReturn]) -> Iterator[Any]:
    """Return the page of a served shop, in a browser; a complaint that is not about a broken call is a failure."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        absent("no playwright: pip install --group browser")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith(served.url) else complaints.append(sent.url))
        page.goto(served.url)
        yield page
        browser.close()
    assert [one for one in complaints if "net::ERR_" not in one] == []


def expect(page: Any, **counts: int) -> None:
    """Wait until the counters say so."""
    for name, count in counts.items():
        page.wait_for_function(f"document.getElementById('{name}').textContent === '{count}'")


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


@pytest.mark.timeout(300)
def test_buttons(page: Any) -> None:
    """Buy 100 makes four counters climb to the same number; broken e-mail dies with its reason; Replay heals it."""
    expect(page, **dict.fromkeys(STEPS, 0))
    press(page, "Buy 100")
    expect(page, **dict.fromkeys(STEPS, 100))
    page.get_by_text("All through after").wait_for()

    press(page, "Break e-mail")
    page.get_by_role("button", name="Repair e-mail").wait_for()
    press(page, "Buy 100")
    expect(page, placed=200, reserved=200, charged=200, emailed=100, failed=300, dead=100)
    assert page.locator("#latest").get_by_text("failed 3 times").count() == 3
    assert "the mail server refuses connections" in page.locator("#latest").inner_text()
    assert page.locator("#latest").get_by_text("and 97 more").is_visible()

    press(page, "Replay")
    expect(page, **dict.fromkeys(STEPS, 200), dead=0, failed=300)
    assert page.get_by_role("button", name="Break e-mail").is_visible()
    assert page.get_by_role("button", name="Replay").is_disabled()
    assert "orders.place_order [inline" in (page.locator("#wiring").text_content() or "")
    assert ledger(page) == [0] * 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lease", [TAKEN_OVER])
def test_kill(page: Any) -> None:
    """Kill -9 in the middle of 100 orders: another process goes on, nothing is lost and nothing doubled."""
    killed = page.wait_for_function("Number(document.getElementById('process').textContent)").json_value()
    press(page, "Buy 100")
    page.wait_for_function("Number(document.getElementById('placed').textContent) > 20")
    press(page, "Kill -9")
    page.get_by_text(f"Process {killed} is gone").wait_for()
    expect(page, **dict.fromkeys(STEPS, 100))
    page.get_by_text("All through after").wait_for()
    lost, redelivered, doubled, repeated = ledger(page)
    assert (lost, doubled) == (0, 0)
    assert redelivered > 0
    assert repeated <= 8
    press(page, "Buy 100")
    expect(page, **dict.fromkeys(STEPS, 200))


def ledger(page: Any) -> list[int]:
    """Wait until nothing is open, and return what the ledger counts."""
    page.wait_for_function("!document.getElementById('sum').textContent.includes('still working')")
    return [int(number) for number in re.findall(r"\d+", page.locator("#sum").inner_text())]
