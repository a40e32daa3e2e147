"""The page in a browser: what it fetches, how wide it is, and whether its scripts work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.browser import browse, needs_browser, probed, skip_unless_it_starts
from harness.runs import sweep, write_run
from lightning_bsl.report import write_report
from lightning_bsl.runs import default_baseline, find_runs, group_runs

pytestmark = needs_browser
MORE = """
      up: click(tables[1], "samples"), down: click(tables[1], "samples"), text: click(tables[0], "group"),
      axes: axes(), chosen: choose("seconds"),
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_it_starts()
    root = sweep(tmp_path_factory.mktemp("runs"))
    write_run(root / "6", ["scheduler=increasing_both", "seed=3"], [3, 2], epochs=6)
    found = find_runs([root], progress=False)
    groups = group_runs(found.runs)
    return write_report(found, groups, default_baseline(groups), root / "report")[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_fits_the_window_and_works(width: int, page: Path, tmp_path: Path) -> None:
    found = probed(page, tmp_path, width, MORE)
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
