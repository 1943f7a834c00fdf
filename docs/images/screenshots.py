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
        for button in page.locator("scalar-card .expand-button").all():  # else the fourth run is below the edge
            button.click()
        keep(page, "dashboard.png", 1000)
        page.goto("about:blank")
        page.goto(charts)
        page.locator("path.area").first.wait_for()
        # Where the logs lie on this machine is nobody's affair.
        page.locator("#data-location, .data-location").first.evaluate("e => e.textContent = 'runs'")
        keep(page, "dashboard_charts.png", 1000)
        browser.close()
    finally:
        server.terminate()
