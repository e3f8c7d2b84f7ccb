"""Write the parameters of nbs/03_train.ipynb from the settings of `Experiment`, or with --check
hold them against each other.

Parameters that are no setting of the run (suites to measure, what is shown) stand below and
are left alone.
"""

import argparse
import json
import sys
from pathlib import Path

import sdsclip_nb.training  # noqa: F401  fills the registries, whose keys are the choices
from sdsclip_nb.experiment import Experiment, parameters_source

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "03_train.ipynb"


def own_lines(source: str) -> list[str]:
    "The lines of the cell that assign no setting"
    settings = set(Experiment.model_fields)
    return [line for line in source.splitlines() if line.split("=")[0].strip() not in settings]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where they differ"
    )
    check = parser.parse_args().check
    nb = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    here = "".join(cell["source"])
    wanted = "\n".join([parameters_source(), *own_lines(here)])
    if here == wanted:
        print(f"{len(wanted.splitlines())} parameters, as the settings say")
        return 0
    if check:
        missing = set(wanted.splitlines()) - set(here.splitlines())
        print("\n".join(sorted(missing) or ["the lines stand in another order"]))
        print(
            "The parameters of nbs/03_train.ipynb are not what Experiment says: "
            "run `python tools/parameters.py`"
        )
        return 1
    cell["source"] = wanted.splitlines(keepends=True)
    NOTEBOOK.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK.name}: {len(wanted.splitlines())} parameters written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
