"""Time the scorers against the schemes they replace, and print what was measured as JSON.

clip       SugarCrepe items through the batched scorer, and one at a time as the public evaluator
           does it. Needs the seven JSON files and the images of COCO val2017; items whose image is
           not there are left out.
denoising  the teacher's score on mini-winoground: accuracy against evaluations of the teacher,
           paired and adaptive against plain.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from statsmodels.stats.proportion import proportion_confint

from sdsclip_nb.clip_scores import ClipScorer
from sdsclip_nb.denoising_scores import DenoisingScorer, plain_errors
from sdsclip_nb.evaluate import winoground_right
from sdsclip_nb.mini import load_suite
from sdsclip_nb.reader import Images, LazyImage
from sdsclip_nb.scores import suite_scores
from sdsclip_nb.student import Student
from sdsclip_nb.teacher import load_teacher


def sugarcrepe(folder: Path, images: Path) -> list[tuple[Path, str, str]]:
    "(image, caption, negative caption) of all items whose image is there"
    files = sorted(folder.glob("*.json"))
    if not files:
        sys.exit(f"{folder} holds no *.json: give SugarCrepe's data folder with --data")
    entries = [entry for file in files for entry in json.loads(file.read_text()).values()]
    entries = [entry for entry in entries if (images / entry["filename"]).is_file()]
    if not entries:
        sys.exit(f"{images} holds none of the images that {folder} names: "
                 "give COCO's val2017 with --images")
    return [(images / e["filename"], e["caption"], e["negative_caption"]) for e in entries]


@torch.no_grad()
def one_at_a_time(student, items) -> np.ndarray:
    "SugarCrepe's public evaluator: open, preprocess, three passes of batch 1 at full length"
    model, scores = student.model, []
    for path, *captions in items:
        texts = [model.encode_text(student.tokenizer(c), normalize=True) for c in captions]
        pixels = student.preprocess(Image.open(path)).unsqueeze(0)
        image = model.encode_image(pixels, normalize=True)
        scores.append([float(text @ image.T) for text in texts])
    return np.array(scores)


def batched(student, items, batch_size) -> np.ndarray:
    "The same through `ClipScorer`"
    paths = list(dict.fromkeys(path for path, *_ in items))
    captions = list(dict.fromkeys(caption for _, *both in items for caption in both))
    path_number = {path: k for k, path in enumerate(paths)}
    caption_number = {caption: k for k, caption in enumerate(captions)}
    image_index = np.array([[path_number[path]] for path, *_ in items])
    caption_index = np.array([[caption_number[caption] for caption in both] for _, *both in items])
    images = Images([LazyImage(path.name, path) for path in paths])
    scorer = ClipScorer(student, batch_size, store=None, progress=False)
    return scorer.scores(images, captions, image_index, caption_index)[:, 0]


def untrained(name: str) -> Student:
    "A student of open_clip's architecture `name` with random weights"
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
    tokenizer, config = open_clip.get_tokenizer(name), open_clip.get_model_config(name)
    return Student(model, preprocess, tokenizer, name, config).eval()


def clip(args) -> dict:
    "Items a second; both ways in alternation, so that a busy machine weighs on both"
    items, student = sugarcrepe(args.data, args.images), untrained(args.model)
    one_at_a_time(student, items[:3])  # warm
    batched(student, items[:3], args.batch_size)
    seconds = {"one at a time": [], "batched": []}
    for _ in range(args.repeat):
        start = time.perf_counter()
        single = one_at_a_time(student, items)
        middle = time.perf_counter()
        many = batched(student, items, args.batch_size)
        seconds["one at a time"].append(middle - start)
        seconds["batched"].append(time.perf_counter() - middle)
    rate = {way: len(items) / float(np.median(times)) for way, times in seconds.items()}
    ratios = np.divide(seconds["one at a time"], seconds["batched"])
    return {
        "model": args.model,
        "items": len(items),
        "images": len({path for path, *_ in items}),
        "largest difference of scores": float(abs(single - many).max()),
        "seconds": {way: [round(x, 2) for x in times] for way, times in seconds.items()},
        "items a second": {way: round(x, 2) for way, x in rate.items()},
        "ratio": round(float(np.median(ratios)), 2),
    }


def right(raw, relative) -> dict[str, list]:
    "Winoground's text and image score of (items, 2, 2) scores, each with its 95 % CI"
    out = {"text": winoground_right(raw)["text"], "image": winoground_right(relative)["image"]}
    for score, items in out.items():
        low, high = proportion_confint(items.sum(), len(items), method="wilson")
        out[score] = [round(float(x), 4) for x in (items.mean(), low, high)]
    return out


def plain_rows(args, teacher, suite, draws) -> list[dict]:
    "Accuracy by the plain scheme; the rows with fewer draws are evenly spaced parts of the longest"
    most = draws[-1]
    errors = plain_errors(teacher, suite, most, batch_size=args.teacher_batch_size)
    rows = []
    for count in draws:
        scores = -errors[..., most // count // 2 :: most // count].mean(-1)
        relative = scores[..., :2] - scores[..., 2:]
        rows.append({"scheme": "plain", "draws": count, "evaluations": 6 * count,
                     **right(scores[..., :2], relative)})
    return rows


def scorer_row(args, teacher, suite, scheme, **settings) -> dict:
    "Accuracy by the scorer, with the mean draws and evaluations of the teacher an item"
    batch_size = args.teacher_batch_size
    scorer = DenoisingScorer(teacher, progress=False, batch_size=batch_size, **settings)
    suite_scores(scorer, suite)
    last = scorer.last
    cost = {k: round(float(last[k].mean()), 2) for k in ("draws", "evaluations", "settled")}
    return {"scheme": scheme, **cost, **right(last["raw"], last["relative"])}


def denoising(args) -> dict:
    "Accuracy and its 95 % CI against evaluations of the teacher an item"
    teacher, suite = load_teacher(args.teacher), load_suite("mini-winoground", n=args.items)
    draws = [2**k for k in range(args.draws.bit_length())]
    rows = plain_rows(args, teacher, suite, draws)
    for count in draws:
        if count <= args.paired_draws:
            fixed = {"draws": count, "strata": min(count, 2), "adaptive": False}
            rows.append(scorer_row(args, teacher, suite, "paired", **fixed))
    rows.append(scorer_row(args, teacher, suite, "paired, adaptive", draws=max(draws[-1], 8)))
    return {"teacher": args.teacher, "items": len(suite), "rows": rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", choices=["clip", "denoising"], default="clip")
    add("--threads", type=int, default=2, help="of torch (default 2)")
    add("--data", type=Path, default=Path("data/sugarcrepe"), help="SugarCrepe's JSON files")
    add("--images", type=Path, default=Path("data/coco/val2017"), help="COCO's val2017")
    add("--model", default="ViT-B-32", help="of open_clip, with random weights")
    add("--batch-size", type=int, default=256)
    add("--repeat", type=int, default=3, help="rounds, both ways in each; the median counts")
    add("--teacher", default="mini")
    add("--teacher-batch-size", type=int, default=64)
    add("--items", type=int, default=400, help="of mini-winoground")
    add("--draws", type=int, default=64, help="most draws of the plain scheme and the adaptive one")
    add("--paired-draws", type=int, default=16, help="most draws of the paired scheme")
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.part == "clip" and not (args.data.is_dir() and args.images.is_dir()):
        print(f"Skipped: {args.data} or {args.images} is not there: "
              "give SugarCrepe's files (--data) and COCO's val2017 (--images)")
        return 0
    measured = clip(args) if args.part == "clip" else denoising(args)
    machine = {"threads": args.threads, "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"part": args.part, **measured, **machine}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
