"""Test what the graph takes for stale, on a copy of this repository: two students trained for three
steps, one small result.

Asserted: from nothing all is made; then nothing is; prose and outputs of a notebook change nothing;
its code, a setting, a weight and a module make stale what depends on them and nothing else, and a
package that only draws makes nothing stale; a failed branch stops no other and is named at the end;
the same seed gives the same numbers, and without AVX-512 nearly the same; at paper scale the SLURM
profile asks for the cores, memory, GPU and time that each step needs. Ends with `N passed, M
failed`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
OUT = "out/reproduce/mini"
STUDENT = "ViT-B-32-sentences"  # the one that variants run on
RUN = f"{STUDENT}/{{}}/seed0"
RESULT = """from sdsclip_nb.plots import point_ranges
from sdsclip_nb.plan import COLUMNS
from sdsclip_nb.report import begin, levels, Runs, write
runs = Runs(results, scale, seeds, other_seeds, extra_seeds); record = begin('gradient', runs)
trainings = ['base', 'clip', 'sds-gradient']
table = levels(runs, ['ViT-B-32-sentences'], trainings, [COLUMNS[scale]['text']])
write(record, runs, table, point_ranges(table, 'training', 'metric').figure, figures)"""


class Copy:
    "A copy of the repository with a tiny result in it, and snakemake in it"

    def __init__(self, folder: Path):
        self.folder = folder
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for name in files.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        shutil.rmtree(folder / "figures", ignore_errors=True)
        self.edit(
            "sdsclip_nb/plan.py",
            lambda text: text.replace(
                "'varied', ('base', 'clip', 'sds', 'placebo', 'sds-gradient'),",
                "'varied', ('base', 'clip', 'sds-gradient'),",
            ),
        )
        nb = nbformat.read(folder / "nbs/paper/gradient.ipynb", 4)
        keep = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
        nb.cells = [
            nbformat.v4.new_markdown_cell("# A small result"),
            keep,
            nbformat.v4.new_code_cell(RESULT),
        ]
        nbformat.write(nb, folder / "nbs/paper/gradient.ipynb")

    def edit(self, name: str, change: Callable[[str], str]) -> None:
        "Rewrite a text file; a change that changes nothing is an error"
        path = self.folder / name
        before = path.read_text()
        after = change(before)
        assert after != before, f"{name} does not hold what the test wants to change in it"
        path.write_text(after)

    def snakemake(self, *options: str, **variables: str) -> subprocess.CompletedProcess:
        "Run the graph for the one result, with further environment variables"
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "figures/gradient.json",
            "--cores",
            "2",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), **variables}
        environment.pop("IN_TEST", None)
        return subprocess.run(
            [*command, "--config", "steps=3", "items=24", "seeds=1"],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *options: str, **variables: str) -> str:
        "Run the graph; its output"
        done = self.snakemake(*options, **variables)
        assert done.returncode == 0, f"snakemake failed:\n{done.stdout[-3000:]}"
        return done.stdout

    def forget(self, training: str) -> None:
        "Remove a run and its outcomes"
        for kind in ("runs", "outcomes"):
            shutil.rmtree(self.folder / OUT / kind / RUN.format(training))

    def trained(self, training: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        "The losses of a run, and its metrics"
        name = RUN.format(training)
        runs, outcomes = (self.folder / OUT / kind / name for kind in ("runs", "outcomes"))
        return pd.read_csv(runs / "history.csv"), pd.read_csv(outcomes / "metrics.csv")

    def stale(self, **variables: str) -> set[str]:
        "What would be made: rule, and training where it has one"
        rules, rule = set(), None
        for line in map(str.strip, self.run("-n", **variables).splitlines()):
            if line.startswith(("rule ", "localrule ")):
                rule = line.split()[1].rstrip(":")
                rules.add(rule)
            if (
                line.startswith("wildcards:") and "training=" in line
            ):  # the finer name in place of the rule's
                rules.discard(rule)
                rules.add(f"{rule} {line.split('training=')[1].split(',')[0]}")
        return rules


RESULT_ONLY = {"result"}
VARIANT = {"fine_tune sds-gradient", "measure sds-gradient", "result"}


def from_nothing(copy: Copy) -> None:
    copy.run()
    made = {p.name for p in (copy.folder / "figures").iterdir()}
    assert made == {"outcomes", *(f"gradient.{e}" for e in ("csv", "json", "png", "svg"))}, made
    logs = sorted(
        p.relative_to(copy.folder / OUT / "logs").as_posix()
        for p in (copy.folder / OUT / "logs").rglob("*.ipynb")
    )
    assert len(logs) == 6, logs  # two trained, three measured, one result
    record = json.loads((copy.folder / "figures/gradient.json").read_text())
    assert set(record["inputs"]) == {RUN.format(t) for t in ("base", "clip", "sds-gradient")}, (
        record["inputs"]
    )
    for name, digest in record["inputs"].items():
        shipped = copy.folder / "figures/outcomes" / f"{name}.json"
        assert json.loads(shipped.read_text())["sha256"] == digest, name


def nothing_changed(copy: Copy) -> None:
    assert copy.stale() == set(), copy.stale()
    os.utime(copy.folder / "sdsclip_nb/evaluate.py")  # touched, the same text
    assert copy.stale() == set(), copy.stale()


def prose_and_outputs(copy: Copy) -> None:
    for name in ("nbs/paper/gradient.ipynb", "nbs/03_train.ipynb", "nbs/jobs/measure.ipynb"):
        nb = nbformat.read(copy.folder / name, 4)
        nb.cells[0].source += "\n\nMore prose."
        next(c for c in nb.cells if c.cell_type == "code").outputs = [
            nbformat.v4.new_output("stream", text="new output")
        ]
        nbformat.write(nb, copy.folder / name)
    assert copy.stale() == set(), copy.stale()


def code_of_a_result(copy: Copy) -> None:
    copy.edit(
        "nbs/paper/gradient.ipynb",
        lambda text: text.replace("begin('gradient', runs)", "begin('gradient',  runs)"),
    )
    assert copy.stale() == RESULT_ONLY, copy.stale()
    copy.run()
    assert copy.stale() == set(), copy.stale()


def a_setting(copy: Copy) -> None:
    before = (copy.folder / "sdsclip_nb/plan.py").read_text()
    copy.edit(
        "sdsclip_nb/plan.py",
        lambda text: text.replace("weighting='one', lam=3.", "weighting='one', lam=4."),
    )
    assert copy.stale() == VARIANT, copy.stale()
    (copy.folder / "sdsclip_nb/plan.py").write_text(before)


def a_weight(copy: Copy) -> None:
    path = copy.folder / "data/mini/teacher/unet/diffusion_pytorch_model.safetensors"
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert copy.stale() == VARIANT, copy.stale()
    path.write_bytes(before)
    os.utime(path, (times.st_atime, times.st_mtime))


MEASURED = {"measure clip", "measure sds-gradient", "measure_untouched base", "result"}
TRAINED = {"fine_tune clip", "fine_tune sds-gradient"}


def a_module(copy: Copy) -> None:
    "What scores is no part of training, and what draws decides no number"
    wanted = {
        "scores": MEASURED,
        "plots": RESULT_ONLY,
        "losses": TRAINED | MEASURED - {"measure_untouched base"},
    }
    for name, stale in wanted.items():
        copy.edit(f"sdsclip_nb/{name}.py", lambda text: text + "# more\n")
        assert copy.stale() == stale, (name, copy.stale())
        copy.edit(f"sdsclip_nb/{name}.py", lambda text: text.removesuffix("# more\n"))


def images_opened_otherwise(copy: Copy) -> None:
    "If `to_rgb` mirrored every image, all would have to be measured again"
    mirrored = lambda text: text.replace("ImageOps.exif_transpose(", "ImageOps.mirror(")
    before = (copy.folder / "sdsclip_nb/items.py").read_text()
    copy.edit("sdsclip_nb/items.py", mirrored)
    assert copy.stale() == MEASURED | TRAINED, copy.stale()
    (copy.folder / "sdsclip_nb/items.py").write_text(before)


def a_plotting_package(copy: Copy) -> None:
    "Another version of a package that draws is recorded and makes nothing anew; so is the lock"
    other = copy.folder / "other"
    (other / "seaborn-99.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: seaborn\nVersion: 99.0\n"
    (other / "seaborn-99.0.dist-info" / "METADATA").write_text(metadata)
    path = f"{other}{os.pathsep}{copy.folder}"
    seen = subprocess.run(
        [sys.executable, "-c", "from sdsclip_nb.record import versions; print(versions())"],
        cwd=copy.folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "'seaborn': '99.0'" in seen, seen
    copy.edit("requirements.lock", lambda text: re.sub("seaborn==.*", "seaborn==99.0", text))
    assert copy.stale(PYTHONPATH=path) == set(), copy.stale(PYTHONPATH=path)


def a_failed_branch(copy: Copy) -> None:
    copy.forget("clip")
    copy.edit(
        "sdsclip_nb/plan.py",
        lambda text: text.replace(
            "'sds-gradient': dict(", "'sds-gradient': dict(teacher='./nowhere', "
        ),
    )
    done = copy.snakemake("--keep-going")
    assert done.returncode != 0, "a run without a teacher did not fail"
    _, _, end = done.stdout.partition("Not everything could be made")
    assert f"{OUT}/logs/fine_tune/{STUDENT}-sds-gradient-seed0.ipynb" in end and "nowhere" in end, (
        done.stdout[-3000:]
    )
    assert (copy.folder / OUT / "outcomes" / RUN.format("clip") / "metrics.json").is_file(), (
        "the other branch was not finished"
    )
    copy.edit("sdsclip_nb/plan.py", lambda text: text.replace("teacher='./nowhere', ", ""))
    assert copy.stale() == VARIANT, copy.stale()


def same_seed(copy: Copy) -> None:
    "What `a_failed_branch` trained anew is what `from_nothing` had trained"
    history, metrics = copy.first
    again, outcomes = copy.trained("clip")
    assert history[["loss", "clip"]].equals(again[["loss", "clip"]]), (
        "the same seed gave another training"
    )
    assert metrics.equals(outcomes), "the same seed gave other outcomes"


def other_processor(copy: Copy) -> None:
    "Without AVX-512 losses agree to four digits, and at most one item of a suite changes"
    copy.run()  # what the failed branch lacks
    trainings = ("clip", "sds-gradient")
    before = [copy.trained(t) for t in trainings]
    for training in trainings:
        copy.forget(training)
    (copy.folder / "figures/gradient.json").unlink()  # else nothing asks for the runs
    copy.run(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
    for training, (history, metrics) in zip(trainings, before):
        again, outcomes = copy.trained(training)
        apart = (again.loss / history.loss - 1).abs().max()
        assert apart < 1e-4, f"{training}: a loss differs by {apart:.2g} of itself"
        items = ((outcomes.value - metrics.value).abs() * metrics.n).max()
        assert items < 1.5, f"{training}: {items:.1f} items of a suite are answered otherwise"
        print(
            f"       {training}: a loss differs by up to {apart:.1e} of itself, "
            f"outcomes by {items:.0f} items of 24"
        )


def asked_for(dry_run: str) -> dict[str, set[tuple[int, ...]]]:
    "Of each rule: threads, MB of memory, GPUs and minutes of its jobs, as a dry run prints them"
    asked: dict[str, set[tuple[int, ...]]] = {}
    for job in re.split(r"^rule ", dry_run, flags=re.MULTILINE)[1:]:
        threads = re.search(r"^    threads: (\d+)", job, re.MULTILINE)
        number = dict(re.findall(r"\b(mem_mb|gpu|runtime)=(\d+)", job))
        values = [int(number.get(name, 0)) for name in ("mem_mb", "gpu", "runtime")]
        asked.setdefault(job.split(":")[0], set()).add((int(threads[1]) if threads else 1, *values))
    return asked


def slurm_profile(copy: Copy) -> None:
    "Cores, memory, GPU and time of every rule, by SLURM's plugin where it is installed"
    options = ["--profile", "tools/slurm", "--cores", "8", "--config", "scale=paper", "seeds=1"]
    if not find_spec("snakemake_executor_plugin_slurm"):
        options = ["--executor", "local", *options]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", *options],
        cwd=copy.folder, env={**os.environ, "PYTHONPATH": str(copy.folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    on_gpu = (8, 32000, 1)
    wanted = {
        # without a teacher, v1-4 by `sds`, v1-4 exact, v2-1 exact
        "fine_tune": {(*on_gpu, minutes) for minutes in (120, 375, 669, 1355)},
        "measure": {(*on_gpu, 240)},
        "measure_untouched": {(*on_gpu, 240)},
        "measure_teacher": {(*on_gpu, 600)},
        "result": {(1, 4000, 0, 30), (1, 4000, 1, 30)},  # one of them runs students
        "claims": {(1, 4000, 0, 30)},
    }
    asked = asked_for(done.stdout)
    asked.pop("all", None)  # collects the others
    assert asked == wanted, asked


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="graph"))
    folder.mkdir(parents=True, exist_ok=True)
    copy, results = Copy(folder.resolve()), []
    steps = [
        from_nothing,
        nothing_changed,
        prose_and_outputs,
        code_of_a_result,
        a_setting,
        a_weight,
        a_module,
        images_opened_otherwise,
        a_plotting_package,
        a_failed_branch,
        same_seed,
        other_processor,
        slurm_profile,
    ]
    for step in steps:
        start = time.time()
        try:
            step(copy)
            results.append(True)
            print(
                f"ok     {step.__name__.replace('_', ' '):<20} {time.time() - start:6.1f} s",
                flush=True,
            )
        except AssertionError as error:
            results.append(False)
            print(
                f"FAILED {step.__name__.replace('_', ' '):<20} {time.time() - start:6.1f} s  "
                f"{error}",
                flush=True,
            )
        if step is from_nothing:
            if not results[-1]:
                break
            copy.first = copy.trained("clip")
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
