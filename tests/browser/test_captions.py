"""The grid in a real browser: typing, keys from picture to picture, undo, tags, and two people at one caption."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium


@pytest.fixture
def shapes(live_platform, browser_of):
    """shapes(): Alice's page of the dataset `shapes`, which has three pictures."""

    def opened(**screen):
        page = browser_of("alice", **screen)
        rows = page.request.get(f"{live_platform.address}/api/v1/datasets/?name=shapes").json()["results"]
        page.goto(f"{live_platform.address}/datasets/{rows[0]['id']}/")
        page.captions = lambda: [row["caption"] for row in _pictures(page, live_platform, rows[0]["id"])]
        return page

    return opened


def _pictures(page, live_platform, pk):
    return page.request.get(f"{live_platform.address}/api/v1/datasets/{pk}/pictures/").json()["results"]


def fields(page):
    return page.locator("#picture-grid textarea")


def state(page, index):
    return page.locator("#picture-grid .caption-state").nth(index)


def test_caption_is_typed_saved_and_undone_from_the_keyboard(shapes):
    page = shapes()
    first, second = fields(page).nth(0), fields(page).nth(1)
    before = page.captions()
    first.fill("a yellow ball")
    page.keyboard.press("Alt+ArrowDown")  # which leaves the field, and saves it
    expect(second).to_be_focused()
    expect(state(page, 0)).to_have_text("Saved")
    assert page.captions() == ["a yellow ball", *before[1:]]
    page.keyboard.press("Alt+ArrowUp")
    expect(first).to_be_focused()
    page.keyboard.press("Alt+z")
    expect(first).to_have_value(before[0])
    expect(state(page, 0)).to_have_text("Undone")
    assert page.captions() == before
    second.focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-picture]").nth(2)).to_be_focused()
    assert page.complaints == []


def test_caption_that_somebody_else_changed_is_a_choice(shapes):
    mine, theirs = shapes(), shapes()
    before = mine.captions()
    fields(theirs).nth(0).fill("theirs")
    fields(theirs).nth(0).blur()
    expect(state(theirs, 0)).to_have_text("Saved")
    fields(mine).nth(0).fill("mine")
    fields(mine).nth(0).blur()
    expect(state(mine, 0)).to_contain_text("alice changed this caption meanwhile. Yours is not saved yet.")
    expect(state(mine, 0)).to_contain_text("theirs")
    expect(fields(mine).nth(0)).to_have_value("mine")
    assert mine.captions() == ["theirs", *before[1:]]
    mine.get_by_role("button", name="Save mine").click()
    expect(state(mine, 0)).to_have_text("Saved")
    assert mine.captions() == ["mine", *before[1:]]
    fields(theirs).nth(0).fill("theirs again")
    fields(theirs).nth(0).blur()
    theirs.get_by_role("button", name="Take theirs").click()
    expect(fields(theirs).nth(0)).to_have_value("mine")
    for text in ("theirs", before[0]):
        mine.locator("[data-undo]").nth(0).click()
        expect(fields(mine).nth(0)).to_have_value(text)
    assert mine.captions() == before
    assert [text for page in (mine, theirs) for text in page.complaints if "409" not in text] == []


def test_what_was_typed_when_the_page_was_left_comes_back(shapes):
    page = shapes()
    before = page.captions()
    page.evaluate("() => { window.fetch = () => new Promise(() => {}); }")  # the request of the last moment is lost
    fields(page).nth(0).fill("typed a moment ago")
    page.reload()
    expect(fields(page).nth(0)).to_have_value("typed a moment ago")
    expect(state(page, 0)).to_have_text("Saved")
    assert page.captions() == ["typed a moment ago", *before[1:]]
    page.locator("[data-undo]").nth(0).click()
    expect(fields(page).nth(0)).to_have_value(before[0])
    page.reload()  # it is not brought back again
    expect(fields(page).nth(0)).to_have_value(before[0])
    assert page.captions() == before


def test_tags_are_chips_with_proposals(shapes):
    page = shapes(width=390, height=740)
    before = page.captions()
    page.get_by_role("button", name="Tags").click()
    entry = page.locator("[data-tag-input]").nth(0)
    entry.press_sequentially("dis")
    proposal = page.get_by_role("option", name="sks disc")
    expect(proposal).to_be_visible()
    entry.press("ArrowDown")
    entry.press("Enter")
    expect(page.locator(".chips").nth(0).locator("li")).to_have_count(2)
    expect(state(page, 0)).to_have_text("Saved")
    assert page.captions() == [f"{before[0]}, {before[1]}", *before[1:]]
    page.get_by_role("button", name="Remove sks disc").nth(0).click()
    expect(state(page, 0)).to_have_text("Saved")
    page.wait_for_function("() => !document.querySelector('.htmx-request')")
    assert page.captions() == before
    page.get_by_role("button", name="Sentences").click()
    expect(fields(page).nth(0)).to_have_value(before[0])
    assert page.complaints == []


def test_many_are_selected_previewed_changed_and_undone(shapes):
    page = shapes()
    before = page.captions()
    boxes = page.locator("[data-select]")
    boxes.nth(0).click()
    boxes.nth(2).click(modifiers=["Shift"])
    expect(page.locator("#selected-count")).to_have_text("3 ticked")
    boxes.nth(1).click()
    page.locator("#bulk > summary").click()
    page.fill("[name=text]", "big")
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#bulk-result h3")).to_have_text("2 of 2 captions change")
    assert page.captions() == before
    page.get_by_role("button", name="Change 2 captions").click()
    expect(page.locator("#messages")).to_have_text("2 captions changed. Undo")
    assert page.captions() == [f"{before[0]}, big", before[1], f"{before[2]}, big"]
    page.locator("#messages button").click()
    expect(page.locator("#messages")).to_have_text("2 captions back.")
    assert page.captions() == before
    assert page.complaints == []
