"""The documentation site in a real browser: no page scrolls sideways, and the search works offline."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
PAGES = (
    "docs/index.html",
    "docs/concepts.html",
    "docs/report.html",
    "docs/reference/gputune.html",
    "scripts/examples/table.html",
)
FLAGS = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-sync"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="there is no chromium with its chromedriver on this machine",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, with warnings as errors, and return its address."""
    for extra in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(extra, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs"]
    subprocess.run(
        [*command, "-d", folder / "doctrees", ".", folder / "html"], cwd=ROOT, check=True
    )
    return (folder / "html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.binary_location = CHROMIUM
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_not_scroll_sideways(browser, site, page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"{site}/{page}")
    needed = browser.execute_script("return document.documentElement.scrollWidth")
    assert browser.execute_script("return document.querySelector('h1').textContent")
    assert needed <= width


def test_the_page_about_reports_shows_a_live_report(browser, site):
    browser.get(f"{site}/docs/report.html")
    browser.switch_to.frame(browser.find_element("css selector", "iframe.report"))
    assert browser.execute_script("return document.querySelectorAll('svg').length") > 3
    browser.switch_to.default_content()


def test_search_finds_a_method_without_a_network(browser, site):
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(f"{site}/search.html?q=predict_interval")
    links = "return [...document.querySelectorAll('.search a')].map((link) => link.href)"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(links))
    targets = browser.execute_script(links)
    assert any(target.endswith("#gputune.TunedModel.predict_interval") for target in targets)
