"""Needle in a haystack: the report, also in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch

from dass.niah_page import build_page, disagreements, half_kept
from dass.niah_pictures import Panel
from dass.niah_report import write_report
from dass.niah_store import Store
from tests.model.niah_tones import hear, hear_beginning, run_grid


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")

    def forgetful(fbank):
        if fbank.shape[1] > 150:
            raise MemoryError("no more")
        return hear_beginning(fbank)

    run_grid(folder, {"hears <all>": hear, "forgetful": forgetful})
    return write_report(folder)


# Runs in the page after its own script: does what a reader does and writes down what came of it.
READER = """<script>addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#cells tbody tr")];
  const shown = () => rows().filter(row => row.getClientRects().length).map(row => row.innerText);
  const outcome = {text: document.body.innerText, rows: shown().length};
  outcome.pictures = [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight]);
  outcome.loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  const filter = document.getElementById("filter");
  const type = text => { filter.value = text; filter.dispatchEvent(new Event("input", {bubbles: true})); };
  type("forgetful WHITE");
  outcome.filtered = shown();
  type("");
  document.querySelector("#cells th:nth-child(5)").click();
  outcome.positions = rows().map(row => Number(row.cells[4].dataset.v));
  outcome.width = [document.documentElement.scrollWidth, innerWidth];
  const result = document.createElement("pre");
  result.id = "outcome";
  result.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(outcome))));
  document.body.append(result);
});</script>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess:
    """The page in a headless Chromium that finds no network; what it says on its console is in stderr."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    fixed += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,2400", "--virtual-time-budget=4000"]
    with tempfile.TemporaryDirectory() as profile:
        command = [binary, *fixed, f"--user-data-dir={profile}", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def test_the_page_works_in_a_browser_without_a_network(report, tmp_path):
    page = tmp_path / "read.html"
    page.write_text(report.read_text().replace("</body>", f"{READER}</body>"))
    seen = browse(page, "--dump-dom")
    assert "CONSOLE" not in seen.stderr, "no errors on the console"
    written = re.search(r'<pre id="outcome">([^<]+)</pre>', seen.stdout)
    assert written, seen.stderr[-2000:]
    outcome = json.loads(base64.b64decode(written[1]))
    assert len(outcome["pictures"]) == 5
    assert all(complete and width > 300 and height > 200 for complete, width, height in outcome["pictures"])
    assert all(url.startswith("data:") for url in outcome["loaded"]), "nothing from elsewhere"
    text = outcome["text"]
    assert "hears <all>" in text and "out of memory" in text and "PyTorch" not in text.split("Machine")[0]
    assert outcome["rows"] == 36
    assert len(outcome["filtered"]) == 9 and all("forgetful" in row for row in outcome["filtered"])
    assert (np.diff(outcome["positions"]) <= 0).all(), "sorted by position, down"
    assert outcome["width"][0] <= outcome["width"][1], "nothing runs out of the window"
    if folder := os.environ.get("DASS_SCREENSHOTS"):
        browse(report, f"--screenshot={Path(folder).resolve() / 'niah-report.png'}")


def test_the_browser_test_can_fail(tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text("<script>missing()</script><img src='https://example.org/x.png'>")
    assert "CONSOLE" in browse(page, "--dump-dom").stderr


def test_the_page_is_one_file_and_says_what_was_published(report):
    page = report.read_text()
    assert "http://" not in page and "https://" not in page and '<link rel="stylesheet"' not in page
    assert "hears &lt;all&gt;" in page and "<all>" not in page
    assert "model card" in page and "at most 12 %" in page
    assert page.count("data:image/png;base64,") == 5


def test_a_cell_that_failed_before_its_length_was_known_is_in_the_page(report):
    lines = list(Store(report.parent).lines.values())
    good = next(line for line in lines if line["model"] == "hears <all>")
    known = ("model", "haystack", "snr", "length", "position")
    failed = {key: good[key] for key in known} | {"status": "killed", "error": "by SIGKILL"}
    page = build_page([*lines, failed], {}, {}, {})
    assert "killed: by SIGKILL" in page and "≥ 2 s (100 %)" in page


def test_the_page_says_where_the_order_lasts_and_the_decision_does_not(report, tmp_path):
    """A model that beyond the needle adds to one class's score: all inputs keep their order, none its decision."""

    def biased(fbank):
        return hear(fbank) + torch.tensor([0.0, 100.0, 0.0]) * (fbank.shape[1] > 40)

    lines = list(run_grid(tmp_path, {"biased": biased}).lines.values())
    found = disagreements(lines)
    assert [text.split(":")[0] for text in found] == ["biased, mean-spectrum, 1 s", "biased, white, 20 dB, 1 s"]
    assert all("100 % of the mAP is kept" in text and "for 33 % of the needles only" in text for text in found)
    assert all("(100 % at the shortest input, 33 % by chance); centred: 100 %" in text for text in found)
    assert escape(found[0]) in build_page(lines, {}, {}, {})
    assert half_kept(lines, "biased", Panel("mean-spectrum", None), "retention").startswith("≥ 2 s")
    assert half_kept(lines, "biased", Panel("mean-spectrum", None), "top1") == "none (33 % at 1 s)"
    deaf = [{**line, "top1": 0.0} for line in lines if line["length"] == 0]
    assert half_kept(deaf, "biased", Panel("mean-spectrum", None), "top1") == "none"
    assert not disagreements(list(Store(report.parent).lines.values()))
