"""Quality, cropping and versions in a real browser: nothing to complain of; a part chosen by mouse and by keyboard."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.test_pages import NOTHING, complaints_of

pytestmark = pytest.mark.chromium


@pytest.fixture
def shapes(browser_of, live_platform):
    """Ids of a dataset with real pictures: (dataset, its first picture)."""
    page = browser_of("alice")
    found = page.request.get(f"{live_platform.address}/api/v1/datasets/?name=shapes").json()["results"][0]
    pictures = page.request.get(f"{live_platform.address}/api/v1/datasets/{found['id']}/pictures/").json()["results"]
    return found["id"], pictures[0]["id"]


@pytest.mark.parametrize(("width", "theme"), [(1280, "dark"), (375, "light")])
def test_pages_give_no_reason_to_complain(browser_of, live_platform, shapes, width, theme):
    dataset, picture = shapes
    page = browser_of("alice", width=width, height=800, theme=theme)
    paths = [
        f"/datasets/{dataset}/quality/?resolution=128",
        f"/datasets/{dataset}/pictures/{picture}/edit/",
        f"/datasets/{dataset}/versions/",
        f"/datasets/{live_platform.rows['dataset']}/versions/compare/?from=1",
        f"/datasets/{live_platform.rows['dataset']}/versions/1/restore/",
        f"/runs/of-picture/{dataset}/{picture}/",
        f"/runs/of-picture/{dataset}/{picture}/destroy/",
    ]
    assert {path: complaints_of(page, path, live_platform) for path in paths} == dict.fromkeys(paths, NOTHING)


def test_part_is_chosen_by_mouse_and_by_keyboard_and_undone(browser_of, live_platform, shapes):
    dataset, picture = shapes
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/datasets/{dataset}/pictures/{picture}/edit/")
    area = page.locator("#crop-area")
    width, height = int(area.get_attribute("data-width")), int(area.get_attribute("data-height"))
    box = area.bounding_box()
    image = page.locator(".crop-frame img").bounding_box()
    assert (round(box["width"]), round(box["height"])) == (round(image["width"]), round(image["height"]))
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] + 50)  # it ends at the edge
    page.mouse.up()
    fields = {name: int(page.input_value(f"[name={name}]")) for name in ("left", "top", "width", "height")}
    assert abs(fields["left"] - width / 4) <= 1
    assert abs(fields["width"] - width / 2) <= 1
    assert fields["top"] + fields["height"] == height
    page.fill("#crop-form [name=left]", "0")
    page.fill("#crop-form [name=width]", str(width // 2))
    assert f"M0 {fields['top']}h{width // 2}" in area.locator("path").get_attribute("d")
    page.keyboard.press("Enter")
    expect(page.locator("#messages")).to_contain_text("Saved. The file that you uploaded is kept.")
    expect(page.locator(".page-head")).to_contain_text(
        f"{width // 2}×{fields['height']}, uploaded with {width}×{height}"
    )
    page.get_by_role("button", name="As it was uploaded").click()
    expect(page.locator("#messages")).to_contain_text("As you uploaded it.")
    assert page.complaints == []


def test_quality_page_begins_the_check_by_itself(browser_of, live_platform, shapes):
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/datasets/{shapes[0]}/quality/?resolution=128")
    expect(page.locator("#quality-check")).to_contain_text("Checking the files")
    assert page.complaints == []


def test_versions_name_their_runs_and_one_is_kept_by_hand(browser_of, live_platform, shapes):
    page = browser_of("alice", width=375, height=800)
    page.goto(f"{live_platform.address}/datasets/{live_platform.rows['dataset']}/versions/")
    expect(page.locator("[id^=runs-of-version-] a").first).to_be_visible()
    page.goto(f"{live_platform.address}/datasets/{shapes[0]}/versions/")
    page.get_by_role("button", name="Keep a version now").click()
    expect(page.locator("#messages")).to_contain_text("version 1")
    page.get_by_role("button", name="Keep a version now").click()
    expect(page.locator("#messages")).to_contain_text("The dataset is the same as version 1")
    assert page.complaints == []
