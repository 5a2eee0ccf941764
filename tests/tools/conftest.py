"""A real browser, for the pages that the tools write."""

import shutil

import pytest
from PIL import Image

# Chromium's own calls home are off, so that a request that is seen is the page's.
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SIZES = {"light": (1200, 1000), "dark": (1200, 1000), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    playwright_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "chrome")
    chromium = next((path for path in map(shutil.which, names) if path), None)
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file at a size of SIZES; afterwards nothing may have failed or left the page."""
    contexts, complaints, addresses = [], [], []

    def open_(path, size="light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if size == "dark" else "light",
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert {address.split(":")[0] for address in addresses} <= {"file", "data"}
    assert sum(address.startswith("file") for address in addresses) == len(contexts)


@pytest.fixture(params=SIZES)
def check_looks(request, open_page, tmp_path):
    """Open a file: no `elements` stick out to the side, `left` is beside `right` but on phones, and
    dark is dark. Return the page where it is light and wide.
    """
    size, width = request.param, SIZES[request.param][0]

    def check(path, left, right, elements):
        page = open_page(path, size)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for element in page.locator(elements).all():
            box = element.bounding_box()
            assert box is None or box["x"] + box["width"] <= width
        first, second = (page.locator(part).first.bounding_box() for part in (left, right))
        assert (first["x"] + first["width"] <= second["x"]) == (size != "phone")
        page.screenshot(path=tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as shot:
            assert (shot.convert("L").getpixel((2, 2)) < 60) == (size == "dark")
        return page if size == "light" else None

    return check
