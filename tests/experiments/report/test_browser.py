"""The page is to be seen, without a network and on a phone."""

import shutil

import pytest

from experiments.report import paper


def test_the_page_loads_nothing(full, page):
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, key, value in page.attributes:
        if key == "src":
            assert value.startswith("data:image/png;base64,")
        elif key == "href":
            assert tag == "a"
            assert value == paper.URL or value.startswith(("#", "report/"))
        else:
            assert "://" not in (value or "")
    text = (full.directory / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text


@pytest.fixture(scope="module")
def browser(full, tmp_path_factory):
    """Chromium without a window, with the full page loaded."""
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver_path = shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--disable-dev-shm-usage"
    ).split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_path)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.get((full.directory / "report.html").as_uri())
        yield driver
    finally:
        driver.quit()


def resize(browser, width, height, is_phone):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return innerWidth") == width


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "is_phone"), [(1200, 900, False), (360, 740, True)])
def test_figures_and_tables_are_to_be_seen(browser, page, width, height, is_phone):
    resize(browser, width, height, is_phone)
    assert browser.get_log("browser") == []
    assert browser.title == "SASG: the paper’s evaluation, redone"
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(x => x.name.slice(0, 20))"
    )
    assert [name for name in loaded if not name.startswith("data:")] == []
    browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
    images = browser.execute_script(
        "return [...document.images].map(x => [x.complete, x.naturalWidth, x.clientWidth, x.alt])"
    )
    assert len(images) == page.tags.count("img")
    for complete, natural, shown, alt in images:
        assert complete
        assert natural > 600
        assert 250 < shown <= width
        assert len(alt) > 20
    tables = browser.execute_script(
        "return [...document.querySelectorAll('table')].map(x => {"
        " const box = x.getBoundingClientRect(), outer = x.parentElement.getBoundingClientRect();"
        " return [box.width, box.height, outer.left, outer.right, x.checkVisibility()]})"
    )
    assert len(tables) == page.tags.count("table")
    for table_width, table_height, left, right, visible in tables:
        assert visible
        assert table_width > 200
        assert table_height > 40
        assert 0 <= left < right <= width


@pytest.mark.browser
def test_the_page_does_not_scroll_sideways_on_a_phone(browser):
    resize(browser, 360, 740, True)
    browser.execute_script("document.querySelectorAll('details').forEach(x => x.open = true)")
    scroll_width = browser.execute_script("return document.documentElement.scrollWidth")
    assert scroll_width <= browser.execute_script("return innerWidth") == 360
    sizes = browser.execute_script(
        "return [...document.body.querySelectorAll('*')].filter(x => x.checkVisibility() &&"
        " [...x.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))"
        ".map(x => parseFloat(getComputedStyle(x).fontSize))"
    )
    assert min(sizes) >= 12.5
