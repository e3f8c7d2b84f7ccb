"""Make every result at paper scale from made-up outcomes, by the graph itself.

No GPU, weights or benchmark is needed, and the numbers mean nothing. What is tested: that the graph
and every page can be made at that scale from the suites, students and teachers it names, that each
writes table, plot and record with the scale in it, and that all claims get a verdict by the rules.
The one result left out is `probes`, which runs the students themselves. Ends with `N passed, M
failed`.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sdsclip_nb.aro import MIN_PAIR
from sdsclip_nb.evaluate import Result
from sdsclip_nb.plan import plan, RESULTS, SUITES_OF, TEACHER_ITEMS, TEACHERS_OF
from sdsclip_nb.suite import METRICS

ROOT = Path(__file__).resolve().parent.parent
ITEMS = 24
LEFT_OUT = ("probes",)
KIND = {  # of suite; the others are zero-shot sets
    "winoground": "winoground",
    "coco2017-retrieval": "retrieval",
    "aro-relation": "choice",
    "aro-attribution": "choice",
    "sugarcrepe": "choice",
    "coco-order": "order",
    "flickr30k-order": "order",
}
TAGS = {"winoground": ["Object|1 main pred", "Relation|1 main pred", "Both|2 main preds"]}
MACROS = {
    "aro-relation": ["macro", "macro without symmetric"],
    "aro-attribution": [f"macro (pairs of {MIN_PAIR} or more)"],
}
TEACHER_SUITES = TEACHER_ITEMS["paper"]


def made_up(suite: str, level: float, rng: np.random.Generator) -> pd.DataFrame:
    "Outcomes of a suite, right with probability `level`"
    number = np.arange(ITEMS)
    tags = np.resize(TAGS.get(suite, [""]), ITEMS)
    classes = {f"macro:{macro}": np.where(number % 3, "a", "b") for macro in MACROS.get(suite, [])}
    about = {"item": number, "cluster": number // 2, "tag": tags, **classes}
    metrics = METRICS[KIND.get(suite, "zeroshot")]
    return pd.DataFrame({**about, **{metric: rng.random(ITEMS) < level for metric in metrics}})


def write_outcomes(folder: Path) -> None:
    "Outcomes of every run and teacher of the plan, and the losses of every training"
    rng, suites = np.random.default_rng(0), SUITES_OF["paper"]
    outcomes = folder / "outcomes"
    details = {suite: {"seconds": 1.0} for suite in suites}
    for run in plan("paper", 1, 1, 1):
        level = .6 if run.training.startswith("sds") else .4
        meta = {"seed": run.seed, "details": details}
        tables = {suite: made_up(suite, level, rng) for suite in suites}
        Result(run.name, tables, meta).save(outcomes / run.name)
        if run.trained:
            losses = pd.DataFrame({"step": np.arange(1, 41), "clip": 1.0, "sds": 1.0})
            (folder / "runs" / run.name).mkdir(parents=True)
            losses.to_csv(folder / "runs" / run.name / "history.csv", index=False)
    for teacher in TEACHERS_OF["paper"]:
        tables = {suite: made_up(suite, .9, rng).assign(evaluations=100)
                  for suite in TEACHER_SUITES}
        Result(teacher, tables, {"details": details}).save(outcomes / f"teacher:{teacher}")


def check(name: str, figures: Path) -> str:
    "What is wrong with a result; '' for nothing"
    path = figures / f"{name}.json"
    if not path.is_file():
        return "was not made"
    record = json.loads(path.read_text())
    files = record["values"].get("files", [f"{name}.md"])
    lacking = [file for file in files if not (figures / file).is_file()]
    if lacking or record["scale"] != "paper":
        return f"scale {record['scale']}, without {lacking}"
    if name == "claims":
        verdicts = {claim["verdict"] for claim in record["values"]["claims"]}
        unknown = verdicts - {"holds", "undecided (one seed)"}  # the teacher's claim needs no seeds
        return f"verdicts {unknown}" if unknown else ""
    return "" if f"{name}.svg" in files else "has no plot"


def make(names: list[str], folder: Path) -> subprocess.CompletedProcess:
    "Let the graph make results from outcomes in `folder`/out, and nothing else"
    # Work in a folder of its own, which holds no lock of this repository's graph.
    (folder / "work").mkdir()
    for name in ("nbs", "sdsclip_nb", "data"):
        (folder / "work" / name).symlink_to(ROOT / name)
    targets = [f"{folder / 'figures' / name}.json" for name in names]
    where = ["--snakefile", ROOT / "Snakefile", "--directory", folder / "work"]
    how = ["--cores", "2", "--keep-going", "--allowed-rules", "result", "claims"]
    config = ["scale=paper", "seeds=1", f"out={folder / 'out'}", f"figures={folder / 'figures'}"]
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *targets, *where, *how, "--config", *config],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    args = parser.parse_args()
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="paper-scale"))).resolve()
    start = time.time()
    write_outcomes(folder / "out")
    names = [name for name in RESULTS if name not in LEFT_OUT]
    done = make(names, folder)
    problems = {name: check(name, folder / "figures") for name in names}
    for name, problem in problems.items():
        print(f"{'FAILED' if problem else 'ok    '} {name:<20} {problem}")
    failed = sum(map(bool, problems.values()))
    if failed:
        print(done.stdout[-3000:])
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"made in {time.time() - start:.0f} s")
    print(f"{len(problems) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
