"""dashboard.png and dashboard_charts.png: the dashboard of the main job, as `torchreg dashboard` links to it.

    make demo && .venv/bin/python docs/images/screenshots.py runs

Needs playwright (of the extra `test`) and chromium, as the browser test does: tests/test_browser.py.
"""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent


def keep(page: Page, name: str, height: int) -> None:
    page.wait_for_timeout(3000)  # the charts fade in
    drawn = Image.open(io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, "width": 1500, "height": height})))
    drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


command = [sys.executable, "-m", "torchreg", "dashboard", *sys.argv[1:]]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
    try:
        _, overview, charts = (re.split(r":\s+", server.stdout.readline().strip(), maxsplit=1)[1] for _ in range(3))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.goto(overview)
        page.get_by_label("Close side pane").click()
        page.locator("scalar-card tb-data-table-content-row").first.wait_for()
        # The table of a card shows three runs, and the rest when it is opened. A real click would scroll.
        page.locator("scalar-card .expand-button").evaluate_all("all => all.forEach(e => e.click())")
        keep(page, "dashboard.png", 1040)
        page.goto("about:blank")
        page.goto(charts)
        page.locator("path.area").first.wait_for()
        # Where the logs lie on this machine is nobody's affair.
        page.locator("#data-location").evaluate("e => e.remove()")
        keep(page, "dashboard_charts.png", 1036)
        browser.close()
    finally:
        server.terminate()
