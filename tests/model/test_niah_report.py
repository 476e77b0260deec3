"""Needle in a haystack: the report, also in a real browser."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dass.niah_report import write_report
from tests.model.niah_tones import hear, hear_beginning, run_grid

# --- the report in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")

    def forgetful(fbank):
        if fbank.shape[1] > 150:
            raise MemoryError("no more")
        return hear_beginning(fbank)

    run_grid(folder, {"hears <all>": hear, "forgetful": forgetful})
    return write_report(folder)


def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,2400",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return selenium.Chrome(options=options, service=selenium.ChromeService(driver))


def test_the_page_works_in_a_browser_without_a_network(report):
    window = browser()
    try:
        window.get(report.as_uri())
        assert window.get_log("browser") == [], "no errors on the console"
        sizes = window.execute_script(
            "return [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight])"
        )
        assert len(sizes) == 4 and all(complete and width > 300 and height > 200 for complete, width, height in sizes)
        requests = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
        urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
        assert urls and all(url.startswith(("file:", "data:")) for url in urls)
        text = window.find_element("tag name", "body").text
        assert "hears <all>" in text and "out of memory" in text and "PyTorch" not in text.split("Machine")[0]
        rows = "return [...document.querySelectorAll('#cells tbody tr')].filter(r => !r.hidden).map(r => r.innerText)"
        assert len(window.execute_script(rows)) == 36
        window.find_element("id", "filter").send_keys("forgetful white")
        shown = window.execute_script(rows)
        assert len(shown) == 9 and all("forgetful" in row for row in shown)
        window.find_element("id", "filter").clear()
        window.find_element("css selector", "#cells th:nth-child(5)").click()
        column = "return [...document.querySelectorAll('#cells tbody tr')].map(r => Number(r.cells[4].dataset.v))"
        assert (np.diff(window.execute_script(column)) <= 0).all(), "sorted by position, down"
        if folder := os.environ.get("DASS_SCREENSHOTS"):
            window.save_screenshot(str(Path(folder) / "niah-report.png"))
    finally:
        window.quit()


def test_the_page_is_one_file_and_says_what_was_published(report):
    page = report.read_text()
    assert "http://" not in page and "https://" not in page and '<link rel="stylesheet"' not in page
    assert "hears &lt;all&gt;" in page and "<all>" not in page
    assert "model card" in page and "at most 12 %" in page
    assert page.count("data:image/png;base64,") == 4
