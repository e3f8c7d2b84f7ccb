"""Execute notebooks in place and keep the outputs worth reading: no warnings, widgets, progress.

A notebook that fails is left as it was; its name and the cell are printed, with exit status 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+/\d+ \[\d+:\d+")  # a progress bar that was replaced in place
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class RenderError(Exception):
    """A cell of a notebook failed."""


def execute(nb, folder: Path) -> None:
    "Run all cells of `nb` in `folder` with this Python, and name the cell on failure"
    at = [0]  # the cell that runs now; a dead kernel leaves no output to tell it by

    def remember(cell, cell_index):
        at[0] = cell_index

    # Encrypted only because the kernel would otherwise print a warning for each notebook.
    config = Config({"KernelManager": {"transport_encryption": "auto"}})
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        nb,
        timeout=None,
        kernel_name="python3",
        resources=resources,
        on_cell_execute=remember,
        config=config,
    )
    try:
        client.execute()
    except (
        CellControlSignal,
        DeadKernelError,
    ) as error:  # the first is the base of execution errors and time-outs
        raise RenderError(
            f"cell {at[0]} ({nb.cells[at[0]].get('id', 'no id')}):\n"
            f"{ANSI.sub('', str(error)).strip()}"
        ) from error


def overwrite(text: str) -> str:
    "What a terminal would show of `text`: a carriage return starts its line again"
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def is_progress(out) -> bool:
    "Is this output the last state of a progress bar?"
    return out.output_type == "display_data" and bool(
        PROGRESS.search(out.get("data", {}).get("text/plain", ""))
    )


def tidy(nb) -> None:
    "Remove stderr, widgets, progress bars and the traces of papermill and jupytext from `nb`"
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for key in ("papermill", "widgets", "jupytext"):
        nb.metadata.pop(key, None)
    for cell in nb.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type != "code":
            continue
        kept = []
        for out in cell.outputs:
            if out.output_type == "stream":
                out.text = overwrite(out.text)
                if out.name == "stderr" or not out.text.strip():
                    continue
            elif WIDGET in out.get("data", {}) or is_progress(out):
                continue
            kept.append(out)
        cell.outputs = kept


def clean(path: Path) -> None:
    "Run nbdev_clean on one file, under the settings of this repository"
    nbdev_clean = Path(sys.executable).with_name("nbdev_clean")
    done = subprocess.run([nbdev_clean, "--fname", path], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "Failed to clean" in done.stderr:  # nbdev_clean only warns when it fails
        raise RenderError(f"nbdev_clean failed:\n{done.stderr.strip()}")


def render(path: Path) -> None:
    "Execute the notebook at `path` in its own folder and replace it by the result"
    nb = nbformat.read(path, as_version=4)
    execute(nb, path.resolve().parent)
    tidy(nb)
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / path.name
        nbformat.write(nb, copy)
        clean(copy)
        result = copy.read_bytes()
    part = path.with_name(
        f".{path.name}.part"
    )  # beside the notebook, so that the last step is one rename
    part.write_bytes(result)
    os.replace(part, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    args = parser.parse_args()
    failed = 0
    for path in args.notebooks:
        start = time.time()
        try:
            render(path)
        except (RenderError, FileNotFoundError, nbformat.reader.NotJSONError) as error:
            print(f"{path} FAILED, left as it was: {error}", file=sys.stderr, flush=True)
            failed += 1
        else:
            print(f"{path} {time.time() - start:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
