"""What a reader sees in a browser: notebooks run in JupyterLab, their widgets used; and the site.

A JupyterLab is started on a free port of this machine, with settings of its own, and a Chromium
without a window. Copies in out/browser/ are run by Run > Run All Cells; the notebooks in nbs/ and
the user's own Jupyter settings are not touched. The site is made anew (`make site`) and read page
by page. Screenshots go to out/browser/*.png. Ends with `N passed, M failed`; the exit status is 1
when any failed, 2 where something is to be installed first.
"""
from __future__ import annotations  # without playwright, its names stand in type hints only

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
import site_test

try:
    from playwright.sync_api import Error as BrowserError
    from playwright.sync_api import Locator, Page, expect, sync_playwright
except ImportError:
    sync_playwright = None

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
OUT = ROOT / "out" / "browser"  # emptied at the start
# What is run, and what the copy's parameters cell says instead, so that it takes a minute.
NOTEBOOKS = {
    "03_train": dict(steps=20, n_items=40, out_dir="out/browser/run"),
    "explore": dict(),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
WIDE, HIGH = 1280, 1000  # pixels of the browser's page
WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget, model = panel?.content?.model;
  const dialog = document.querySelector('.jp-Dialog-content')?.innerText ?? '';
  if (!model?.cells || !panel.sessionContext) return {kernel: 'none', cells: [], dialog};
  const cells = Array.from({length: model.cells.length}, (_, i) => {
    const cell = model.cells.get(i), source = cell.sharedModel.getSource().trim();
    const found = {mimes: [], html: '', error: ''};
    for (let k = 0; k < (cell.outputs?.length ?? 0); k++) {
      const output = cell.outputs.get(k), json = output.toJSON();
      found.mimes.push(...Object.keys(output.data));
      found.html += output.data['text/html'] ?? '';
      if (output.type === 'error') found.error = json.ename + ': ' + json.evalue;
    }
    return {code: cell.type === 'code' && source !== '', ran: cell.executionCount > 0,
            line: source.split('\\n')[0], ...found};
  });
  return {kernel: panel.sessionContext.session?.kernel?.status ?? 'none', cells, dialog};
}"""
# An element's text and images.
SEEN = r"e => [e.innerText, ...[...e.querySelectorAll('img')].map(image => image.src)].join('\n')"
SHUT_DOWN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"
SHOW = """async i => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = i;
  await notebook.scrollToItem(i, 'start');
  const output = notebook.widgets[i].outputArea.node;
  const fits = output.offsetHeight < notebook.node.offsetHeight;
  output.scrollIntoView({block: fits ? 'center' : 'start'});
}"""


class TestError(Exception):
    """A check that failed, with the reason as its text."""


# The server ---------------------------------------------------------------------------------------

def environment(folder: Path) -> dict[str, str]:
    "This environment, with all that Jupyter and IPython read or write of the user's in `folder`"
    own = {name: value for name, value in os.environ.items()
           if not name.startswith(("JUPYTER", "IPYTHON")) and name != "IN_TEST"}
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        own[f"JUPYTER_{name}"] = str(folder / name.lower())
    for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
        own[f"JUPYTERLAB_{name}"] = str(folder / name.lower())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return own | {"IPYTHONDIR": str(folder / "ipython"), "PATH": path, "HF_HUB_OFFLINE": "1"}


def quiet_settings(folder: Path) -> None:
    "Settings of a JupyterLab that asks nobody for news"
    extension = folder / "settings_dir" / "@jupyterlab" / "apputils-extension"
    extension.mkdir(parents=True)
    path = extension / "notification.jupyterlab-settings"
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
    """A JupyterLab on the repository's root, stopped at the end, kernels and all

    Gives its address with `{}` for what to open.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), OUT / "jupyterlab.log"
    options = dict(ip="127.0.0.1", port=port, port_retries=0, open_browser=False, allow_root=True,
                   root_dir=ROOT)
    command = [sys.executable, "-m", "jupyterlab",
               *(f"--ServerApp.{name}={value}" for name, value in options.items()),
               f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with tempfile.TemporaryDirectory() as tmp, open(log, "w") as file:
        quiet_settings(Path(tmp))
        server = subprocess.Popen(command, cwd=ROOT, env=environment(Path(tmp)), stdout=file,
                                  stderr=file)
        try:
            end = time.time() + limit
            while not answers(f"http://127.0.0.1:{port}/api/status?token={token}"):
                if server.poll() is not None or time.time() > end:
                    last = log.read_text()[-1500:]
                    raise TestError(f"JupyterLab did not start within {limit:.0f} s:\n{last}")
                time.sleep(.3)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


# A notebook in the browser ------------------------------------------------------------------------

def with_values(source: str, values: dict) -> str:
    "A parameters cell with other values"
    for name, value in values.items():
        line = f"{name} = {value!r} "
        source, count = re.subn(rf"^{name} *=[^#\n]*", line, source, flags=re.MULTILINE)
        if count != 1:
            raise TestError(f"the parameters cell has no line `{name} = ...`")
    return source


def copy_of(name: str, values: dict) -> Path:
    """A copy without outputs of nbs/NAME.ipynb in out/browser/, as a path relative to the root

    `values` stand in its parameters cell instead of what is there.
    """
    notebook = nbformat.read(NBS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = with_values(cell.source, values)
    path = OUT / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path.relative_to(ROOT)


def title(number: int, cell: dict) -> str:
    "A cell by its number and its first line"
    return f"cell {number} ({cell['line'][:80]})"


class Notebook:
    "A notebook that is open in the browser"

    def __init__(self, page: Page, address: str, path: Path):
        self.page, self.name = page, path.name
        page.goto(address.format(path.as_posix()))
        self.wait(lambda state: state["cells"] and state["kernel"] == "idle", 120,
                  lambda state: f"{self.name}: its kernel is {state['kernel']} after 120 s")
        page.evaluate("window.jupyterapp.shell.collapseLeft()")  # room for the notebook

    def state(self) -> dict:
        "The kernel, what matters of the cells, and the text of a dialog, if there is one"
        return self.page.evaluate(STATE)

    def wait(self, done: Callable[[dict], bool], limit: float, late: Callable[[dict], str]) -> dict:
        """Wait until `done`, and a moment later still `done`

        A dead kernel or a cell's error ends it at once.
        """
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
        dead = state["kernel"] if state["kernel"] in ("dead", "autorestarting") else ""
        # JupyterLab asks only when something is wrong: a kernel died, another changed the file.
        said = " ".join(state["dialog"].split()) or dead
        if said:
            raise TestError(f"{self.name}, {self.at(state)}: {said}")

    @staticmethod
    def at(state: dict) -> str:
        "The first cell that has not run, else the last"
        cells = list(enumerate(state["cells"])) or [(0, dict(line=""))]
        return title(*(unfinished(state) or cells[-1:])[0])

    def menu(self, *names: str) -> None:
        "Click through the menus"
        for name in names:
            self.page.get_by_role("menuitem", name=name, exact=True).click()

    def run_all(self, limit: float) -> dict:
        "Run > Run All Cells, and wait until all have run"
        self.menu("Run", "Run All Cells")
        late = f"not done after {limit:.0f} s (--limit)"
        return self.wait(lambda state: state["kernel"] == "idle" and not unfinished(state), limit,
                         lambda state: f"{self.name}, {self.at(state)}: {late}")

    def show(self, number: int) -> None:
        "Scroll to the output of cell `number`"
        self.page.evaluate(SHOW, number)
        self.page.wait_for_timeout(1500)  # what has come into sight is drawn

    def screenshot(self, number: int, suffix: str = "") -> str:
        "A screenshot of what cell `number` shows"
        self.show(number)
        file = OUT / f"{Path(self.name).stem}{suffix}.png"
        self.page.screenshot(path=file)
        return file.relative_to(ROOT).as_posix()


def unfinished(state: dict) -> list[tuple[int, dict]]:
    "The code cells that have not run, with their numbers"
    cells = enumerate(state["cells"])
    return [(number, cell) for number, cell in cells if cell["code"] and not cell["ran"]]


def with_output(state: dict, mime: str) -> list[int]:
    "The numbers of the cells that show a `mime`"
    return [number for number, cell in enumerate(state["cells"]) if mime in cell["mimes"]]


# Checks -------------------------------------------------------------------------------------------

def run_notebook(page: Page, address: str, name: str, limit: float) -> tuple[Notebook, str]:
    "Open a copy, run all cells, take a screenshot of the last plot; what came out in a few words"
    notebook = Notebook(page, address, copy_of(name, NOTEBOOKS[name]))
    state = notebook.run_all(limit)
    cells = sum(cell["code"] for cell in state["cells"])
    drawn = with_output(state, "image/png")
    if not drawn:
        raise TestError(f"{notebook.name}: no cell shows a plot")
    file = notebook.screenshot(drawn[-1])
    return notebook, f"{cells} code cells, {len(drawn)} with a plot: {file}"


def main_job(notebook: Notebook, limit: float) -> str:
    "What every main job leaves: curves of each step, a table of before and after, a saved student"
    tables = [cell["html"] for cell in notebook.state()["cells"] if "<table" in cell["html"]]
    if not any("before" in table and "after" in table for table in tables):
        raise TestError(f"{notebook.name}: none of its {len(tables)} tables has before and after")
    values = NOTEBOOKS["03_train"]
    folder = ROOT / values["out_dir"]
    steps = len((folder / "history.csv").read_text().splitlines()) - 1
    if steps != values["steps"]:
        raise TestError(f"{notebook.name}: {steps} steps in {folder}/history.csv")
    if not list(folder.glob("student/*.safetensors")):
        raise TestError(f"{notebook.name}: no weights in {folder}/student")
    return f"{steps} steps, {len(tables)} tables, a student in {values['out_dir']}"


def widgets_of(notebook: Notebook) -> Locator:
    "The output that holds the widgets, in sight and drawn"
    cells = with_output(notebook.state(), WIDGET)
    if not cells:
        raise TestError(f"{notebook.name}: no cell shows a widget")
    notebook.show(cells[-1])
    dropdown = notebook.page.locator(".widget-dropdown")
    area = notebook.page.locator(".jp-Cell-outputArea").filter(has=dropdown).last
    expect(area.locator(".widget-text input").last).to_be_visible(timeout=30_000)
    return area


def changed(notebook: Notebook, area: Locator, before: str, what: str, limit: float) -> str:
    "Wait until the widgets' output is another than `before`, and the same a second later"
    end, last = time.time() + limit, before
    while True:
        now = area.evaluate(SEEN)
        if now == last != before:
            notebook.check(notebook.state())
            return now
        if time.time() > end:
            raise TestError(f"{notebook.name}: {what}, and the output did not change within "
                            f"{limit:.0f} s")
        last = now
        notebook.page.wait_for_timeout(1000)


def choose_another(notebook: Notebook, limit: float) -> str:
    "Choose another value in the first drop-down: text and image of the answer change"
    area = widgets_of(notebook)
    before = area.evaluate(SEEN)
    select = area.locator(".widget-dropdown select").first
    old, values = select.input_value(), select.locator("option").all_inner_texts()
    new = next(value for value in reversed(values) if value != old)
    select.select_option(new)
    changed(notebook, area, before, f"{new!r} was chosen instead of {old!r}", limit)
    file = notebook.screenshot(with_output(notebook.state(), WIDGET)[-1], "-widgets")
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
        raise TestError(f"{notebook.name}: the answer to an empty text is {now[-300:]!r}")
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
        except (TestError, site_test.SiteError, BrowserError, OSError) as error:
            self.failed += 1
            print(f"FAILED {name}: {error}", flush=True)
            return None
        self.passed += 1
        said = result[-1] if isinstance(result, tuple) else result
        print(f"ok     {name} ({time.time() - start:.0f} s): {said}", flush=True)
        return result


# The checks of a notebook, after it has run.
AFTER = {
    "03_train": {"curves, a table and a student": main_job},
    "explore": {"another value chosen": choose_another, "an empty caption": empty_caption},
}


def not_run() -> None:
    raise TestError("the notebook did not run")


def test_notebook(page: Page, address: str, name: str, limit: float, report: Report) -> None:
    "All checks of a notebook"
    done = report(f"{name}: Run All Cells", run_notebook, page, address, name, limit)
    for what, check in AFTER[name].items():
        work = (check, done[0], min(limit, 120)) if done else (not_run,)
        report(f"{name}: {what}", *work)
    page.evaluate(SHUT_DOWN)  # a kernel that hangs would slow down what comes next


def test_site(page: Page, report: Report) -> None:
    "All checks of the site"
    if report("site: make site", site_test.build) is None: return
    with site_test.served() as address:
        found = site_test.troubles(page, address)
        for what, check in site_test.CHECKS.items():
            report(f"site: {what}", check, page, address)
        report("site: no trouble", site_test.quiet, found)


def lacking(browser: str | None) -> list[str]:
    "What is to be installed first"
    problems = []
    if not sync_playwright:
        problems.append("the Python package playwright is not in this environment (make setup)")
    if not browser:
        problems.append("no Chromium is in PATH (Debian: apt-get install chromium), or name one: "
                        "--browser /path/to/chrome")
    return problems


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*NOTEBOOKS, "site"], help="this alone")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS",
                        help="for all cells of a notebook (default: %(default)s)")
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None),
                        metavar="PROGRAM", help="a Chromium or Chrome (default: the first of "
                                                f"{', '.join(BROWSERS)} in PATH)")
    return parser.parse_args()


@contextmanager
def new_page(browser: str) -> Iterator[Page]:
    "A page of a browser, which is closed at the end"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        page = chromium.new_page(viewport=dict(width=WIDE, height=HIGH))
        page.set_default_timeout(60_000)
        yield page
        chromium.close()


def main() -> int:
    args = arguments()
    browser = args.browser and shutil.which(args.browser)
    if problems := lacking(browser):
        print("; ".join(problems), file=sys.stderr)
        return 2
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    report = Report()
    try:
        if args.only in (None, "site"):
            with new_page(browser) as page:
                test_site(page, report)
        notebooks = [name for name in NOTEBOOKS if args.only in (None, name)]
        if notebooks:
            with jupyterlab() as address, new_page(browser) as page:
                for name in notebooks:
                    test_notebook(page, address, name, args.limit, report)
    except (TestError, BrowserError) as error:  # of the server or of the browser, not of a check
        report.failed += 1
        print(f"FAILED server or browser: {error}", flush=True)
    print(f"{report.passed} passed, {report.failed} failed")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
