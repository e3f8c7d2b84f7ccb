"""Bad input of every kind: each ends in a clear error, a counted skip, or is rightly taken.

`bad_input_cases.py` has the collected cases; beside them hypothesis changes valid files at random.
A case fails if the error is another package's or does not name the file or parameter, if an item
is lost without being counted, if a wrong value is taken, or if it takes longer than its time.
Prints a table by class and ends with `N passed, M failed`.
"""

import argparse
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bad_input_cases import Case, all_cases  # noqa: E402
from bad_input_generated import bounded, kinds  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # a case may take: one that hangs takes more, a slow machine less
GB = 6  # of address space: a device read to its end would fill the machine
OURS = str(ROOT / "sdsclip_nb")
COLUMNS = ("cases", "error", "skipped", "taken", "FAILED")


class TookTooLong(BaseException):
    "A case that hangs"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    "Inside, whatever hangs is broken off"

    def stop(number, frame):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_ours(error: BaseException) -> bool:
    "Was it raised on purpose, by a line of the kit?"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(OURS) and "raise" in (last.line or "")


def of_error(case: Case, error: BaseException) -> tuple[str, str]:
    "Outcome of a case that raised, and what is wrong with it"
    said = f"{type(error).__name__}: {str(error)[:200]}"
    if not is_ours(error):
        return "FAILED", f"foreign {said}"
    if case.check or case.skips:
        return "FAILED", f"not taken: {said}"
    lacking = [word for word in case.words if word not in str(error)]
    return ("FAILED", f"does not say {lacking}: {said}") if lacking else ("error", "")


def of_value(case: Case, value) -> tuple[str, str]:
    "Outcome of a case that gave a value, and what is wrong with it"
    if not case.check:
        return "FAILED", f"taken without a word: {value!r:.120}"
    if case.skips:
        reasons = [f"{where}: {reason}" for where, reason in value.skipped]
        lacking = [word for word in case.words if not any(word in text for text in reasons)]
        if not reasons or lacking:
            return "FAILED", f"not counted ({lacking}): {reasons}"
    if not case.check(value):
        return "FAILED", f"another value: {value!r:.120}"
    return ("skipped" if case.skips else "taken"), ""


def outcome(case: Case) -> tuple[str, str]:
    "What came of a case, and why it failed if so"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # hangs outside Python
            with time_limit(SECONDS):
                value = case.run(Path(folder))
        except TookTooLong:
            return "FAILED", f"hangs: broken off after {SECONDS} s"
        except Exception as error:
            return of_error(case, error)
        return of_value(case, value)


def generated(name: str, check: Callable) -> tuple[Counter, str]:
    "Outcomes of the examples of a property, and the smallest that fails"
    found = Counter()

    def judge(run: Callable) -> None:
        values = []
        case = Case("generated", name, run, check=lambda value: values.append(value) or True)
        verdict, why = outcome(case)
        if values and getattr(values[0], "skipped", None):
            verdict = "skipped"
        ours = why.startswith("not taken") and "AssertionError" not in why
        found["error" if ours else verdict] += 1
        if verdict == "FAILED" and not ours:
            raise AssertionError(why)

    try:
        bounded(check)(judge)
    except Exception as error:  # hypothesis joins several failures into a group
        return Counter(FAILED=1) + Counter({k: v for k, v in found.items() if k != "FAILED"}), (
            " ".join([str(error), *getattr(error, "__notes__", [])])[:600]
        )
    return found, ""


def table(counts: dict[str, Counter]) -> str:
    "Classes and their outcomes as Markdown"
    rows = [("class", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    total = Counter()
    for group, found in counts.items():
        rows.append((group, sum(found.values()), *(found[name] for name in COLUMNS[1:])))
        total += found
    rows.append(("all", sum(total.values()), *(total[name] for name in COLUMNS[1:])))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def main() -> int:
    "Run the cases; 0 if none failed"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="classes or cases whose name holds this")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (GB << 30, GB << 30))
    counts: dict[str, Counter] = defaultdict(Counter)
    for case in all_cases():
        if given.only and given.only not in f"{case.group}: {case.name}":
            continue
        found, why = outcome(case)
        counts[case.group][found] += 1
        if why:
            print(f"FAILED {case.group}: {case.name}: {why}", flush=True)
    for name, check in kinds().items():
        group = f"generated: {name}"
        if not given.only or given.only in group:
            counts[group], why = generated(name, check)
            if why:
                print(f"FAILED {group}: {why}", flush=True)
    print(table(counts))
    total = sum(counts.values(), Counter())
    print(f"{total.total() - total['FAILED']} passed, {total['FAILED']} failed")
    return int(total["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
