"""What a person sees: the real server, watched through a real browser."""

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from big_runs import write_big_run, write_runs
from playwright.sync_api import Browser, Page, expect, sync_playwright
from synthetic import HEADS, LAYERS, manifest, write_run, write_table

from diagnostics.app.launch import dashboard_command, dashboard_environment
from diagnostics.store.manifest import write_manifest

WAIT_MS = 30_000
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        missing = "no Chromium found: install it (Debian: apt-get install chromium) to see the pages as a person does"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "collapse", collapse=True, started_s=time.time() - 10.0)
    write_run(folder, "healthy", started_s=time.time() - 20.0)
    return folder


@pytest.fixture(scope="module")
def large_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_runs(folder, 1000, layers=1, heads=1, tables=False)
    write_big_run(folder / "long", steps=20_000, every=5, layers=2, heads=2)
    return folder


@pytest.fixture(scope="module")
def address(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _server(root, tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


@pytest.fixture(scope="module")
def large(large_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _server(large_root, tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


@contextmanager
def _server(root: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            dashboard_command(root, port=port),
            env=dashboard_environment(),
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _await_health(f"http://127.0.0.1:{port}/_stcore/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    tab = chromium.new_page(viewport={"width": 1600, "height": 1200})
    tab.set_default_timeout(WAIT_MS)
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    hosts: set[str] = set()
    tab.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).hostname or ""))
    yield tab
    # What a page needs comes from its own server: it works offline, and nothing of a run leaves.
    assert hosts <= {"127.0.0.1", ""}
    expect(tab.get_by_text("Share chart")).to_have_count(0)
    expect(tab.locator('.modebar-btn[data-title*="Share"]')).to_have_count(0)
    expect(tab.get_by_test_id("stException")).to_have_count(0)
    tab.close()
    assert errors == []


def _await_health(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own server on this machine
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not come up:\n{log.read_text()}")


def _see_charts(page: Page, count: int) -> None:
    drawn = page.locator(".js-plotly-plot .main-svg .scatterlayer path.js-line")
    expect(page.locator(".js-plotly-plot")).to_have_count(count, timeout=WAIT_MS)
    expect(drawn.first).to_be_attached(timeout=WAIT_MS)


_STEP_RANGE = "document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range.slice()"


def _zoom(page: Page) -> list[float]:
    """Drags over the first chart and returns the steps that are shown then."""
    whole = page.evaluate(_STEP_RANGE)
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 42, steps=5)
    page.mouse.up()
    page.wait_for_function(f"{_STEP_RANGE}[0] > {whole[0]}", timeout=WAIT_MS)
    zoomed: list[float] = page.evaluate(_STEP_RANGE)
    return zoomed


def test_a_click_on_a_run_in_the_list_opens_its_page(page: Page, address: str) -> None:
    page.goto(address)
    grid = page.get_by_test_id("stDataFrame")
    expect(grid).to_be_visible(timeout=WAIT_MS)
    # The grid is drawn on a canvas, with its cells as hidden text inside: below the header of 35 px the first row.
    expect(grid.locator("canvas td", has_text="collapse").first).to_be_attached(timeout=WAIT_MS)
    grid.locator(".dvn-scroller").click(position={"x": 220, "y": 52})
    expect(page.get_by_role("heading", name="collapse")).to_be_visible(timeout=WAIT_MS)
    expect(page).to_have_url(re.compile("run=collapse"))
    _see_charts(page, 2)


@pytest.mark.parametrize("width", [480, 1600])
def test_the_charts_fit_a_narrow_and_a_wide_window(page: Page, address: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1200})
    page.goto(f"{address}/?run=collapse")
    _see_charts(page, 2)
    box = page.locator(".js-plotly-plot").first.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_section_draws_what_it_promises(page: Page, address: str) -> None:
    page.goto(f"{address}/?run=collapse")
    _see_charts(page, 2)
    for section, words in (
        ("Heads over training", "attention entropy of blocks.0.attn"),
        ("Singular spectrum", "singular values"),
        ("Updates", "size of each update against its weight"),
        ("Other scalars", "lr"),
    ):
        page.get_by_test_id("stButtonGroup").get_by_text(section, exact=True).click()
        expect(page.locator(".js-plotly-plot").nth(1)).to_contain_text(words, timeout=WAIT_MS)
    page.get_by_test_id("stButtonGroup").get_by_text("Run", exact=True).click()
    expect(page.get_by_text("Attention sites")).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_text("Recorder overhead")).to_be_visible(timeout=WAIT_MS)


def test_two_runs_are_laid_over_each_other(page: Page, address: str) -> None:
    page.goto(f"{address}/?compare=collapse&compare=healthy")
    _see_charts(page, 1)
    legend = page.locator(".js-plotly-plot .legendtext")
    expect(legend).to_have_text(["collapse", "healthy"], timeout=WAIT_MS)


def test_a_live_run_advances_without_a_full_reload(page: Page, address: str, root: Path) -> None:
    run_dir = write_run(root, "live", state="running", started_s=time.time())
    try:
        page.goto(f"{address}/?run=live")
        expect(page.get_by_text("100 steps")).to_be_visible(timeout=WAIT_MS)
        _see_charts(page, 2)
        page.evaluate("window.notReloaded = true")
        zoom = _zoom(page)
        for number, step in enumerate((100, 110, 120), start=1):
            heads = [
                {"step": step, "layer": layer, "head": head} for layer in LAYERS for head in range(HEADS)
            ]
            write_table(run_dir, "attention", [{**row, "entropy": 1.0} for row in heads], number=number)
            losses = [
                {"step": step + i, "time_s": time.time(), "loss": 2.0, "measured": i == 0} for i in range(10)
            ]
            write_table(run_dir, "steps", losses, number=number)
            write_manifest(run_dir, manifest("live", state="running", steps=step + 10, started_s=time.time()))
            expect(page.get_by_text(f"{step + 10} steps")).to_be_visible(timeout=WAIT_MS)
            # The heat map follows the newest measured step, the overview the newest loss.
            expect(page.locator(".js-plotly-plot").nth(1)).to_contain_text(f"at step {step}", timeout=WAIT_MS)
            last = "() => document.querySelector('.js-plotly-plot').calcdata[0].at(-1).x"
            page.wait_for_function(f"({last})() === {step + 9}", timeout=WAIT_MS)
        assert page.evaluate("window.notReloaded") is True
        assert page.evaluate(_STEP_RANGE) == zoom
        write_manifest(run_dir, manifest("live", state="finished", steps=130))
        expect(page.get_by_text("finished")).to_be_visible(timeout=WAIT_MS)
    finally:
        shutil.rmtree(run_dir)


def test_a_thousand_runs_are_listed_and_none_is_chosen(page: Page, large: str) -> None:
    page.goto(large)
    grid = page.get_by_test_id("stDataFrame")
    expect(grid).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_text("1,001 runs.")).to_be_visible(timeout=WAIT_MS)
    # Nothing is chosen by itself: a page that compared a thousand runs would never come.
    expect(page.get_by_test_id("stBaseButton-primary")).to_be_disabled()
    expect(grid.locator("canvas td", has_text="attempt 2").first).to_be_attached(timeout=WAIT_MS)


# Points of the loss per step on screen.
_SHOWN = """() => {
    const plot = document.querySelector('.js-plotly-plot');
    const [first, last] = plot._fullLayout.xaxis.range;
    const loss = plot.calcdata.find(points => points[0].trace.name === 'loss');
    return loss.filter(point => first <= point.x && point.x <= last).length / (last - first);
}"""


def test_zooming_into_a_long_run_brings_its_single_steps(page: Page, large: str) -> None:
    page.goto(f"{large}/?run=long")
    _see_charts(page, 2)
    expect(page.get_by_text("Each point stands for 16 steps")).to_be_visible(timeout=WAIT_MS)
    page.wait_for_function(f"({_SHOWN})() < 0.1", timeout=WAIT_MS)
    whole = page.evaluate(_STEP_RANGE)
    zoom = _zoom(page)
    page.wait_for_function(f"({_SHOWN})() > 0.2", timeout=WAIT_MS)
    assert page.evaluate(_STEP_RANGE) == zoom
    # A double click shows the whole run again.
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], box["y"] + 40)
    page.wait_for_function(f"{_STEP_RANGE}[0] < {zoom[0]}", timeout=WAIT_MS)
    page.wait_for_function(f"({_SHOWN})() < 0.1", timeout=WAIT_MS)
    assert page.evaluate(_STEP_RANGE)[1] == pytest.approx(whole[1], rel=0.01)
