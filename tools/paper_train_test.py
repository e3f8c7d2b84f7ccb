"""Run the main job at paper scale, in the form that the README gives, on stand-ins.

The student is ViT-B-32 in its real size, the teacher a cut-down Stable Diffusion v1-4, both with
random weights in the layout of the hub's cache; the pairs are real COCO files, the benchmark is
SugarCrepe's real files. The numbers mean nothing. What is tested, in each precision: that the
command finds, loads, trains, evaluates, draws, saves and reopens what the paper's experiment is
made of, without a network. `--device cuda` does so on a GPU. Ends with `N passed, M failed`.
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import nbformat
import open_clip
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdsclip_nb.benchmarks import load_benchmark
from sdsclip_nb.evaluate import evaluate
from sdsclip_nb.experiment import TEACHERS
from sdsclip_nb.mini import mini_tokenizer
from sdsclip_nb.student import hub_place, load_student
from sdsclip_nb.sugarcrepe import SUGARCREPE
from sdsclip_nb.tiny_pipelines import tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
PRECISIONS = ("no", "bf16", "fp16")
REVISION = "0" * 40
# The map is fitted to every image's latents, and a CPU is slow at half-precision convolutions.
SMALL = dict(steps=2, batch_size=4, n_pairs=12, map_steps=4, save_every=0)
FAMILIES = ("sdxl", "pixart-sigma", "sd3")  # beside Stable Diffusion 1, which the precisions try
DRAWN = {  # a cell of 03_train that draws -> images it shows
    "if watched: draw(": 1,  # training pairs
    "show_curves(run)": 1,
    "run.seen.items()": 2,  # h_w of them as the VAE decodes it: after the first fit, at the end
    "show_comparison(": 1,
}
COMPARISON = "show_comparison("  # the one that benchmarks="none" leaves out


def clone(folder: Path, shared: Path) -> Path:
    "A folder like a clone of this repository, with COCO and SugarCrepe where the README says"
    work = folder / "work"
    crepe = work / "data" / "sugarcrepe"
    crepe.mkdir(parents=True)
    (work / "out").mkdir()
    for name in ("settings.ini", "nbs", "sdsclip_nb"):
        (work / name).symlink_to(ROOT / name)
    (work / "data" / "coco").symlink_to(shared / "coco-mini")
    # copies: a link in a folder of data may not lead out of it
    shutil.copytree(shared / "coco-mini" / "val2017", crepe / "val2017")
    for path in (shared / "sugarcrepe").glob("*.json"):
        shutil.copyfile(path, crepe / path.name)
    return work


def snapshot(cache: Path, repo: str) -> Path:
    "The folder of a repository in the hub's cache, made as the hub's client makes it"
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    place = folder / "snapshots" / REVISION
    place.mkdir(parents=True)
    return place


def student_file(cache: Path) -> Path:
    "Where the hub's cache has the weights of OpenAI's ViT-B-32"
    repo, _ = hub_place("ViT-B-32", "openai")
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / REVISION
    return folder / "open_clip_model.safetensors"


def stand_in_student(cache: Path) -> None:
    "OpenAI's ViT-B-32 with random weights"
    model = open_clip.create_model("ViT-B-32", force_quick_gelu=True)
    repo, _ = hub_place("ViT-B-32", "openai")
    snapshot(cache, repo)
    save_file(model.state_dict(), student_file(cache))


def stand_in_unet() -> UNet2DConditionModel:
    "The blocks and shapes of Stable Diffusion v1-4, with few channels"
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    return UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(16, 16, 32, 32),
        layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=4,
        down_block_types=down, up_block_types=up,
    )  # fmt: skip


def stand_in_teacher(cache: Path) -> None:
    "Stable Diffusion v1-4 in diffusers' layout, with few channels and random weights"
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4,
        latent_channels=4, sample_size=512, scaling_factor=0.18215,
    )  # fmt: skip
    tokenizer = mini_tokenizer(context_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, stand_in_unet(), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(snapshot(cache, TEACHERS["sd-v1-4"]))


def train(work: Path, name: str, device: str, **settings) -> Path:
    "Run the main job; the folder that it wrote. Next to it lies the executed notebook"
    out = work / "out" / name
    given = SMALL | dict(out_dir=out, device=device) | settings
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    papermill = Path(sys.executable).parent / "papermill"
    documented = ["-p", "arch", "ViT-B-32", "-p", "scale", "paper"]
    command = [papermill, "nbs/03_train.ipynb", out.with_suffix(".ipynb"), *documented]
    environment = os.environ | {"HF_HUB_CACHE": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *options], cwd=work, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return out


def check_record(out: Path, precision: str, device: str) -> None:
    "The losses are finite; scale, precision and device are those asked for"
    record = json.loads((out / "record.json").read_text())
    losses = [record["values"][name] for name in ("last_clip", "last_sds")]
    assert all(0 < loss < float("inf") for loss in losses), record["values"]
    assert record["scale"] == "paper", record
    assert record["parameters"]["precision"] == precision, record["parameters"]
    on_cpu = record["made_by"]["device"] == "cpu"
    assert on_cpu == (device == "cpu"), record["made_by"]


def check_drawn(path: Path, sources: Iterable[str] = DRAWN) -> None:
    "Every cell that draws has its images"
    cells = nbformat.read(path, 4).cells
    for source in sources:
        wanted = DRAWN[source]
        cell = next(cell for cell in cells if source in cell.source)
        shown = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        assert shown == wanted, f"{source} shows {shown} images, not {wanted}"


def check_table(out: Path) -> dict:
    "The rows of the comparison, by suite, metric and tag; SugarCrepe and retrieval are there"
    rows = json.loads((out / "comparison.json").read_text())
    table = {(row["suite"], row["metric"], row["tag"]): row for row in rows}
    wanted = {("sugarcrepe", "correct", tag) for tag in ("all", *SUGARCREPE)}
    wanted.add(("coco-val-79-retrieval", "R@1", "all"))
    assert wanted <= set(table), list(table)
    return table


def check_weights(work: Path, out: Path) -> None:
    "What was trained has changed, and nothing else"
    before = load_file(student_file(work / "hub"))
    after = load_file(out / "student" / "open_clip_model.safetensors")
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    norms = {name for name in before if ".ln_" in f".{name}"}
    assert changed == norms, f"{sorted(changed ^ norms)[:5]} changed, or should have"


def reopened(out: Path, device: str):
    "The saved student, which has OpenAI's activation"
    student = load_student(str(out / "student"), "paper", device=device)
    activation = type(student.model.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == "QuickGELU", activation
    return student


def check_reloaded(work: Path, out: Path, device: str, after: float) -> None:
    "The saved student has the outcomes of the trained one"
    student = reopened(out, device)
    suite = load_benchmark("sugarcrepe", work / "data" / "sugarcrepe", on_error="skip")
    table = evaluate(student, [suite]).outcomes["sugarcrepe"]
    assert set(table.tag) == set(SUGARCREPE), set(table.tag)
    assert abs(table.correct.mean() - after) < 1e-9, (table.correct.mean(), after)


def check(work: Path, precision: str, device: str) -> None:
    "Run the main job in a precision, and check all that it leaves"
    out = train(work, precision, device, precision=precision)
    check_record(out, precision, device)
    check_drawn(out.with_suffix(".ipynb"))
    table = check_table(out)
    check_weights(work, out)
    check_reloaded(work, out, device, table["sugarcrepe", "correct", "all"]["after"])


def check_family(work: Path, family: str, device: str) -> None:
    "Run the main job under a teacher of another family, opened from its folder"
    teacher = work / "teachers" / family
    tiny_pipeline(family).save_pretrained(teacher)
    out = train(work, family, device, precision="bf16", teacher=teacher, benchmarks="none")
    check_record(out, "bf16", device)
    record = json.loads((out / "record.json").read_text())
    assert record["parameters"]["teacher"] == str(teacher), record["parameters"]
    check_drawn(out.with_suffix(".ipynb"), [cell for cell in DRAWN if cell != COMPARISON])
    check_weights(work, out)
    reopened(out, device)


def check_refusal() -> None:
    "Without a GPU, `--device cuda` ends at once with one line that says so"
    said = io.StringIO()
    with patch("torch.cuda.device_count", return_value=0), contextlib.redirect_stderr(said):
        status = main(["--device", "cuda"])
    assert status == 1 and said.getvalue().count("\n") == 1, (status, said.getvalue())


def tried(name: str, test: Callable, *arguments) -> bool:
    "Run a test and print its line; did it pass?"
    start = time.time()
    try:
        test(*arguments)
    except AssertionError as error:
        print(f"FAILED {name:<16} {time.time() - start:6.1f} s  {error}", flush=True)
        return False
    print(f"ok     {name:<16} {time.time() - start:6.1f} s", flush=True)
    return True


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: on a GPU (default cpu)")
    parser.add_argument(
        "--data", type=Path, default=SHARED, help="folder that holds coco-mini/ and sugarcrepe/"
    )
    args = parser.parse_args(options)
    if args.device.startswith("cuda") and not torch.cuda.device_count():
        print("torch finds no CUDA device here: run this on a machine with one", file=sys.stderr)
        return 1
    for name in ("coco-mini", "sugarcrepe"):
        if not (args.data / name).is_dir():
            print(f"skipped: {args.data.name}/{name} is not here; --data names its folder")
            print("0 passed, 0 failed")
            return 0
    passed = [tried("refusal", check_refusal)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="paper") as name:
        work = clone(Path(name), args.data.resolve())
        for stand_in in (stand_in_student, stand_in_teacher):
            stand_in(work / "hub")
        for precision in PRECISIONS:
            passed.append(tried(f"precision {precision}", check, work, precision, args.device))
        for family in FAMILIES:
            passed.append(tried(f"teacher {family}", check_family, work, family, args.device))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
