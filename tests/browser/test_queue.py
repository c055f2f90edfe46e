"""What people do to the queue, to runs and to hosts, with and without scripts."""

from __future__ import annotations

import sqlite3

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium
NAMES = "() => [...document.querySelectorAll('.queue-table .row-link')].map((link) => link.textContent)"


def change(live_platform, statement, *values):
    path = live_platform.log.parents[3] / "lorapilot.sqlite3"
    with sqlite3.connect(path, timeout=20, isolation_level=None) as rows:
        return rows.execute(statement, values).fetchall()


@pytest.fixture
def ordered(live_platform):
    """The ids of order-1, order-2 and order-3, in this order."""
    ids = live_platform.rows["ordered"]
    for place, pk in enumerate(ids, start=1):
        change(live_platform, "UPDATE runs_run SET place = ?, priority = -1, held_at = NULL WHERE id = ?", place, pk)
    return ids


def order(page):
    return [name for name in page.evaluate(NAMES) if name.startswith("order-")]


def wait_for_order(page, *numbers):
    names = [f"order-{number}" for number in numbers]
    page.wait_for_function(f"(names) => JSON.stringify(({NAMES})().filter((n) => names.includes(n))) === "
                           "JSON.stringify(names)", arg=names)  # fmt: skip


def test_run_is_moved_by_keyboard_in_place(browser_of, live_platform, ordered):
    first, second, _ = ordered
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/runs/")
    page.locator(f"#down-{first}").focus()
    page.keyboard.press("Enter")
    wait_for_order(page, 2, 1, 3)
    expect(page.locator("#queue-announcer")).to_contain_text("order-1 is number")
    expect(page.locator(f"#down-{first}")).to_be_focused()
    page.keyboard.press("Enter")
    wait_for_order(page, 2, 3, 1)
    expect(page.locator(f"#down-{first}")).to_be_focused()  # it is at its end, and keeps the focus
    page.click(f"#last-{second}")
    wait_for_order(page, 3, 1, 2)
    assert page.complaints == []


def test_run_is_held_and_given_priority_in_place(browser_of, live_platform, ordered):
    page, third = browser_of("alice"), ordered[2]
    page.goto(f"{live_platform.address}/runs/")
    page.click(f"#priority-{third}-1")
    expect(page.locator(f"#priority-{third}-1")).to_have_attribute("aria-pressed", "true")
    wait_for_order(page, 3, 1, 2)
    page.click(f"#hold-{third}")
    expect(page.locator(f"#queued-{third} .badge")).to_have_text("Held")
    page.click(f"#hold-{third}")
    expect(page.locator(f"#queued-{third} .badge")).to_have_count(0)
    assert page.complaints == []


def test_queue_says_what_it_refused(browser_of, live_platform, ordered):
    page, first = browser_of("alice"), ordered[0]
    page.goto(f"{live_platform.address}/runs/")
    page.evaluate(f"document.querySelector('#last-{first}').value = 'sideways'")
    page.click(f"#last-{first}")
    expect(page.locator("#messages")).to_have_text("Move it up, down, first or last.")
    assert order(page) == ["order-1", "order-2", "order-3"]


def test_queue_works_without_scripts(chromium, live_platform, ordered):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{live_platform.address}/accounts/login/")
    page.fill("[name=login]", "alice")
    page.fill("[name=password]", "alice-password")
    page.click("main button")
    page.click(f"#up-{ordered[1]}")
    expect(page.locator(".queue-table .row-link").filter(has_text="order-")).to_have_text(
        ["order-2", "order-1", "order-3"]
    )
    page.click(f"#priority-{ordered[0]}-0")
    expect(page.locator(f"#priority-{ordered[0]}-0")).to_have_attribute("aria-pressed", "true")
    context.close()


def test_run_is_paused_and_released_on_its_page(browser_of, live_platform):
    page, run = browser_of("alice"), live_platform.rows["trains"]
    page.goto(f"{live_platform.address}/runs/{run}/")
    expect(page.locator("[data-log]")).to_have_attribute("data-state", "live")
    page.click("#pause-button")
    badge = page.locator("#run-head .badge")
    expect(badge).to_have_text("Pausing")
    expect(page.locator("#stop-notice")).to_contain_text("held in the queue until it is released")
    back_in_queue = "status = 'queued', slot_id = NULL, attempt = 2, stop_intent = '', held_at = '2026-01-01'"
    facts = f"{back_in_queue}, reason = 'Paused. It goes on from step 60.', revision = revision + 1"
    change(live_platform, f"UPDATE runs_run SET {facts} WHERE id = ?", run)
    expect(badge).to_have_text("Paused")
    expect(page.locator("[data-figure=attempt]")).to_have_text("2")
    page.click("#hold-button")
    expect(badge).to_have_text("Queued")
    expect(page.locator("#wait-place")).to_contain_text("in the queue")
    assert page.complaints == []


def test_silent_host_is_told_while_the_page_is_open(browser_of, live_platform):
    page, run = browser_of("alice"), live_platform.rows["stopping"]
    page.goto(f"{live_platform.address}/runs/{run}/")
    expect(page.locator("[data-countdown]")).to_contain_text("left")
    expect(page.locator("#run-head")).not_to_contain_text("Nothing is heard of")
    lost = "UPDATE runs_host SET lost_at = ? WHERE id = ?"
    change(live_platform, lost, "2026-01-01", live_platform.rows["draining"])
    change(live_platform, "UPDATE runs_run SET revision = revision + 1 WHERE id = ?", run)
    expect(page.locator("#run-head")).to_contain_text("Nothing is heard of gpu-1")
    expect(page.locator("#run-announcer")).to_contain_text("Nothing is heard of its host.")
    change(live_platform, lost, None, live_platform.rows["draining"])
    change(live_platform, "UPDATE runs_run SET revision = revision + 1 WHERE id = ?", run)
    expect(page.locator("#run-head")).not_to_contain_text("Nothing is heard of")


def test_end_now_asks_first_and_says_what_is_lost(browser_of, live_platform):
    page, run = browser_of("alice"), live_platform.rows["stopping"]
    page.goto(f"{live_platform.address}/runs/{run}/")
    page.click("#kill-button")
    expect(page.locator("#confirm-question")).to_have_text("End stopping-slowly now?")
    expect(page.locator("#confirm-detail")).to_contain_text("steps 201 to 240 will be trained again")
    page.keyboard.press("Escape")
    assert change(live_platform, "SELECT kill_requested_at FROM runs_run WHERE id = ?", run) == [(None,)]


def test_many_runs_are_submitted_at_once(browser_of, live_platform):
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/runs/new/")
    page.select_option("[name=dataset]", label="shapes")
    page.select_option("[name=base_model]", label="pilot-tiny")
    page.fill("[name=output_name]", "many")
    page.click("#variations summary")
    page.check("[name=vary_profile][value=quick_test]")
    page.fill("[name=vary_rank]", "2, x")
    expect(page.locator("#preview .notice")).to_contain_text("Write whole numbers with commas between them.")
    page.fill("[name=vary_rank]", "2, 4")
    page.fill("[name=vary_seed]", "1, 2")
    expect(page.locator("#preview .names .mono")).to_have_text(
        ["many-quick-test-r2-s1", "many-quick-test-r2-s2", "many-quick-test-r4-s1", "many-quick-test-r4-s2"]
    )
    page.click("text=Start 4 runs")
    page.wait_for_url("**/runs/")
    expect(page.locator("#messages")).to_have_text("4 runs are in the queue.")
    assert next(name for name in page.evaluate(NAMES) if name.startswith("many")) == "many-quick-test-r2-s1"
    assert page.complaints == []
    change(live_platform, "UPDATE runs_run SET held_at = '2026-01-01' WHERE output_name LIKE 'many-%'")


def test_hosts_are_changed_in_place_by_staff(browser_of, live_platform):
    page, host = browser_of("alice"), live_platform.rows["draining"]
    page.goto(f"{live_platform.address}/hosts/")
    page.click(f"#host-{host}-details summary")
    button = page.locator(f"#host-{host} tbody tr").first.get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_contain_text("Enable")
    expect(button).to_be_focused()
    expect(page.locator(f"#host-{host}-details")).to_have_attribute("open", "")
    expect(page.locator("#messages")).to_have_text("gpu-1/gpu0 takes no more runs.")
    button.click()
    expect(button).to_contain_text("Disable")
    assert page.complaints == []
    page = browser_of("bob")
    page.goto(f"{live_platform.address}/hosts/")
    expect(page.locator("main button")).to_have_count(0)
    expect(page.locator(f"#host-{host} tbody tr").first).to_contain_text("a run of another user")
