"""What a reader of the site sees in a browser: the checks of out/site that browser_test.py runs."""
from __future__ import annotations  # without playwright, its names stand in type hints only

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

try:
    from playwright.sync_api import Page
except ImportError:
    Page = None

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SITE = ROOT / "out" / "site"
SHOTS = ROOT / "out" / "browser"
RESULTS = "paper"  # the folder of nbs/ with the results
WORD = "placebo"  # to search for

# What came into sight of a page: plots, tables, and the formulas that the browser lays out as such.
SHOWN = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const tall = element => element.getBoundingClientRect().height > 10;
  return {
    plots: all('.cell_output img').filter(image => image.naturalWidth > 0 && tall(image)).length,
    lost: all('img').filter(image => image.naturalWidth === 0).map(image => image.src),
    tables: all('.cell_output table').filter(tall).length,
    formulas: all('article math[display=block]').filter(
      math => tall(math) && getComputedStyle(math).display === 'block math').length,
    prose: all('article p, article li, article td').map(element => element.innerText).join('\\n'),
    width: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
}"""


class SiteError(Exception):
    """A check that failed, with the reason as its text."""


def expect(holds: bool, reason: str) -> None:
    if not holds: raise SiteError(reason)


# Building and serving -----------------------------------------------------------------------------

def build() -> str:
    "Make the site anew, as `make site` does; its last line says how many pages"
    command = ["make", "--no-print-directory", "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expect(done.returncode == 0, f"make site failed:\n{done.stderr.strip()[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


class Handler(SimpleHTTPRequestHandler):
    "Serves files and says nothing"

    def log_message(self, *args) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    "The address of a server of the site on this machine, stopped at the end"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def troubles(page: Page, address: str) -> list[str]:
    "A list that fills with what goes wrong on pages to come: errors, requests that fail or leave"
    found = []

    def request(request) -> None:
        if not request.url.startswith((address, "data:")): found.append(f"asked for {request.url}")

    def failure(request) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving a page before its icon has come
            found.append(f"{request.failure}: {request.url}")

    def response(response) -> None:
        if response.status >= 400: found.append(f"{response.status} for {response.url}")

    def console(message) -> None:
        if message.type in ("error", "warning"): found.append(message.text)

    page.on("request", request)
    page.on("response", response)
    page.on("requestfailed", failure)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", console)
    return found


# What there is to see -----------------------------------------------------------------------------

def notebooks() -> dict[str, dict]:
    "Every notebook by the name of its page, such as paper/table1"
    found = {}
    for path in sorted(NBS.rglob("*.ipynb")):
        name = path.relative_to(NBS).with_suffix("").as_posix()
        if "/." not in f"/{name}":  # Jupyter's checkpoints
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def prose(notebook: dict) -> str:
    "The Markdown of a notebook"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def stored(notebook: dict) -> tuple[int, int]:
    "How many plots and how many tables of pandas a notebook has as outputs"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    html = ["".join(data["text/html"]) for data in shown if "text/html" in data]
    plots = [data for data in shown if "text/html" not in data
             and any(mime.startswith("image/") for mime in data)]
    return len(plots), sum(text.count("<table") for text in html)


# Checks -------------------------------------------------------------------------------------------

def start_page(page: Page, address: str) -> str:
    "The first group of the navigation are the results, and every notebook is in it"
    page.goto(address)
    captions = page.locator(".sidebar-tree .caption").all_text_contents()
    expect(captions[:1] == ["Results"], f"the navigation begins with {captions[:1]}")
    hrefs = "links => links.map(link => link.href.split('#')[0])"
    links = page.locator(".sidebar-tree a").evaluate_all(hrefs)
    missing = [name for name in notebooks()
               if name != "index" and f"{address}{name}.html" not in links]
    expect(not missing, f"not in the navigation: {', '.join(missing)}")
    heading = page.locator("article h1").first.inner_text()
    page.screenshot(path=SHOTS / "site-start.png")
    return f"{heading!r}, {len(links)} links: out/browser/site-start.png"


def every_page(page: Page, address: str) -> str:
    "Each notebook's plots and tables are shown, and no page is wider than the window"
    plots = tables = 0
    for name, notebook in notebooks().items():
        page.goto(f"{address}{name}.html")
        shown = page.evaluate(SHOWN)
        here = stored(notebook)
        expect(any(here) or not name.startswith(f"{RESULTS}/"), f"{name} has no plot and no table")
        expect(not shown["lost"], f"{name}: images that are not shown: {shown['lost']}")
        expect(shown["plots"] == here[0], f"{name}: {shown['plots']} of {here[0]} plots are shown")
        expect(shown["tables"] >= here[1], f"{name}: {shown['tables']} of {here[1]} tables shown")
        expect(shown["width"] <= 0, f"{name} is {shown['width']} pixels wider than the window")
        plots, tables = plots + here[0], tables + here[1]
    return f"{len(notebooks())} pages, {plots} plots, {tables} tables"


def result_page(page: Page, address: str) -> str:
    "A result: its table and its plot, the code behind a button"
    name = next(name for name, notebook in notebooks().items()
                if name.startswith(RESULTS + "/") and min(stored(notebook)) > 0)
    page.goto(f"{address}{name}.html")
    code = page.locator(".cell_input, .cell details.hide pre").first
    expect(not code.is_visible(), f"{name}: the code is in sight before it is asked for")
    page.locator("details.hide summary").first.click()
    opened = page.locator("details.hide[open] pre").first
    expect(opened.is_visible(), f"{name}: the button shows no code")
    plot = page.locator(".cell_output img").first
    plot.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "site-result.png")
    return f"{name}: out/browser/site-result.png"


def formulas(page: Page, address: str) -> str:
    "Formulas are laid out by the browser; no TeX is left in the prose"
    pages = {name: prose(notebook).count("$$") // 2 for name, notebook in notebooks().items()}
    pages = {name: count for name, count in pages.items() if count}
    expect(bool(pages), "no notebook has a formula between $$")
    for name, count in pages.items():
        page.goto(f"{address}{name}.html")
        shown = page.evaluate(SHOWN)
        drawn = shown["formulas"]
        expect(drawn == count, f"{name}: {drawn} of {count} formulas are shown")
        raw = re.search(r".*(\$\$|\\[a-z]+\{).*", shown["prose"])
        expect(raw is None, f"{name}: TeX in the prose: {raw and raw[0]}")
    page.locator("math[display=block]").first.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "site-formula.png")
    return f"{sum(pages.values())} on {len(pages)} pages: out/browser/site-formula.png"


def search(page: Page, address: str) -> str:
    "The search finds pages that have the word"
    page.goto(address)
    page.locator("input.sidebar-search").fill(WORD)
    page.keyboard.press("Enter")
    page.locator("ul.search li a").first.wait_for(timeout=20_000)
    page.wait_for_load_state("networkidle")
    hits = page.locator("ul.search li a").all_inner_texts()
    page.screenshot(path=SHOTS / "site-search.png")
    page.locator("ul.search li a").first.click()
    found = page.locator("article").inner_text()
    expect(WORD in found.lower(), f"the first page found, {hits[0]!r}, does not have {WORD!r}")
    return f"{WORD!r} is on {len(hits)} pages, the first {hits[0]!r}: out/browser/site-search.png"


CHECKS = {"start page": start_page, "every plot and table": every_page, "a result": result_page,
          "formulas": formulas, "search": search}


def quiet(found: list[str]) -> str:
    "Nothing went wrong on the way"
    expect(not found, "\n".join(dict.fromkeys(found)))
    return "no error, no failed request, nothing asked from outside"
