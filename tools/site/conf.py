"""The notebooks as a static site, by Sphinx and MyST-NB: `make site` writes out/site/index.html.

Pages show the outputs stored in the notebooks; nothing is executed. The navigation is computed from
the files in nbs/: a page is named by its first heading and stands in the group of its folder. The
site asks for nothing from outside: formulas are MathML, and the search runs in the browser.
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
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
RESULTS = "paper"  # the folder whose tables and figures come first, in the navigation and on a page
START = ("index", "03_train")  # the way in
# The groups of the navigation by folder, in this order; other folders follow under their own names.
CAPTIONS = {RESULTS: "Results", "start": "Start", "": "The code, in reading order"}

# Directives of nbdev are the first lines of a cell.
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.MULTILINE)
HIDDEN = re.compile(r"^\s*#\s*\|\s*(hide|default_exp)\b", re.MULTILINE)
SILENT = re.compile(r"^\s*#\s*\|\s*echo:\s*false\b", re.MULTILINE)  # the output stays
# Where the target of a link to a text outside nbs/ begins.
DOCUMENT = re.compile(r"(?<=\]\()(?=\.\./[^)\s]*\.md\))")
# The beginning of a table's cell with a long text.
SENTENCE = re.compile(r"<t[dh](?=[^>]*>[^<]{40,}<)")

log = logging.getLogger(__name__)  # a warning fails the build

# Settings of Sphinx -------------------------------------------------------------------------------

package = configparser.ConfigParser()
package.read(ROOT / "settings.ini", encoding="utf-8")
project = package["DEFAULT"]["title"]
author = package["DEFAULT"]["author"]
copyright = package["DEFAULT"]["copyright"]
version = release = package["DEFAULT"]["version"]

extensions = ["myst_nb"]
source_suffix = {".ipynb": "myst-nb"}
exclude_patterns = ["**/.*"]  # Jupyter's checkpoints
highlight_language = "none"  # of code in prose that names no language: commands, what they print
html_theme = "furo"
html_title = project
html_static_path = ["site.css", str(FONTS / "STIXGeneral.ttf")]
html_css_files = ["site.css"]
html_favicon = "favicon.svg"
html_copy_source = False
html_use_index = False
html_math_renderer = "mathml"

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js = {}  # these come from outside, and widgets without a kernel do nothing
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False


# Notebooks ----------------------------------------------------------------------------------------

def read(page: str) -> dict:
    "The notebook of a page, such as paper/table1"
    return json.loads((NBS / f"{page}.ipynb").read_text(encoding="utf-8"))


def prose(notebook: dict) -> str:
    "The Markdown of a notebook"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def mark_sentences(outputs: list[dict]) -> None:
    "Mark the cells of tables that hold a sentence: they may be broken over lines, numbers may not"
    for output in outputs:
        data = output.get("data", {})
        if "text/html" in data:
            text = "".join(data["text/html"])
            data["text/html"] = SENTENCE.sub(r'\g<0> class="sentence"', text)


def for_readers(cells: list[dict]) -> list[dict]:
    "The cells as the site shows them: without hidden ones and nbdev's directives"
    shown = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            shown.append(cell | dict(source=DOCUMENT.sub("path:", source)))
        elif not HIDDEN.search(source):
            mark_sentences(cell["outputs"])
            tags = ["remove-input"] if SILENT.search(source) else []
            shown.append(cell | dict(source=DIRECTIVE.sub("", source), metadata=dict(tags=tags)))
    return shown


def folded(cells: list[dict]) -> list[dict]:
    "The cells with code out of sight; neighbours become one, lest a row of buttons precede a table"
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


# Navigation ---------------------------------------------------------------------------------------

def order(pages: set[str]) -> list[str]:
    "Rooms by their numbers; pages of a folder as the tables of index.ipynb list them, then others"
    tables = [line for line in prose(read("index")).splitlines() if line.startswith("|")]

    def key(page: str) -> tuple[int, str]:
        rows = [row for row, line in enumerate(tables) if "/" in page and f"({page}.ipynb)" in line]
        return min(rows, default=len(tables)), page

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
    "A line of the navigation; rooms with their numbers, by which other notebooks call them"
    if page == "index": return f"{project} <self>"
    number = re.match(r"\d[^_/]*(?=_)", page)
    title = re.search(r"^# +(.+)$", prose(read(page)), re.MULTILINE)
    return f"{number[0]} {title[1]} <{page}>" if number and title else page


def navigation(pages: set[str]) -> dict:
    "The cell that gives the site its navigation"
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(map(entry, names))
             for caption, names in groups(pages).items()]
    source = "\n```\n\n".join(trees) + "\n```"
    return dict(cell_type="markdown", id="navigation", metadata={}, source=source)


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    "Change what Sphinx has read of a notebook, before it is parsed"
    notebook = json.loads(source[0])
    cells = for_readers(notebook["cells"])
    notebook["cells"] = folded(cells) if page.startswith(f"{RESULTS}/") else cells
    # For the colours of the code; nbdev_clean removes it from the files.
    notebook["metadata"]["language_info"] = dict(name="python", pygments_lexer="python")
    if page == app.config.root_doc:
        notebook["cells"].append(navigation(app.env.found_docs))
    source[0] = json.dumps(notebook)


# Formulas -----------------------------------------------------------------------------------------

def mathml(node: nodes.math | nodes.math_block, display: str) -> str:
    "A formula as MathML; a command or an environment that is not known fails the build"
    result = convert(node.astext(), display=display)
    if re.search(r"\\|>&<", result):
        log.warning("formula not understood: %s", node.astext(), location=node)
    return result


def inline_formula(translator, node: nodes.math) -> None:
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block_formula(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


# Links --------------------------------------------------------------------------------------------

def loaded_from_outside(soup: BeautifulSoup) -> list[str]:
    "What a page loads that is not part of the site"
    tags = soup(["script", "img", "link", "iframe"])
    addresses = [tag.get("src") or tag.get("href") or "" for tag in tags]
    return [address for address in addresses if urlsplit(address).netloc]


def missing(soup: BeautifulSoup, page: Path) -> list[str]:
    "The files that a page links to or shows and that are not there"
    tags = soup(["a", "img", "script", "link"])
    targets = [urlsplit(tag.get("href") or tag.get("src") or "") for tag in tags]
    paths = [unquote(target.path) for target in targets if not target.scheme and not target.netloc]
    return [path for path in paths if path and not (page.parent / path).exists()]


def check_pages(app: Sphinx, error: Exception | None) -> None:
    "Hold every page against the files of the site: Sphinx does not see into the outputs of a cell"
    if error: return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        for address in loaded_from_outside(soup):
            log.warning("%s loads %s from outside", page, address)
        for path in missing(soup, page):
            log.warning("%s links to %s, which does not exist", page, path)
    print(f"{len(app.env.found_docs)} pages: {Path(app.outdir, 'index.html').relative_to(ROOT)}")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))
    app.connect("source-read", prepare)
    app.connect("build-finished", check_pages)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
