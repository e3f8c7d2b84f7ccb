"""Run the main job twice at small size, and hold everything that it records against each other.

Two runs of `papermill nbs/03_train.ipynb` with the same settings must leave the same losses step by
step, weights, latent map, record, comparison, plots, and the same answer to every item, to the bit;
only times, paths and what a run's folder is called may differ. A third run with another seed must
differ in all of these, so that the comparison is one. On the CPU; what a GPU does not promise
stands in the record (`made_by: determinism`). Ends with `N passed, M failed`.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch

from sdsclip_nb.evaluate import evaluate
from sdsclip_nb.mini import load_suite
from sdsclip_nb.shipped import digest
from sdsclip_nb.student import load_student

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MAIN_JOB = "nbs/03_train.ipynb"
SMALL = dict(
    device="cpu", threads=1, n_pairs=160, steps=8, map_steps=20, n_items=60,
    benchmarks="mini-winoground,mini-relation", progress=False,
)  # fmt: skip
TIMES = ("started", "seconds", "training_seconds", "out_dir")  # in the record


def start(out: Path, **settings) -> subprocess.Popen:
    "The main job as a user calls it"
    given = {**SMALL, **settings, "out_dir": out}
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    command = [BIN / "papermill", "--no-progress-bar", MAIN_JOB, out / "executed.ipynb", *options]
    out.mkdir(parents=True)
    return subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    "Wait for a run; its end is shown where it failed"
    output, _ = process.communicate()
    assert process.returncode == 0, f"the main job failed:\n{output[-3000:]}"


def without(record: dict, names: tuple) -> dict:
    "A record without some names, at every depth"
    return {
        name: without(value, names) if isinstance(value, dict) else value
        for name, value in record.items() if name not in names
    }


def record(out: Path) -> str:
    "The record without times and without the folder's name"
    return json.dumps(without(json.loads((out / "record.json").read_text()), TIMES))


def file(name: str):
    "A function of a run's folder: the digest of a file in it"
    return lambda out: sha256((out / name).read_bytes()).hexdigest()


def plots(out: Path) -> list[str]:
    "Digests of all that the executed page draws"
    cells = json.loads((out / "executed.ipynb").read_text())["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    drawn = [data["image/png"] for data in shown if "image/png" in data]
    return [sha256("".join(png).encode()).hexdigest() for png in drawn]


def answers(out: Path) -> str:
    "The digest of what the student gets right"
    torch.set_num_threads(1)
    suites = [load_suite("mini-winoground", n=60), load_suite("mini-order", n=60)]
    return digest(evaluate(load_student(str(out / "student")), suites))


RECORDED = {
    "losses": file("history.csv"),
    "weights of the student": file("student/open_clip_model.safetensors"),
    "weights of the latent map": file("latent_map.safetensors"),
    "record": record,
    "comparison": file("comparison.json"),
    "plots": plots,
    "answers": answers,
}


def problems(one: Path, two: Path, other: Path) -> Iterator[tuple[str, str]]:
    "What is recorded, and what is wrong with it; nothing where all is well"
    for name, value in RECORDED.items():
        first, second, third = (value(out) for out in (one, two, other))
        if not first:
            yield name, "nothing was recorded"
        elif first != second:
            yield name, f"the same seed gave another: {first!r:.300} and {second!r:.300}"
        elif first == third:
            yield name, "another seed gave the same"
        else:
            yield name, ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    begun, failed = time.time(), 0
    with tempfile.TemporaryDirectory(prefix="determinism") as name:
        folder = Path(name)
        runs = {"one": {}, "two": {}, "other": dict(seed=1)}
        for processes in (("one", "two"), ("other",)):  # two at a time
            started = [start(folder / run, **runs[run]) for run in processes]
            for process in started:
                finish(process)
        for what, problem in problems(*(folder / run for run in runs)):
            failed += bool(problem)
            print(f"{'FAILED' if problem else 'ok    '} {what:<26} {problem}".rstrip())
    print(f"{len(RECORDED) - failed} passed, {failed} failed, {time.time() - begun:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
