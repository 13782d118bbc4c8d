"""The page in a real browser: no error, brushes and sorting by mouse and keyboard, quick with ten
thousand trials."""

import json
import math
import shutil

import pytest

from gputune.views.scores import order_by_score
from long_numbers import long_numbers, study_of_long_numbers
from made_studies import HOSTILE, hostile_study, made_descent, made_study, study_of

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no chromium with its chromedriver on this machine"
)

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync window-size=1200,1000"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tmp_path):
    def open_page(study):
        study.report(tmp_path / "report.html")
        browser.get((tmp_path / "report.html").as_uri())
        # painted, not only parsed
        browser.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done))"
        )
        assert browser.get_log("browser") == []

    return open_page


@pytest.fixture(scope="module")
def study():
    return made_study(80, halved=True)


def by_score(study):
    """Return the trials in the order of the page's table."""
    return [study.trials[row] for row in order_by_score(study)]


def cells(browser, column):
    rows = "[...document.querySelectorAll('.trials tbody tr')]"
    return browser.execute_script(
        f"return {rows}.map((row) => row.cells[arguments[0]].textContent)", column
    )


def headings(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.trials thead th')].map((th) => th.textContent)"
    )


def kept(browser):
    return browser.execute_script("return document.getElementById('kept').textContent")


def actions(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    return ActionChains(browser)


def drag(browser, axis, low, high):
    """Drag over an axis from one share of its length to another."""
    reach = browser.find_elements("css selector", ".parallel .reach")[axis]
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", reach
    )
    length = reach.rect["height"]
    start, end = (round((0.5 - share) * length) for share in (low, high))
    chain = actions(browser).move_to_element_with_offset(reach, 0, start).click_and_hold()
    chain.move_by_offset(0, end - start).release().perform()


def axis_of(browser, name):
    names = browser.execute_script(
        "return [...document.querySelectorAll('.parallel .axis')].map((a) => a.ariaLabel)"
    )
    return names.index(f"Brush on {name}")


def test_sorting_by_a_click(browser, opened, study):
    opened(study)
    ranking = by_score(study)
    assert cells(browser, 0) == [str(trial.number) for trial in ranking[:25]]
    place = headings(browser).index("width")
    button = browser.find_elements("css selector", ".trials thead button")[place]
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button
    )
    button.click()
    widths = sorted(trial.params["width"] for trial in study.trials)
    assert cells(browser, place) == list(map(str, widths[:25]))
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    button.click()
    assert cells(browser, place) == list(map(str, widths[::-1][:25]))
    score = headings(browser).index("accuracy")
    browser.find_elements("css selector", ".trials thead button")[score].click()
    best_first = sorted((t.score for t in study.trials if math.isfinite(t.score)), reverse=True)
    # a first click shows the best
    assert cells(browser, score) == [f"{value:.4f}" for value in best_first[:25]]
    assert len(browser.find_elements("css selector", ".trials th[aria-sort]")) == 1


def test_sorting_with_the_keyboard_and_turning_pages(browser, opened, study):
    from selenium.webdriver.common.keys import Keys

    opened(study)
    button = browser.find_elements("css selector", ".trials thead button")[0]
    button.send_keys(Keys.ENTER)
    assert cells(browser, 0) == [str(number) for number in range(25)]
    for _ in range(3):
        browser.find_element("id", "after").send_keys(Keys.ENTER)
    assert cells(browser, 0) == [str(number) for number in range(75, 80)]
    assert browser.find_element("id", "place").text == "76 to 80 of 80"
    assert not browser.find_element("id", "after").is_enabled()
    browser.find_element("id", "before").send_keys(Keys.ENTER)
    assert cells(browser, 0) == [str(number) for number in range(50, 75)]


def test_trials_without_a_score_are_last_in_either_order(browser, opened, study):
    opened(study)
    place = headings(browser).index("accuracy")
    for _ in range(2):
        browser.execute_script(
            "document.querySelectorAll('.trials thead button')[arguments[0]].click()", place
        )
        assert "–" not in cells(browser, place)
    for _ in range(3):
        browser.execute_script("document.getElementById('after').click()")
    assert set(cells(browser, place)[-2:]) == {"–"}


def test_brushing_with_the_mouse_keeps_the_trials_that_pass(browser, opened, study):
    opened(study)
    place = axis_of(browser, "lr")
    logs = [math.log(trial.params["lr"]) for trial in study.trials]
    low = min(logs)
    high = max(logs)
    drag(browser, place, 0.3, 0.7)
    brush = browser.find_elements("css selector", ".parallel .brush")[place]
    reach = browser.find_elements("css selector", ".parallel .reach")[place]
    top, length = (float(reach.get_attribute(name)) for name in ("y", "height"))
    upper = 1 - (float(brush.get_attribute("y")) - top) / length
    lower = upper - float(brush.get_attribute("height")) / length
    assert (lower, upper) == pytest.approx((0.3, 0.7), abs=0.02)
    inside = {
        rank
        for rank, trial in enumerate(by_score(study))
        if lower - 0.002 <= (math.log(trial.params["lr"]) - low) / (high - low) <= upper + 0.002
    }
    assert 5 < len(inside) < 75
    assert kept(browser) == f"{len(inside)} of 80 trials are kept."
    lit = browser.execute_script(
        "return [...document.querySelectorAll('.parallel [data-rank]:not(.off)')].map((p) => "
        "Number(p.dataset.rank))"
    )
    assert set(lit) == {rank for rank in inside if math.isfinite(by_score(study)[rank].score)}
    numbers = [str(by_score(study)[rank].number) for rank in sorted(inside)]
    assert cells(browser, 0) == numbers[:25]

    words = axis_of(browser, "activation")  # a second brush: both must hold
    drag(browser, words, 0.9, 1.0)
    (word,) = set(cells(browser, headings(browser).index("activation")))
    both = [rank for rank in inside if by_score(study)[rank].params["activation"] == word]
    assert 0 < len(both) < len(inside) and kept(browser) == f"{len(both)} of 80 trials are kept."
    browser.find_element("id", "release").click()
    assert kept(browser) == "All trials are kept."
    assert not browser.find_element("id", "release").is_displayed()


def test_a_click_on_an_axis_lets_go(browser, opened, study):
    opened(study)
    place = axis_of(browser, "width")
    drag(browser, place, 0.2, 0.5)
    assert kept(browser) != "All trials are kept."
    reach = browser.find_elements("css selector", ".parallel .reach")[place]
    actions(browser).move_to_element(reach).click().perform()
    assert kept(browser) == "All trials are kept."


def test_brushing_with_the_keyboard(browser, opened, study):
    from selenium.webdriver.common.keys import Keys

    opened(study)
    axis = browser.find_elements("css selector", ".parallel .axis")[axis_of(browser, "accuracy")]
    browser.execute_script("arguments[0].focus()", axis)
    actions(browser).send_keys(Keys.ENTER).perform()
    assert axis.get_attribute("aria-valuetext") == "75 to 100 percent of the axis"
    assert "of 80 trials are kept" in kept(browser)
    actions(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    assert axis.get_attribute("aria-valuetext") == "65 to 90 percent of the axis"
    actions(browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_UP).key_up(Keys.SHIFT).perform()
    assert axis.get_attribute("aria-valuetext") == "62 to 93 percent of the axis"
    actions(browser).send_keys(Keys.ESCAPE).perform()
    assert axis.get_attribute("aria-valuetext") == "all" and kept(browser) == "All trials are kept."


def test_every_control_is_reached_with_the_tab_key(browser, opened, study):
    from selenium.webdriver.common.keys import Keys

    opened(study)
    reached = []
    script = (
        "const e = document.activeElement; return e.className.baseVal || e.className || e.id || "
        "e.tagName"
    )
    while len(reached) < 100 and reached[-1:] != ["copy"]:
        actions(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.execute_script(script))
    assert {"skip", "axis", "frame", "after", "copy"} <= set(reached)
    assert reached.count("axis") == len(study.best_params) + 1


def test_pointing_at_a_row_shows_its_line(browser, opened, study):
    opened(study)
    row = browser.find_elements("css selector", ".trials tbody tr")[2]
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", row
    )
    actions(browser).move_to_element(row).perform()
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.parallel .shown')].map((path) => path.dataset.rank)"
    )
    assert shown == ["2"]


@pytest.mark.parametrize("text", HOSTILE[:6])
def test_hostile_text_adds_nothing_and_runs_nothing(browser, opened, text):
    opened(hostile_study("plain"))
    # The number of ticks of a chart depends on the length of its labels.
    script = (
        "const tags = (part) => [...document.querySelectorAll(part)].map((e) => e.tagName);"
        "return [tags('*:not(svg *)'), [...new Set(tags('svg *'))].sort()]"
    )
    plain = browser.execute_script(script)
    opened(hostile_study(text))
    assert browser.execute_script(script) == plain
    assert (
        browser.execute_script("return document.querySelector('h1').textContent")
        == f"Study of {text}"
    )


def test_the_page_asks_the_network_for_nothing(browser, opened, study):
    browser.get_log("performance")
    opened(study)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in sent if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in sent if url.startswith("file:")]) == 1


def test_the_policy_stops_what_is_not_the_pages_own(browser, opened, study):
    opened(study)
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.stranger = 1'; "
        "document.body.append(s)"
    )
    assert browser.execute_script("return window.stranger") is None
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_dark_and_print_have_their_colours(browser, opened, study):
    opened(study)
    back = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(back)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert browser.execute_script(back) != light
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", **dark})
    assert browser.execute_script(back) == "rgb(255, 255, 255)"
    assert (
        browser.execute_script("return getComputedStyle(document.querySelector('nav')).display")
        == "none"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window_and_no_labels_overlap(browser, opened, study, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for shown in (study, made_descent()):
        opened(shown)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OVERLAPS) == []
        hints = browser.execute_script(HINTS)
        assert hints and all(is_shown == is_cut for is_shown, is_cut in hints), hints
        assert any(is_cut for _, is_cut in hints) == (width == 390)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


HINTS = """
return [...document.querySelectorAll('.frame[tabindex]')].map((frame) => {
  const hint = frame.parentElement.querySelector('.hint');
  return [hint !== null && hint.getClientRects().length > 0, frame.scrollWidth > frame.clientWidth + 1];
});
"""

OVERLAPS = """
const found = [];
for (const chart of document.querySelectorAll('svg')) {
  const texts = [...chart.querySelectorAll('text')];
  const boxes = texts.map((text) => text.getBoundingClientRect());
  for (let i = 0; i < texts.length; i += 1) {
    for (let j = 0; j < i; j += 1) {
      const [a, b] = [boxes[i], boxes[j]];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 3) {
        found.push([chart.getAttribute('aria-label'), texts[i].textContent, texts[j].textContent]);
      }
    }
  }
}
return found;
"""


@pytest.mark.parametrize(
    "made",
    [lambda: made_study(0), lambda: made_study(12, waiting=12), lambda: made_study(1)],
    ids=["empty", "waiting", "one"],
)
def test_a_page_with_little_on_it_has_no_error(opened, made):
    opened(made())


def test_of_ten_thousand_trials_few_are_drawn_and_all_answer(browser, opened):
    """A report with as many elements as trials would need seconds for every answer."""
    opened(made_study(10_000, epochs=50))
    drag(browser, axis_of(browser, "lr"), 0.3, 0.7)
    browser.execute_script("document.querySelectorAll('.trials thead button')[5].click()")
    assert "of 10000 trials are kept" in kept(browser)
    assert len(cells(browser, 0)) == 25
    assert browser.execute_script("return document.getElementsByTagName('*').length") < 3000


@pytest.mark.parametrize("width", [1280, pytest.param(800, marks=pytest.mark.long)])
def test_the_first_card_uses_its_full_width(browser, opened, study, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(study)
    free = browser.execute_script(
        "return [...document.querySelectorAll('#headline dl')].map((list) => {"
        "  const edge = list.getBoundingClientRect().right;"
        "  const parts = [...list.children];"
        "  return edge - Math.max(...parts.map((part) => part.getBoundingClientRect().right));"
        "})"
    )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert len(free) > 1 and all(space < 2 for space in free), free


def test_the_script_writes_numbers_as_the_first_rows_have_them(browser, opened):
    values = [1.2345e-5, 0.000123456, 0.25, 123456.7, 1.5e-7]
    opened(study_of([{"lr": value, "width": 64} for value in values]))
    place = headings(browser).index("lr")
    assert sorted(cells(browser, place)) == sorted(
        ["1.234e-5", "0.0001235", "0.25", "123500", "1.5e-7"]
    )


def test_the_script_writes_at_most_four_digits(browser, opened):
    opened(study_of_long_numbers(-12.345678901234567, 12.345678901234567))
    first_rows = browser.execute_script("return document.querySelector('.trials').innerText")
    browser.execute_script("document.querySelector('.trials thead button').click()")
    sorted_rows = browser.execute_script("return document.querySelector('.trials').innerText")
    assert sorted(first_rows.split()) == sorted(sorted_rows.split())
    assert long_numbers(sorted_rows) == []
