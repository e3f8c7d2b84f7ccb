"""Compare the figures of another run (another machine, a fresh clone) with those in figures/.

The rules are stated in nbs/06a_report. Both need the same seeds: the committed figures
are of `make reproduce SEEDS=5 ARGS=extra_seeds=1`. Exits with 1 where something is beyond.
"""
import argparse
import sys
from pathlib import Path

from sdsclip_nb.report import compare_figures, TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("there", type=Path, help="folder of the other figures")
    parser.add_argument(
        "--here", type=Path, default=Path("figures"), help="folder of these (default: figures)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help=f"of a number, as a share of the width of its interval (default {TOLERANCE})")
    args = parser.parse_args()
    try:
        found = compare_figures(args.here.resolve(), args.there.resolve(), args.tolerance)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(found.to_string(index=False))
    print(f"{found.within.sum()} files within, {(~found.within).sum()} not")
    return int(not found.within.all())


if __name__ == "__main__":
    sys.exit(main())
