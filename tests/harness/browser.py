"""A page in a browser without a window."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

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
      MORE
      fetched: performance.getEntriesByType("resource").map(each => each.name).filter(name => !name.startsWith("data:")),
    }), "*");
  });
}
</script>
"""
FRAME = """<body><pre></pre><script>
addEventListener("message", event => { document.querySelector("pre").textContent = event.data; });
</script><iframe style="border:0;width:WIDTHpx;height:2000px" src="page.html"></iframe>"""


def skip_unless_it_starts() -> None:
    try:
        browse("--dump-dom", "about:blank")
    except (subprocess.SubprocessError, OSError) as error:  # a sandbox may forbid what it needs
        pytest.skip(f"the browser does not start: {error}")


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


def probed(page: Path, folder: Path, width: int, more: str) -> dict[str, object]:
    """What the probe, and `more` of it, finds in a window of that width: a frame, as no browser is as narrow as a phone."""
    (folder / "page.html").write_text(page.read_text().replace("</body>", PROBE.replace("MORE", more) + "</body>"))
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    shown = browse("--dump-dom", "--window-size=1400,2000", (folder / "frame.html").as_uri())
    found: dict[str, object] = json.loads(unescape(shown.split("<pre>")[1].split("</pre>")[0]))
    return found
