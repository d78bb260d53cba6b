"""The page in headless Chromium: phone and desktop, light and dark. Skipped without Playwright or a Chromium."""

import shutil

import pytest

from qcft import api
from qcft.events import Watch
from qcft.files import read_json, write_json
from qcft.recipe import recipe_from

from .helpers.runs import seal_again

sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '<script>document.title = "owned"</script><img src="https://example.org/x" onerror="document.title=1">'

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture
def reports(made, raw_recipe):
    """One run's page and one of two arms, with an answer that would run a script; made once."""
    runs = made / "runs"
    if not runs.exists():
        for name, freeze in (("one", "none"), ("two", "first:2")):
            api.run(recipe_from({**raw_recipe, "name": name}, {"phase2.freeze": freeze}), runs=runs)
        file = runs / ".steps" / read_json(runs / "one" / "run.json")["stages"]["eval/phase2"] / "answers.json"
        answers = read_json(file)
        answers[0]["text"] = EVIL + " x" * 300
        write_json(file, answers)
        seal_again(file.parent)
        api.report(["one"], runs, Watch(), made / "single")
        api.report(["one", "two"], runs, Watch(), made / "arms")
    return made


@pytest.mark.parametrize("kind", ["single", "arms"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_keeps_to_itself_and_can_be_read(browser, reports, kind, width, scheme, tmp_path):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = (reports / kind / "report.html").as_uri()
    page.goto(address)
    assert said == []
    assert asked == [address]
    assert page.title().endswith("· qcft")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Nothing sticks out of the page but inside a box that scrolls.
    out = page.evaluate(
        """width => [...document.querySelectorAll('main *, header *')].filter(element =>
        !element.closest('.scroll, pre, svg, .desk') && element.getBoundingClientRect().right > width + 1
    ).map(element => element.tagName + '.' + element.className)""",
        width,
    )
    assert out == []
    # Nothing hides its last rows, and only tables that are wider than the page say so.
    heights = page.evaluate(
        "[...document.querySelectorAll('.scroll, pre, p, h3')].map(e => e.scrollHeight - e.clientHeight)"
    )
    assert max(heights) <= 1
    tables = page.evaluate("""[...document.querySelectorAll('.scroll')].map(box => [
        box.scrollWidth > box.clientWidth, box.querySelector('.wide').clientWidth > 0
    ])""")
    assert all(wider == says for wider, says in tables)
    assert {wider for wider, _ in tables} == ({True, False} if width == 390 else {False})
    # Each plot is there once, as wide as the page or as a phone's.
    plots = page.locator("figure svg:visible")
    assert plots.count() == page.locator("figure:has(svg)").count() >= 4
    widths = plots.evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert min(widths) > 0.85 * width
    whole = page.locator(".answers details").first
    assert not whole.locator("p").is_visible()
    whole.locator("summary").click()
    assert whole.locator("p").is_visible()
    assert contrast(page, "body", "body") > 7
    assert contrast(page, ".note", "body") > 4.5
    assert contrast(page, "svg text", "body", "fill") > 7
    assert EVIL in page.locator(".answers").first.inner_text()
    page.screenshot(path=tmp_path / f"{kind}-{width}-{scheme}.png", full_page=True)
    context.close()


def contrast(page, on, under, what="color"):
    """WCAG's contrast of an element's colour against another's background."""
    front = page.locator(on).first.evaluate(f"e => getComputedStyle(e).{what}")
    back = page.locator(under).first.evaluate("e => getComputedStyle(e).backgroundColor")

    def luminance(colour):
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
