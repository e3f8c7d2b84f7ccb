"""Make README.md from nbs/index.ipynb; with --check only say whether it is up to date."""

import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "nbs/index.ipynb"
HEADER = f"<!-- Made from {SOURCE} by `make readme`: edit the notebook. -->\n\n"
# Rich results as GitHub shows them; nbconvert alone would prefer an image, which a README can only
# link to.
FORMATS = ["text/markdown", "text/html", "text/latex", "text/plain"]
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.MULTILINE)
SILENT = re.compile(
    r"^\s*#\s*\|\s*echo:\s*false\b", re.MULTILINE
)  # the output stays, the code goes
HIDDEN = re.compile(r"^\s*#\s*\|\s*(hide|default_exp)\b", re.MULTILINE)
# Code is matched first so that what looks like a link inside it is left alone.
LINK = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|(?P<before>\]\(|\b(?:src|href)=[\"'])(?P<target>[^)\s\"']+)",
    re.DOTALL,
)


class ReadmeError(Exception):
    """Something in the notebook cannot stand in a README."""


def to_root(target: str) -> str:
    "A link as it must read in the repository's root, when `target` is how it reads in nbs/"
    if target.startswith(("#", "/")) or re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
        return target
    path, sharp, fragment = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(SOURCE), path))
    if path.startswith(".."):
        raise ReadmeError(f"{SOURCE}: the link {target!r} leaves the repository")
    if not (ROOT / path).exists():
        raise ReadmeError(f"{SOURCE}: the link {target!r} points to {path}, which does not exist")
    return path + sharp + fragment


def fix_links(markdown: str) -> str:
    "Rewrite the relative links of a markdown text from nbs/ to the root"
    return LINK.sub(lambda m: m["code"] or m["before"] + to_root(m["target"]), markdown)


def prepare(nb):
    "The notebook without hidden cells, directives and style sheets, its links seen from the root"
    cells = []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            cell.source = fix_links(cell.source)
        elif cell.cell_type == "code":
            if HIDDEN.search(cell.source):
                continue
            silent = SILENT.search(cell.source)
            cell.source = DIRECTIVE.sub("", cell.source)
            for out in cell.outputs:
                data = out.get("data", {})
                if any(mime.startswith("image/") for mime in data):
                    raise ReadmeError(
                        f"{SOURCE}: cell {i} shows an image: save it in figures/, link to it"
                    )
                if "text/html" in data:
                    data["text/html"] = re.sub(
                        r"<style.*?</style>\s*", "", data["text/html"], flags=re.DOTALL
                    )
            if silent:
                cells += [
                    nbformat.v4.new_markdown_cell(fix_links("".join(o["data"]["text/markdown"])))
                    for o in cell.outputs
                    if "text/markdown" in o.get("data", {})
                ]
                continue
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {
        "name": "python"
    }  # nbdev_clean drops it; code fences are named after it
    return nb


def make_readme() -> str:
    "The text README.md must have"
    nb = prepare(nbformat.read(ROOT / SOURCE, as_version=4))
    config = Config({"NbConvertBase": {"display_data_priority": FORMATS}})
    body, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    body = re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE)
    return HEADER + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if README.md is out of date",
    )
    args = parser.parse_args()
    readme = ROOT / "README.md"
    try:
        new = make_readme()
    except (ReadmeError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    old = readme.read_text(encoding="utf-8") if readme.exists() else None
    if args.check and new != old:
        print(f"README.md is not what {SOURCE} gives; run `make readme`", file=sys.stderr)
        return 1
    if new != old:
        readme.write_text(new, encoding="utf-8")
        print("README.md written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
