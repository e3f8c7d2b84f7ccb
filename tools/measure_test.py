"""Measure by the documented command: one's own pairs, recorded scores without images, a sample.

Each runs `nbs/05e_measure.ipynb` by papermill as a user would. Ends with `N passed, M failed`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from sdsclip_nb.mini import make_pairs

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = 2  # of each image of one's own
SENTENCES = [  # of two Winoground items
    ("a dog bites a man", "a man bites a dog"),
    ("a cup on a table", "a table on a cup"),
]


def measure(folder: Path, expected: int = 0, **parameters) -> str:
    "What the command prints; its result is in `folder`/result"
    given = {"out_dir": folder / "result", **parameters}
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    command = [
        sys.executable, "-m", "papermill", ROOT / "nbs" / "05e_measure.ipynb",
        folder / "out.ipynb", "--no-progress-bar", *pairs,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if (done.returncode != 0) != expected:
        raise AssertionError(f"status {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout + done.stderr


def result(folder: Path) -> tuple[dict, pd.DataFrame]:
    "The record and the metrics"
    record = json.loads((folder / "result" / "metrics.json").read_text())
    return record, pd.read_csv(folder / "result" / "metrics.csv")


def own_pairs(folder: Path) -> str:
    "one's own pairs, both ways, all captions of an image counted, links out of the folder by name"
    from PIL import Image

    pairs, lines = make_pairs(12), []
    (folder / "pairs" / "val").mkdir(parents=True)
    for number, (pixels, caption) in enumerate(zip(pairs.images, pairs.captions)):
        Image.fromarray(pixels).save(folder / "pairs" / "val" / f"{number}.png")
        for text in (caption, f"an image of {caption}"):  # two rows an image
            lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "pairs" / "val" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    given = dict(suites="retrieval", data="folder", data_root=folder / "pairs", split="val")
    image = folder / "pairs" / "val" / "0.png"
    image.symlink_to(image.rename(folder / "apart.png"))
    said = measure(folder, 1, **given)
    assert "follow_links=True" in said, said[-500:]
    measure(folder, follow_links=True, **given)
    _, metrics = result(folder)
    counts = metrics[metrics.tag == "all"].set_index("metric").n
    assert counts["R@1"] == 12, counts
    assert counts["R@10 text to image"] == 12 * CAPTIONS, counts
    said = measure(folder, 1, suites="retrieval", data_root=folder / "pairs", split="test")
    assert "test" in said, said[-500:]
    return f"{counts['R@1']} images, {counts['R@1 text to image']} captions"


def hub_pairs(folder: Path) -> str:
    "pairs of a data set as the hub has them, its columns given after the place"
    import datasets
    from PIL import Image

    pairs = make_pairs(12)
    images = [Image.fromarray(pixels) for pixels in pairs.images]
    titles = [[caption, f"an image of {caption}"] for caption in pairs.captions]
    table = datasets.Dataset.from_dict({"photo": images, "title": titles})
    datasets.DatasetDict(test=table).save_to_disk(folder / "saved")
    given = {"suites": "retrieval", "data": "hub", "split": "test"}
    measure(folder, data_root=f"{folder}/saved?caption=title", **given)
    _, metrics = result(folder)
    counts = metrics[metrics.tag == "all"].set_index("metric").n
    assert counts["R@10 text to image"] == 12 * CAPTIONS, counts
    said = measure(folder, 1, data_root=folder / "saved", **given)
    assert "?caption=NAME" in said, said[-500:]
    return f"{counts['R@1']} images, {counts['R@1 text to image']} captions"


def recorded(folder: Path) -> str:
    "Winoground's score files, with the annotation alone"
    entries, lines = [], []
    for item, captions in enumerate(SENTENCES):
        about = {"num_main_preds": 1, "collapsed_tag": "Relation"}
        images = {f"image_{k}": f"ex_{item}_img_{k}" for k in (0, 1)}
        texts = {f"caption_{k}": caption for k, caption in enumerate(captions)}
        entries.append({"id": item, **images, **texts, **about})
        lines += [
            {"label": f"{item}_c{caption}_i{image}", "score": 0.3 + 1e-12 * (caption == image)}
            for caption in (0, 1)
            for image in (0, 1)
        ]
    root = folder / "winoground"
    root.mkdir()
    for path, rows in ((root / "examples.jsonl", entries), (folder / "model.jsonl", lines)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure(folder, model=folder / "model.jsonl", suites="winoground", root=root)
    _, metrics = result(folder)
    found = metrics[metrics.tag == "all"].set_index("metric").value.to_dict()
    assert found == {"text": 1, "image": 1, "group": 1}, found
    return "scores that differ by 1e-12 are no ties"


def a_sample(folder: Path) -> str:
    "with n, the size of the sample is in the record and the table"
    measure(folder, suites="mini-order", n=20)
    record, metrics = result(folder)
    size = record["meta"]["samples"]["mini-order"]
    assert size == "20 of 1,000 items" and set(metrics["sample"]) == {size}, (size, metrics)
    assert size in (folder / "out.ipynb").read_text()
    return size


def main() -> int:
    "Run all; 0 if nothing failed"
    failed, tests = 0, (own_pairs, hub_pairs, recorded, a_sample)
    for test in tests:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"ok     {test.__name__:<12} {test(Path(folder))}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {test.__name__:<12} {error}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
