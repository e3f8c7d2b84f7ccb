"""Make faults happen to a training run, go on afterwards, and compare with a run that had none.

Each run is a process of its own. A case fails unless the run ends with the right exit status and
one message, without a traceback, that says what happened, what is safe and how to go on, and the
run after it ends equal to the bit. Disks are small file systems in memory, which only root can
mount; without one those cases are skipped, and a limit on file sizes stands for them.
The last case is a run of 2,000 steps, in which memory, open files and disk stay flat. `--short`
runs what takes a minute. Ends with `N passed, M failed`.
"""

import argparse
import codecs
import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil  # noqa: E402
import torch  # noqa: E402

from sdsclip_nb import training  # noqa: E402
from sdsclip_nb.pairs import load_pairs  # noqa: E402
from sdsclip_nb.record import Record, file_hash  # noqa: E402

BIN = Path(sys.executable).parent
FORK = multiprocessing.get_context("fork")  # the libraries are loaded once
ROOT = Path(__file__).resolve().parent.parent
PAIRS, STEPS, EVERY, FAULT = 48, 20, 6, 15  # the fault comes at a step after the second checkpoint
SETTINGS = dict(
    data="folder", device="cpu", batch_size=8, steps=STEPS, save_every=EVERY, map_steps=20,
    num_workers=0,
)
DISK_MB = 48
MANY = 90  # steps of a run that something happens to from outside
LONG_STEPS, SETTLED, SAMPLED = 2000, 500, 50  # what grows until the second does not count
GROWTH_MB = dict(memory=16, disk=2)  # from then on, at most; measured 2.5 and 0.8
SAY = "--say" in sys.argv  # show what every run said
WAIT = 1800  # seconds for a run to end: what takes longer hangs
LONG_WAIT = 4 * WAIT  # for the run of 2,000 steps


class Skip(Exception):
    "A case that this machine does not allow, with the reason"


# A run, and what becomes of it ------------------------------------------------------------------

@dataclass
class Ended:
    "A process that has ended."
    status: int  # negative: the signal that killed it
    said: str  # stdout and stderr


def options(settings: dict) -> list[str]:
    "As words of a command"
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def in_process(output: Path, fault: Callable, words: list[str]) -> None:
    "The command `python -m sdsclip_nb.training`, with a fault, in a process group of its own"
    os.setsid()
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fault()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        training.main(words)
    finally:
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        if before != after:
            print("Traceback: the signal handlers were not restored", file=sys.stderr)


def run(root: Path, fault: Callable = lambda: None, poke: Callable = lambda process: None,
        wait: float = WAIT, **settings) -> Ended:
    "One run in `root`, with a fault from within or a poke from outside"
    output = root.parent / f"{root.name}.txt"
    words = options(SETTINGS | dict(data_root=root.parent / "pairs", out_dir=root) | settings)
    process = FORK.Process(target=in_process, args=(output, fault, words))
    process.start()
    poke(process)
    process.join(wait)
    if process.exitcode is None:
        process.kill()
        process.join()
        return Ended(-9, output.read_text() + f"\nTraceback: it hung for {wait} s")
    if SAY:
        print(output.read_text())
    return Ended(process.exitcode, output.read_text())


def results(root: Path) -> dict:
    "All that a run leaves, but its times"
    files = [*root.glob("student/*"), root / "latent_map.safetensors", root / "history.csv"]
    values = json.loads((root / "record.json").read_text())["values"]
    del values["training_seconds"]
    return {path.name: file_hash(path) for path in files} | values


def write_pairs(folder: Path, count: int = PAIRS) -> None:
    "Images with captions, as files"
    folder.mkdir()
    pairs = load_pairs("mini", n=count)
    with open(folder / "metadata.jsonl", "w") as lines:
        for number in range(count):
            pair, name = pairs[number], f"{number:04}.png"
            pair.image.save(folder / name)
            lines.write(json.dumps(dict(file_name=name, text=pair.captions[0])) + "\n")


# Faults -----------------------------------------------------------------------------------------

def at_step(action: Callable, number: int = FAULT) -> Callable:
    "A fault: something that happens just before a step"
    def install():
        update = training.Loop.update

        def acting(self, batch, this):
            if this == number:
                action()
            return update(self, batch, this)

        training.Loop.update = acting

    return install


def before(owner, name: str, action: Callable) -> Callable:
    "A fault: something that happens just before a function is called for the first time"
    def install():
        function, done = getattr(owner, name), []

        def acting(*args, **kwargs):
            if not done:
                done.append(True)
                action()
            return function(*args, **kwargs)

        setattr(owner, name, acting)

    return install


@contextlib.contextmanager
def disk(root: Path, options: str = f"size={DISK_MB}m") -> Iterator[None]:
    "A small file system at the run's folder"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root)]
    if subprocess.run(command, capture_output=True).returncode:
        raise Skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def fill(root: Path) -> Callable:
    "Write until the disk is full"
    def action():
        with contextlib.suppress(OSError), open(root / "ballast", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    return action


def unfill(root: Path) -> None:
    (root / "ballast").unlink()


def limit_files() -> None:
    "No file may become larger than a few kilobytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))


def hide(folder: Path) -> Callable:
    "Take away every other image"
    def action():
        for path in sorted(folder.glob("*.png"))[::2]:
            path.rename(path.with_suffix(".gone"))

    return action


def unhide(folder: Path) -> None:
    for path in folder.glob("*.gone"):
        path.rename(path.with_suffix(".png"))


def kill_workers() -> None:
    "Kill the processes that load images"
    for child in psutil.Process().children():
        child.kill()


def take(size: str) -> Callable:
    "Ask for more memory than there is: of torch, or of Python"
    def action():
        torch.empty(1 << 50) if size == "torch" else bytearray(1 << 60)

    return action


def signal_me(number: int) -> Callable:
    "A signal to this process and its children, as a terminal or a scheduler sends it"
    kill = ["kill", f"-{signal.Signals(number).name[3:]}", "--"]
    return lambda: subprocess.run([*kill, f"-{os.getpgid(0)}"], start_new_session=True, check=True)


def no_loading() -> None:
    "What is said before loading must not need it"
    def build(*args, **kwargs):
        raise AssertionError("something was loaded")

    training.build = build


# What has to be so ------------------------------------------------------------------------------

def problems(ended: Ended, status: int, words: list[str]) -> list[str]:
    "What is wrong with the end of a run"
    out = []
    if ended.status != status:
        out.append(f"exit status {ended.status}, not {status}")
    if "Traceback" in ended.said:
        out.append("a traceback")
    lacking = [word for word in words if word not in ended.said]
    if lacking:
        out.append(f"does not say {lacking}")
    said = [line for line in ended.said.splitlines() if line.strip()]
    return out + [f"its end: {' / '.join(said[-4:])[-600:]}"] * bool(out)


def first_line(ended: Ended) -> str:
    "Of the message that a run ended with"
    before, _, _ = ended.said.partition("\nSafe on disk:")
    return before.splitlines()[-1][:160]


@dataclass
class Bench:
    "Where the cases run, and what runs without a fault left."
    folder: Path
    plain: dict = field(default_factory=dict)  # `results`

    def without_fault(self) -> dict:
        "What a run without a fault leaves, whatever the number of processes that load"
        if not self.plain:
            root = self.folder / "plain"
            ended = run(root)
            assert ended.status == 0, f"without a fault: {ended.said[-2000:]}"
            self.plain = results(root)
        return self.plain

    def case(self, name: str, fault: Callable, words: list[str], status: int = 1,
             mend: Callable = lambda: None, step: int | None = EVERY * 2, **settings) -> str:
        "A run with a fault, the mend, and the run after it, which has to go on from `step`"
        root = self.folder / name
        started = time.time()
        ended = run(root, fault, **settings)
        wrong = problems(ended, status, words + ([f"step {step}"] if step else []))
        mend()
        again = run(root, **settings)
        if again.status:
            wrong.append(f"the next run failed: {again.said[-300:]}")
        else:
            wrong += self.differences(root, self.without_fault(), step)
        assert not wrong, "; ".join(wrong)
        return f"{time.time() - started:.1f} s, {first_line(ended)}"

    def differences(self, root: Path, plain: dict, step: int | None) -> list[str]:
        "Between a run that went on and the one without a fault"
        out = unequal(results(root), plain)
        resumed = json.loads((root / "record.json").read_text())["made_by"].get(
            "resumed_at_steps", [])
        wanted = [step] if step else []
        return out + [f"went on from {resumed}, not {wanted}"] * (resumed != wanted)



def test_disk_full(bench: Bench, where: str) -> str:
    "The disk is full when a checkpoint, the result or the record is written"
    root = bench.folder / f"disk-{where}"
    faults = dict(checkpoint=at_step(fill(root)), result=at_step(fill(root), STEPS - 1),
                  record=before(Record, "save", fill(root)), start=fill(root))
    last = (STEPS - 1) // EVERY * EVERY
    step = dict(checkpoint=EVERY * 2, start=None).get(where, last)
    words = ["MB are free", "out_dir="] if where == "start" else ["No space left"]
    with disk(root):
        return bench.case(root.name, faults[where], [*words, str(root)],
                          mend=lambda: unfill(root), step=step)


def test_disk_small(bench: Bench) -> str:
    "A disk that the run would fill: said before its first step"
    root = bench.folder / "disk-small"

    def no_steps():
        training.fit_map = training.Loop = None

    with disk(root, "size=12m"):
        wrong = problems(ended := run(root, no_steps), 1, ["MB are free", "out_dir=", "at least"])
        assert not wrong, wrong
        again = run(root, save_every=0)  # as the message proposes: the result alone has room
        assert again.status == 0, again.said[-600:]
    return first_line(ended)


def test_file_limit(bench: Bench) -> str:
    "A file may not grow any more"
    return bench.case("limit", at_step(limit_files), [os.strerror(errno.EFBIG)])


def test_read_only(bench: Bench) -> str:
    "The folder cannot be written: said before anything is loaded"
    root = bench.folder / "read-only"
    with disk(root, "ro"):
        wrong = problems(run(root, no_loading), 1, ["Read-only", str(root)])
    assert not wrong, wrong
    return "said before loading"


def test_unwritable(bench: Bench) -> str:
    "The folder belongs to somebody else"
    root = bench.folder / "unwritable"
    root.mkdir()
    root.chmod(0o555)
    bench.folder.chmod(0o755)

    def somebody():
        no_loading()
        codecs.lookup("utf-8-sig")  # Python's own files may not be readable to others
        if os.geteuid() == 0:
            os.seteuid(65534)

    wrong = problems(run(root, somebody), 1, ["cannot be written", str(root)])
    assert not wrong, wrong
    return "said before loading"


def test_rights_lost(bench: Bench) -> str:
    "The folder can no longer be written in mid-run"
    bench.folder.chmod(0o755)
    kept = bench.folder / "rights" / "checkpoints"

    def lose():
        if os.geteuid() == 0:
            for path in kept.rglob("*"):
                path.chmod(0o755)  # to be read by the user that this process becomes
            os.seteuid(65534)
        else:
            kept.chmod(0o555)

    return bench.case("rights", at_step(lose), ["Permission denied"],
                      mend=lambda: kept.chmod(0o755))


def test_image_gone(bench: Bench, workers: int) -> str:
    "An image vanishes in mid-run"
    pairs = bench.folder / "pairs"
    return bench.case(f"image-{workers}", at_step(hide(pairs)), [".png", str(pairs)],
                      mend=lambda: unhide(pairs), num_workers=workers)


def test_worker_killed(bench: Bench) -> str:
    "A process that loads images is killed"
    return bench.case("worker", at_step(kill_workers), ["num_workers"], num_workers=1)


def test_memory(bench: Bench, size: str) -> str:
    "No memory is left"
    words = ["teacher_batch_size", "batch_size", "memory"]
    return bench.case(f"memory-{size}", at_step(take(size)), words)


def test_signal(bench: Bench, number: int, workers: int) -> str:
    "SIGTERM or Ctrl-C in mid-run: the step is finished, and a checkpoint is written at once"
    name = f"{signal.Signals(number).name}-{workers}"
    return bench.case(name, at_step(signal_me(number)), [signal.Signals(number).name],
                      status=128 + number, step=FAULT + 1, num_workers=workers)


def test_early_signal(bench: Bench, number: int) -> str:
    "The same while the latent map is fitted"
    name = f"early-{signal.Signals(number).name}"
    fault = before(training, "fit_map", signal_me(number))
    return bench.case(name, fault, ["nothing"], status=128 + number, step=None)


def test_any_moment(bench: Bench, number: int, tries: int) -> str:
    "A signal from outside at a random moment of a run, its start and its end included"
    found = []
    for k in range(tries):
        root = bench.folder / f"moment-{number}-{k}"
        delay = random.Random(k).uniform(0, 2.5)

        def poke(process, root=root, delay=delay):
            while process.is_alive() and not (root / ".holder.json").exists():
                time.sleep(0.01)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

        ended = run(root, poke=poke)
        over = (root / "record.json").exists()
        wrong = [] if over else problems(ended, 128 + number, ["Safe on disk"])
        again = run(root)
        wrong += [again.said[-300:]] * bool(again.status)
        found.append(json.loads((root / "record.json").read_text())["made_by"].get(
            "resumed_at_steps", [0]))
        wrong += unequal(results(root), bench.without_fault())
        assert not wrong, f"{k}: {wrong}"
    return f"{tries} times, went on from steps {sorted(step for steps in found for step in steps)}"


def unequal(found: dict, plain: dict) -> list[str]:
    "What of two results is not equal to the bit"
    return [f"{name} is not equal to the bit" for name in plain if found.get(name) != plain[name]]


def usage(root: Path) -> dict:
    "Of this process, of those that load for it, and of the run's folder"
    processes = [psutil.Process(), *psutil.Process().children()]
    files = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return dict(memory=sum(process.memory_info().rss for process in processes) / 1e6,
                files=psutil.Process().num_fds(), disk=sum(files) / 1e6)


def watched(root: Path, output: Path) -> Callable:
    "Not a fault: what a run uses, at the start of every so many steps"
    def install():
        update, rows = training.Loop.update, []

        def noting(self, batch, number):
            if number % SAMPLED == 0:
                rows.append(dict(step=number) | usage(root))
                output.write_text(json.dumps(rows))
            return update(self, batch, number)

        training.Loop.update = noting

    return install


def test_long(bench: Bench) -> str:
    "A run of 2,000 steps with a checkpoint every 100 and a loading process"
    root, output = bench.folder / "long", bench.folder / "usage.json"
    ended = run(root, watched(root, output), wait=LONG_WAIT, steps=LONG_STEPS, save_every=100,
                num_workers=1)
    assert ended.status == 0, ended.said[-2000:]
    rows = [row for row in json.loads(output.read_text()) if row["step"] >= SETTLED]
    growth = {name: max(row[name] for row in rows) - rows[0][name] for name in rows[0]}
    text = (f"from step {SETTLED} to {LONG_STEPS}: memory of {rows[0]['memory']:.0f} MB grows by "
            f"{growth['memory']:.1f} MB, disk of {rows[0]['disk']:.1f} MB by {growth['disk']:.2f} "
            f"MB, {rows[0]['files']} open files by {growth['files']}")
    assert growth["files"] == 0 and all(growth[name] <= GROWTH_MB[name] for name in GROWTH_MB), text
    return text


def command(*words, **env: str) -> Ended:
    "A command of this environment, in a process group of its own"
    done = subprocess.run(
        [str(word) for word in words], env={**os.environ, **env}, text=True, timeout=WAIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    return Ended(done.returncode, done.stdout)


def once_saved(root: Path, process: subprocess.Popen, action: Callable) -> None:
    "Something that happens from outside when a run has its first checkpoint, if it gets so far"
    while process.poll() is None and not list(root.glob("checkpoints/step-" + "[0-9]" * 8)):
        time.sleep(0.02)
    if process.poll() is None:
        action(process)


def poked(root: Path, action: Callable, words: list) -> Ended:
    "A command of its own, and something that happens to it once it has saved"
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, cwd=ROOT,
    )
    threading.Thread(target=once_saved, args=(root, process, action), daemon=True).start()
    said, _ = process.communicate(timeout=WAIT)
    return Ended(process.returncode, said)


def compared(bench: Bench, root: Path, again: Ended) -> list[str]:
    "What is wrong with a run of `MANY` steps that was started again"
    if again.status:
        return [f"the next run failed: {again.said[-600:]}"]
    plain = bench.folder / "plain-many"
    if not plain.exists():
        ended = run(plain, steps=MANY)
        assert ended.status == 0, f"without a fault: {ended.said[-600:]}"
    resumed = json.loads((root / "record.json").read_text())["made_by"].get("resumed_at_steps")
    return unequal(results(root), results(plain)) + ["it did not go on"] * (not resumed)


def test_command(bench: Bench, number: int) -> str:
    "The command itself: a signal from outside, then the same command again"
    root = bench.folder / f"command-{number}"
    given = SETTINGS | dict(steps=MANY, data_root=bench.folder / "pairs", out_dir=root)
    words = [sys.executable, "-m", "sdsclip_nb.training", *options(given)]
    ended = poked(root, lambda process: os.killpg(process.pid, number), words)
    wrong = problems(ended, 128 + number, [signal.Signals(number).name, "goes on from step"])
    wrong += compared(bench, root, command(*words))
    assert not wrong, wrong
    return first_line(ended)


def test_ranks(bench: Bench) -> str:
    "SIGTERM to torchrun: two processes agree on the step and write one checkpoint"
    root, plain = bench.folder / "ranks", bench.folder / "ranks-plain"
    given = SETTINGS | dict(steps=MANY, data_root=bench.folder / "pairs")
    words = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", "-m", "sdsclip_nb.training",
             *options(given), "--out_dir"]
    ended = poked(root, lambda process: process.send_signal(signal.SIGTERM), [*words, root])
    wrong = ["no message"] * ("Stopped by SIGTERM" not in ended.said)  # then torchrun's traceback
    wrong += [f"exit status {ended.status}"] * (ended.status == 0)
    for folder in (root, plain):
        again = command(*words, folder)
        assert again.status == 0, again.said[-600:]
    wrong += unequal(results(root), results(plain))
    assert not wrong, f"{wrong} {ended.said[-600:]}"
    record = json.loads((root / "record.json").read_text())
    return f"went on from {record['made_by']['resumed_at_steps']}"


def main_job(bench: Bench, root: Path, output: Path) -> list:
    "The words of the main job as a notebook"
    given = SETTINGS | dict(steps=MANY, data_root=bench.folder / "pairs", out_dir=root,
                            benchmarks="none")
    options = [word for name, value in given.items() for word in ("-p", name, value)]
    return [BIN / "papermill", "nbs/03_train.ipynb", output, *options]


def test_papermill_signal(bench: Bench, number: int) -> str:
    "A signal to papermill, which ends its kernel; then again"
    root, output = bench.folder / f"papermill-{number}", bench.folder / f"out-{number}.ipynb"
    words = main_job(bench, root, output)
    ended = poked(root, lambda process: process.send_signal(number), words)
    wrong = [f"exit status {ended.status}"] * (ended.status == 0)
    wrong += compared(bench, root, command(*words))
    assert not wrong, f"{wrong} {ended.said[-600:]}"
    record = json.loads((root / "record.json").read_text())
    return f"exit status {ended.status}, went on from {record['made_by']['resumed_at_steps']}"


def test_papermill(bench: Bench) -> str:
    "The main job as a notebook: an image vanishes, and the notebook says so; then again"
    root, pairs = bench.folder / "papermill", bench.folder / "pairs"
    output = bench.folder / "out.ipynb"
    words = main_job(bench, root, output)
    ended = poked(root, lambda process: hide(pairs)(), words)
    unhide(pairs)
    cells = json.loads(output.read_text())["cells"]
    shown = [out for cell in cells for out in cell.get("outputs", [])
             if out["output_type"] == "error"]
    wrong = ["papermill says nothing of it"] * ("goes on from step" not in ended.said)
    wrong += [f"exit status {ended.status}"] * (ended.status == 0)
    wrong += ["the notebook does not show it"] * (
        not shown or "goes on from step" not in shown[-1]["evalue"])
    wrong += compared(bench, root, command(*words))
    assert not wrong, f"{wrong} {ended.said[-600:] if wrong else ''}"
    return f"{shown[-1]['ename']} in the notebook"


class Hub(BaseHTTPRequestHandler):
    "A model hub with one model, which breaks off in the midst of its largest file while `broken`"
    folder, name, sha, broken, breaks = None, "somebody/teacher", "0" * 40, True, 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*.*")}
        if path.startswith(f"/api/models/{self.name}"):
            listed = [dict(type="file", path=name, size=file.stat().st_size, oid=file_hash(file))
                      for name, file in files.items()]
            model = dict(id=self.name, sha=self.sha, private=False, tags=[],
                         siblings=[dict(rfilename=name) for name in files])
            return self.send(json.dumps(listed if "/tree/" in path else model).encode(), "0", body)
        file = files.get(path.partition("/resolve/")[2].partition("/")[2])
        if file is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send(file.read_bytes(), file_hash(file), body, len(files))

    def send(self, content: bytes, etag: str, body: bool, size: int = 0) -> None:
        first = 0
        if span := self.headers.get("Range"):
            first = int(span.removeprefix("bytes=").partition("-")[0])
        rest = content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if not body:
            return
        if type(self).broken and len(content) > 1 << 20:
            type(self).breaks += 1
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.wfile.write(rest)


def test_download(bench: Bench) -> str:
    "The connection to the hub is lost in the midst of the teacher's weights, again and again"
    Hub.folder = ROOT / "data" / "mini" / "teacher"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0",
               HF_HOME=str(bench.folder / "hub"), HF_HUB_DISABLE_XET="1")
    own = dict(scale="paper", arch=ROOT / "data/mini/students/ViT-B-32", precision="no",
               grad="sds", eval_every=0, steps=4, data_root=bench.folder / "pairs")

    def main_job(teacher, name) -> Ended:
        given = SETTINGS | own | dict(teacher=teacher, out_dir=bench.folder / name)
        return command(sys.executable, "-m", "sdsclip_nb.training", *options(given), **env)

    Hub.broken = True
    wrong = problems(main_job(Hub.name, "download"), 1, ["download broke off", "hub's cache"])
    assert Hub.breaks, "nothing was broken off"
    Hub.broken = False
    again = main_job(Hub.name, "download")
    assert again.status == 0, again.said[-1500:]
    assert main_job(Hub.folder, "local").status == 0
    server.shutdown()
    ours, plain = (results(bench.folder / name) for name in ("download", "local"))
    assert not wrong, wrong
    assert ours == plain, "not equal to the bit"
    return f"broken off {Hub.breaks} times"


CASES = {  # name -> (test, arguments, is it short?)
    "disk full, checkpoint": (test_disk_full, ("checkpoint",), True),
    "disk full, result": (test_disk_full, ("result",), False),
    "disk full, record": (test_disk_full, ("record",), False),
    "disk full, at the start": (test_disk_full, ("start",), False),
    "disk too small": (test_disk_small, (), True),
    "file size limit": (test_file_limit, (), False),
    "read-only folder": (test_read_only, (), True),
    "unwritable folder": (test_unwritable, (), True),
    "rights lost in mid-run": (test_rights_lost, (), False),
    "image gone": (test_image_gone, (0,), True),
    "image gone, worker": (test_image_gone, (1,), False),
    "worker killed": (test_worker_killed, (), True),
    "out of memory, torch": (test_memory, ("torch",), True),
    "out of memory, Python": (test_memory, ("python",), False),
    "SIGTERM": (test_signal, (signal.SIGTERM, 0), False),
    "SIGTERM, worker": (test_signal, (signal.SIGTERM, 1), True),
    "Ctrl-C": (test_signal, (signal.SIGINT, 0), True),
    "Ctrl-C, worker": (test_signal, (signal.SIGINT, 1), False),
    "SIGTERM, map": (test_early_signal, (signal.SIGTERM,), False),
    "Ctrl-C, map": (test_early_signal, (signal.SIGINT,), False),
    "SIGTERM at any moment": (test_any_moment, (signal.SIGTERM, 6), False),
    "Ctrl-C at any moment": (test_any_moment, (signal.SIGINT, 6), False),
    "SIGTERM, the command": (test_command, (signal.SIGTERM,), False),
    "Ctrl-C, the command": (test_command, (signal.SIGINT,), False),
    "image gone, papermill": (test_papermill, (), False),
    "SIGTERM, papermill": (test_papermill_signal, (signal.SIGTERM,), False),
    "Ctrl-C, papermill": (test_papermill_signal, (signal.SIGINT,), False),
    "SIGTERM, torchrun": (test_ranks, (), False),
    "interrupted download": (test_download, (), False),
    "2,000 steps": (test_long, (), False),
}


def test(folder: Path, chosen: list[str]) -> int:
    "Run the cases; how many failed"
    write_pairs(folder / "pairs")
    bench = Bench(folder)
    counts = dict(ok=0, FAILED=0, skipped=0)
    for name in chosen:
        function, arguments, _ = CASES[name]
        try:
            word, text = "ok", function(bench, *arguments)
        except Skip as reason:
            word, text = "skipped", str(reason)
        except Exception as error:
            word, text = "FAILED", f"{type(error).__name__}: {error}"
        counts[word] += 1
        print(f"{word:<8}{name:<26} {text}", flush=True)
    print(f"{counts['ok']} passed, {counts['FAILED']} failed, {counts['skipped']} skipped")
    return counts["FAILED"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="what takes a minute")
    parser.add_argument("--say", action="store_true", help="show what every run said")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="the cases that begin so")
    args = parser.parse_args()
    chosen = [name for name, (*_, short) in CASES.items() if short or not args.short]
    if args.only:
        chosen = [name for name in CASES if name.startswith(tuple(args.only))]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        return int(test(Path(folder), chosen) > 0)


if __name__ == "__main__":
    sys.exit(main())
