"""The run form with a trainer's own options: they come with the trainer, are searched, and survive a refusal."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium


def choose(page, live_platform, stack="kohya"):
    page.goto(f"{live_platform.address}/runs/new/")
    page.locator("#id_dataset").select_option(index=1)
    page.locator("#id_base_model").select_option(str(live_platform.rows["base"]))
    page.locator("#id_stack").select_option(stack)
    expect(page.locator("#stack-options")).to_be_visible()


def test_options_come_with_the_trainer_and_are_searched(browser_of, live_platform):
    page = browser_of("alice", width=375, height=740)
    choose(page, live_platform)
    page.locator("#stack-options > summary").click()
    page.locator("#option-search").fill("scale_weight")
    shown = page.locator("[data-option]:visible")
    expect(shown).to_have_count(1)
    expect(shown.locator("code")).to_have_text("scale_weight_norms")
    page.locator("#option-search").fill("no such thing")
    expect(page.locator("#option-none")).to_be_visible()
    page.locator("#id_stack").select_option("builtin")
    expect(page.locator("#stack-options")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_configuration_is_read_into_the_form_and_the_run_can_be_started_from_there(browser_of, live_platform):
    page = browser_of("alice")
    choose(page, live_platform)
    page.locator("#configuration > summary").click()
    page.locator("#config-text").fill('network_dim = 24\nscale_weight_norms = 1.5\nwandb_api_key = "x"')
    page.locator("#read-config").click()
    expect(page.locator("#id_rank")).to_have_value("24")
    expect(page.locator("[name='option-scale_weight_norms']")).to_have_value("1.5")
    expect(page.get_by_text("wandb_api_key is left out.")).to_be_visible()
    expect(page.locator("#run-form")).to_have_attribute("action", "/runs/new/")
    assert page.complaints == []
