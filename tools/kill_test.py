"""Kill a training run with SIGKILL, start it again, and compare with a run that was left alone.

Equal to the bit must be: student, latent map, optimizer state, history with its metrics, and what
the record says came out. A run is killed at random moments and at every change that writing a
checkpoint or the result makes on the disk; by Python with 0 and 2 loading processes, by papermill
on 03_train, and by Snakemake, whose orphaned training the next run waits for. A killed run's newest
checkpoint is also replaced by one that torch does not load. `--short` does a few of each by Python.
Ends with `N passed, M failed`.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

import sdsclip_nb.evaluate  # noqa: E402, F401  loaded once, not by every child
from sdsclip_nb import checkpoints, training  # noqa: E402
from sdsclip_nb.record import file_hash  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FORK = multiprocessing.get_context("fork")  # the libraries are loaded once
STEPS, EVERY = 12, 3
SETTINGS = dict(
    device="cpu", n_pairs=64, batch_size=16, steps=STEPS, save_every=EVERY, map_steps=20,
    trackers="none",
)  # fmt: skip
RUNS = 20  # killed at random
TIMES = ("seconds", "started", "training_seconds")  # of a record: no two runs share them
WAIT = 1800  # seconds for a run to end: what takes longer hangs


# A run, and what it leaves ---------------------------------------------------------------------

def noting_optimizer(folder: Path) -> None:
    "The state of the optimizer at the end is written into the run's folder as a digest"
    run = training.Loop.run

    def noted(self, *args, **options):
        seconds = run(self, *args, **options)
        buffer = io.BytesIO()
        torch.save(self.optimizer.state_dict(), buffer)
        (folder / "optimizer.txt").write_text(sha256(buffer.getvalue()).hexdigest())
        return seconds

    training.Loop.run = noted


def in_process(folder: Path, settings: dict, before: Callable) -> None:
    "What `python -m sdsclip_nb.training` does, in a process group of its own, output to a file"
    os.setsid()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    noting_optimizer(folder)
    before()
    given = SETTINGS | settings | dict(out_dir=folder)
    training.main([word for k, v in given.items() for word in (f"--{k}", str(v))])


def start(folder: Path, settings: dict, before: Callable = lambda: None):
    "The process of a run"
    process = FORK.Process(target=in_process, args=(folder, settings, before))
    process.start()
    return process


def finish(folder: Path, settings: dict) -> None:
    "Run to the end; raise unless it ends well"
    process = start(folder, settings)
    process.join(WAIT)
    said = (folder.parent / f"{folder.name}.log").read_text()[-1500:]
    assert process.exitcode == 0, f"{folder.name} ended with {process.exitcode}:\n{said}"


def left(folder: Path) -> dict:
    "All that two equal runs share"
    record = json.loads((folder / "record.json").read_text())
    values = {name: value for name, value in record["values"].items() if name not in TIMES}
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kinds = (".safetensors", ".csv", ".txt")
    hashed = [name for name in names if name.suffix in kinds or name.parts[0] == "student"]
    files = {str(name): file_hash(folder / name) for name in hashed}
    stray = [name for name in names if str(name).endswith((".new", ".old"))]
    stray += [path.name for path in folder.glob("checkpoints*")]
    assert not stray, f"left over: {stray}"
    return dict(values=values, inputs=record["inputs"], **files)


def same(folder: Path, whole: Path) -> None:
    "Raise unless a run left what another did"
    ours, theirs = left(folder), left(whole)
    differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    assert not differing, f"{folder.name}: {differing} differ"


def steps_saved(folder: Path) -> list:
    "Of a run's checkpoints, in order"
    return sorted(int(p.name[5:]) for p in folder.glob("checkpoints/step-" + "[0-9]" * 8))


def until(condition: Callable, what: str) -> None:
    "Wait until something is true"
    end = time.time() + WAIT
    while not condition():
        assert time.time() < end, f"{what}: not in {WAIT} s"
        time.sleep(0.02)


def resumed(folder: Path) -> list:
    "The steps at which a run was taken up"
    return json.loads((folder / "record.json").read_text())["made_by"].get("resumed_at_steps", [])


# At random moments -----------------------------------------------------------------------------

def where(folder: Path) -> str:
    "How far a killed run had come"
    if (folder / "result.new").exists():
        return "result"
    if list(folder.glob("checkpoints/*.new")) or list(folder.glob("checkpoints/*.old")):
        return "checkpoint"
    return "steps" if (folder / "checkpoints").exists() else "start"


def at_random(base: Path, wholes: dict, runs: int) -> str:
    "killed at random moments"
    draw, met, taken_up = random.Random(0), Counter(), 0
    for k in range(runs):
        workers = (0, 2)[k % 2]
        settings = dict(num_workers=workers, eval_every=STEPS)
        whole, seconds = wholes[workers]
        folder = base / f"random-{k}"
        process = start(folder, settings)
        if k % 3 == 2:  # however slow the machine is by now, it has something to go on from
            until(lambda: not process.is_alive() or steps_saved(folder), "a checkpoint")
            process.join(draw.uniform(0, 0.05) * seconds)
        else:
            process.join(draw.uniform(0.1, 1.0) * seconds)
        alive = process.is_alive()
        process.kill()
        process.join()
        met[where(folder) if alive else "over"] += 1
        if alive or not (folder / "record.json").exists():
            finish(folder, settings)
            taken_up += bool(resumed(folder))
        same(folder, whole)
        shutil.rmtree(folder)
    assert taken_up, "no run went on from a checkpoint"
    moments = ", ".join(f"{name} {count}" for name, count in sorted(met.items()))
    return f"{runs} of {runs} equal; killed in: {moments}; {taken_up} went on from a checkpoint"


# In every gap of the writing -------------------------------------------------------------------

CHANGES = {
    os: ("replace", "fsync", "mkdir", "unlink", "rmdir"),
    torch: ("save",),
    safetensors.torch: ("save_file",),
    checkpoints.shutil: ("rmtree",),
}


def dying_at(number: int, report: Path) -> Callable:
    """Counts changes of the disk from the third checkpoint on; that of the number is not made.

    The third is the first whose writing removes one. How many there were is written to `report`.
    """

    def watch() -> None:
        count, on = [0], [False]

        def counted(call, name):
            def change(*args, **options):
                if on[0]:
                    if count[0] == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count[0] += 1
                return call(*args, **options)

            return change

        for module, names in CHANGES.items():
            for name in names:
                setattr(module, name, counted(getattr(module, name), name))
        save, main = training.Loop.save, training.save_run

        def saved(self, *args):
            on[0] = len(self.history) == 3 * EVERY
            save(self, *args)
            on[0] = False

        def result(*args):
            on[0] = True
            main(*args)
            on[0] = False
            report.write_text(str(count[0]))

        training.Loop.save, training.save_run = saved, result

    return watch


def in_gaps(base: Path, wholes: dict, some: int | None) -> str:
    "killed in every gap of writing a checkpoint and the result"
    settings, (whole, _) = dict(num_workers=0, eval_every=STEPS), wholes[0]
    report = base / "changes.txt"
    counting = start(base / "counted", settings, dying_at(-1, report))
    counting.join(WAIT)
    assert counting.exitcode == 0, f"the run that counts ended with {counting.exitcode}"
    changes = int(report.read_text())
    places = range(changes)
    if some:
        places = sorted(random.Random(0).sample(places, some))
    went_on = Counter()
    for number in places:
        folder = base / f"gap-{number}"
        process = start(folder, settings, dying_at(number, report))
        process.join(WAIT)
        assert process.exitcode == -signal.SIGKILL, f"gap {number}: ended {process.exitcode}"
        over = (folder / "record.json").exists()  # it is written last: all else is there
        finish(folder, settings)
        same(folder, whole)
        went_on["finished" if over else f"step {resumed(folder)}"] += 1
        shutil.rmtree(folder)
    expected = {"finished", f"step {[2 * EVERY]}", f"step {[3 * EVERY]}"}
    assert set(went_on) <= expected, f"taken up at {went_on}"
    steps = ", ".join(f"{name} {count} times" for name, count in sorted(went_on.items()))
    return f"{len(places)} of {changes} gaps: all equal; {steps}"


# A checkpoint that torch does not load ----------------------------------------------------------

def spoil(state: Path, name: str) -> None:
    "Another pickle in the place of one file of a checkpoint, sealed"
    with open(state / name, "wb") as file:
        torch.save(Path("a"), file)
    checkpoints.seal(state)


def in_refused(base: Path, wholes: dict) -> str:
    "killed, then the newest checkpoint is replaced by one that torch does not load"
    settings, (whole, _) = dict(num_workers=0, eval_every=STEPS), wholes[0]

    def dying() -> None:
        training.save_run = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

    killed = base / "killed"
    process = start(killed, settings, dying)
    process.join(WAIT)
    assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode}"
    older, newer = (f"step-{steps:08}" for steps in steps_saved(killed))
    files = sorted(path.name for path in (killed / "checkpoints" / newer).iterdir())
    names = [name for name in files if not name.endswith(".json")]
    cases = {name: ([newer], name, [2 * EVERY]) for name in names}
    cases["both"] = ([older, newer], "optimizer.bin", [])
    for case, (states, name, taken_up) in cases.items():
        folder = base / f"refused-{case}"
        shutil.copytree(killed, folder)
        for state in states:
            spoil(folder / "checkpoints" / state, name)
        finish(folder, settings)
        said = (base / f"{folder.name}.log").read_text()
        assert said.count(f"({name} cannot be loaded") == len(states), f"{case}: {said[-1500:]}"
        assert resumed(folder) == taken_up, f"{case}: went on from {resumed(folder)}"
        same(folder, whole)
    return f"{', '.join(names)}: went on from the one before; both refused: began anew; all equal"


# By papermill and Snakemake --------------------------------------------------------------------

NOTEBOOK = dict(steps=200, save_every=10)  # a kernel sees late that papermill is gone


def papermill(folder: Path) -> list[str]:
    "The main job, small"
    given = SETTINGS | NOTEBOOK
    given |= dict(out_dir=folder, benchmarks="none", num_workers=0, progress=False)
    words = [word for k, v in given.items() for word in ("-p", k, str(v))]
    notebook = ROOT / "nbs" / "03_train.ipynb"
    command = [BIN / "papermill", "--no-progress-bar", notebook, f"{folder}.ipynb", *words]
    return [str(word) for word in command]


def quiet(command: list[str], **options) -> subprocess.Popen:
    "A command in a session of its own, its output in a file"
    log = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, text=True, **options
    )
    process.log = log
    return process


def ended(process: subprocess.Popen) -> str:
    "Wait for the end of a command that must succeed; what it said"
    status = process.wait(WAIT)
    process.log.seek(0)
    said = process.log.read()
    assert status == 0, f"ended with {status}:\n{said[-2000:]}"
    return said


def trainings(folder: Path) -> list:
    "Living processes that hold a run's folder"
    holder = checkpoints._holder(folder)
    return [holder["pid"]] if holder and checkpoints.is_alive(holder) else []


def by_papermill(base: Path) -> str:
    "papermill killed while its kernel trains"
    ended(quiet(papermill(base / "notebook")))
    for step in (10, 50, 90):
        folder = base / f"notebook-{step}"
        process = quiet(papermill(folder))
        until(lambda: max(steps_saved(folder), default=0) >= step, f"step {step}")
        process.kill()
        process.wait()
        until(lambda: not trainings(folder), "the kernel's end")
        ended(quiet(papermill(folder)))
        assert resumed(folder), "began anew"
        same(folder, base / "notebook")
    return "3 of 3 equal; the kernel ended with papermill each time"


RUN = "ViT-B-32/clip/seed0"


def snakemake(out: Path, *options: str) -> list[str]:
    "One training of the graph"
    target = f"{out}/runs/{RUN}/record.json"
    command = [sys.executable, "-m", "snakemake", target, "--cores", "1", "--quiet", "all"]
    config = ["--config", "steps=400", f"out={out}", f"figures={out}/figures"]
    return [*command, "--rerun-incomplete", *options, *config]


def by_snakemake(base: Path) -> str:
    "snakemake killed while its notebook trains"
    ended(quiet(snakemake(base / "graph"), cwd=ROOT))
    whole = base / "graph" / "runs" / RUN
    waited = 0
    for k in range(3):
        out = base / f"graph-{k}"
        folder = out / "runs" / RUN
        process = quiet(snakemake(out), cwd=ROOT)
        until(lambda: trainings(folder), "the start of the training")
        time.sleep(2 * k)
        process.kill()
        process.wait()
        orphan = trainings(folder)
        refused = quiet(snakemake(out), cwd=ROOT)
        assert refused.wait(WAIT) != 0, "snakemake's own lock is gone"
        ended(quiet(snakemake(out, "--unlock"), cwd=ROOT))
        ended(quiet(snakemake(out), cwd=ROOT))
        waited += bool(orphan) and not psutil.pid_exists(orphan[0])
        same(folder, whole)
        shutil.rmtree(out)
    assert waited, "no training was left behind to wait for"
    return f"3 of 3 equal; {waited} times the next run waited for the training left behind"


# All of it -------------------------------------------------------------------------------------

@contextlib.contextmanager
def timed() -> Iterator[Callable]:
    "A function that gives the seconds so far"
    started = time.time()
    yield lambda: time.time() - started


def left_alone(base: Path) -> dict:
    "Loading processes -> folder of a run that was not killed, and its seconds"
    wholes = {}
    for workers in (0, 2):
        with timed() as seconds:
            settings = dict(num_workers=workers, eval_every=STEPS)
            finish(base / f"whole-{workers}", settings)
        wholes[workers] = base / f"whole-{workers}", seconds()
    same(base / "whole-0", base / "whole-2")
    return wholes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few kills by Python alone")
    names = ("random", "gaps", "refused", "papermill", "snakemake")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    random_runs, some = (3, 5) if args.short else (RUNS, None)
    failed = passed = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        wholes = left_alone(base) if {*names[:3]} & {*args.only} else {}
        cases = {
            "random": lambda: at_random(base, wholes, random_runs),
            "gaps": lambda: in_gaps(base, wholes, some),
            "refused": lambda: in_refused(base, wholes),
            "papermill": lambda: by_papermill(base),
            "snakemake": lambda: by_snakemake(base),
        }
        for name in names[:3] if args.short else names:
            if name not in args.only:
                continue
            with timed() as seconds:
                try:
                    said, good = cases[name](), True
                except Exception as error:  # one case must not end the others
                    said, good = f"{type(error).__name__}: {error}", False
            passed, failed = passed + good, failed + (not good)
            print(f"{'ok' if good else 'FAILED':6} {name} ({seconds():.0f} s): {said}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
