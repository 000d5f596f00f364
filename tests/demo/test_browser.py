"""The page in a real browser: Debian's chromium, driven by playwright."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install "crossflow-toolkit[demo]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")

BROWSER = shutil.which("chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def tab(page) -> Iterator[object]:
    """A tab with the page open, in which nothing may be logged as an error and nothing be asked of another host."""
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("request", lambda asked: problems.append(asked.url) if is_elsewhere(asked.url, page.url) else None)
        opened.goto(page.url)
        opened.wait_for_selector("#run-t2i")
        yield opened
        browser.close()
    assert problems == []


def is_elsewhere(url: str, here: str) -> bool:
    return not url.startswith((here, "data:", "blob:"))


def show(tab, name: str) -> None:
    """Opens a tab of the page, which may stand behind the button for further tabs."""
    tabs = tab.get_by_role("tab", name=name, exact=True)
    if not tabs.count():
        tab.click(".overflow-menu > button")
        tabs = tab.locator(".overflow-dropdown button", has_text=name)
    tabs.first.click()


def picture(tab, place) -> np.ndarray:
    """The pixels of the first picture shown at a place, as the browser has them from the server."""
    place.first.wait_for()
    with Image.open(io.BytesIO(tab.request.get(place.first.get_attribute("src")).body())) as image:
        return np.array(image.convert("RGB"))


def test_a_typed_prompt_becomes_the_picture_of_the_pipeline(tab, page) -> None:
    tab.get_by_label("Prompt").first.fill("a blue sphere")
    tab.click("#run-t2i")
    expected = page.models.get("t2i").pipe("a blue sphere", output_type="np")[0]
    assert np.array_equal(picture(tab, tab.locator(".result img")), expected)
    tab.get_by_label("Prompt").first.fill(" ")
    tab.click("#run-t2i")
    tab.get_by_text("is empty. Type a sentence").wait_for()


def test_an_upload_is_enlarged_and_a_broken_one_is_refused(tab, page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(photo)
    show(tab, "Image to image")
    panel = tab.get_by_role("tabpanel").filter(visible=True)
    panel.locator("input[type=file]").first.set_input_files(photo)
    panel.locator(".upload img").wait_for()
    panel.locator("#run-sr").click()
    expected = np.array(page.models.get("sr").pipe(photo)[0])
    assert np.array_equal(picture(tab, panel.locator(".result img")), expected)
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:60])
    panel.get_by_label("Remove Image").or_(panel.get_by_label("Clear")).first.click()
    panel.locator("input[type=file]").first.set_input_files(broken)
    panel.locator("#run-sr").click()
    tab.get_by_text("cannot be read as a picture").wait_for()


def test_tabs_show_what_they_are_for(tab) -> None:
    show(tab, "Latent space")
    tab.click("#run-interpolate")
    tab.wait_for_selector("#place", state="visible")
    show(tab, "Training")
    tab.locator(".charts polyline").first.wait_for()
    show(tab, "Evaluation")
    assert tab.locator("table.items td.value").first.inner_text() == "10"


def test_the_page_fits_a_phone(tab) -> None:
    tab.set_viewport_size(PHONE)
    for name in ("Text to image", "Step by step", "Evaluation"):
        show(tab, name)
        tab.wait_for_timeout(200)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
