"""Measure the speed of the kit on this machine: figures/bench.json, a table in figures/bench.md.

efficiency  the work of student and teacher alone, as a share of a whole training step (mini scale)
plain       a plain training loop, as released code has it, against the kit's (mini scale)
unet        efficiency with Stable Diffusion's UNet at a quarter of its channels, ViT-B-32 in its
            real size, and COCO's files read by workers (see --coco)
options     what torch.compile, channels_last, TF32, kept captions and rare fetching of losses bring
loading     images a second at 224 pixels by number of workers (needs COCO's files, see --coco)
scoring     CLIP scores in batches, and denoising scores by the paired scheme
memory      of Stable Diffusion v1-4 and v2-1 at batch 32, computed; on a GPU also a real step's
main        papermill on nbs/03_train.ipynb, in a process of its own

Options that are not listed here go to papermill for the main job, such as `-p arch RN50`.
"""

import argparse
import copy
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
PACKAGES = ["torch", "open_clip_torch", "diffusers", "transformers", "accelerate"]
BLOCK = 10  # steps timed at once: the kit fetches its losses every ten
GOALS = {"efficiency": 0.95, "sds": 2.2, "exact": 1.6, "scoring": 5.0, "calls": 0.25}


def row(what: str, measured, goal=None, met=None) -> dict:
    "One line of the table"
    outcome = "" if goal is None else "met" if met else "missed"
    return {"what": what, "measured": measured, "goal": goal, "outcome": outcome}


def at_least(what: str, measured: float, goal: float) -> dict:
    "A line whose goal is a lower bound"
    return row(what, round(measured, 3), f"at least {goal}", measured >= goal)


def seconds_of(work) -> float:
    "How long a function takes, with what it left to a GPU"
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(ways: dict, blocks: int) -> dict[str, float]:
    "Median seconds a step of functions that do `BLOCK` steps, in alternation; the first is warm-up"
    seconds = {name: [] for name in ways}
    for _ in range(blocks + 1):
        for name, work in ways.items():
            seconds[name].append(seconds_of(work) / BLOCK)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


class Kit:
    "A training run of the kit at mini scale, as far as its steps"

    def __init__(self, grad: str, folder: str, steps: int, block: int = BLOCK, **settings):
        from sdsclip_nb.experiment import Experiment
        from sdsclip_nb.training import Loop, build, fit_map, run_folder, start

        small = dict(map_steps=20, trackers="none")
        self.e = Experiment(grad=grad, out_dir=folder, steps=steps, **small | settings)
        self.parts = build(self.e)
        self.e, self.block = self.parts.experiment, block
        where = run_folder(self.e)
        self.accelerator, _ = start(self.parts, where)
        fit_map(self.parts)
        self.loop = Loop(self.parts, self.accelerator, where)
        self.loop.module.train()
        self.batches = iter(self.loop.batches)
        self.number, self.last = 0, []

    def captions(self, first: int, count: int) -> list[list[str]]:
        "Of each of some steps, known without loading their images"
        from sdsclip_nb.batches import StepBatches

        items = self.parts.pairs.items
        at = StepBatches(len(items), self.e.batch_size, self.e.seed).at
        return [[items[d.index].captions[int(d.caption * len(items[d.index].captions))]
                 for d in at(step)] for step in range(first, first + count)]

    def meet(self):
        "Encode the captions of the next steps, as if they had come before"
        for captions in self.captions(self.number, self.block):
            self.parts.teacher.encode_captions(captions)

    def share_new(self) -> float:
        "Share of the captions of a run of default length that the teacher has not met yet"
        from sdsclip_nb.experiment import Experiment

        drawn = self.captions(0, Experiment().steps)
        return len({c for step in drawn for c in step}) / sum(map(len, drawn))

    def steps(self):
        "As `Loop.run` takes them, losses fetched and logged at the end"
        self.last = []
        for _ in range(self.block):
            batch = next(self.batches)
            self.loop.advance(batch, self.number)
            self.last.append(batch)
            self.number += 1
        self.loop.settle()


class Bare:
    "The work of student and teacher on the tensors of a kit's last steps, and nothing else"

    def __init__(self, kit: Kit):
        self.kit, self.ready = kit, []

    def prepare(self):
        "Tensors in place, before the clock runs"
        from sdsclip_nb.losses import draw_noise
        from sdsclip_nb.training import student_inputs

        parts = self.kit.parts
        self.ready = []
        for batch in self.kit.last:
            inputs = student_inputs(parts, batch)
            with torch.no_grad():
                outputs = parts.module(*inputs)
                drawn, noise = draw_noise(outputs["latents"], self.kit.e.timesteps)
                noisy = parts.teacher.add_noise(outputs["latents"], noise, drawn)
            conditioning = parts.teacher.encode_captions(batch["caption"])
            gradients = {name: torch.randn_like(value) for name, value in outputs.items()}
            self.ready.append((inputs, gradients, noise, noisy, drawn, conditioning))

    def steps(self):
        "Student forward and backward; teacher forward, and its input gradient if it is exact"
        parts, exact = self.kit.parts, self.kit.e.grad == "exact"
        for inputs, gradients, noise, noisy, drawn, conditioning in self.ready:
            outputs = parts.module(*inputs)
            with torch.set_grad_enabled(exact):
                latents = noisy.detach().requires_grad_(exact)
                predicted = parts.teacher.predict(latents, drawn, conditioning)
                if exact:
                    torch.autograd.grad((predicted - noise).pow(2).mean(), latents)
            kept = [name for name in outputs if outputs[name].requires_grad]
            torch.autograd.backward(
                [outputs[name] for name in kept], [gradients[name] for name in kept])
            self.kit.loop.optimizer.zero_grad()


def alone_and_whole(kit: Kit, blocks: int) -> dict[str, float]:
    "Median seconds a step: `bare` work, `whole` step with `new` captions and with `known` ones"
    bare, seconds = Bare(kit), {"bare": [], "new": [], "known": []}
    for k in range(blocks + 1):
        for captions in ("new", "known"):
            if captions == "known":
                kit.meet()
            seconds[captions].append(seconds_of(kit.steps) / kit.block)
            bare.prepare()
            seconds["bare"].append(seconds_of(bare.steps) / kit.block)
        if k == 0:  # warm-up
            seconds = {name: [] for name in seconds}
    return {name: float(np.median(times)) for name, times in seconds.items()}


def efficiency(args) -> dict:
    """Time of the bare work over that of a whole step, in alternation.

    A caption is encoded when the teacher meets it first. So a step is dearer in the first epoch
    than later; over a run it is as dear as its share of new captions makes it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blocks = 2 if args.quick else 4
    details, rows = {}, []
    for grad in ("sds", "exact"):
        with tempfile.TemporaryDirectory() as folder:
            kit = Kit(grad, folder, 2 * (blocks + 1) * BLOCK)
            new = kit.share_new()
            seconds = alone_and_whole(kit, blocks)
        seconds["run"] = new * seconds["new"] + (1 - new) * seconds["known"]
        say(f"{grad}: " + ", ".join(f"{k} {1e3 * value:.1f} ms" for k, value in seconds.items()))
        details[grad] = {"seconds a step": seconds, "share of new captions": new}
        what = f"share of a step that is student and teacher, {grad}, 1 thread: "
        rows.append(at_least(what + "over a run", seconds["bare"] / seconds["run"],
                             GOALS["efficiency"]))
        for captions in ("new", "known"):
            share = round(seconds["bare"] / seconds[captions], 3)
            rows.append(row(what + f"all captions {captions}", share))
        rows.append(row(f"ms of such a step, {grad}: what it is made of", made_of(seconds)))
    torch.set_num_threads(threads)
    return {"rows": rows, "details": details}


def quarter_of_sd1(folder: Path) -> Path:
    "Stable Diffusion v1-4's blocks with a quarter of their channels and random weights, saved"
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdsclip_nb.mini import mini_tokenizer
    from sdsclip_nb.tiny_pipelines import tiny_pipeline

    pipeline = tiny_pipeline("sd1")
    pipeline.unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(80, 160, 320, 320),
        layers_per_block=2, cross_attention_dim=192, attention_head_dim=8, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    pipeline.tokenizer = tokenizer = mini_tokenizer(context_length=77)
    pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, hidden_size=192,
        intermediate_size=768, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    pipeline.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        latent_channels=4, sample_size=512, scaling_factor=0.18215)
    pipeline.save_pretrained(folder)
    return folder


def real_size_student(folder: Path) -> Path:
    "ViT-B-32 as OpenAI's, with random weights, saved"
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    name = "ViT-B-32-quickgelu"
    model = open_clip.create_model(name)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = open_clip.get_model_config(name)
    save_config_for_hf(model, folder / "open_clip_config.json", model_config=config)
    return folder


def unet(args) -> dict:
    """As `efficiency`, nearer to the paper's models: all cores, images prepared by workers.

    Batches of 2: a step costs the same for an image, and a block of two steps takes seconds."""
    if not args.coco.is_dir():
        return skipped("unet", f"{args.coco} is not there: give COCO's folder with --coco")
    blocks, details, rows = 1 if args.quick else 3, {}, []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        teacher, student = quarter_of_sd1(folder / "teacher"), real_size_student(folder / "student")
        settings = dict(
            scale="paper", arch=str(student), teacher=str(teacher), data="coco",
            device="cuda" if torch.cuda.is_available() else "cpu",
            data_root=str(args.coco), on_error="skip", batch_size=2, precision="no", map_steps=2)
        for grad in ("sds", "exact"):
            steps = 4 * (blocks + 1)
            kit = Kit(grad, f"{tmp}/{grad}", steps, block=2, **settings)
            seconds = alone_and_whole(kit, blocks)
            del kit
            text = ", ".join(f"{k} {value:.2f} s" for k, value in seconds.items())
            say(f"{grad}: {text}")
            details[grad] = seconds
            what = (f"share of a step that is student and teacher, {grad}, quarter of SD v1-4 on "
                    f"COCO's files, {torch.get_num_threads()} threads")
            rows.append(at_least(what, seconds["bare"] / seconds["new"], GOALS["efficiency"]))
    return {"rows": rows, "details": details}


class Option:
    "A teacher's pass over latents, with the gradient in them, under one way of computing"

    def __init__(self, teacher, batch: int):
        draw = torch.Generator().manual_seed(0)
        shape = (batch, *teacher.latent_shape)
        self.teacher, self.device = teacher, teacher.device
        self.noisy = torch.randn(shape, generator=draw).to(self.device)
        self.drawn = torch.randint(20, 980, (batch,), generator=draw).to(self.device)
        self.conditioning = teacher.encode_captions(["a red square left of a blue circle"] * batch)
        self.gradient, self.collects = None, False

    def passes(self):
        "Forward and backward to the latents, and to the weights if they collect"
        latents = self.noisy.clone().requires_grad_()
        predicted = self.teacher.predict(latents, self.drawn, self.conditioning)
        error = predicted.float().pow(2).mean()
        if self.collects:
            error.backward()
        else:
            self.gradient, = torch.autograd.grad(error, latents)

    def seconds(self, repeats: int) -> float:
        "Median of one pass"
        return float(np.median([seconds_of(self.passes) for _ in range(repeats)]))


def contiguous_inputs(module, inputs, named):
    "A hook: the teacher hands its denoiser channels_last latents"
    first, *others = inputs
    return (first.contiguous(), *others), named


def one_way(name: str, teacher, batch: int, repeats: int) -> dict:
    "Seconds of a pass under one way of computing, of the first, and the gradient"
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    layout = torch.contiguous_format if name == "contiguous" else torch.channels_last
    teacher.denoiser.to(memory_format=layout)
    hooks = []
    if name == "contiguous":
        hook = teacher.denoiser.register_forward_pre_hook(contiguous_inputs, with_kwargs=True)
        hooks.append(hook)
    try:
        tf32 = "TF32" in name
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if "compiled" in name:
            teacher.denoiser.compile()
        option = Option(teacher, batch)
        first = seconds_of(option.passes)  # with compiling
        return {"first": first, "seconds": option.seconds(repeats), "gradient": option.gradient}
    except Exception as error:  # inductor's own, by what this machine lacks: no C++ compiler
        if "compiled" not in name:
            raise
        said = re.sub(r"/\S*/", "", str(error).splitlines()[0])  # without this machine's folders
        return {"skipped": f"{type(error).__name__}: {said[:160]}"}
    finally:
        teacher.denoiser._compiled_call_impl = None
        teacher.denoiser.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
        for hook in hooks:
            hook.remove()


def option_rows(what: str, teacher, batch: int, repeats: int) -> tuple[list[dict], dict]:
    "Each way against the kit's own, channels_last: times as fast, and how far the gradient moves"
    names = ["channels_last", "contiguous", "channels_last, compiled"]
    names += ["channels_last, TF32"] if torch.cuda.is_available() else []
    ways = {name: one_way(name, teacher, batch, repeats) for name in names}
    kit = ways["channels_last"]
    rows = []
    for name, found in ways.items():
        said = f"times as fast as the kit's channels_last, {what}, {name}"
        if "skipped" in found:
            rows.append(row(said, f"skipped: {found['skipped']}"))
        elif found is not kit:
            moved = (found["gradient"] - kit["gradient"]).abs().max() / kit["gradient"].abs().max()
            ratio = kit["seconds"] / found["seconds"]
            rows.append(row(said, f"{ratio:.2f}, gradient moves by {moved.item():.0e}, "
                                  f"first pass {found['first']:.1f} s"))
    for found in ways.values():
        found.pop("gradient", None)
    say(f"{what}: {ways}")
    return rows, ways


def options(args) -> dict:
    "What each way of computing brings, forward and backward through the frozen UNet"
    from sdsclip_nb.teacher import load_teacher

    repeats = 3 if args.quick else 9
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tmp}/compiled"  # a first pass compiles
        rows, details = option_rows(
            "mini UNet, batch 32", load_teacher("mini", device), 32, repeats)
        teacher = load_teacher(str(quarter_of_sd1(Path(tmp) / "teacher")), device)
        more, details["quarter"] = option_rows(
            "quarter of SD v1-4, batch 2", teacher, 2, max(2, repeats // 3))
    fetched, details["fetching"] = fetching(args)
    return {"rows": rows + more + fetched, "details": details}


def fetching(args) -> tuple[list[dict], dict]:
    "Captions kept, and losses fetched every ten steps, against each step anew; mini scale, sds"
    blocks = 2 if args.quick else 4
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit("sds", folder, 3 * (blocks + 1) * BLOCK)

        def each_step():
            kit.block = 1
            for _ in range(BLOCK):
                kit.steps()
            kit.block = BLOCK

        def anew():
            kit.parts.teacher._conditioning.clear()
            kit.steps()

        met = {name: [] for name in ("captions anew", "captions kept", "fetched each step")}
        for _ in range(blocks + 1):  # the first is warm-up
            met["captions anew"].append(seconds_of(anew) / BLOCK)
            kit.meet()
            met["captions kept"].append(seconds_of(kit.steps) / BLOCK)
            kit.meet()
            met["fetched each step"].append(seconds_of(each_step) / BLOCK)
    seconds = {name: float(np.median(times[1:])) for name, times in met.items()}
    say(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items()))
    rows = [row(f"times as long as with captions kept, a mini step, {name}",
                round(seconds[name] / seconds["captions kept"], 3))
            for name in ("captions anew", "fetched each step")]
    return rows, seconds


def made_of(seconds: dict) -> str:
    "A step with new captions, in parts"
    parts = {"student and teacher": seconds["bare"],
             "text encoder on new captions": seconds["new"] - seconds["known"],
             "loading, losses, optimizer": seconds["known"] - seconds["bare"]}
    return ", ".join(f"{name} {1e3 * value:.1f}" for name, value in parts.items())


def weight_gradients(teacher, repeats: int) -> dict:
    "Median seconds of a pass through a UNet that collects gradients in its weights, and without"
    passes = {}
    for name, collects in {"without": False, "with": True}.items():
        other = copy.copy(teacher)
        other.unet = copy.deepcopy(teacher.unet).requires_grad_(collects)
        passes[name] = Option(other, 32)
        passes[name].collects = collects
    seconds = {name: [] for name in passes}
    for _ in range(repeats + 1):  # the first is warm-up
        for name, option in passes.items():
            seconds[name].append(seconds_of(option.passes))
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


class Plain:
    "The same training as released code writes it: nothing kept, nothing frozen, decoded in line"

    def __init__(self, kit: Kit, way: str):
        self.e, self.way, self.number = kit.e, way, 0
        source = kit.parts
        self.device, self.items = source.device, source.pairs.items
        self.draws = iter(kit.loop.batches.batch_sampler)
        self.student = copy.deepcopy(source.student)
        self.map = copy.deepcopy(source.latent_map)
        teacher = source.teacher
        self.scheduler, self.tokenizer = teacher.scheduler, teacher.tokenizer
        self.encoder = copy.deepcopy(teacher.text_encoder).requires_grad_(True)
        self.unet = copy.deepcopy(teacher.unet).requires_grad_(True)
        self.unet.to(memory_format=torch.contiguous_format)
        self.alphas = teacher.alphas_cumprod
        self.files = [jpeg(source.pairs[i].image) for i in range(len(source.pairs))]
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.trained += list(self.map.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, self.e.lr, weight_decay=0.0)

    def steps(self):
        "Ten steps"
        for _ in range(BLOCK):
            self.step(next(self.draws))

    def load(self, draws) -> tuple:
        "Images decoded and prepared, and captions"
        opened = [Image.open(io.BytesIO(self.files[d.index])).convert("RGB") for d in draws]
        images = torch.stack([self.student.preprocess(image) for image in opened])
        own = [self.items[d.index].captions for d in draws]
        captions = [some[int(d.caption * len(some))] for some, d in zip(own, draws)]
        return images.to(self.device), captions

    def step(self, draws):
        "One optimizer step"
        images, captions = self.load(draws)
        features = self.student.model.encode_image(images)
        texts = self.student.model.encode_text(self.student.tokenizer(captions).to(self.device))
        scores = F.normalize(features, dim=-1) @ F.normalize(texts, dim=-1).T
        logits = self.student.model.logit_scale.exp() * scores
        labels = torch.arange(len(images), device=self.device)
        clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss = clip + self.e.lam * self.sds(self.map(features), captions)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.e.clip_grad)
        self.optimizer.step()
        self.unet.zero_grad()
        loss.item()

    def sds(self, latents, captions) -> torch.Tensor:
        "The denoising error, or DreamFusion's stop-gradient loss with the same gradient as `sds`"
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.tokenizer.model_max_length).input_ids
        with torch.no_grad():
            hidden = self.encoder(ids.to(self.device))[0]
        first, last = self.e.timesteps
        drawn = torch.randint(first, last + 1, (len(latents),), device=self.device)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, drawn)
        weight = (1 - self.alphas[drawn]).view(-1, 1, 1, 1)
        if self.way == "autograd":
            predicted = self.unet(noisy, drawn, hidden).sample
            return (weight * (predicted - noise) ** 2).mean()
        with torch.no_grad():
            predicted = self.unet(noisy, drawn, hidden).sample
        target = (latents - weight * (predicted - noise)).detach()
        return 0.5 * F.mse_loss(latents, target)


def known_captions(kits: dict, blocks: int) -> dict[str, float]:
    "Median seconds a step of the kit where the teacher has met the captions"
    seconds = {f"kit, {grad}": [] for grad in kits}
    for _ in range(blocks):
        for grad, kit in kits.items():
            kit.meet()
            seconds[f"kit, {grad}"].append(seconds_of(kit.steps) / BLOCK)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def jpeg(image) -> bytes:
    "An image as a file"
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def plain(args) -> dict:
    "Seconds of a step of the plain loop over those of the kit's"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blocks = 2 if args.quick else 4
    with tempfile.TemporaryDirectory() as tmp:
        steps = (2 * blocks + 1) * BLOCK
        kits = {grad: Kit(grad, f"{tmp}/{grad}", steps) for grad in ("sds", "exact")}
        loops = {way: Plain(kits["sds"], way) for way in ("autograd", "stop-gradient")}
        ways = {f"kit, {grad}": kit.steps for grad, kit in kits.items()}
        ways |= {f"plain, {way}": loop.steps for way, loop in loops.items()}
        seconds = alternate(ways, blocks)
        known = known_captions(kits, blocks)
        new = kits["sds"].share_new()
        alone = weight_gradients(kits["exact"].parts.teacher, 5 * blocks)
    for name, value in known.items():
        seconds[f"{name}, known"] = value
        seconds[f"{name}, run"] = new * seconds[name] + (1 - new) * value
    torch.set_num_threads(threads)
    say(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items()))
    rows = []
    for grad, way in (("sds", "autograd"), ("sds", "stop-gradient"), ("exact", "autograd")):
        ratio = seconds[f"plain, {way}"] / seconds[f"kit, {grad}, run"]
        what = f"times as fast as a plain loop ({way}), {grad}, 1 thread, over a run"
        rows.append(at_least(what, ratio, GOALS[grad]))
    rows.append(row("of which the UNet alone, exact: times as fast without weight gradients",
                    round(alone["with"] / alone["without"], 2)))
    return {"rows": rows, "details": {"seconds a step": seconds, "UNet alone": alone}}


def loading(args) -> dict:
    "Images a second by workers, and what a step takes"
    import open_clip

    from sdsclip_nb.batches import PairBatches
    from sdsclip_nb.pairs import load_pairs

    if not args.coco.is_dir():
        return skipped("loading", f"{args.coco} is not there: give COCO's folder with --coco")
    pairs = load_pairs("coco", args.coco, on_error="skip")
    preprocess = open_clip.image_transform(224, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    count = 4 if args.quick else 12
    rates = {}
    for workers in (0, 1, 2):
        batches = iter(PairBatches(pairs, preprocess, tokenizer, 32, num_workers=workers))
        for _ in range(1 + 2 * workers):  # what the workers prepared while they started
            size = len(next(batches)["image"])
        seconds = seconds_of(lambda ahead=batches: [next(ahead) for _ in range(count)])
        rates[workers] = size * count / seconds
        say(f"{workers} workers: {rates[workers]:.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit("sds", folder, 3 * BLOCK)
        needed = kit.e.batch_size / alternate({"step": kit.steps}, 2)["step"]
    rows = [row(f"images/s at 224 pixels, {n} workers", round(rate)) for n, rate in rates.items()]
    rows.append(row("images/s that a step of batch 32 takes, mini scale, sds", round(needed)))
    rows.append(row("images/s for one pass over COCO in 5 minutes (sds on an H100)",
                    round(118_287 / 300)))
    return {"rows": rows, "details": {"images": len(pairs), "rates": rates, "needed": needed}}


def scoring(args) -> dict:
    "By tools/bench_scores.py"
    import bench_scores

    rows, details = [], {}
    crepe, images = args.sugarcrepe, args.coco / "val2017"
    if crepe.is_dir() and images.is_dir():
        options = Namespace(data=crepe, images=images, model="ViT-B-32", batch_size=256,
                            repeat=1 if args.quick else 2)
        details["clip"] = found = bench_scores.clip(options)
        what = f"times as fast as one at a time, CLIP scores of {found['items']} SugarCrepe items"
        rows.append(at_least(what, found["ratio"], GOALS["scoring"]))
    else:
        rows += skipped("CLIP scores", f"{crepe} or {images} is not there")["rows"]
    say("denoising scores")
    details["denoising"], line = denoising(bench_scores, 10 if args.quick else 40)
    return {"rows": [*rows, line], "details": details}


def denoising(bench_scores, items: int) -> tuple[dict, dict]:
    "Calls of the UNet by the paired, adaptive scheme against the plain scheme's, as many draws"
    options = Namespace(teacher="mini", items=items, draws=64, paired_draws=0,
                        teacher_batch_size=64)
    found = bench_scores.denoising(options)
    most = max(r["evaluations"] for r in found["rows"] if r["scheme"] == "plain")
    ours = found["rows"][-1]
    share, goal = ours["evaluations"] / most, GOALS["calls"]
    what = (f"share of the plain scheme's UNet calls (64 draws), denoising scores of {items} items"
            f"; text {ours['text'][0]:.3f}, plain {found['rows'][-2]['text'][0]:.3f}")
    return found, row(what, round(share, 3), f"at most {goal}", share <= goal)


def memory(args) -> dict:
    "Computed from the settings; on a GPU also measured in real steps"
    try:
        from sdsclip_nb.cost import memory_table
    except ImportError:
        return skipped("memory", "sdsclip_nb.cost is not available")
    table = memory_table()
    rows = []
    for entry in table.to_dict("records"):
        numbers = ", ".join(f"{name} {value:.1f}" for name, value in entry.items()
                            if isinstance(value, float))
        rows.append(row(f"GB, {entry['teacher']}, {entry['way']}", numbers))
    if torch.cuda.is_available():
        rows += [on_gpu(grad) for grad in ("sds", "exact")]
        rows += passes_over_coco()
    return {"rows": rows, "details": {"table": table.to_dict("records")}}


def on_gpu(grad: str) -> dict:
    "Most memory of ten real steps at mini scale"
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit(grad, folder, BLOCK)
        torch.cuda.reset_peak_memory_stats()
        kit.steps()
    peak = torch.cuda.max_memory_allocated() / 1e9
    return row(f"GB allocated at most in ten steps, mini scale, {grad}", round(peak, 3))


def passes_over_coco() -> list[dict]:
    """Stable Diffusion v1-4's UNet on a GPU: share of the peak, hours for one pass over COCO.

    On random weights and latents, which cost what real ones do; the paper names six hours."""
    import diffusers

    from sdsclip_nb.cost import COCO_PAIRS, PEAK, denoiser_config, denoiser_flops

    config = denoiser_config("sd-v1-4")
    unet = diffusers.UNet2DConditionModel.from_config(config).to("cuda", torch.bfloat16)
    unet.to(memory_format=torch.channels_last).requires_grad_(False).eval()
    place = dict(device="cuda", dtype=torch.bfloat16)
    hidden, drawn = torch.randn(16, 77, 768, **place), torch.full((16,), 500, device="cuda")
    noisy = torch.randn(16, 4, 64, 64, **place)
    card = next((name for name in PEAK if name in torch.cuda.get_device_name()), None)
    rows = []
    for grad, flops in denoiser_flops(config).items():

        def work(exact=grad == "exact"):
            with torch.set_grad_enabled(exact):
                latents = noisy.clone().requires_grad_(exact)
                error = unet(latents, drawn, hidden).sample.float().pow(2).mean()
                if exact:
                    torch.autograd.grad(error, latents)

        seconds = float(np.median([seconds_of(work) for _ in range(7)][2:])) / len(noisy)
        share = f", {flops / seconds / PEAK[card]:.0%} of {card}'s peak" if card else ""
        rows.append(row(f"hours for one pass over COCO, teacher alone, {grad} (paper: 6)",
                        f"{COCO_PAIRS * seconds / 3600:.2f}{share}"))
    return rows


# In a small process of its own: what a process held before it started a program counts as that
# program's peak, and this one has held a UNet.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""


def time_once(options: list[str]) -> tuple[float, int]:
    "Seconds that one run of the main job takes, and its peak memory as the system counts it"
    papermill = Path(sys.executable).with_name("papermill")
    with tempfile.TemporaryDirectory() as tmp:
        peak = Path(tmp) / "peak"
        command = [papermill, "nbs/03_train.ipynb", Path(tmp) / "run.ipynb", "--no-progress-bar"]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", MEASURED, peak, *command, *options], cwd=ROOT, check=True
        )
        return time.perf_counter() - start, int(peak.read_text())


def main_job(args) -> dict:
    "Seconds and peak memory of nbs/03_train.ipynb"
    options = [*(["-p", "steps", "50"] if args.quick else []), *args.options]
    runs = [time_once(options) for _ in range(args.repeat)]
    seconds = [round(taken, 1) for taken, _ in runs]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    peak = round(max(memory for _, memory in runs) * unit / 1e6)
    said = f" ({' '.join(options)})" if options else ""
    rows = [row(f"seconds of the main job{said}", min(seconds)),
            row("MB of memory of the main job, at most", peak)]
    return {"rows": rows, "details": {"seconds": seconds, "peak_memory_mb": peak}}


PARTS = {"efficiency": efficiency, "plain": plain, "unet": unet, "options": options,
         "loading": loading, "scoring": scoring, "memory": memory, "main": main_job}


def say(text: str):
    "A line of progress"
    print(f"  {text}", flush=True)


def skipped(what: str, why: str) -> dict:
    "A part that cannot run here"
    say(f"skipped: {why}")
    return {"rows": [row(what, f"skipped: {why}")], "details": {}}


def machine() -> dict:
    "Where the numbers come from"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"device": name or platform.machine(), "machine": platform.machine(),
            "cpus": os.cpu_count(), "load": [round(x, 2) for x in os.getloadavg()],
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES}}


def table_of(result: dict) -> str:
    "The table, as Markdown"
    where = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    lines = [f"{where['device']}, {where['cpus']} CPU cores, load {where['load'][0]} at the start, "
             f"Python {where['python']}, {versions}; {result['seconds']} s in all.", "",
             "| part | what | measured | goal | |", "|---|---|---|---|---|"]
    for part, found in result["parts"].items():
        for line in found["rows"]:
            cells = [part, line["what"], line["measured"], line["goal"] or "", line["outcome"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART")
    add("--quick", action="store_true", help="fewer steps, and a main job of 50")
    add("--repeat", type=int, default=1, help="runs of the main job (default 1)")
    add("--coco", type=Path, default=SHARED / "coco-mini", help="COCO's folder")
    add("--sugarcrepe", type=Path, default=SHARED / "sugarcrepe", help="SugarCrepe's JSON files")
    add("--out", type=Path, help="folder of bench.json and bench.md (default: figures, "
                                 "with --quick or --only out/bench)")
    args, args.options = parser.parse_known_args()
    return args


def folder_of(args) -> Path:
    "A part of the numbers, or quick ones, do not replace those in figures/"
    whole = not args.quick and set(args.only) == {*PARTS}
    return ROOT / ("figures" if whole else "out/bench")


def write(result: dict, folder: Path):
    "After every part: what was measured stays if a later part fails"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "bench.md").write_text(table_of(result))


def main() -> int:
    args = parse()
    start = time.perf_counter()
    result = {"machine": machine(), "quick": args.quick, "seconds": None, "parts": {}}
    args.out = args.out or folder_of(args)
    for part in args.only:
        print(part, flush=True)
        try:
            result["parts"][part] = PARTS[part](args)
        except subprocess.CalledProcessError as error:
            print(f"the main job failed with exit status {error.returncode}", file=sys.stderr)
            return 1
        result["seconds"] = round(time.perf_counter() - start, 1)
        write(result, args.out)
    print(table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
