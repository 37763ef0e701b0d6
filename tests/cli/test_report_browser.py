"""The page of `ds_fp8 report` in a real browser: no error, nothing beyond the edge, every chart drawn, in both schemes.

Needs Chromium (`apt install chromium`, or CHROMIUM names it; DS_FP8_TEST_INSTALL=1 installs it, as in .ci/run) and
playwright (extra `browser`); without them it is skipped. With DS_FP8_SCREENSHOTS=FOLDER
the pages are kept as pictures: docs/images was made so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ds_fp8.cli.main import main
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.telemetry import JsonlLog, TensorStatistics, aggregate, find_alarms
from ds_fp8.telemetry.alarms import new_alarms

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, the extra `browser`")
pytest.importorskip("plotly", reason="needs the extra report")


def find_browser() -> str | None:
    """The path of a Chromium; installed now where .ci/run allows it, and None where that fails."""
    names = ("chromium", "chromium-browser", "google-chrome")
    may_install = os.environ.get("DS_FP8_TEST_INSTALL") == "1" and os.geteuid() == 0 and shutil.which("apt-get")
    if not any(map(shutil.which, names)) and may_install and "CHROMIUM" not in os.environ:
        with contextlib.suppress(subprocess.SubprocessError):
            # One at a time: the tests of the launchers install, too, in another worker.
            apt = ["flock", "/tmp/ds_fp8_tests_apt.lock", "apt-get"]
            subprocess.run([*apt, "update", "-qq"], capture_output=True, timeout=240)
            packages = ["chromium", "fonts-dejavu-core"]
            command = [*apt, "install", "-y", "-qq", "--no-install-recommends", *packages]
            subprocess.run(command, capture_output=True, timeout=400)
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


pytestmark = pytest.mark.slow

LAYERS = [f"blocks.{block}.{name}" for block in range(4) for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]
BANNER = """ds_fp8: 16 of 17 Linear -> Fp8Linear (HYBRID, delayed, history 1024 (max), margin 0); kept 1: lm_head
ds_fp8: backend torch on cpu (emulated); interval 1; reduce_amax on; weight_cache off; eval off
ds_fp8: plan ccf42bf5f123"""


def reading(layer, role, step, rank):
    """Made up: steady ranges that differ by layer; one input that jumps at step 200, one gradient lost after step
    300.
    """
    fmt = E5M2 if role == "grad_output" else E4M3
    wave = 1 + 0.05 * ((step // 10 * 7 + rank * 3 + len(layer)) % 5)
    amax = wave * (1 + LAYERS.index(layer) % 4) * (1e-3 if role == "grad_output" else 1.0)
    scale, share, more = fmt.max / amax, 0.004 * wave, {}
    if (layer, role, step) == ("blocks.1.attn.qkv", "input", 200):
        amax *= 16
    if (layer, role) == ("blocks.3.mlp.down", "grad_output") and step > 300:
        share, more = 0.6, {"underflow_of_own_amax": 0.02}
    return TensorStatistics(layer, role, amax, scale, fmt, share, **more)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """one.html: two ranks in FP8; two.html: the same beside an unmodified run; none.html: one step without any
    reading.
    """
    folder = tmp_path_factory.mktemp("report")
    for rank in range(2):
        log, known = JsonlLog(folder / "fp8" / f"telemetry_rank{rank}.jsonl"), set()
        log.write("plan", digest="x", banner=BANNER, plan={})
        for step in range(10, 610, 10):
            found = [
                reading(layer, role, step, rank) for layer in LAYERS for role in ("input", "weight", "grad_output")
            ]
            alarms = find_alarms(found)
            wire = {"wire/gradient_bytes": 2.1e6, "wire/weight_bytes": 4e6, "wire/scale_bytes": 2e4, "wire/ratio": 0.37}
            loss = 2 + 600 / (step + 150) + 0.04 * ((step // 10 * 5 + rank) % 7)
            readings = [operand.to_json() for operand in found]
            log.write("step", step=step, loss=loss, values={**aggregate(found, alarms), **wire}, readings=readings)
            for alarm in new_alarms(alarms, known):
                shown = {
                    "kind": alarm.kind,
                    "fqn": alarm.fqn,
                    "role": alarm.role,
                    "text": alarm.text,
                    "cure": alarm.cure,
                }
                log.write("alarm", step=step, **shown)
    baseline = JsonlLog(folder / "bf16" / "losses.jsonl")
    for step in range(10, 610, 10):
        baseline.write("loss", step=step, loss=2 + 600 / (step + 150) + 0.04 * (step // 10 * 3 % 7))
    JsonlLog(folder / "none" / "telemetry_rank0.jsonl").write("step", step=1, loss=None, values={}, readings=[])
    for name, runs in (("one", ["fp8"]), ("two", ["bf16/losses.jsonl", "fp8"]), ("none", ["none"])):
        assert main(["report", *(str(folder / run) for run in runs), "-o", str(folder / f"{name}.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("needs a Chromium: apt install chromium, or CHROMIUM=path")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, pages):  # the browser first: without one nothing is made
    """(name, width, scheme) -> the page, drawn; the errors of its script are a failure at the end."""
    contexts, errors = [], []

    def opened(name, width=1440, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfinished", lambda request: errors.append(request.url) if "http" in request.url[:5] else None)
        page.goto((pages / f"{name}.html").as_uri())
        page.wait_for_selector("#facts td")
        page.wait_for_function("charts.every((c) => c.chart.hidden || c.chart.querySelector('.main-svg'))")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_nothing_stands_beyond_the_edge(open_page, width, scheme):
    """Eleven charts, all inside their cards; the page does not scroll sideways; text and ground differ by 4.5 to 1 and
    more.
    """
    page = open_page("two", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = page.evaluate(
        """() => { const edge = (e) => e.getBoundingClientRect();
        const all = (card) => [...card.querySelectorAll('h3, .main-svg text')];
        const isOut = (e, card) => edge(e).left < edge(card).left - 1 || edge(e).right > edge(card).right + 1;
        return [...document.querySelectorAll('.card')].filter(
            (card) => all(card).some((e) => edge(e).width && isOut(e, card))).length }"""
    )
    assert (page.locator(".chart .main-svg:first-child").count(), outside) == (11, 0)
    titles = page.evaluate("[...document.querySelectorAll('.chart')].map((c) => c._fullLayout.yaxis.title.text)")
    assert titles[:2] == ["loss", "MB"] and titles[-1] == "% of the elements"
    light = """(name) => {
        const c = getComputedStyle(document.body)[name].match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * c[0] + .7152 * c[1] + .0722 *
        c[2] }"""
    ground, text = page.evaluate(light, "backgroundColor"), page.evaluate(light, "color")
    assert (ground < text) == (scheme == "dark") and (max(ground, text) + 0.05) / (min(ground, text) + 0.05) > 4.5
    assert page.evaluate("charts[0].chart._fullLayout.font.color") == ("#e6e7ea" if scheme == "dark" else "#1c1e21")
    if os.environ.get("DS_FP8_SCREENSHOTS"):
        path = Path(os.environ["DS_FP8_SCREENSHOTS"]) / f"report_{width}_{scheme}.png"
        page.screenshot(path=path, full_page=width == 1440)


def test_alarms_come_first_and_are_marked_where_they_were_raised(open_page):
    page = open_page("one")
    assert page.evaluate("document.querySelector('main section').id") == "alarms"
    assert page.locator(".alarm summary b").all_inner_texts() == ["saturated", "underflow"]
    assert "amax_history_len" in page.locator(".alarm summary").nth(1).inner_text()
    marks = """() => charts.flatMap((c) =>
        (c.chart.data ?? []).filter((l) => l.isAlarm).map((l) => [c.axis, l.x, l.text[0]]))"""
    found = page.evaluate(marks)
    assert ["amax", [200], "saturated: blocks.1.attn.qkv input"] in found
    assert ["% of the elements", [310], "underflow: blocks.3.mlp.down grad_output"] in found


def test_layers_are_grouped_and_filtered_and_lines_smoothed(open_page):
    """Four groups of four blocks; one layer of two ranks; a smoothed loss turns less than the raw one."""
    page = open_page("one")
    names = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    assert page.locator("#legend .chip").all_inner_texts() == [f"blocks.*.{name}" for name in names]
    page.select_option("#mode", "layers")
    page.fill("#filter", "blocks.2.*.up")
    assert page.locator("#legend .chip").all_inner_texts() == ["blocks.2.mlp.up"]
    assert "1 of 16 layers" in page.locator("#shown").inner_text()
    names = "charts[2].chart.data.map((l) => l.name)"
    assert page.evaluate(names) == ["blocks.2.mlp.up, rank 0", "blocks.2.mlp.up, rank 1"]
    turns = """(() => { const y = charts[0].chart.data.at(-1).y;
        return y.slice(1).map((v, i) => Math.abs(v - y[i])).reduce((a, b) => a + b) })()"""
    raw = page.evaluate(turns)
    page.fill("#smoothing", "0.9")
    assert page.evaluate(turns) < 0.8 * raw
    page.select_option("#ranks", "range")
    assert page.evaluate("charts[0].chart.data.length") == 3, "least, largest, median"


def test_what_was_not_measured_is_said(open_page):
    """A log without loss, bytes and readings: no chart, eleven sentences."""
    page = open_page("none")
    texts = [text for text in page.locator(".card p").all_inner_texts() if text]
    assert len(texts) == 11 and all(text.startswith("not measured: ") for text in texts)
    assert page.locator(".main-svg").count() == 0


def test_the_whole_banner_is_on_the_page(open_page):
    page = open_page("one", 390)
    assert page.locator("pre").inner_text() == BANNER
    assert page.evaluate("(() => { const p = document.querySelector('pre'); return p.scrollWidth <= p.clientWidth })()")
