"""Train with two processes and in two parts, and hold both against one process.

The two processes talk by gloo on the CPU. With the same batch of 32 pairs, one process, two
processes of 16 pairs each, and one process in two parts must end after 20 steps with the same
weights, up to the rounding of sums in another order (float32; `TOLERANCE`). Ends with
`N passed, M failed`.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import pandas as pd
import torch
from open_clip.model import set_model_preprocess_cfg
from safetensors.torch import load_file

from sdsclip_nb.losses import clip_loss, hardneg_loss
from sdsclip_nb.student import load_student, save_student
from sdsclip_nb.training import Loop, check_run, command_line, train

BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node=2")
TOLERANCE = 2e-6  # of any weight and loss; measured 6e-7, while the student moves by 0.03
NORM_TOLERANCE = 1e-4  # of the gradient's norm, up to 2; measured 2e-5, through the teacher
LEAST_MOVE = 0.01  # of the weight that moves most
PAIRS, BATCH, STEPS = 320, 32, 20
CUT = 13  # the step at which a run is broken off
SMALL = dict(
    device="cpu", n_pairs=PAIRS, batch_size=BATCH, steps=STEPS, map_steps=30, save_every=10
)
LOSSES = {
    "sds": dict(loss="clip+sds"),
    "exact": dict(
        loss="clip+sds", grad="exact", weighting="one", lam=3.0, control="shuffled-captions"
    ),
    "hardneg": dict(loss="clip+hardneg"),
    "rank": dict(loss="clip+rank", rank_timesteps=1),
    "sigmoid": dict(loss="clip"),  # of a student with SigLIP's bias
}


class Cut(Exception):
    """A run that is broken off."""


# What runs in each process ---------------------------------------------------------------------

def options(folder: Path, **settings) -> list[str]:
    "Settings as options of the command"
    given = {**SMALL, **settings, "out_dir": folder}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def sigmoid_student(folder: Path) -> Path:
    "The mini ViT-B-32 with SigLIP's bias, made once: such a student trains by the sigmoid loss"
    place = folder / "sigmoid-student"
    if not place.exists():
        student = load_student("ViT-B-32")
        student.config = student.config | dict(init_logit_bias=-25.0)
        model = open_clip.CLIP(**student.config)
        lacking, _ = model.load_state_dict(student.model.state_dict(), strict=False)
        assert lacking == ["logit_bias"], lacking
        about = open_clip.get_model_preprocess_cfg(student.model)
        set_model_preprocess_cfg(model, about)
        student.model = model
        save_student(student, place)
    return place


def settings_of(name: str, folder: Path) -> dict:
    "Those of a loss, with its student"
    return LOSSES[name] | (dict(arch=sigmoid_student(folder)) if name == "sigmoid" else {})


def train_in(folder: Path, **settings) -> None:
    "One run, from the options of the command"
    train(check_run(**command_line(options(folder, **settings))), progress=False)


@contextlib.contextmanager
def watched(path: Path, cut: bool = False):
    "Write down which pairs each step of a run takes; break it off at step `CUT` if so asked"
    update = Loop.update
    taken = []

    def noting(self, batch, number):
        if cut and number == CUT:
            raise Cut
        taken.append((number, batch["id"]))
        return update(self, batch, number)

    Loop.update = noting
    try:
        yield
    except Cut:
        assert cut
    finally:
        Loop.update = update
        path.write_text(json.dumps(taken))


def gathered_losses(rank: int, ranks: int) -> dict:
    "Value and gradients of each contrastive loss, from this process's slice of the features"
    draw = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 8, 16, generator=draw)
    negatives = torch.randn(6, 16, generator=draw).requires_grad_()
    mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    own = negatives if rank == ranks - 1 else None  # the first of two processes has none
    scale, bias = torch.tensor(10.0), torch.tensor(-3.0)
    where = dict(rank=rank, ranks=ranks)
    losses = {
        "softmax": lambda images, texts: clip_loss(images, texts, scale, **where),
        "sigmoid": lambda images, texts: clip_loss(images, texts, scale, bias, **where),
        "hardneg": lambda images, texts: hardneg_loss(images, texts, own, scale, ranks),
        "none": lambda images, texts: hardneg_loss(images, texts, None, scale, ranks),
    }
    found, shared = {}, 1 / ranks
    for name, loss in losses.items():
        both = [part[mine].clone().requires_grad_() for part in (images, texts)]
        value = loss(*both)
        value.backward()
        gradients = torch.zeros(2, 8, 16)
        for whole, part in zip(gradients, both):
            whole[mine] = 0 if part.grad is None else part.grad * shared
        if name == "hardneg" and own is not None:
            gradients = torch.cat([gradients.flatten(), own.grad.flatten() * shared])
        found[name] = dict(value=value.item(), gradients=gradients.flatten().tolist())
    return found


def work(folder: Path) -> None:
    "All that two processes have to show; torchrun starts this in each of them"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    losses = gathered_losses(rank, ranks)
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))
    for name in LOSSES:
        with watched(folder / f"{name}-taken-{rank}.json"):
            train_in(folder / f"{name}-2", **settings_of(name, folder))
    with watched(folder / f"cut-taken-{rank}.json", cut=True):
        train_in(folder / "cut-2", eval_every=10)
    torch.distributed.barrier()
    if rank == 0:
        left = sorted(path.name for path in (folder / "cut-2" / "checkpoints").glob("step-*/*"))
        (folder / "checkpoint.json").write_text(json.dumps(left))
    torch.distributed.barrier()
    with watched(folder / f"resumed-taken-{rank}.json"):
        train_in(folder / "cut-2", eval_every=10)


# What is claimed of the results ----------------------------------------------------------------

def weights(folder: Path) -> dict:
    "Of student and latent map"
    files = sorted(folder.glob("**/*.safetensors"))
    assert files, f"nothing was saved in {folder.name}"
    named = {f"{file.stem}.{k}": v for file in files for k, v in load_file(file).items()}
    return {name: value.float() for name, value in named.items()}


def difference(one: Path, two: Path) -> float:
    "The largest between any two weights of two runs"
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys(), "other weights"
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def read(path: Path):
    return json.loads(path.read_text())


def same_losses(folder: Path) -> str:
    "softmax, sigmoid and hard negatives of gathered features: values and gradients"
    whole, parts = gathered_losses(0, 1), [read(folder / f"losses-{rank}.json") for rank in (0, 1)]
    largest = 0.0
    for name, one in whole.items():
        value = sum(part[name]["value"] for part in parts) / 2
        gradients = torch.zeros(len(one["gradients"]))
        for part in parts:
            gradients[: len(part[name]["gradients"])] += torch.tensor(part[name]["gradients"])
        wrong = (gradients - torch.tensor(one["gradients"])).abs().max().item()
        largest = max(largest, wrong, abs(value - one["value"]))
        assert largest < 1e-6, f"{name}: {largest:.0e}"
    return f"within {largest:.0e}"


def same_weights(folder: Path, name: str) -> str:
    "two processes, and one in two parts, train as one process does"
    settings = settings_of(name, folder)
    train_in(folder / f"{name}-1", **settings)
    train_in(folder / f"{name}-parts", **settings, accumulate=2)
    untouched = load_student(str(settings.get("arch", "ViT-B-32"))).model.state_dict()
    trained = load_file(folder / f"{name}-1" / "student" / "open_clip_model.safetensors")
    moved = max((trained[key] - untouched[key]).abs().max().item() for key in trained)
    assert moved > LEAST_MOVE, f"the student moved by {moved:.0e} only"
    found = {kind: difference(folder / f"{name}-1", folder / f"{name}-{kind}")
             for kind in ("2", "parts")}  # fmt: skip
    text = f"two processes {found['2']:.0e}, two parts {found['parts']:.0e}; moved {moved:.0e}"
    assert max(found.values()) < TOLERANCE, text
    same_history(folder, name)
    return text


def same_history(folder: Path, name: str) -> None:
    "The curves are those of the whole batch"
    one = pd.read_csv(folder / f"{name}-1" / "history.csv")
    for kind in ("2", "parts"):
        other = pd.read_csv(folder / f"{name}-{kind}" / "history.csv")
        assert list(one) == list(other), f"{kind}: columns {list(other)}"
        wrong = (one - other).abs().max()
        norm = wrong.pop("gradient_norm")
        assert wrong.max() < TOLERANCE, f"{kind}: the losses differ by {wrong.max():.0e}"
        assert norm < NORM_TOLERANCE, f"{kind}: the gradient's norm differs by {norm:.0e}"


def each_pair_once(folder: Path) -> str:
    "in an epoch; the two processes share every batch evenly"
    for name in LOSSES:
        taken = [read(folder / f"{name}-taken-{rank}.json") for rank in (0, 1)]
        assert all(len(ids) == BATCH // 2 for of_rank in taken for _, ids in of_rank), name
        steps = PAIRS // BATCH
        for epoch in range(STEPS // steps):
            ids = [id for of_rank in taken for number, own in of_rank
                   if number // steps == epoch for id in own]  # fmt: skip
            assert len(ids) == len(set(ids)) == PAIRS, f"{name}: {len(set(ids))} of {PAIRS} pairs"
    return f"{PAIRS} pairs, {STEPS // steps} epochs"


def one_writer(folder: Path) -> str:
    "the folder of two processes holds what that of one holds"
    for name in LOSSES:
        one, two = (sorted(path.relative_to(folder / f"{name}-{kind}").as_posix()
                           for path in (folder / f"{name}-{kind}").rglob("*")
                           if "events.out" not in path.name and "tensorboard/" not in str(path))
                    for kind in "12")  # fmt: skip
        assert one == two, f"{name}: {sorted(set(one) ^ set(two))}"
        logs = list((folder / f"{name}-2" / "tensorboard").rglob("events.out*"))
        assert len({path.parent for path in logs}) <= 2, f"{name}: logs of two writers"
        processes = read(folder / f"{name}-2" / "record.json")["made_by"]["processes"]
        assert processes == 2, f"{name}: the record says {processes} processes"
    return "one record, one student, one history"


def cut_and_resumed(folder: Path) -> str:
    "two processes cut off at step 13 go on from step 10 and end with the same weights"
    left = read(folder / "checkpoint.json")
    expected = {"model.safetensors", "progress.json", "random_states_0.pkl", "random_states_1.pkl"}
    assert expected <= set(left), left
    for rank in (0, 1):
        cut, resumed = (read(folder / f"{kind}-taken-{rank}.json") for kind in ("cut", "resumed"))
        assert [number for number, _ in resumed] == list(range(10, STEPS)), resumed
        assert cut[10:] == resumed[: CUT - 10], "other pairs after the cut"
    found = difference(folder / "sds-2", folder / "cut-2")
    assert found == 0, f"the weights differ by {found:.0e}"
    history = pd.read_csv(folder / "cut-2" / "history.csv")
    evaluated = history["mini-retrieval R@1"].notna().sum()
    assert evaluated == STEPS // 10, f"{evaluated} evaluations"
    return "equal to the bit"


def as_documented(folder: Path) -> str:
    "torchrun starts the command; one of the processes prints where the result is"
    made = folder / "documented"
    done = run(*TORCHRUN, "-m", "sdsclip_nb.training", *options(made, steps=2, n_pairs=64))
    assert done.returncode == 0, tail(done)
    assert done.stdout.split() == [str(made)], done.stdout
    assert (made / "student" / "open_clip_model.safetensors").is_file()
    return "torchrun -m sdsclip_nb.training"


def by_accelerate(folder: Path) -> str:
    "`accelerate launch` starts two processes on CPUs with ACCELERATE_USE_CPU=1 and --multi_gpu"
    made = folder / "accelerate"
    words = "launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no"
    command = (BIN / "accelerate", *words.split(), "--dynamo_backend=no")
    given = options(made, steps=2, n_pairs=64, loss="clip")
    done = run(*command, "-m", "sdsclip_nb.training", *given, ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, tail(done)
    processes = read(made / "record.json")["made_by"]["processes"]
    assert processes == 2, f"the record says {processes} processes"
    return "accelerate launch, two processes"


def run(*command, **variables) -> subprocess.CompletedProcess:
    "A command with one thread a process, and further variables of the environment"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **variables}
    return subprocess.run([str(word) for word in command], env=env, text=True, capture_output=True)


def tail(done: subprocess.CompletedProcess) -> str:
    "Where a command failed: torchrun's own report comes last"
    return (done.stdout + done.stderr)[:3000]


def test(folder: Path) -> int:
    "Run the processes, then every claim; how many failed"
    torch.set_num_threads(1)
    start = time.time()
    sigmoid_student(folder)  # before two processes ask for it
    done = run(*TORCHRUN, __file__, "--worker", folder)
    assert done.returncode == 0, f"two processes failed:\n{tail(done)}"
    print(f"two processes ran, {time.time() - start:.1f} s", flush=True)
    claims = {f"same weights, {name}": lambda name=name: same_weights(folder, name)
              for name in LOSSES}  # fmt: skip
    others = (same_losses, each_pair_once, one_writer, cut_and_resumed)
    for claim in (*others, as_documented, by_accelerate):
        claims[claim.__name__.replace("_", " ")] = lambda claim=claim: claim(folder)
    failed = 0
    for name, claim in claims.items():
        start = time.time()
        try:
            word, text = "ok    ", claim()
        except AssertionError as error:
            word, text, failed = "FAILED", error, failed + 1
        print(f"{word} {name:<24} {time.time() - start:5.1f} s  {text}", flush=True)
    print(f"{len(claims) - failed} passed, {failed} failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", type=Path, help="the folder, for each of the processes")
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        return int(test(Path(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
