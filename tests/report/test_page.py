"""The page in a browser: what it fetches, how wide it is, and whether its scripts work."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_bsl.report import default_baseline, find_runs, group_runs, write_report
from tests.report.test_compare import sweep, write_run

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# what a script inside of the page sees, told to the page around it
PROBE = """
<script>
{
  const tables = document.querySelectorAll("table");
  const click = (table, title) => {
    const header = [...table.tHead.rows[0].cells].find(each => each.textContent === title);
    header.click();
    const rows = [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent));
    return [rows, header.getAttribute("aria-sort")];
  };
  const axes = () => [...document.querySelectorAll("[data-axis]")].filter(each => !each.hidden).map(each => each.dataset.axis);
  const choose = value => { document.querySelector(`input[value=${value}]`).click(); return axes(); };
  addEventListener("load", () => {
    const images = [...document.images], shown = images.filter(each => each.offsetParent);
    parent.postMessage(JSON.stringify({
      width: [document.documentElement.scrollWidth, innerWidth],
      widest: Math.max(...shown.map(each => each.getBoundingClientRect().right)),
      images: images.every(each => each.complete && each.naturalWidth > 0) && images.length,
      scrolls: [...document.querySelectorAll(".scroll")].some(each => each.scrollWidth > each.clientWidth),
      up: click(tables[1], "samples"), down: click(tables[1], "samples"), text: click(tables[0], "group"),
      axes: axes(), chosen: choose("seconds"),
      fetched: performance.getEntriesByType("resource").map(each => each.name).filter(name => !name.startsWith("data:")),
    }), "*");
  });
}
</script>
"""
FRAME = """<body><pre></pre><script>
addEventListener("message", event => { document.querySelector("pre").textContent = event.data; });
</script><iframe style="border:0;width:WIDTHpx;height:2000px" src="page.html"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        browse("--dump-dom", "about:blank")
    except (subprocess.SubprocessError, OSError) as error:  # a sandbox may forbid what it needs
        pytest.skip(f"the browser does not start: {error}")
    root = sweep(tmp_path_factory.mktemp("runs"))
    write_run(root / "6", ["scheduler=increasing_both", "seed=3"], [3, 2], epochs=6)
    found = find_runs([root], progress=False)
    groups = group_runs(found.runs)
    return write_report(found, groups, default_baseline(groups), root / "report")[0]


def browse(*arguments: str) -> str:
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ]
    command = [BROWSER, *flags, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def probed(page: Path, folder: Path, width: int) -> dict[str, object]:
    """What the probe finds in a window of that width: a frame, as browsers have no windows as narrow as a phone's."""
    (folder / "page.html").write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    shown = browse("--dump-dom", "--window-size=1400,2000", (folder / "frame.html").as_uri())
    found: dict[str, object] = json.loads(unescape(shown.split("<pre>")[1].split("</pre>")[0]))
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_fits_the_window_and_works(width: int, page: Path, tmp_path: Path) -> None:
    found = probed(page, tmp_path, width)
    assert found["width"] == [width, width]
    assert found["widest"] <= width  # type: ignore[operator]
    assert found["images"] == len(list(page.parent.glob("*.png"))) == 10
    assert found["scrolls"] == (width == 390)  # tables scroll, the page does not
    assert found["fetched"] == []
    for way, reverse, said in (("up", False, "ascending"), ("down", True, "descending")):
        rows, order = found[way]  # type: ignore[misc]
        samples = [float(row[5].split("[")[0].replace(",", "")) for row in rows]
        assert samples == sorted(samples, reverse=reverse) != sorted(samples, reverse=not reverse)
        assert order == said
    assert [row[0] for row in found["text"][0]] == ["constant_decaying", "increasing_both"]  # type: ignore[index]
    assert found["axes"] == ["samples"]
    assert found["chosen"] == ["seconds"]


def test_it_is_to_be_seen(page: Path, tmp_path: Path) -> None:
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,1500", page.as_uri())
    image = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert image.shape[1] == 1280
    rows = (image != 255).any(axis=2).mean(axis=1) > 0.01
    assert rows.mean() > 0.3  # from top to bottom there is something
    assert len(np.unique(image[::8].reshape(-1, 3), axis=0)) > 50


def test_all_axes_are_shown_without_scripts(page: Path) -> None:
    text = page.read_text()
    assert text.count('class="figures" data-axis=') == 4
    assert '<fieldset class="axes" hidden>' in text
    assert 'data-axis="samples" hidden' not in text
