"""The run's page while the run lives: its log, its figures, and what a person does there."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

LOG = "[data-log]"
LINES = "() => [...document.querySelectorAll('[data-log-lines] > div')].map((line) => line.textContent)"
pytestmark = pytest.mark.chromium


@pytest.fixture
def watched(live_platform):
    """A running run of the test's own, with an empty log: (id, path of the log)."""
    run, path = live_platform.rows["watched"].pop()
    return run, Path(path)


def run_page(page, live_platform, run="live"):
    page.goto(f"{live_platform.address}/runs/{live_platform.rows.get(run, run)}/")
    expect(page.locator(LOG)).to_have_attribute("data-state", "live")
    return page


def wait_for_offset(page, offset):
    expect(page.locator(LOG)).to_have_attribute("data-offset", str(offset), timeout=20_000)


def database(live_platform):
    return sqlite3.connect(live_platform.log.parents[3] / "lorapilot.sqlite3", timeout=20, isolation_level=None)


def test_log_is_complete_after_the_server_was_killed(browser_of, live_platform, watched):
    run, log = watched
    page = run_page(browser_of("alice"), live_platform, run)
    finished = threading.Event()

    def train():
        with log.open("ab", buffering=0) as file:
            for number in range(1500):
                line = f"step {number} Größe ✓ 画像 \x1b[32mloss\x1b[0m {number / 1500:.4f}\n".encode()
                file.write(line[:17])  # inside a character, now and then
                time.sleep(0.002)
                file.write(line[17:])
        finished.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    page.wait_for_function("() => document.querySelectorAll('[data-log-lines] > div').length > 100")
    live_platform.kill()
    expect(page.locator("[data-log-state]")).to_have_text("reconnecting…")
    assert not finished.is_set()
    live_platform.start()
    trainer.join()
    wait_for_offset(page, log.stat().st_size)
    expect(page.locator("[data-log-state]")).to_have_text("live")
    assert page.evaluate(LINES) == [f"step {n} Größe ✓ 画像 loss {n / 1500:.4f}" for n in range(1500)]


def test_reload_shows_the_end_and_then_the_whole_log(browser_of, live_platform, watched):
    run, log = watched
    lines = [f"line {number} {'x' * 1000}" for number in range(900)]
    log.write_text("\n".join(lines) + "\n")
    page = run_page(browser_of("alice"), live_platform, run)
    wait_for_offset(page, log.stat().st_size)
    shown = page.evaluate(LINES)
    assert shown == lines[-len(shown) :]
    assert 500 <= len(shown) <= 520  # 512 KiB of it
    page.click("text=Load the whole log")
    page.wait_for_function("() => document.querySelectorAll('[data-log-lines] > div').length === 900")
    assert page.evaluate(LINES) == lines
    expect(page.locator("[data-log-whole]")).to_be_hidden()


def test_log_follows_its_end_until_the_reader_scrolls_up(browser_of, live_platform, watched):
    run, log = watched
    log.write_text("".join(f"line {number}\n" for number in range(200)))
    page = run_page(browser_of("alice"), live_platform, run)
    wait_for_offset(page, log.stat().st_size)
    end = """() => { const view = document.querySelector('[data-log-view]');
        return view.scrollHeight - view.scrollTop - view.clientHeight < 2; }"""
    assert page.evaluate(end)
    page.locator("[data-log-view]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => document.querySelector('[data-log-view]').scrollTop === 0")
    expect(page.locator("[data-log-jump]")).to_be_visible()
    with log.open("a") as file:
        file.write("one more\n")
    wait_for_offset(page, log.stat().st_size)
    assert page.evaluate("document.querySelector('[data-log-view]').scrollTop") == 0
    page.click("[data-log-jump]")
    page.wait_for_function(end)


def test_flood_of_lines_leaves_the_last_ones(browser_of, live_platform, watched):
    run, log = watched
    page = run_page(browser_of("alice"), live_platform, run)
    log.write_text("".join(f"line {number}\n" for number in range(60_000)))
    wait_for_offset(page, log.stat().st_size)
    assert page.evaluate(LINES) == [f"line {number}" for number in range(55_000, 60_000)]


def test_markup_in_the_log_stays_text(browser_of, live_platform, watched):
    run, log = watched
    log.write_text("<img src=x onerror=alert(1)><b>bold</b>\n")
    page = run_page(browser_of("alice"), live_platform, run)
    wait_for_offset(page, log.stat().st_size)
    assert page.evaluate(LINES) == ["<img src=x onerror=alert(1)><b>bold</b>"]
    assert page.complaints == []


def test_figures_curve_and_status_change_in_place(browser_of, live_platform):
    page = run_page(browser_of("alice"), live_platform)
    run = live_platform.rows["live"]
    expect(page.locator("[data-figure=step]")).to_have_text("180 / 320")
    page.wait_for_function("() => document.querySelector('[data-loss-chart]').lossChart.points.length === 180")
    with database(live_platform) as rows:
        rows.execute(
            "INSERT INTO runs_metricpoint (run_id, step, attempt, loss, learning_rate, at)"
            " VALUES (?, 181, 1, 0.05, 0.001, '2026-01-01')",
            [run],
        )
        rows.execute("UPDATE runs_run SET step = 181, loss = 0.05, revision = revision + 1 WHERE id = ?", [run])
    expect(page.locator("[data-figure=step]")).to_have_text("181 / 320")
    expect(page.locator("[data-figure=loss]")).to_have_text("0.05000")
    page.wait_for_function("() => document.querySelector('[data-loss-chart]').lossChart.points.at(-1).step === 181")
    with database(live_platform) as rows:
        rows.execute(
            "INSERT INTO runs_runevent (run_id, at, attempt, old_status, new_status, message)"
            " VALUES (?, '2026-01-01', 1, '', '', 'Saw something.')",
            [run],
        )
        rows.execute("UPDATE runs_run SET status = 'stopping', revision = revision + 1 WHERE id = ?", [run])
    expect(page.locator("#stop-button")).to_be_disabled()
    expect(page.locator("#run-head .badge")).to_have_text("Stopping")
    expect(page.locator("[data-part=events]")).to_contain_text("Saw something.")
    with database(live_platform) as rows:
        rows.execute("DELETE FROM runs_runevent WHERE message = 'Saw something.'")
        rows.execute("DELETE FROM runs_metricpoint WHERE run_id = ? AND step = 181", [run])
        rows.execute("UPDATE runs_run SET status = 'running', step = 180, revision = revision + 1 WHERE id = ?", [run])
    expect(page.locator("#stop-button")).to_be_enabled()
    assert page.complaints == []


def test_curve_of_a_long_run_stays_small_and_keeps_its_peaks(browser_of, live_platform):
    page = run_page(browser_of("alice"), live_platform, "failed")  # it has no points of its own
    kept = page.evaluate(
        """() => { const chart = document.querySelector('[data-loss-chart]').lossChart;
           const loss = (step) => step === 7777 ? 9 : 0.1 + (step % 7) / 100;
           for (let step = 1; step <= 20000; step += 1) chart.add([[step, loss(step), 1e-4]]);
           const steps = chart.points.map((point) => point.step);
           chart.add([[15000, 0.5, 1e-4]]);  // resumed from an earlier step
           return {fits: steps.length <= 4000, rising: steps.every((step, i) => !i || step > steps[i - 1]),
                   last: steps.at(-1), peak: chart.points.some((point) => point.step === 7777),
                   after: chart.points.at(-1).step}; }"""
    )
    assert kept == {"fits": True, "rising": True, "last": 20000, "peak": True, "after": 15000}


def test_curve_ends_where_a_new_attempt_goes_on(browser_of, live_platform):
    page = run_page(browser_of("alice"), live_platform, "failed")  # it has no points of its own
    lasts = page.evaluate(
        """() => { const chart = document.querySelector('[data-loss-chart]').lossChart;
           chart.add(Array.from({length: 100}, (_, step) => [step + 1, 0.1, 1e-4]));
           const last = (run) => { document.dispatchEvent(new CustomEvent('run:status', {detail: {
             ...document.getElementById('run').runPage.run, validations: [], ...run}}));
             return chart.points.at(-1).step; };
           return [last({is_active: false, step: 60}), last({is_active: true, step: 100, stage: 'loading'}),
                   last({is_active: true, step: 60, stage: ''}), last({is_active: true, step: 61, stage: ''})]; }"""
    )
    assert lasts == [100, 100, 60, 60]


def test_stop_by_keyboard_asks_first(browser_of, live_platform):
    page = run_page(browser_of("alice"), live_platform)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "stop-button":
            break
    assert page.evaluate("document.activeElement.id") == "stop-button"
    page.keyboard.press("Enter")
    dialog = page.locator("#confirm-dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("Stop sks-face?")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "stop-button"
    assert _status(live_platform, "live") == "running"


def test_stop_is_sent_after_the_question(browser_of, live_platform):
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/runs/")
    page.click("text=product-shots")
    page.click("#stop-button")
    page.click("#confirm-ok")
    expect(page.locator("#run-head .badge")).to_have_text("Stopped")
    expect(page.locator("#resume-button")).to_be_visible()


def test_sample_is_enlarged_in_a_dialog(browser_of, live_platform):
    page = run_page(browser_of("alice"), live_platform, "done")
    page.locator("a[data-sample]").first.click()
    dialog = page.locator("#sample-dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("a photo of sks face on a blue background")
    page.wait_for_function("() => document.querySelector('#sample-dialog img').naturalWidth === 128")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.complaints == []


def test_lora_file_is_downloaded(browser_of, live_platform):
    page = run_page(browser_of("alice"), live_platform, "done")
    with page.expect_download() as download:
        page.locator("[data-part=checkpoints] a[download]").click()
    assert download.value.suggested_filename == "sks-face-first-try.safetensors"
    assert download.value.path().stat().st_size == 4096


def test_stranger_sees_no_run(browser_of, live_platform):
    page = browser_of("bob")
    page.goto(f"{live_platform.address}/runs/{live_platform.rows['live']}/")
    expect(page.locator("h1")).to_have_text("There is nothing here that you may see")
    page.evaluate(
        """(path) => { const socket = new WebSocket(location.origin.replace("http", "ws") + path);
           socket.onclose = (event) => { window.closedWith = event.code; }; }""",
        f"/ws/runs/{live_platform.rows['live']}/",
    )
    page.wait_for_function("() => window.closedWith === 4404")


def _status(live_platform, run):
    with database(live_platform) as rows:
        return rows.execute("SELECT status FROM runs_run WHERE id = ?", [live_platform.rows[run]]).fetchone()[0]
