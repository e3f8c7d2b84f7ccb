"""Compare the figures of another run (another machine, a fresh clone) with those in figures/.

Compared are levels, differences, verdicts and, item by item, the answers behind them; the rules
are stated in nbs/06b_agreement. Both need the same seeds: the committed figures are of
`make reproduce SEEDS=5 ARGS=extra_seeds=1`. Without a folder, the numbers in figures/ are computed
again from the answers shipped with them. Exits with 1 where something is beyond, with 2 where
nothing can be compared.
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from sdsclip_nb.agreement import (
    compare_figures, compare_outcomes, follows, outcomes_by_suite, shipped_models, TOLERANCE)


def check_self(folder: Path) -> bool:
    "Print whether the numbers of a folder follow from its own answers; True where they do"
    found = follows(folder)
    print(found.to_string(index=False))
    print(f"{found.within.sum()} files follow from their answers, {(~found.within).sum()} do not")
    return bool(found.within.all())


def differing(compared: pd.DataFrame) -> Iterator[str]:
    "One line for each model, suite and metric whose answers differ, with the items"
    for row in compared[compared.differ != 0].itertuples():
        if pd.isna(row.differ):
            yield f"{row.model} {row.suite}: other items; it cannot be compared"
        else:
            items = ", ".join(map(str, row.which))
            yield f"{row.model} {row.suite} {row.metric}: {row.differ:.0f} of {row.items}: {items}"


def check_answers(here: Path, there: Path, items: bool) -> bool:
    "Print how many answers differ; True where they may, and where there are none to compare"
    lacking = [folder for folder in (here, there) if not shipped_models(folder)]
    if lacking:
        names = " and ".join(map(str, lacking))
        print(f"{names}: no outcomes, so single answers were NOT compared (made before they were "
              "shipped, or outcomes/ was not copied)")
        return True
    compared = compare_outcomes(here, there)
    print(outcomes_by_suite(compared).to_string(index=False))
    missing = sorted({*shipped_models(here)} ^ {*shipped_models(there)})
    if missing:
        print(f"only one folder holds the outcomes of {', '.join(missing)}")
    if items:
        print("\n".join(differing(compared)) or "no answer differs")
    differ, answers = int(compared.differ.sum()), compared["items"].sum()
    print(f"{differ} of {answers} answers differ; {(~compared.within).sum()} of {len(compared)} "
          "models, suites and metrics are beyond what may differ")
    return bool(compared.within.all()) and not missing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "there", type=Path, nargs="?", help="folder of the other figures; none: check these alone")
    parser.add_argument(
        "--here", type=Path, default=Path("figures"), help="folder of these (default: figures)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help=f"of a number, as a share of the width of its interval (default {TOLERANCE})")
    parser.add_argument(
        "--items", action="store_true", help="list the items whose answers differ")
    args = parser.parse_args()
    here = args.here.resolve()
    try:
        if args.there is None:
            return int(not check_self(here))
        there = args.there.resolve()
        found = compare_figures(here, there, args.tolerance)
        print(found.to_string(index=False))
        print(f"{found.within.sum()} files within, {(~found.within).sum()} not")
        answers = check_answers(here, there, args.items)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return int(not (found.within.all() and answers))


if __name__ == "__main__":
    sys.exit(main())
