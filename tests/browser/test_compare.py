"""Runs beside each other, in a browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium
CHART = "document.querySelector('[data-compared-chart]').comparedChart"


def compared(page, live_platform, *names, **more):
    asked = [f"run={live_platform.rows[name]}" for name in names] + [f"{key}={value}" for key, value in more.items()]
    page.goto(f"{live_platform.address}/runs/compare/?{'&'.join(asked)}")
    return page


def test_ticked_runs_are_compared(browser_of, live_platform):
    page = browser_of("alice")
    done, again = live_platform.rows["done"], live_platform.rows["again"]
    bar = page.locator(".compare-bar")
    expect(bar).to_be_hidden()
    page.check(f"#compare-{done}")
    page.check(f"#compare-{again}")
    with page.expect_response(lambda answer: answer.url.endswith("/runs/") and answer.request.resource_type == "xhr"):
        pass  # the list comes anew; what is ticked stays so
    page.wait_for_function("() => !document.querySelector('.htmx-request')")
    expect(page.locator(f"#compare-{done}")).to_be_checked()
    page.click("#compare-button")
    page.wait_for_url(f"**/runs/compare/?run={again}&run={done}")
    expect(page.locator("h1")).to_have_text("2 runs beside each other")
    assert page.complaints == []


def test_curves_lie_over_each_other(browser_of, live_platform):
    page = compared(browser_of("alice"), live_platform, "done", "again")
    lines = f"() => {CHART}.chart.data.datasets.map((one) => [one.label, one.data.length, one.borderDash.length])"
    assert page.evaluate(lines) == [["sks-face-first-try", 320, 0], ["sks-face-rank-8", 320, 2]]
    assert page.evaluate(f"() => new Set({CHART}.chart.data.datasets.map((one) => one.borderColor)).size") == 2
    ends = f"() => {CHART}.chart.data.datasets.map((one) => Math.round(one.data.at(-1).x))"
    assert page.evaluate(ends) == [320, 320]
    page.select_option("#axis", "time")
    assert page.evaluate(ends) == [128, 175]  # seconds
    page.locator("#smoothing").fill("0")
    measured = f"() => {CHART}.chart.data.datasets[0].data[9].y === {CHART}.runs[0].points[9][1]"
    assert page.evaluate(measured)
    page.get_by_label("sks-face-rank-8", exact=True).uncheck()
    assert page.evaluate(f"() => {CHART}.chart.data.datasets.map((one) => one.hidden)") == [False, True]
    colour = page.evaluate(f"() => {CHART}.chart.data.datasets[0].borderColor")
    page.click("#theme-button")
    assert page.evaluate(f"() => {CHART}.chart.data.datasets[0].borderColor") != colour
    assert page.complaints == []


def test_settings_that_are_the_same_are_shown_on_demand(browser_of, live_platform):
    page = compared(browser_of("alice"), live_platform, "done", "again")
    expect(page.locator("#setting-rank")).to_be_visible()
    expect(page.locator("#setting-steps")).to_be_hidden()
    page.locator("#show-all").focus()
    page.keyboard.press("Space")
    expect(page.locator("#setting-steps")).to_be_visible()
    assert page.complaints == []


def test_samples_are_those_up_to_the_chosen_step(browser_of, live_platform):
    page = compared(browser_of("alice"), live_platform, "done", "again")
    first = page.locator(".compare-samples tbody tr").first
    expect(first.locator("td")).to_have_text(["step 320", "step 320"])
    page.select_option("#step", "160")
    expect(first.locator("td")).to_have_text(["before training", "step 160"])
    loaded = "(picture) => picture.decode().then(() => picture.naturalWidth)"
    assert first.locator("img").last.evaluate(loaded) == 128
    first.locator("a").last.click()
    dialog = page.locator("#sample-dialog")
    expect(dialog).to_be_visible()
    expect(dialog.locator("h2")).to_have_text("sks-face-rank-8 · step 160 · seed 1")
    assert page.complaints == []


def test_samples_are_of_the_step_in_the_address(browser_of, live_platform):
    page = compared(browser_of("alice"), live_platform, "done", "again", step=0)
    expect(page.locator("#step")).to_have_value("0")
    cells = page.locator(".compare-samples tbody tr").first.locator("td")
    expect(cells).to_have_text(["before training", "before training"])


def test_phone_scrolls_the_tables_and_not_the_page(browser_of, live_platform):
    page = browser_of("alice", width=390, height=844)
    compared(page, live_platform, "done", "again", "live", "failed", "stopped", "out")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.get_by_role("group", name="Figures")
    label = box.locator("tbody th").first
    left = label.bounding_box()["x"]
    box.evaluate("(box) => { box.scrollLeft = 300; }")
    assert box.evaluate("(box) => box.scrollLeft") == 300
    assert label.bounding_box()["x"] == left
    assert page.complaints == []


def test_form_with_changes_begins_as_a_copy(browser_of, live_platform):
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/runs/{live_platform.rows['again']}/")
    page.click("#clone-button")
    expect(page.locator("#id_output_name")).to_have_value("sks-face-rank-8-2")
    expect(page.locator("#id_rank")).to_have_value("8")
    expect(page.locator("#preview")).to_contain_text("8 / 8")
    page.fill("#id_rank", "12")
    page.keyboard.press("Tab")
    expect(page.locator("#preview")).to_contain_text("12 / 8")
    assert page.complaints == []
