"""Run notebooks as a reader does: in JupyterLab, in a browser, by Run > Run All Cells; and use the widgets.

A JupyterLab is started on a free port of this machine, with settings of its own, and a Chromium without a window. They run copies in
out/browser/; the notebooks in nbs/ and the user's own Jupyter settings are not touched. Pictures of what was seen go to out/browser/*.png.
Ends with `N passed, M failed`; the exit status is 1 when any failed, 2 where something is to be installed first.
"""
from __future__ import annotations  # where playwright is missing, its names stand in type hints only

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

try:
    from playwright.sync_api import Error as BrowserError
    from playwright.sync_api import Locator, Page, expect, sync_playwright
except ImportError:
    sync_playwright = None

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
OUT = ROOT / "out" / "browser"  # emptied at the start
NOTEBOOKS = {  # name -> what its copy's parameters cell says instead, so that it takes a minute
    "03_train": dict(steps=20, n_items=40, out_dir="out/browser/run"),
    "explore": dict(),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
WIDE, HIGH = 1280, 1000  # pixels of the browser's page
WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget, model = panel?.content?.model;
  const dialog = document.querySelector('.jp-Dialog-content')?.innerText ?? '';
  if (!model?.cells || !panel.sessionContext) return {kernel: 'none', cells: [], dialog};
  const cells = Array.from({length: model.cells.length}, (_, i) => {
    const cell = model.cells.get(i), source = cell.sharedModel.getSource().trim(), found = {mimes: [], error: ''};
    for (let k = 0; k < (cell.outputs?.length ?? 0); k++) {
      const output = cell.outputs.get(k);
      found.mimes.push(...Object.keys(output.data));
      if (output.type === 'error') { const e = output.toJSON(); found.error = e.ename + ': ' + e.evalue; }
    }
    return {code: cell.type === 'code' && source !== '', ran: cell.executionCount > 0, line: source.split('\\n')[0], ...found};
  });
  return {kernel: panel.sessionContext.session?.kernel?.status ?? 'none', cells, dialog};
}"""
SEEN = r"e => [e.innerText, ...[...e.querySelectorAll('img')].map(image => image.src)].join('\n')"  # an element's text and pictures
SHUT_DOWN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"
SHOW = """async i => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = i;
  await notebook.scrollToItem(i, 'start');
  const output = notebook.widgets[i].outputArea.node;
  output.scrollIntoView({block: output.offsetHeight < notebook.node.offsetHeight ? 'center' : 'start'});
}"""


class TestError(Exception):
    """A check that failed, with the reason as its text."""


# The server ----------------------------------------------------------------------------------------------------------

def environment(folder: Path) -> dict[str, str]:
    "This environment, with all that Jupyter and IPython read or write of the user's in `folder`"
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON")) and k != "IN_TEST"}
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        own[f"JUPYTER_{name}"] = str(folder / name.lower())
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        own[f"JUPYTERLAB_{name}"] = str(folder / name.lower())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return own | {"IPYTHONDIR": str(folder / "ipython"), "PATH": path, "HF_HUB_OFFLINE": "1"}


def quiet_settings(folder: Path) -> None:
    "Settings of a JupyterLab that asks nobody for news"
    path = folder / "settings_dir" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(fetchNews="false", checkForUpdates=False)))


def answers(url: str) -> bool:
    "Does a server answer at `url`?"
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


@contextmanager
def jupyterlab(limit: float = 120) -> Iterator[str]:
    "A JupyterLab on the repository's root; gives its address with `{}` for what to open. Stopped at the end, kernels and all"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, log = secrets.token_hex(16), OUT / "jupyterlab.log"
    options = dict(ip="127.0.0.1", port=port, port_retries=0, open_browser=False, allow_root=True, root_dir=ROOT)
    command = [sys.executable, "-m", "jupyterlab", *(f"--ServerApp.{k}={v}" for k, v in options.items()),
               f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with tempfile.TemporaryDirectory() as tmp, open(log, "w") as file:
        quiet_settings(Path(tmp))
        server = subprocess.Popen(command, cwd=ROOT, env=environment(Path(tmp)), stdout=file, stderr=file)
        try:
            end = time.time() + limit
            while not answers(f"http://127.0.0.1:{port}/api/status?token={token}"):
                if server.poll() is not None or time.time() > end:
                    raise TestError(f"JupyterLab did not start within {limit:.0f} s; its last words:\n{log.read_text()[-1500:]}")
                time.sleep(.3)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


# A notebook in the browser -------------------------------------------------------------------------------------------

def copy_of(name: str, parameters: dict) -> Path:
    "A copy without outputs of nbs/NAME.ipynb in out/browser/, with other values in its parameters cell; relative to the root"
    nb = nbformat.read(NBS / f"{name}.ipynb", as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            for key, value in parameters.items():
                cell.source, n = re.subn(rf"^{key} *=[^#\n]*", f"{key} = {value!r} ", cell.source, flags=re.MULTILINE)
                if n != 1:
                    raise TestError(f"{name}.ipynb has no parameter {key}")
    path = OUT / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path.relative_to(ROOT)


def title(number: int, cell: dict) -> str:
    "A cell by its number and its first line"
    return f"cell {number} ({cell['line'][:80]})"


class Notebook:
    "A notebook that is open in the browser"

    def __init__(self, page: Page, address: str, path: Path):
        self.page, self.name = page, path.name
        page.goto(address.format(path.as_posix()))
        self.wait(lambda s: s["cells"] and s["kernel"] == "idle", 120, lambda s: f"{self.name}: its kernel is {s['kernel']} after 120 s")
        page.evaluate("window.jupyterapp.shell.collapseLeft()")  # room for the notebook

    def state(self) -> dict:
        "The kernel, what matters of the cells, and the text of a dialog, if there is one"
        return self.page.evaluate(STATE)

    def wait(self, done: Callable[[dict], bool], limit: float, late: Callable[[dict], str]) -> dict:
        "Wait until `done`, and a moment later still `done`; a dead kernel or a cell's error ends it at once"
        end, before = time.time() + limit, False
        while True:
            state = self.state()
            self.check(state)
            now = bool(done(state))
            if now and before:
                return state
            if time.time() > end:
                raise TestError(late(state))
            before = now
            time.sleep(.5)

    def check(self, state: dict) -> None:
        "Fail if a cell holds an error, the kernel died or a dialog is open"
        for number, cell in enumerate(state["cells"]):
            if cell["error"]:
                raise TestError(f"{self.name}, {title(number, cell)}: {cell['error'][:300]}")
        said = " ".join(state["dialog"].split()) or state["kernel"] * (state["kernel"] in ("dead", "autorestarting"))
        if said:  # JupyterLab asks only when something is wrong: a kernel that died, a file changed by another
            raise TestError(f"{self.name}, {self.at(state)}: {said}")

    @staticmethod
    def at(state: dict) -> str:
        "The first cell that has not run, else the last"
        number, cell = next(iter(unfinished(state)), (len(state["cells"]) - 1, (state["cells"] or [dict(line="")])[-1]))
        return title(number, cell)

    def menu(self, *names: str) -> None:
        "Click through the menus"
        for name in names:
            self.page.get_by_role("menuitem", name=name, exact=True).click()

    def run_all(self, limit: float) -> dict:
        "Run > Run All Cells, and wait until all have run"
        self.menu("Run", "Run All Cells")
        return self.wait(lambda s: s["kernel"] == "idle" and not unfinished(s), limit,
                         lambda s: f"{self.name}, {self.at(s)}: not done after {limit:.0f} s (--limit)")

    def show(self, number: int) -> None:
        "Scroll to the output of cell `number`"
        self.page.evaluate(SHOW, number)
        self.page.wait_for_timeout(1500)  # what has come into sight is drawn

    def picture(self, number: int, suffix: str = "") -> str:
        "A screenshot of what cell `number` shows"
        self.show(number)
        file = OUT / f"{Path(self.name).stem}{suffix}.png"
        self.page.screenshot(path=file)
        return file.relative_to(ROOT).as_posix()


def unfinished(state: dict) -> list[tuple[int, dict]]:
    "The code cells that have not run, with their numbers"
    return [(i, c) for i, c in enumerate(state["cells"]) if c["code"] and not c["ran"]]


def with_output(state: dict, mime: str) -> list[int]:
    "The numbers of the cells that show a `mime`"
    return [i for i, c in enumerate(state["cells"]) if mime in c["mimes"]]


# Checks --------------------------------------------------------------------------------------------------------------

def run_notebook(page: Page, address: str, name: str, limit: float) -> tuple[Notebook, str]:
    "Open a copy, run all cells, take a picture of the last one drawn; what came out in a few words"
    notebook = Notebook(page, address, copy_of(name, NOTEBOOKS[name]))
    state = notebook.run_all(limit)
    cells, drawn = sum(c["code"] for c in state["cells"]), with_output(state, "image/png")
    if not drawn:
        raise TestError(f"{notebook.name}: no cell shows a picture")
    return notebook, f"{cells} code cells, {len(drawn)} with a picture: {notebook.picture(drawn[-1])}"


def widgets_of(notebook: Notebook) -> Locator:
    "The output that holds the widgets, in sight and drawn"
    cells = with_output(notebook.state(), WIDGET)
    if not cells:
        raise TestError(f"{notebook.name}: no cell shows a widget")
    notebook.show(cells[-1])
    area = notebook.page.locator(".jp-Cell-outputArea").filter(has=notebook.page.locator(".widget-dropdown")).last
    expect(area.locator(".widget-text input").last).to_be_visible(timeout=30_000)
    return area


def changed(notebook: Notebook, area: Locator, before: str, what: str, limit: float) -> str:
    "Wait until the widgets' output is another than `before`, and still the same a second later"
    end, last = time.time() + limit, before
    while True:
        now = area.evaluate(SEEN)
        if now == last != before:
            notebook.check(notebook.state())
            return now
        if time.time() > end:
            raise TestError(f"{notebook.name}: {what}, and the output did not change within {limit:.0f} s")
        last = now
        notebook.page.wait_for_timeout(1000)


def choose_another(notebook: Notebook, limit: float) -> str:
    "Choose another value in the first drop-down: text and picture of the answer change"
    area = widgets_of(notebook)
    before, select = area.evaluate(SEEN), area.locator(".widget-dropdown select").first
    old, values = select.input_value(), select.locator("option").all_inner_texts()
    new = next(v for v in reversed(values) if v != old)
    select.select_option(new)
    changed(notebook, area, before, f"{new!r} was chosen instead of {old!r}", limit)
    file = notebook.picture(with_output(notebook.state(), WIDGET)[-1], "-widgets")
    return f"{old} -> {new}: {file}"


def empty_caption(notebook: Notebook, limit: float) -> str:
    "Make the last text empty: an answer in words, no traceback; and put it back"
    area = widgets_of(notebook)
    before, text = area.evaluate(SEEN), area.locator(".widget-text input").last
    old = text.input_value()
    text.fill("")
    text.press("Enter")
    now = changed(notebook, area, before, "the last text was emptied", limit)
    words = next((line for line in now.splitlines() if "empty" in line), None)
    if words is None or "Traceback" in now:
        raise TestError(f"{notebook.name}: the answer to an empty text does not say that it is empty: {now[-300:]!r}")
    text.fill(old)
    text.press("Enter")
    changed(notebook, area, now, "the last text was filled again", limit)
    return words


class Report:
    "Counts checks and prints a line for each"

    def __init__(self):
        self.passed = self.failed = 0

    def __call__(self, name: str, work: Callable, *args):
        "What `work(*args)` returns, or None if it failed; its last or only value is what to print"
        start = time.time()
        try:
            result = work(*args)
        except (TestError, BrowserError, OSError) as error:
            self.failed += 1
            print(f"FAILED {name}: {error}", flush=True)
            return None
        self.passed += 1
        said = result[-1] if isinstance(result, tuple) else result
        print(f"ok     {name} ({time.time() - start:.0f} s): {said}", flush=True)
        return result


def test(page: Page, address: str, name: str, limit: float, report: Report) -> None:
    "All checks of a notebook"
    done = report(f"{name}: Run All Cells", run_notebook, page, address, name, limit)
    for what, work in (("another value chosen", choose_another), ("an empty caption", empty_caption)) if name == "explore" else ():
        if done is None:
            report.failed += 1
            print(f"FAILED {name}: {what}: the notebook did not run", flush=True)
        else:
            report(f"{name}: {what}", work, done[0], min(limit, 120))
    page.evaluate(SHUT_DOWN)  # a kernel that hangs would slow down what comes next


def lacking(browser: str | None) -> list[str]:
    "What is to be installed first"
    packages = [] if sync_playwright else ["the Python package playwright is not in this environment (make setup)"]
    programs = [] if browser else ["no Chromium is in PATH (Debian: apt-get install chromium), or name one: --browser /path/to/chrome"]
    return packages + programs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NOTEBOOKS, help="this notebook alone")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for all cells of a notebook (default: %(default)s)")
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None), metavar="PROGRAM",
                        help=f"a Chromium or Chrome (default: the first of {', '.join(BROWSERS)} in PATH)")
    args = parser.parse_args()
    browser = args.browser and shutil.which(args.browser)
    if problems := lacking(browser):
        print("; ".join(problems), file=sys.stderr)
        return 2
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    report = Report()
    try:
        with jupyterlab() as address, sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
            page = chromium.new_page(viewport=dict(width=WIDE, height=HIGH))
            page.set_default_timeout(60_000)
            for name in [args.only] if args.only else NOTEBOOKS:
                test(page, address, name, args.limit, report)
            chromium.close()
    except (TestError, BrowserError) as error:  # of the server or of the browser, not of a check
        report.failed += 1
        print(f"FAILED server or browser: {error}", flush=True)
    print(f"{report.passed} passed, {report.failed} failed")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
