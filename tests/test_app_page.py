"""The page in headless Chromium: what a visitor does, and that the browser has nothing to complain about."""

import os
import re

import pytest
from app_process import chromium, random_adapters, running_app

BROWSER = chromium()
NEEDED = "needs Chromium (apt-get install chromium) and the packages of `install.sh app,dev`"
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
if not BROWSER or sync_playwright is None:
    if os.environ.get("CI"):
        pytest.fail(f"the page's tests {NEEDED}", pytrace=False)
    pytest.skip(NEEDED, allow_module_level=True)

COLUMNS = ("Base model", "SFT", "DPO", "TKPO")
SLOW = 60_000  # milliseconds
# Gradio's client may log this when it closes the stream of events after the last one.
STREAM_CLOSED = "AbortError: signal is aborted without reason"
# `busy` becomes the board's states in their order; three short outlines may be written between two looks.
WATCH_BUSY = """() => {
  const state = () => document.querySelector("#board .board").ariaBusy;
  window.busy = [state()];
  new MutationObserver(() => { if (state() !== busy.at(-1)) busy.push(state()); })
    .observe(document.querySelector("#board"), { childList: true, subtree: true, attributes: true });
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    adapters = random_adapters(tmp_path_factory.mktemp("adapters"))
    folder = tmp_path_factory.mktemp("app")
    with running_app(folder, "--dtype", "float32", "--adapters", *adapters, "--per-minute", "0") as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, address):
    """visit(**context options) → a page; at the end no console error, no failed script, no foreign request."""
    contexts, faults = [], []

    def open_page(fragment="", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **options})
        context.set_default_timeout(SLOW)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: faults.append(m.text) if _is_fault(m) else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        foreign = re.compile(rf"^(?!{re.escape(address)}|data:|blob:|about:)")
        page.on("request", lambda r: faults.append(f"foreign: {r.url}") if foreign.match(r.url) else None)
        page.goto(address + fragment)
        expect(page.locator("#run")).to_be_visible(timeout=SLOW)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def _is_fault(message) -> bool:
    return message.type == "error" and not message.text.startswith(STREAM_CLOSED)


def topic_field(page):
    return page.locator("#compare-topic input, #compare-topic textarea")


def write(page, topic="Why bread rises", style=None):
    topic_field(page).fill(topic)
    if style:
        page.get_by_role("radio", name=re.compile(style)).first.check()
    page.get_by_role("button", name="Write the outlines").click()


def sheets(page):
    return page.locator("#board .sheet")


def set_length(page, length):
    page.get_by_role("button", name="Style strength, language").first.click()
    field = page.locator("#compare-length input[type=number]")
    field.fill(str(length))
    field.blur()


def test_a_visitor_writes_four_outlines_and_looks_at_all_tabs(visit):
    page = visit()
    expect(sheets(page)).to_have_count(4)
    page.evaluate(WATCH_BUSY)
    write(page, style="Objective")
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
    expect(page.locator("#status")).to_contain_text("Done in")
    expect(page.locator("#board .board")).to_have_attribute("aria-busy", "false")
    assert page.evaluate("busy") == ["false", "true", "false"]
    for i, name in enumerate(COLUMNS):
        sheet = sheets(page).nth(i)
        expect(sheet.locator("h3")).to_have_text(name)
        expect(sheet.locator(".verdict")).to_contain_text(re.compile("reads as|repeats itself"))
        expect(sheet.locator(".facts li")).to_have_count(4)
    for name, there in (
        ("Compare styles", "#styles-run"),
        ("Token preferences", "#preferences-run"),
        ("Paper", ".published"),
        ("Compare methods", "#run"),
    ):
        page.get_by_role("tab", name=name).click()
        expect(page.locator(there).first).to_be_visible(timeout=SLOW)


def test_outlines_stream_and_stop_at_once(visit):
    page = visit()
    set_length(page, 384)
    write(page)
    body = sheets(page).nth(0).locator(".outline")
    expect(body).not_to_contain_text("reading the prompt", timeout=SLOW)
    early = len(body.inner_text())
    page.wait_for_function("n => document.querySelector('#board .outline').innerText.length > n", arg=early)
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped after", timeout=5_000)
    stopped = body.inner_text()
    page.wait_for_timeout(700)
    assert body.inner_text() == stopped and stopped
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#run")).to_be_enabled()


def test_copy_download_and_link(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    write(page, "Salt & <b>pepper</b>", style="Concise")
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
    page.get_by_role("button", name="Copy: DPO").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#board .actions").nth(2).get_attribute("data-text")
    with page.expect_download() as event:
        page.get_by_role("button", name="Download: TKPO").click()
    assert event.value.suggested_filename == "salt-b-pepper-b-concise-tkpo.md"
    saved = event.value.path().read_text(encoding="utf-8")
    assert saved.startswith("# Salt & <b>pepper</b>\n")
    page.get_by_role("button", name="Copy link to this query").click()
    page.wait_for_function("location.hash.length > 1")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url


def test_a_link_fills_in_the_whole_query(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    article = "海绵城市如何应对内涝。\n" * 150
    page.get_by_role("button", name="Article (optional)").first.click()
    page.locator("#compare-article textarea").fill(article)
    topic_field(page).fill("Zürich & 海")
    page.get_by_role("radio", name=re.compile("Comprehensive")).first.check()
    page.get_by_role("button", name="Copy link to this query").click()
    page.wait_for_function("location.hash.length > 1")
    fragment = "/" + page.evaluate("location.hash")
    assert len(fragment) < 1000, "an article is deflated"
    other = visit(fragment)
    expect(topic_field(other)).to_have_value("Zürich & 海", timeout=SLOW)
    expect(other.get_by_role("radio", name=re.compile("Comprehensive")).first).to_be_checked()
    other.get_by_role("button", name="Article (optional)").first.click()
    expect(other.locator("#compare-article textarea")).to_have_value(article)


def test_tokens_open_from_a_column_and_by_keyboard(visit):
    page = visit()
    write(page, "Salt")
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
    text = page.locator("#board .actions").nth(3).get_attribute("data-text")
    page.get_by_role("button", name="See its tokens: TKPO").click()
    expect(page.locator(".token").first).to_be_visible(timeout=SLOW)
    expect(page.locator("#preferences-outline textarea")).to_have_value(text)
    panel = page.locator(".token-panel")
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(panel).to_contain_text("token 2 of")
    expect(panel.locator("tbody").nth(1).locator("tr")).to_have_count(11)
    expect(panel).to_contain_text("r = ")
    page.keyboard.press("ArrowLeft")
    expect(panel).to_contain_text("token 1 of")


@pytest.mark.parametrize(
    ("topic", "message"),
    [("", "nothing to outline"), ("x" * 201, "201 characters; at most 200")],
)
def test_a_bad_topic_is_explained_where_it_was_asked(visit, topic, message):
    page = visit()
    write(page, topic)
    expect(page.locator("#status [role=alert]")).to_contain_text(message, timeout=SLOW)
    expect(page.locator("#run")).to_be_enabled()


def test_script_in_any_field_stays_text(visit):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page = visit()
    page.get_by_role("button", name="Article (optional)").first.click()
    page.locator("#compare-article textarea").fill(evil * 3)
    write(page, evil)
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
    page.get_by_role("tab", name="Token preferences").click()
    page.locator("#preferences-topic input, #preferences-topic textarea").fill(evil)
    page.locator("#preferences-outline textarea").fill(f"1. {evil}")
    page.locator("#preferences-run").click()
    expect(page.locator(".token").first).to_be_visible(timeout=SLOW)
    page.locator(".token").nth(5).click()
    assert page.locator("#board img, #tokens img, #board script, #tokens script").count() == 0


def test_a_dropped_file_becomes_the_article_and_a_binary_one_is_refused(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Article (optional)").first.click()
    (tmp_path / "good.md").write_text("The night the bridge fell.", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\x7fELF" + bytes(range(256)) * 4)
    page.locator("#compare-file input[type=file]").set_input_files(tmp_path / "good.md")
    expect(page.locator("#compare-article textarea")).to_have_value("The night the bridge fell.", timeout=SLOW)
    page.locator("#compare-file input[type=file]").set_input_files(tmp_path / "bad.txt")
    alert = page.locator("[role=alert]").first
    expect(alert).to_contain_text("bad.txt is not a text file", timeout=SLOW)
    expect(page.locator("#compare-article textarea")).to_have_value("The night the bridge fell.")


def test_the_page_speaks_chinese_and_keeps_what_was_written(visit):
    page = visit()
    write(page, "Salt")
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
    before = page.locator("#board .actions").nth(0).get_attribute("data-text")
    page.get_by_role("radio", name="中文").first.check()
    expect(page.locator("#run")).to_have_text("写提纲", timeout=SLOW)
    expect(page.get_by_role("tab", name="词元偏好")).to_be_visible()
    expect(sheets(page).nth(0).locator(".verdict")).to_contain_text(re.compile("读来像|自我重复"))
    assert page.locator("#board .actions").nth(0).get_attribute("data-text") == before


def test_a_chinese_browser_gets_a_chinese_page(visit):
    expect(visit(locale="zh-CN").locator("#run")).to_have_text("写提纲", timeout=SLOW)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1920])
def test_nothing_is_wider_than_the_screen_and_all_text_has_contrast(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 800}, color_scheme=scheme)
    write(page, "Salt")
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tops = [box["y"] for box in (sheets(page).nth(i).bounding_box() for i in range(4))]
    assert (len(set(tops)) == 4) == (width == 375), "columns stand side by side, on a phone one below the other"
    low = page.evaluate(CONTRAST)
    assert low == [], "WCAG AA asks for a contrast of 4.5"


# Elements with text of their own whose colour is too near the first opaque background behind them.
CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const low = [];
  for (const e of document.querySelectorAll(".gradio-container *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (e.closest("button:disabled, style, script")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${e.tagName}.${e.className} “${e.textContent.trim().slice(0, 30)}” ${ratio.toFixed(2)}`);
  }
  return low;
}"""


def test_every_field_has_a_name_and_the_keyboard_reaches_the_button(visit):
    page = visit()
    nameless = page.evaluate(
        """() => {
        const named = (e) => e.labels?.length || e.ariaLabel || e.hasAttribute("aria-labelledby") ||
          e.textContent.trim() || e.title;
        return [...document.querySelectorAll("input, textarea, button")]
          .filter((e) => e.checkVisibility() && e.type !== "file" && !named(e)).map((e) => e.outerHTML.slice(0, 120));
        }"""
    )
    assert nameless == []
    topic_field(page).fill("Salt")
    topic_field(page).focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "run":
            break
    assert page.evaluate("document.activeElement.id") == "run"
    page.keyboard.press("Enter")
    expect(page.locator("#board .actions")).to_have_count(4, timeout=SLOW)
