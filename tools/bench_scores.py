"""Time the scorers against the schemes they replace, and print what was measured as JSON.

clip       SugarCrepe items through the batched scorer, and one at a time as the public evaluator does it. Needs the seven
           JSON files and the pictures of COCO val2017; items whose picture is not there are left out.
denoising  the teacher's score on mini-winoground: accuracy against UNet evaluations, paired and adaptive against plain.
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

from sdsclip_nb.mini import load_suite
from sdsclip_nb.reader import Images, LazyImage
from sdsclip_nb.clip_scores import ClipScorer
from sdsclip_nb.denoising_scores import DenoisingScorer, plain_errors
from sdsclip_nb.scores import suite_scores
from sdsclip_nb.student import Student
from sdsclip_nb.teacher import load_teacher


def sugarcrepe(folder: Path, pictures: Path) -> list[tuple[Path, str, str]]:
    "(picture, caption, negative caption) of all items whose picture is there"
    files = sorted(folder.glob("*.json"))
    if not files:
        sys.exit(f"{folder} holds no *.json: give SugarCrepe's data folder with --data")
    items = [item for f in files for item in json.loads(f.read_text()).values()]
    out = [(pictures / i["filename"], i["caption"], i["negative_caption"]) for i in items if (pictures / i["filename"]).is_file()]
    if not out:
        sys.exit(f"{pictures} holds none of the pictures that {folder} names: give COCO's val2017 with --images")
    return out


@torch.no_grad()
def one_at_a_time(student, items) -> np.ndarray:
    "SugarCrepe's public evaluator: open, preprocess, three passes of batch 1 at full length"
    model, out = student.model, []
    for path, *captions in items:
        texts = [model.encode_text(student.tokenizer(c), normalize=True) for c in captions]
        image = model.encode_image(student.preprocess(Image.open(path)).unsqueeze(0), normalize=True)
        out.append([float(t @ image.T) for t in texts])
    return np.array(out)


def batched(student, items, batch_size) -> np.ndarray:
    "The same through `ClipScorer`"
    paths, captions = list(dict.fromkeys(p for p, *_ in items)), list(dict.fromkeys(c for _, *cs in items for c in cs))
    place, text = ({x: k for k, x in enumerate(xs)} for xs in (paths, captions))
    i = np.array([[place[p]] for p, *_ in items])
    c = np.array([[text[x] for x in cs] for _, *cs in items])
    scorer = ClipScorer(student, batch_size, store=None, progress=False)
    return scorer.scores(Images([LazyImage(p.name, p) for p in paths]), captions, i, c)[:, 0]


def clip(args) -> dict:
    "Items a second, both ways in alternation; the ratio is the median of the rounds, so that a busy machine weighs on both"
    items = sugarcrepe(args.data, args.images)
    model, _, preprocess = open_clip.create_model_and_transforms(args.model, pretrained=None)
    student = Student(model, preprocess, open_clip.get_tokenizer(args.model), args.model, open_clip.get_model_config(args.model)).eval()
    one_at_a_time(student, items[:3])
    batched(student, items[:3], args.batch_size)  # warm
    seconds = {"one at a time": [], "batched": []}
    for _ in range(args.repeat):
        start = time.perf_counter()
        a = one_at_a_time(student, items)
        middle = time.perf_counter()
        b = batched(student, items, args.batch_size)
        seconds["one at a time"].append(middle - start)
        seconds["batched"].append(time.perf_counter() - middle)
    rate = {k: len(items) / float(np.median(v)) for k, v in seconds.items()}
    ratios = np.divide(seconds["one at a time"], seconds["batched"])
    return {
        "model": args.model, "items": len(items), "pictures": len({p for p, *_ in items}),
        "largest difference of scores": float(abs(a - b).max()), "seconds": {k: [round(x, 2) for x in v] for k, v in seconds.items()},
        "items a second": {k: round(v, 2) for k, v in rate.items()}, "ratio": round(float(np.median(ratios)), 2),
    }


def right(raw, relative) -> dict[str, float]:
    "Winoground's text and image score of (items, 2, 2) scores"
    text = (raw[:, 0, 0] > raw[:, 0, 1]) & (raw[:, 1, 1] > raw[:, 1, 0])
    image = (relative[:, 0, 0] > relative[:, 1, 0]) & (relative[:, 1, 1] > relative[:, 0, 1])
    out = {}
    for name, x in (("text", text), ("image", image)):
        low, high = proportion_confint(x.sum(), len(x), method="wilson")
        out[name] = [round(float(v), 4) for v in (x.mean(), low, high)]
    return out


def denoising(args) -> dict:
    "Accuracy and its 95 % interval against UNet evaluations an item; the sparser plain rows are evenly spaced parts of the longest"
    teacher, suite = load_teacher(args.teacher), load_suite("mini-winoground", n=args.items)
    draws = [2**k for k in range(args.draws.bit_length()) if 2**k <= args.draws]
    longest, rows = draws[-1], []
    errors = plain_errors(teacher, suite, longest, batch_size=args.teacher_batch_size)
    for d in draws:
        e = -errors[..., longest // d // 2 :: longest // d].mean(-1)
        rows.append({"scheme": "plain", "draws": d, "evaluations": 6 * d, **right(e[..., :2], e[..., :2] - e[..., 2:])})
    fixed = [("paired", {"draws": d, "strata": min(d, 2), "adaptive": False}) for d in draws if d <= args.paired_draws]
    for scheme, settings in [*fixed, ("paired, adaptive", {"draws": max(longest, 8)})]:
        scorer = DenoisingScorer(teacher, progress=False, batch_size=args.teacher_batch_size, **settings)
        suite_scores(scorer, suite)
        out = scorer.last
        mean = {k: round(float(out[k].mean()), 2) for k in ("draws", "evaluations", "settled")}
        rows.append({"scheme": scheme, **mean, **right(out["raw"], out["relative"])})
    return {"teacher": args.teacher, "items": len(suite), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["clip", "denoising"], default="clip")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--data", type=Path, default=Path("data/sugarcrepe"), help="SugarCrepe's folder of JSON files")
    parser.add_argument("--images", type=Path, default=Path("data/coco/val2017"), help="COCO's val2017")
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, with random weights")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3, help="rounds, both ways in each; the median counts")
    parser.add_argument("--teacher", default="mini")
    parser.add_argument("--teacher-batch-size", type=int, default=64)
    parser.add_argument("--items", type=int, default=400, help="of mini-winoground")
    parser.add_argument("--draws", type=int, default=64, help="most draws of the plain scheme and the adaptive one")
    parser.add_argument("--paired-draws", type=int, default=16, help="most draws of the paired scheme")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "clip" and not (args.data.is_dir() and args.images.is_dir()):
        print(f"Skipped: {args.data} or {args.images} is not there: give SugarCrepe's files (--data) and COCO's val2017 (--images)")
        return 0
    machine = {"threads": args.threads, "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"part": args.part, **(clip if args.part == "clip" else denoising)(args), **machine}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
