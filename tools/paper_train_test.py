"""Run the main job at paper scale on a CPU, in the form that the README gives, on stand-ins.

The student is ViT-B-32 in its real size, the teacher a cut-down Stable Diffusion v1-4, both with
random weights in the layout of the hub's cache; the pairs are real COCO files. The numbers mean
nothing. What is tested: that the command finds, loads, trains, evaluates, saves and reopens what
the paper's experiment is made of, without a network. Ends with `N passed, M failed`.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdsclip_nb.experiment import TEACHERS
from sdsclip_nb.mini import mini_tokenizer
from sdsclip_nb.student import hub_place

ROOT = Path(__file__).resolve().parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco-mini"
PRECISIONS = {"auto": "no", "bf16": "bf16"}  # asked for -> used; a CPU has no fp16
REVISION = "0" * 40
SMALL = dict(steps=2, batch_size=4, map_steps=20, device="cpu", save_every=0)


def snapshot(cache: Path, repo: str) -> Path:
    "The folder of a repository in the hub's cache, made as the hub's client makes it"
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    place = folder / "snapshots" / REVISION
    place.mkdir(parents=True)
    return place


def stand_in_student(cache: Path) -> None:
    "OpenAI's ViT-B-32 with random weights"
    model = open_clip.create_model("ViT-B-32", force_quick_gelu=True)
    repo, _ = hub_place("ViT-B-32", "openai")
    save_file(model.state_dict(), snapshot(cache, repo) / "open_clip_model.safetensors")


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
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4,
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


def train(folder: Path, precision: str) -> dict:
    "The record of the main job at paper scale"
    out = folder / precision
    given = SMALL | dict(data_root=COCO, precision=precision, out_dir=out)
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    papermill = Path(sys.executable).parent / "papermill"
    documented = ["-p", "arch", "ViT-B-32", "-p", "scale", "paper"]
    command = [papermill, "nbs/03_train.ipynb", out.with_suffix(".ipynb"), *documented]
    environment = os.environ | {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads((out / "record.json").read_text())


def check(folder: Path, precision: str) -> None:
    "The run left what it must: finite losses, a comparison, a student with OpenAI's activation"
    record = train(folder, precision)
    losses = [record["values"][name] for name in ("last_clip", "last_sds")]
    assert all(0 < loss < float("inf") for loss in losses), record["values"]
    assert record["scale"] == "paper", record
    assert record["parameters"]["precision"] == PRECISIONS[precision], record["parameters"]
    table = json.loads((folder / precision / "comparison.json").read_text())
    assert {row["metric"] for row in table} >= {"R@1"}, table
    saved = open_clip.create_model(f"local-dir:{folder / precision / 'student'}")
    activation = type(saved.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == "QuickGELU", activation


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not COCO.is_dir():
        print("skipped: ../shared/data/coco-mini is not here\n0 passed, 0 failed")
        return 0
    torch.manual_seed(0)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="paper") as name:
        folder = Path(name)
        for stand_in in (stand_in_student, stand_in_teacher):
            stand_in(folder / "hub")
        for precision in PRECISIONS:
            start = time.time()
            try:
                check(folder, precision)
                print(f"ok     precision {precision:<6} {time.time() - start:6.1f} s", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"FAILED precision {precision:<6} {error}", flush=True)
    print(f"{len(PRECISIONS) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
