"""Every page in light and dark, on a desk and on a phone: nothing for the browser to complain of (script errors,
violations of the Content-Security-Policy), nothing wider than the screen, a name for everything that takes input."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium
UNNAMED = """() => {
  const named = (element) => element.labels?.length || element.ariaLabel || element.title
    || element.getAttribute("aria-labelledby") || element.textContent.trim()
    || element.querySelector("img[alt]:not([alt=''])");
  return [...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a[href], summary, dialog")]
    .filter((element) => !element.hidden && !element.closest("[aria-hidden=true]") && !named(element))
    .map((element) => element.outerHTML);
}"""
WITHOUT_ALT = "() => [...document.images].filter((image) => !image.hasAttribute('alt')).map((image) => image.src)"
REPEATED_IDS = """() => { const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  return ids.filter((id, index) => ids.indexOf(id) !== index); }"""
INLINE = "() => document.querySelectorAll('[style], style, script:not([src]), [onclick]').length"
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
PATHS = [
    "/runs/", "/runs/new/", "/runs/{live}/", "/runs/{done}/", "/runs/{failed}/", "/runs/{stopped}/delete/",
    "/runs/{live}/share/", "/datasets/", "/datasets/new/", "/datasets/{dataset}/", "/models/", "/models/{base}/",
    "/models/get/", "/account/", "/accounts/password/change/", "/accounts/logout/", "/runs/{stopping}/", "/runs/{out}/",
    "/runs/{unheard}/", "/hosts/", "/hosts/{silent}/declare-dead/",
    "/services/", "/runs/base-config/", "/runs/{done}/config/", "/runs/{done}/config/?stack=kohya",
    "/runs/new/?from={done}", "/runs/compare/choose/",
]  # fmt: skip
SCREENS = [(1280, 900, "light"), (1280, 900, "dark"), (375, 740, "light"), (375, 740, "dark")]


def complaints_of(page, path, live_platform):
    answer = page.goto(live_platform.address + path.format(**live_platform.rows))
    assert answer.status == 200, path
    page.wait_for_load_state("load")
    return {
        "complaints": page.complaints,
        "unnamed": page.evaluate(UNNAMED),
        "without alt": page.evaluate(WITHOUT_ALT),
        "repeated ids": page.evaluate(REPEATED_IDS),
        "too wide by": page.evaluate(OVERFLOW),
    }


NOTHING = {"complaints": [], "unnamed": [], "without alt": [], "repeated ids": [], "too wide by": 0}


@pytest.mark.parametrize(("width", "height", "theme"), SCREENS)
def test_pages_give_no_reason_to_complain(browser_of, live_platform, width, height, theme):
    page = browser_of("alice", width=width, height=height, theme=theme)
    found = {path: complaints_of(page, path, live_platform) for path in PATHS}
    assert found == dict.fromkeys(PATHS, NOTHING)


@pytest.mark.parametrize("width", [320, 375])
def test_phone_shows_the_whole_navigation(browser_of, live_platform, width):
    page = browser_of("alice", width=width, height=740)
    page.goto(live_platform.address + "/runs/")
    nav = page.get_by_role("navigation", name="Main")
    expect(nav.get_by_role("link")).to_have_text(["Runs", "Datasets", "Models", "LoRAs", "Services"])
    for link in nav.get_by_role("link").all():
        box = link.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_phone_keeps_a_long_label_beside_its_box(browser_of, live_platform):
    page = browser_of("alice", width=375, height=740)
    page.goto(f"{live_platform.address}/datasets/{live_platform.rows['dataset']}/captioning/")
    label = page.get_by_text("Begin each caption with the trigger word").bounding_box()
    box = page.get_by_label("Begin each caption with the trigger word").bounding_box()
    assert label["x"] >= box["x"] + box["width"]
    assert abs(label["y"] - box["y"]) < 6


def test_pages_before_sign_in_give_no_reason_to_complain(browser_of, live_platform):
    page = browser_of(None, width=375, height=740)
    paths = ["/accounts/login/", "/accounts/signup/"]
    assert {path: complaints_of(page, path, live_platform) for path in paths} == dict.fromkeys(paths, NOTHING)


def test_templates_carry_no_inline_style_or_script(browser_of, live_platform):
    page = browser_of("alice")
    for path in PATHS:
        markup = page.request.get(live_platform.address + path.format(**live_platform.rows)).text()
        page.set_content("")
        inert = "([markup]) => new DOMParser().parseFromString(markup, 'text/html')"
        count = page.evaluate(f"(markup) => ({INLINE.replace('document', f'({inert})([markup])')})()", markup)
        assert count == 0, path


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_admin_page_of_a_run_shows_the_live_log(browser_of, live_platform, theme):
    live_platform.log.write_text("first line\n")
    page = browser_of("alice", theme=theme)
    page.goto(f"{live_platform.address}/admin/runs/run/{live_platform.rows['live']}/change/")
    lines = page.locator("[data-log-lines] > div")
    expect(lines).to_have_text(["first line"])
    with live_platform.log.open("a") as file:
        file.write("second line\n")
    expect(lines).to_have_text(["first line", "second line"])
    assert page.complaints == []


def test_chosen_theme_stays(browser_of, live_platform):
    page = browser_of("alice")
    page.click("#theme-button")
    page.goto(f"{live_platform.address}/datasets/")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 22)"
    expect(page.locator("#theme-button")).to_have_attribute("aria-label", "Use light colours")


def test_skip_link_leads_past_the_navigation(browser_of, live_platform):
    page = browser_of("alice")
    page.keyboard.press("Tab")
    expect(page.locator(".skip-link")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("main a").first).to_be_focused()


def test_queue_is_refreshed_and_keeps_the_focus(browser_of, live_platform):
    page = browser_of("alice")
    link = page.locator(f"#run-{live_platform.rows['live']}")
    link.focus()
    with page.expect_response(lambda answer: answer.request.headers.get("hx-request") == "true"):
        pass
    page.wait_for_function("() => !document.querySelector('.htmx-swapping, .htmx-settling')")
    expect(link).to_be_focused()


def test_form_proposes_a_name_and_shows_what_is_wrong(browser_of, live_platform):
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/runs/new/")
    page.select_option("[name=dataset]", label="sks face")
    expect(page.locator("[name=output_name]")).to_have_value("sks-face")
    page.select_option("[name=base_model]", label="pilot-tiny")
    expect(page.locator("#preview .notice")).to_be_visible()  # the dataset has no pictures
    page.check("[name=profile][value='']")
    expect(page.locator("[name=rank]")).to_be_visible()
    page.click("text=Start the run")
    expect(page.locator("[role=alert]")).to_be_visible()
    expect(page.locator("[name=dataset] option:checked")).to_have_text("sks face")
