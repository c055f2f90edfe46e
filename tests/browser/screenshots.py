"""The pictures of docs/screenshots/, from a real run: light and dark, at most 150 KB each, as WebP.

python tests/browser/screenshots.py http://127.0.0.1:7878 admin <password> <run id> docs/screenshots
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

MOST_BYTES = 150_000
DESK = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
# (name, path, screen, theme, how much of the page: the screen, or all of it)
SHOTS = [
    ("run-light", "/runs/{run}/", DESK, "light", "all"),
    ("run-dark", "/runs/{run}/", DESK, "dark", "all"),
    ("run-phone", "/runs/{run}/", PHONE, "light", "screen"),
    ("runs", "/runs/", DESK, "light", "screen"),
    ("hosts", "/hosts/", DESK, "light", "screen"),
    ("new-run", "/runs/new/?dataset={dataset}&base_model={model}", DESK, "dark", "screen"),
    ("dataset", "/datasets/{dataset}/", DESK, "light", "screen"),
    ("models", "/models/", DESK, "dark", "screen"),
    ("quality", "/datasets/{dataset}/quality/", DESK, "light", "screen"),
    ("configuration", "/runs/{run}/config/?stack=kohya", DESK, "dark", "screen"),
]


def main(address: str, user: str, password: str, run: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, place, screen, theme, extent in SHOTS:
            context = browser.new_context(viewport=screen, color_scheme=theme, reduced_motion="reduce")
            page = context.new_page()
            sign_in(page, address, user, password)
            page.goto(address + place.format(run=run, **inputs_of(page, address, run)))
            settle(page)
            save(page.screenshot(full_page=extent == "all"), out / f"{name}.webp")
            context.close()
        browser.close()


def sign_in(page: Page, address: str, user: str, password: str) -> None:
    page.goto(f"{address}/accounts/login/")
    page.fill("[name=login]", user)
    page.fill("[name=password]", password)
    page.click("main button")
    page.wait_for_url("**/runs/")


def inputs_of(page: Page, address: str, run: str) -> dict[str, str]:
    """The ids of the run's dataset and base model, from the links on its page."""
    page.goto(f"{address}/runs/{run}/")
    links = {
        kind: page.locator(f"main a[href^='/{kind}/']").first.get_attribute("href") for kind in ("datasets", "models")
    }
    return {"dataset": links["datasets"].split("/")[2], "model": links["models"].split("/")[2]}


def settle(page: Page) -> None:
    """Pictures loaded, the curve drawn, the log at its end, the preview answered."""
    page.wait_for_function("() => [...document.images].every((image) => image.complete || image.loading === 'lazy')")
    if page.locator("[data-log]").count():
        page.wait_for_selector("[data-log-lines] > div")
        page.wait_for_function("() => document.querySelector('[data-loss-chart]').lossChart.points.length > 0")
    if page.locator("#preview").count():
        page.wait_for_selector("#preview .stats")
    page.wait_for_timeout(800)


def save(png: bytes, path: Path) -> None:
    """In the best quality that fits."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for quality in (90, 80, 70, 60, 50):
        picture.save(path, "WEBP", quality=quality, method=6)
        if path.stat().st_size < MOST_BYTES:
            return
    raise SystemExit(f"{path} is larger than {MOST_BYTES:,} bytes in every quality.")


if __name__ == "__main__":
    main(*sys.argv[1:])
