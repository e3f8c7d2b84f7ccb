"""The notebooks as a static site, by Sphinx and MyST-NB: `make site` writes out/site/index.html.

Pages show the outputs stored in the notebooks; nothing is executed. The navigation is computed from the
files in nbs/: a page is named by its first heading and stands in the group of its folder. The site asks
for nothing from outside: formulas are MathML, and the search runs in the browser.
"""
import configparser
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib
from bs4 import BeautifulSoup
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
RESULTS = "paper"  # what the pages of this folder show comes first, in the navigation and on the page
START = ("index", "03_train")  # the way in
CAPTIONS = {RESULTS: "Results", "start": "Start", "": "The code, in reading order"}  # then other folders

# Directives of nbdev are the first lines of a cell.
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.MULTILINE)
SILENT = re.compile(r"^\s*#\s*\|\s*echo:\s*false\b", re.MULTILINE)  # the output stays, the code goes
HIDDEN = re.compile(r"^\s*#\s*\|\s*(hide|default_exp)\b", re.MULTILINE)
DOCUMENT = re.compile(r"(?<=\]\()(?=\.\./[^)\s]*\.md\))")  # where the target of a link to a text outside nbs/ begins
SENTENCE = re.compile(r"<t[dh](?=[^>]*>[^<]{40,}<)")  # the beginning of a table's cell with a long text

log = logging.getLogger(__name__)  # a warning fails the build

# Settings of Sphinx --------------------------------------------------------------------------------

package = configparser.ConfigParser()
package.read(ROOT / "settings.ini", encoding="utf-8")
project = package["DEFAULT"]["title"]
author = package["DEFAULT"]["author"]
copyright = package["DEFAULT"]["copyright"]
version = release = package["DEFAULT"]["version"]

extensions = ["myst_nb"]
source_suffix = {".ipynb": "myst-nb"}
exclude_patterns = ["**/.*"]  # Jupyter's checkpoints
html_theme = "furo"
html_title = project
html_static_path = ["site.css", str(Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf"))]
html_css_files = ["site.css"]
html_favicon = "favicon.svg"
html_copy_source = False
html_use_index = False
html_math_renderer = "mathml"
highlight_language = "none"  # of code in prose that names no language: commands and what they print

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js = {}  # they come from outside, and widgets without a kernel do nothing
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False


# Notebooks -----------------------------------------------------------------------------------------

def read(page: str) -> dict:
    "The notebook of a page, such as paper/table1"
    return json.loads((NBS / f"{page}.ipynb").read_text(encoding="utf-8"))


def prose(notebook: dict) -> str:
    "The Markdown of a notebook"
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def mark_sentences(outputs: list[dict]) -> None:
    "Give cells of tables that hold a sentence a class of their own: they may be broken over lines, numbers may not"
    for output in outputs:
        data = output.get("data", {})
        if "text/html" in data:
            data["text/html"] = SENTENCE.sub(r'\g<0> class="sentence"', "".join(data["text/html"]))


def for_readers(cells: list[dict]) -> list[dict]:
    "The cells as the site shows them: without hidden ones and nbdev's directives"
    shown = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            shown.append(cell | dict(source=DOCUMENT.sub("path:", source)))
        elif not HIDDEN.search(source):
            tags = ["remove-input"] if SILENT.search(source) else []
            mark_sentences(cell["outputs"])
            shown.append(cell | dict(source=DIRECTIVE.sub("", source), metadata=dict(tags=tags)))
    return shown


def folded(cells: list[dict]) -> list[dict]:
    "The cells with code out of sight; neighbours become one, so that no row of buttons precedes a table"
    joined = []
    for cell in cells:
        if cell["cell_type"] == "code" and not cell["metadata"]["tags"]:
            cell = cell | dict(metadata=dict(tags=["hide-input"]))
        before = joined[-1] if joined else {}
        if cell["cell_type"] == "code" and before.get("metadata") == cell["metadata"]:
            before["source"] += "\n\n" + cell["source"]
            before["outputs"] += cell["outputs"]
        else:
            joined.append(cell)
    return joined


# Navigation ----------------------------------------------------------------------------------------

def order(pages: set[str]) -> list[str]:
    "Rooms by their numbers, the pages of a folder as the tables of index.ipynb list them, then the others"
    tables = [line for line in prose(read("index")).splitlines() if line.startswith("|")]

    def key(page: str) -> tuple:
        rows = [number for number, line in enumerate(tables) if f"({page}.ipynb)" in line and "/" in page]
        return (rows or [len(tables)])[0], page

    return sorted(pages, key=key)


def groups(pages: set[str]) -> dict[str, list[str]]:
    "The pages of the navigation by caption"
    found = {caption: [] for caption in CAPTIONS.values()}
    found[CAPTIONS["start"]] += START
    for page in order(pages - set(START)):
        folder = page.rpartition("/")[0]
        found.setdefault(CAPTIONS.get(folder, folder.capitalize()), []).append(page)
    return {caption: names for caption, names in found.items() if names}


def entry(page: str) -> str:
    "A line of the navigation: a room with its number, by which other notebooks call it"
    if page == "index":
        return f"{project} <self>"
    number = re.match(r"\d[^_/]*(?=_)", page)
    title = re.search(r"^# +(.+)$", prose(read(page)), re.MULTILINE)
    return f"{number[0]} {title[1]} <{page}>" if number and title else page


def navigation(pages: set[str]) -> dict:
    "The cell that gives the site its navigation"
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(map(entry, names)) + "\n```"
             for caption, names in groups(pages).items()]
    return dict(cell_type="markdown", id="navigation", metadata={}, source="\n\n".join(trees))


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    "Change what Sphinx has read of a notebook, before it is parsed"
    notebook = json.loads(source[0])
    cells = for_readers(notebook["cells"])
    notebook["cells"] = folded(cells) if page.startswith(RESULTS + "/") else cells
    notebook["metadata"]["language_info"] = dict(name="python", pygments_lexer="python")  # nbdev_clean removes it
    if page == app.config.root_doc:
        notebook["cells"].append(navigation(app.env.found_docs))
    source[0] = json.dumps(notebook)


# Formulas ------------------------------------------------------------------------------------------

def mathml(latex: str, display: str) -> str:
    "A formula as MathML; a command that is not known makes the build fail"
    result = convert(latex, display=display)
    if "\\" in re.sub(r"<annotation.*?</annotation>", "", result):
        log.warning("formula not understood: %s", latex)
    return result


def inline_formula(translator, node) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def formula(translator, node) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


# Links ---------------------------------------------------------------------------------------------

def from_outside(soup: BeautifulSoup) -> list[str]:
    "What a page loads that is not part of the site"
    loaded = [tag.get("src") or tag.get("href") or "" for tag in soup(["script", "img", "link", "iframe"])]
    return [address for address in loaded if urlsplit(address).scheme not in ("", "data") or address.startswith("//")]


def missing(soup: BeautifulSoup, page: Path) -> list[str]:
    "The files that a page links to or shows and that are not there"
    targets = [tag.get("href") or tag.get("src") or "" for tag in soup(["a", "img", "script", "link"])]
    paths = [(target, urlsplit(target)) for target in targets]
    return [target for target, parts in paths if not parts.scheme and parts.path
            and not (page.parent / unquote(parts.path)).exists()]


def check_site(app: Sphinx, error: Exception | None) -> None:
    "Hold every page against the files of the site: notebooks' HTML outputs are not seen by Sphinx"
    if error: return
    pages = sorted(Path(app.outdir).rglob("*.html"))
    for page in pages:
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        for address in from_outside(soup):
            log.warning("%s loads %s from outside", page.name, address)
        for target in missing(soup, page):
            log.warning("%s links to %s, which does not exist", page.name, target)
    print(f"{len(app.env.found_docs)} pages: {Path(app.outdir, 'index.html')}")


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.connect("source-read", prepare)
    app.connect("build-finished", check_site)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
