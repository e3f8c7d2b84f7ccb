"""What `bad_input_test.py` tries: one entry a fault, by class, with what has to come of it.

A fault of data is loaded twice: with on_error='raise', where the error has to hold `words`, and
with 'skip', where the item has to be counted and the others kept. A fault that makes the whole
source unusable is raised both times. `Takes` is for what looks odd and is right: the value is
checked.
"""

import csv
import gzip
import io
import json
import os
import shutil
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdsclip_nb.benchmarks import load_benchmark
from sdsclip_nb.experiment import from_root, make_experiment
from sdsclip_nb.mini import load_suite
from sdsclip_nb.pairs import load_pairs
from sdsclip_nb.recorded_scores import RecordedScorer
from sdsclip_nb.student import load_student
from sdsclip_nb.suite import subset
from sdsclip_nb.teacher import load_teacher

DEEP = "[" * 50_000 + "]" * 50_000
SURROGATE = '"a \\ud800 dog"'  # of JSON: half of a pair of UTF-16
GOOD = 2  # items without a fault beside each bad one


class Case(NamedTuple):
    "One fault under one way of loading."

    group: str
    name: str
    run: Callable[[Path], Any]  # in a folder of its own
    words: tuple = ()  # that the error has to hold
    skips: int = 0  # items to be counted as left out, of those the first one named with `words`
    check: Callable | None = None  # of the value, where it is rightly taken


CASES: list[Case] = []


def fails(group: str, name: str, run: Callable, *words: str) -> None:
    "A fault that has to be an error"
    CASES.append(Case(group, name, run, words))


def takes(group: str, name: str, run: Callable, check: Callable) -> None:
    "What looks odd and is right"
    CASES.append(Case(group, name, run, check=check))


def bad_item(group: str, name: str, load: Callable, *words: str, left: int = GOOD) -> None:
    "A fault of one item: an error, and with 'skip' counted while `left` others stay"
    CASES.append(Case(group, name, lambda f: load(f, "raise"), words))
    CASES.append(
        Case(group, f"{name}, skip", lambda f: load(f, "skip"), words, 1, lambda d: len(d) == left)
    )


def bad_source(group: str, name: str, load: Callable, *words: str) -> None:
    "A fault of the whole source: an error either way"
    for on_error in ("raise", "skip"):
        said = name if on_error == "raise" else f"{name}, skip"
        CASES.append(Case(group, said, lambda f, how=on_error: load(f, how), words))


# Writers ----------------------------------------------------------------------------------------


def photo(seed: int = 0, size: tuple = (8, 6), mode: str = "RGB") -> Image.Image:
    "A small image of noise"
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    "An image file"
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(path: Path, content: bytes | str | Callable) -> None:
    "Bytes, text, or whatever a function makes at a path"
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(
            content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        )


def good_folder(folder: Path) -> None:
    "Two pairs of image and caption file"
    for k in range(GOOD):
        write(folder / f"good{k}.png", encoded(photo(k)))
        write(folder / f"good{k}.txt", f"good caption {k}")


def image_file(content, name: str = "bad.png") -> Callable:
    "Loads a folder that holds one more image"

    def load(folder, on_error):
        good_folder(folder)
        write(folder / name, content)
        write(folder / f"{Path(name).stem}.txt", "a caption")
        pairs = load_pairs("folder", folder, on_error=on_error)
        for k in range(len(pairs)):  # without 'skip' an image is opened when it is its turn
            pairs[k]
        return pairs

    return load


def caption_file(content, name: str = "bad.txt") -> Callable:
    "Loads a folder that holds one more caption file"

    def load(folder, on_error):
        good_folder(folder)
        write(folder / "bad.png", encoded(photo(9)))
        write(folder / name, content)
        return load_pairs("folder", folder, on_error=on_error)

    return load


def table(content, name: str = "captions.csv", images=("a.png", "b.png", "c.png")) -> Callable:
    "Loads a folder of three images with a table"

    def load(folder, on_error):
        for k, image in enumerate(images):
            write(folder / image, encoded(photo(k)))
        write(folder / name, content)
        return load_pairs("folder", folder, on_error=on_error)

    return load


def lines(*bad: str) -> Callable:
    "Loads a metadata.jsonl of two good lines and these"
    good = [json.dumps(dict(file_name=f"{x}.png", text=f"caption {x}")) for x in "ab"]
    return table("\n".join([*good, *bad]) + "\n", "metadata.jsonl")


def coco_data(change: Callable = lambda data: None) -> dict:
    "Annotations of three images, changed"
    data = dict(
        images=[dict(id=k, file_name=f"{k}.jpg") for k in range(3)],
        annotations=[dict(image_id=k, caption=f"caption {k}") for k in range(3)],
    )
    change(data)
    return data


def coco(content) -> Callable:
    "Loads COCO of these annotations: a change of three good ones, or the file's content"

    def load(folder, on_error):
        data = content
        if callable(content) and getattr(content, "changes", True):
            data = json.dumps(coco_data(content))
        for k in range(3):
            write(folder / "train2017" / f"{k}.jpg", encoded(photo(k), "JPEG"))
        write(folder / "annotations" / "captions_train2017.json", data)
        return load_pairs("coco", folder, on_error=on_error)

    return load


def file_of(function: Callable) -> Callable:
    "Marks a function that makes something at a path, not one that changes entries"
    function.changes = False
    return function


def flickr(change: Callable) -> Callable:
    "Loads Flickr30k of three entries, changed"

    def load(folder, on_error):
        images = [
            dict(filename=f"{k}.jpg", split="train", sentences=[dict(raw=f"caption {k}")])
            for k in range(3)
        ]
        change(images)
        for k in range(3):
            write(folder / "flickr30k-images" / f"{k}.jpg", encoded(photo(k), "JPEG"))
        write(folder / "dataset_flickr30k.json", json.dumps(dict(images=images)))
        return load_pairs("flickr30k", folder, on_error=on_error)

    return load


def add_to(tar: tarfile.TarFile, name: str, content: bytes = b"", **about) -> None:
    "One member"
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def good_shard(tar: tarfile.TarFile, keys: str = "ab") -> None:
    "Two good samples"
    for k, key in enumerate(keys):
        add_to(tar, f"{key}.jpg", encoded(photo(k), "JPEG"))
        add_to(tar, f"{key}.txt", f"caption {key}".encode())


def shard(fill: Callable | None = None, after: Callable | None = None, **options) -> Callable:
    "Loads a shard of two good samples and what `fill` adds; `after` changes the file's bytes"

    def load(folder, on_error):
        folder.mkdir(exist_ok=True)
        path = folder / "train-0.tar"
        with tarfile.open(path, "w", **options) as tar:
            good_shard(tar)
            if fill:
                fill(tar)
        if after:
            path.write_bytes(after(path.read_bytes()))
        return load_pairs("shards", folder, on_error=on_error)

    return load


def sample(name: str = "bad", **files: bytes) -> Callable:
    "Adds one sample to a shard, its files by their endings"
    return lambda tar: [add_to(tar, f"{name}.{kind}", data) for kind, data in files.items()]


def fifo(path: Path) -> None:
    "A pipe that nobody writes to"
    os.mkfifo(path)


def folder_there(path: Path) -> None:
    "A folder where a file should be"
    path.mkdir(parents=True)


def socket_there(path: Path) -> None:
    "A Unix socket where a file should be; by its short name, which has a limit"
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: str | Path) -> Callable:
    "A symbolic link"
    return lambda path: path.symlink_to(target)


def outside(kind: str = "file", levels: int = 2) -> Callable:
    "A link to something beside the source's folder, so many levels above"

    def make(path):
        place = path.parents[levels - 1] / "elsewhere"
        place.mkdir(exist_ok=True)
        write(place / "secret.png", encoded(photo(7)))
        path.symlink_to(place / "secret.png" if kind == "file" else place)

    return make


# Images -----------------------------------------------------------------------------------------


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    "A grey PNG of any stated size"

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def raster(array: np.ndarray, kind: str = "TIFF") -> bytes:
    "An image file of an array of any type"
    return encoded(Image.fromarray(array), kind)


def frames(kind: str) -> bytes:
    "Two frames, the first red"
    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    return encoded(red, kind, save_all=True, append_images=[blue], duration=100)


def is_red(data) -> bool:
    "Is the pair that was added of a red image?"
    return near(data, (255, 0, 0))


def added(data) -> Image.Image:
    "The image that was added to the folder"
    return next(data[k].image for k in range(len(data)) if not data[k].id.startswith("good"))


def near(data, colour: tuple, within: int = 40) -> bool:
    "Is the middle of the added image of about this colour?"
    image = added(data)
    found = image.getpixel((image.width // 2, image.height // 2))
    return max(abs(a - b) for a, b in zip(found, colour)) <= within


def images() -> None:
    "Broken, odd and hostile images"
    whole = {
        kind: encoded(photo(5, (40, 30)), kind)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    }
    for kind, data in whole.items():
        bad_item(
            "images", f"{kind} cut in the middle", image_file(data[: len(data) // 2]), "bad.png"
        )
        bad_item("images", f"{kind}: only its first 10 bytes", image_file(data[:10]), "bad.png")
    crc = bytearray(whole["PNG"])
    crc[60] ^= 255
    broken = {
        "empty file": b"",
        "one byte": b"\x00",
        "a web page": b"<!DOCTYPE html><title>404</title>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj",
        "EPS, which Pillow gives to a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
        b"%%EndComments\nnewpath 0 0 moveto\nshowpage\n%%EOF\n",
        "PNG with a wrong checksum": bytes(crc),
        "PNG of no height": png(10, 0),
        "PNG of no width": png(0, 10),
        "PNG that states 60000 x 60000": png(60_000, 60_000),
        "PNG whose pixels are 20000 x 20000 zeros": png(20_000, 20_000, bytes(20_001 * 400)),
        "PNG without pixels": png(8, 8),
        "float TIFF in 0..1": raster(np.random.rand(6, 8).astype(np.float32)),
        "float TIFF in 0..255": raster(255 * np.random.rand(6, 8).astype(np.float32)),
        "float TIFF of NaN": raster(np.full((6, 8), np.nan, np.float32)),
        "32-bit TIFF beyond 16 bit": raster(np.full((6, 8), 2**20, np.int32)),
        "32-bit TIFF below 0": raster(np.full((6, 8), -5, np.int32)),
        "gzip of a PNG": gzip.compress(whole["PNG"]),
        "NumPy array": b"\x93NUMPY\x01\x00" + bytes(100),
        "pickle": b"\x80\x04\x95" + bytes(50),
    }
    for name, content in broken.items():
        bad_item("images", name, image_file(content), "bad.png")
    places = dict(
        folder=folder_there,
        pipe=file_of(fifo),
        socket=socket_there,
        device=link_to("/dev/zero"),
        loop=link_to("bad.png"),
        dangling=link_to("not-there.png"),
    )
    for name, make in places.items():
        if name == "folder":  # not a file: a folder of that name is none of the images
            takes(
                "images",
                "a folder named bad.png",
                lambda f, m=make: image_file(m)(f, "raise"),
                lambda data: len(data) == GOOD,
            )
        else:
            bad_item("images", f"{name} in an image's place", image_file(make), "bad.png")
    bad_item("images", "link that leaves the folder", in_sub(image_file(outside())), "follow_links")
    odd_images(whole)


def in_sub(load: Callable) -> Callable:
    "The same in a folder below, so that there is a place beside it"

    def inner(folder, on_error):
        (folder / "source").mkdir()
        return load(folder / "source", on_error)

    return inner


def odd_images(whole: dict) -> None:
    "What looks odd and is right"
    red = Image.new("RGB", (8, 6), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    alpha = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    taken = {
        "CMYK JPEG": (encoded(red.convert("CMYK"), "JPEG"), is_red),
        "palette PNG": (encoded(red.convert("P")), is_red),
        "palette PNG with transparency": (
            encoded(Image.new("P", (8, 6), 0), transparency=0),
            lambda d: near(d, (255,) * 3),
        ),
        "transparent PNG": (encoded(alpha), lambda d: near(d, (255,) * 3)),
        "grey and alpha": (encoded(alpha.convert("LA")), lambda d: near(d, (255,) * 3)),
        "black and white": (encoded(Image.new("1", (8, 6), 1)), lambda d: near(d, (255,) * 3)),
        "16-bit grey PNG": (
            encoded(Image.new("I;16", (8, 6), 32896)),
            lambda d: near(d, (128,) * 3, 2),
        ),
        "animated GIF: its first frame": (frames("GIF"), is_red),
        "animated WebP: its first frame": (frames("WEBP"), is_red),
        "animated PNG: its first frame": (frames("PNG"), is_red),
        "TIFF of two pages: the first": (frames("TIFF"), is_red),
        "orientation in EXIF": (
            encoded(red, "JPEG", exif=exif),
            lambda d: added(d).size == (6, 8) and is_red(d),
        ),
        "JPEG named .png": (encoded(red, "JPEG"), is_red),
        "progressive JPEG": (encoded(red, "JPEG", progressive=True), is_red),
        "grey JPEG": (encoded(red.convert("L"), "JPEG"), lambda d: near(d, (76,) * 3)),
        "bytes after the end": (encoded(red) + b"trailing bytes", is_red),
        "1 x 1": (encoded(Image.new("RGB", (1, 1), "red")), is_red),
        "30000 x 1": (encoded(Image.new("RGB", (30_000, 1), "red")), is_red),
        "1 x 30000": (encoded(Image.new("RGB", (1, 30_000), "red")), is_red),
        "broken EXIF": (encoded(red, "JPEG", exif=b"Exif\x00\x00broken"), is_red),
        "YCbCr TIFF": (encoded(red.convert("YCbCr"), "TIFF"), is_red),
        "BMP": (encoded(red, "BMP"), is_red),
    }
    for name, (content, check) in taken.items():
        takes("images", name, lambda f, c=content: image_file(c)(f, "raise"), check)
    names = [
        "bad.PNG",
        "a b.png",
        "a%20b.png",
        "it's.png",
        'a"b.png',
        "é.png",
        "e\u0301.png",
        "日本.png",
        "$HOME.png",
        "-rf.png",
        "a;b.png",
        "a&b.png",
        "a\nb.png",
        "a..b.png",
        "~.png",
    ]
    for name in names:
        takes(
            "images",
            f"the name {name!r}",
            lambda f, n=name: image_file(encoded(red), n)(f, "raise"),
            is_red,
        )
    raw = os.fsdecode(b"\xff\xfe.png")
    bad_item("images", "a name that is not UTF-8", image_file(encoded(red), raw), "UTF-8")


# Captions ---------------------------------------------------------------------------------------


def captions() -> None:
    "Captions in a .txt, and as JSON"
    files = {
        "empty": b"",
        "spaces alone": b"  \n\t\n",
        "Latin-1": "café".encode("latin-1"),
        "UTF-16 with a mark": "a dog".encode("utf-16"),
        "UTF-16 without one": "a dog".encode("utf-16-le"),
        "NUL": b"a \x00 dog",
        "binary": bytes(range(256)),
        "cut in a letter": "é".encode()[:1],
    }
    for name, content in files.items():
        bad_item("captions", f"file: {name}", caption_file(content), "bad")
    bad_item("captions", "file: missing", caption_file(b"a", "other.txt"), "bad.txt")
    bad_item("captions", "file: a pipe", caption_file(file_of(fifo)), "bad.txt")
    bad_item("captions", "file: a folder", caption_file(folder_there), "bad.txt")
    bad_item("captions", "file: a link to a device", caption_file(link_to("/dev/zero")), "bad.txt")
    bad_item(
        "captions",
        "file: a link that leaves the folder",
        in_sub(caption_file(outside())),
        "follow_links",
    )
    values = {
        "empty": '""',
        "spaces": '"  "',
        "null": "null",
        "a number": "5",
        "true": "true",
        "NaN": "NaN",
        "an object": "{}",
        "a list of numbers": "[1, 2]",
        "a nested list": '[["a"]]',
        "an empty list": "[]",
        "a lone surrogate": SURROGATE,
        "a lone low surrogate": '"\\udc00"',
        "NUL": '"a \\u0000 dog"',
        "a surrogate in a list": f"[{SURROGATE}]",
    }
    for name, value in values.items():
        line = f'{{"file_name": "c.png", "text": {value}}}'
        bad_item("captions", f"JSON: {name}", lines(line), "c.png" if name != "NaN" else "line 3")
    right = {
        "byte order mark": (b"\xef\xbb\xbfa dog", ["a dog"]),
        "CRLF": (b"a dog\r\na cat\r\n", ["a dog", "a cat"]),
        "space around": (b"  a dog  \n", ["a dog"]),
        "blank lines": (b"\n\na dog\n\n", ["a dog"]),
        "emoji": ("🐕 runs".encode(), ["🐕 runs"]),
        "right to left": ("כלב רץ".encode(), ["כלב רץ"]),
        "combining marks": ("e\u0301te\u0301".encode(), ["e\u0301te\u0301"]),
        "HTML": (b"<script>x</script>", ["<script>x</script>"]),
        "line separator of Unicode": ("a\u2028b".encode(), ["a\u2028b"]),
        "100,000 words": (b"dog " * 100_000, ["dog " * 99_999 + "dog"]),
        "percent and braces": (b"100 % of {dogs} %s", ["100 % of {dogs} %s"]),
        "tab inside": (b"a\tdog", ["a\tdog"]),
    }
    for name, (content, expected) in right.items():
        takes(
            "captions",
            f"file: {name}",
            lambda f, c=content: caption_file(c)(f, "raise"),
            lambda d, e=expected: d.captions(0) == e,
        )
    takes(
        "captions",
        "JSON: a pair of surrogates is one letter",
        lambda f: lines('{"file_name": "c.png", "text": "\\ud83d\\udc15"}')(f, "raise"),
        lambda d: d.captions(2) == ["🐕"],
    )
    takes(
        "captions",
        "JSON: a list of captions",
        lambda f: lines('{"file_name": "c.png", "text": ["a", "b"]}')(f, "raise"),
        lambda d: d.captions(2) == ["a", "b"],
    )


# CSV --------------------------------------------------------------------------------------------


def tables() -> None:
    "CSV files of captions"
    head, rows = "image,caption\n", "a.png,a dog\nb.png,a cat\n"
    whole = {
        "empty file": "",
        "blank lines": "\n\n\n",
        "header alone": head,
        "no header": rows,
        "header twice": "image,caption,caption\na.png,x,y\n",
        "the image's column twice": "image,image,caption\na.png,b.png,x\n",
        "another header": "name,words\na.png,a dog\n",
        "semicolons": "image;caption\na.png;a dog\n",
        "tabs": "image\tcaption\na.png\ta dog\n",
        "UTF-16": (head + rows).encode("utf-16"),
        "Latin-1": (head + "a.png,café\n").encode("latin-1"),
        "NUL": head + "a.png,a \0 dog\n",
        "a pipe": file_of(fifo),
        "a link to a device": link_to("/dev/zero"),
        "a field of 200,000 letters that is no caption": head.replace("\n", ",x\n")
        + f"a.png,a,{'x' * 200_000}\n",
    }
    for name, content in whole.items():
        bad_source("CSV", name, table(content), "captions.csv")
    bad_source("CSV", "a link that leaves the folder", in_sub(table(outside())), "follow_links")
    items = {
        "open quote at the end": 'c.png,"a bird\n',
        "open quote before more rows": 'c.png,"a bird\nd.png,a fish\n',
        "a row of one field": "c.png\n",
        "an empty caption": "c.png,\n",
        "an image that is not there": "d.png,x\n",
        "an empty image": ",a bird\n",
        "another case": "C.png,a bird\n",
        "the other form of a letter": "\u00e9.png,x\n",
        "a path that leads out": "../c.png,x\n",
        "an absolute path": "/etc/passwd,x\n",
        "a drive": "C:c.png,x\n",
        "backslashes": "..\\c.png,x\n",
        "a URL": "https://host/c.png,x\n",
        "the folder itself": ".,x\n",
        "an escape of a URL": "c%2Epng,x\n",
    }
    for name, row in items.items():
        bad_item("CSV", name, table(head + rows + row), "line")
    bad_item(
        "CSV",
        "an open quote that the next quote ends",
        table(head + 'a.png,"a dog\nb.png,a ""cat""\nc.png,a bird"\n' + "b.png,a\nc.png,b\n"),
        "line",
    )
    bad_item(
        "CSV",
        "a comma without quotes in a caption that stands first",
        table("caption,image\na dog,a.png\na cat,b.png\na bird, a big one,c.png\n"),
        "line 4",
        "quotes",
    )
    right = {
        "comma without quotes in a caption that stands last": (
            rows + "c.png,a bird, a big one\n",
            2,
            ["a bird, a big one"],
        ),
        "comma in quotes": (rows + 'c.png,"a bird, a big one"\n', 2, ["a bird, a big one"]),
        "quotes in quotes": (rows + 'c.png,"a ""big"" bird"\n', 2, ['a "big" bird']),
        "quotes in the middle": (rows + 'c.png,a "big" bird\n', 2, ['a "big" bird']),
        "an image twice: its captions join": (rows + "a.png,one more\n", 0, ["a dog", "one more"]),
        "no line end at the end": (rows + "c.png,a bird", 2, ["a bird"]),
        "blank lines between": (rows + "\n\nc.png,a bird\n", 2, ["a bird"]),
        "HTML": (rows + "c.png,<b>bird</b>\n", 2, ["<b>bird</b>"]),
        "a formula of a spreadsheet": (rows + "c.png,=1+1\n", 2, ["=1+1"]),
    }
    for name, (content, place, expected) in right.items():
        takes(
            "CSV",
            name,
            lambda f, c=content: table(head + c)(f, "raise"),
            lambda d, p=place, e=expected: d.captions(p) == e,
        )
    for name, content in {
        "byte order mark": ("\ufeff" + head + rows),
        "CRLF": (head + rows).replace("\n", "\r\n"),
        "CR alone": (head + rows).replace("\n", "\r"),
        "columns the other way round": "caption,image\na dog,a.png\na cat,b.png\n",
        "a further column": "image,caption,by\na.png,a dog,x\nb.png,a cat,y\n",
    }.items():
        takes(
            "CSV",
            name,
            lambda f, c=content: table(c)(f, "raise"),
            lambda d: [d.captions(k) for k in (0, 1)] == [["a dog"], ["a cat"]],
        )


# JSON -------------------------------------------------------------------------------------------


def json_files() -> None:
    "metadata.jsonl, COCO and Flickr30k"
    bad_lines = {
        "cut short": '{"file_name": "c.png", "te',
        "no object": '["c.png", "a"]',
        "a number": "5",
        "null": "null",
        "50,000 deep": DEEP,
        "deep in a value": f'{{"file_name": "c.png", "text": {DEEP}}}',
        "single quotes": "{'file_name': 'c.png'}",
        "a key twice": '{"file_name": "c.png", "text": "a", "text": "b"}',
        "the image's key twice": '{"file_name": "a.png", "file_name": "c.png", "text": "a"}',
        "no image": '{"text": "a"}',
        "no caption": '{"file_name": "c.png"}',
        "image is a number": '{"file_name": 5, "text": "a"}',
        "image is null": '{"file_name": null, "text": "a"}',
        "image is empty": '{"file_name": "", "text": "a"}',
        "path that leads out": '{"file_name": "../../etc/passwd", "text": "a"}',
        "absolute path": '{"file_name": "/etc/passwd", "text": "a"}',
        "NUL in the name": '{"file_name": "c.png\\u0000", "text": "a"}',
        "surrogate in the name": '{"file_name": "c\\ud800.png", "text": "a"}',
        "a name of 5,000 letters": json.dumps(dict(file_name="c" * 5000, text="a")),
        "two objects": '{"file_name": "c.png", "text": "a"} {}',
        "a comment": "// a comment",
        "a file under two names": '{"file_name": "./a.png", "text": "a"}',
        "a number of 10,000 digits": f'{{"file_name": "c.png", "text": "a", "n": {"9" * 10_000}}}',
    }
    for name, line in bad_lines.items():
        bad_item("JSON", f"line: {name}", lines(line), "line")
    for name, content in {
        "UTF-16": '{"file_name": "a.png", "text": "a"}'.encode("utf-16"),
        "empty": b"",
        "a pipe": file_of(fifo),
        "a link to a device": link_to("/dev/zero"),
    }.items():
        bad_source("JSON", f"lines: {name}", table(content, "metadata.jsonl"), "metadata.jsonl")
    takes(
        "JSON",
        "line: Infinity and NaN in other keys, as pandas writes them",
        lambda f: lines('{"file_name": "c.png", "text": "a", "n": Infinity, "m": NaN}')(f, "raise"),
        lambda d: len(d) == 3,
    )
    takes(
        "JSON",
        "lines: a line separator of Unicode in a caption",
        lambda f: lines('{"file_name": "c.png", "text": "a\u2028b"}')(f, "raise"),
        lambda d: d.captions(2) == ["a\u2028b"],
    )
    whole = {
        "cut short": '{"images": [',
        "a web page": "<html>",
        "empty": "",
        "null": "null",
        "a list": "[]",
        "50,000 deep": DEEP,
        "UTF-16": '{"images": [], "annotations": []}'.encode("utf-16"),
        "Latin-1": '{"images": "é"}'.encode("latin-1"),
        "a key twice": '{"images": [], "images": [], "annotations": []}',
        "no images": '{"annotations": []}',
        "images is a number": '{"images": 5, "annotations": []}',
        "nothing in it": '{"images": [], "annotations": []}',
        "a comma too many": '{"images": [],}',
        "two documents": "{} {}",
        "NaN": '{"images": NaN, "annotations": []}',
        "a pipe": file_of(fifo),
        "a folder": file_of(folder_there),
        "a link to a device": file_of(link_to("/dev/zero")),
    }
    for name, content in whole.items():
        bad_source(
            "JSON",
            f"COCO: {name}",
            coco(content),
            "captions_train2017.json" if name != "nothing in it" else "no pair",
        )

    def image(**values):
        return lambda data: data["images"][2].update(values)

    def note(**values):
        return lambda data: data["annotations"][2].update(values)

    changes = {
        "an id twice": image(id=1),
        "an id as number and text": image(id="1"),
        "one file under two ids": image(file_name="1.jpg"),
        "one file, written otherwise": image(file_name="./1.jpg"),
        "no id": lambda data: data["images"][2].pop("id"),
        "id is null": image(id=None),
        "id is a list": image(id=[1]),
        "id is 1.5": image(id=1.5),
        "id is true": image(id=True),
        "no file name": lambda data: data["images"][2].pop("file_name"),
        "file is not there": image(file_name="9.jpg"),
        "file leads out": image(file_name="../../x.jpg"),
        "file is absolute": image(file_name="/etc/passwd"),
        "file is a folder": image(file_name="."),
        "an entry is a number": lambda data: data["images"].__setitem__(2, 5),
        "an entry is null": lambda data: data["images"].__setitem__(2, None),
        "caption is null": note(caption=None),
        "caption is a number": note(caption=3),
        "caption is empty": note(caption=" "),
        "caption has a surrogate": note(caption="\ud800"),
        "caption has a NUL": note(caption="a\0"),
    }
    for name, change in changes.items():
        if name.startswith("id") or name == "no id":
            # its captions belong to no image any more: two faults
            CASES.append(
                Case(
                    "JSON",
                    f"COCO: {name}",
                    lambda f, c=change: coco(c)(f, "raise"),
                    ("captions_train2017.json",),
                )
            )
        else:
            bad_item(
                "JSON",
                f"COCO: {name}",
                coco(change),
                "2" if "entry" in name or "an id" in name else "",
            )
    for name, change in {
        "no filename": lambda images: images[2].pop("filename"),
        "split is null": lambda images: images[2].update(split=None),
        "sentences is text": lambda images: images[2].update(sentences="a"),
        "a sentence is a number": lambda images: images[2].update(sentences=[5]),
        "no sentences": lambda images: images[2].update(sentences=[]),
        "raw is null": lambda images: images[2].update(sentences=[dict(raw=None)]),
        "a filename twice": lambda images: images[2].update(filename="1.jpg"),
        "raw has a surrogate": lambda images: images[2].update(sentences=[dict(raw="\udfff")]),
    }.items():
        bad_item("JSON", f"Flickr30k: {name}", flickr(change), "")


# Shards -----------------------------------------------------------------------------------------


def shards() -> None:
    "Tar files"
    jpg = encoded(photo(3), "JPEG")
    samples = {
        "no caption": sample(jpg=jpg),
        "no image": sample(txt=b"a dog"),
        "caption is empty": sample(jpg=jpg, txt=b""),
        "caption is Latin-1": sample(jpg=jpg, txt="é".encode("latin-1")),
        "caption has a NUL": sample(jpg=jpg, txt=b"a\0"),
        "JSON is a list": sample(jpg=jpg, json=b"[]"),
        "JSON has no caption": sample(jpg=jpg, json=b"{}"),
        "JSON is cut": sample(jpg=jpg, json=b'{"caption"'),
        "JSON is 50,000 deep": sample(jpg=jpg, json=DEEP.encode()),
        "JSON has a key twice": sample(jpg=jpg, json=b'{"caption": "a", "caption": "b"}'),
        "JSON has a surrogate": sample(jpg=jpg, json=f'{{"caption": {SURROGATE}}}'.encode()),
        "caption is null": sample(jpg=jpg, json=b'{"caption": null}'),
        "the image is a link": lambda tar: [
            add_to(tar, "bad.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            add_to(tar, "bad.txt", b"a"),
        ],
        "the image is a hard link": lambda tar: [
            add_to(tar, "bad.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"),
            add_to(tar, "bad.txt", b"a"),
        ],
        "the image is a device": lambda tar: [
            add_to(tar, "bad.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
            add_to(tar, "bad.txt", b"a"),
        ],
        "the image is a pipe": lambda tar: [
            add_to(tar, "bad.jpg", type=tarfile.FIFOTYPE),
            add_to(tar, "bad.txt", b"a"),
        ],
        "the image is a folder": lambda tar: [
            add_to(tar, "bad.jpg", type=tarfile.DIRTYPE),
            add_to(tar, "bad.txt", b"a"),
        ],
        "name leads out": sample("../bad", jpg=jpg, txt=b"a"),
        "name is absolute": sample("/etc/bad", jpg=jpg, txt=b"a"),
        "the image is sparse, of 2^40 zeros": lambda tar: [
            add_to(tar, "bad.jpg", bytes(512), type=tarfile.GNUTYPE_SPARSE),
            add_to(tar, "bad.txt", b"a"),
        ],
        "image twice": lambda tar: [sample(jpg=jpg)(tar), sample(jpg=jpg, txt=b"a")(tar)],
        "caption twice": lambda tar: [sample(jpg=jpg, txt=b"a")(tar), sample(txt=b"b")(tar)],
        "image is empty": sample(jpg=b"", txt=b"a"),
        "image is text": sample(jpg=b"hello", txt=b"a"),
        "image is cut": sample(jpg=jpg[:100], txt=b"a"),
        "image is an EPS": sample(
            jpg=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
            txt=b"a",
        ),
    }
    for name, fill in samples.items():
        if name.startswith("image is"):  # opened only with 'skip', or when it is its turn
            CASES.append(
                Case(
                    "shards", f"{name}, opened", lambda f, x=fill: shard(x)(f, "raise")[2], ("bad",)
                )
            )
            CASES.append(
                Case(
                    "shards",
                    f"{name}, skip",
                    lambda f, x=fill: shard(x)(f, "skip"),
                    ("bad",),
                    1,
                    lambda d: len(d) == GOOD,
                )
            )
        else:
            bad_item("shards", name, shard(fill), "bad")
    third = sample("c", jpg=jpg, txt=b"a")

    def flipped(data):  # the checksum in the header of the third sample
        data = bytearray(data)
        data[data.index(b"c.jpg") + 150] ^= 255
        return bytes(data)

    bad_files = {
        "cut in a file": dict(after=lambda data: data[:600]),
        "cut between files": dict(after=lambda data: data[:1024]),
        "empty": dict(after=lambda data: b""),
        "zeros alone": dict(after=lambda data: bytes(10_240)),
        "compressed": dict(after=gzip.compress),
        "no tar": dict(after=lambda data: b"hello" * 1000),
        "a web page": dict(after=lambda data: b"<html></html>" * 100),
        "a header in the middle damaged": dict(fill=third, after=flipped),
        "two tars joined": dict(after=lambda data: data + data),
        "the end mark cut": dict(after=lambda data: data.rstrip(b"\0")),
    }
    for name, given in bad_files.items():
        bad_source(
            "shards", name, shard(**given), "train-0.tar" if name != "zeros alone" else "no pair"
        )

    def two(second):
        def load(folder, on_error):
            shard()(folder, "raise")
            write(folder / "train-1.tar", second)
            return load_pairs("shards", folder, on_error=on_error)

        return load

    for name, make in dict(
        pipe=file_of(fifo),
        folder=folder_there,
        device=link_to("/dev/zero"),
        dangling=link_to("x"),
        empty=b"",
    ).items():
        bad_item("shards", f"{name} in a shard's place", two(make), "train-1.tar")
    bad_item("shards", "a link that leaves the folder", in_sub(two(outside())), "follow_links")
    with_names = {
        "a very long name": sample("d" * 300, jpg=jpg, txt=b"a"),
        "upper-case endings": sample(JPG=jpg, TXT=b"a"),
        "a folder in the name": sample("x/y", jpg=jpg, txt=b"a"),
        "caption in JSON": sample(jpg=jpg, json=b'{"caption": "a"}'),
        "further files": sample(jpg=jpg, txt=b"a", npy=b"\x93NUMPY"),
        "a byte order mark": sample(jpg=jpg, txt=b"\xef\xbb\xbfa"),
    }
    for name, fill in with_names.items():
        takes(
            "shards",
            name,
            lambda f, x=fill: shard(x)(f, "raise"),
            lambda d: len(d) == 3 and d.captions(2) == ["a"],
        )
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        takes(
            "shards",
            f"format {kind} of tar",
            lambda f, k=kind: shard(third, format=k)(f, "raise"),
            lambda d: len(d) == 3,
        )


# Score files ------------------------------------------------------------------------------------


def scores() -> None:
    "Files of recorded scores"
    suite = subset(load_suite("mini-winoground"), [0, 1])
    names = [suite.captions[k] for k in suite.caption_index.ravel()[:2]]
    all_rows = [
        dict(image=str(image), caption=suite.captions[caption], score=0.25 * k)
        for item in range(2)
        for k, (image, caption) in enumerate(
            (i, c) for i in suite.image_index[item] for c in suite.caption_index[item]
        )
    ]

    def file(rows, change=None, name="scores.csv"):
        table = pd.DataFrame(rows)
        if change:
            table = change(table)
        if name.endswith("parquet"):
            return lambda path: table.to_parquet(path)
        if name.endswith("csv"):
            return table.to_csv(index=False)
        return "".join(json.dumps(row) + "\n" for row in table.to_dict("records"))

    def read(content, name="scores.csv"):
        def run(folder):
            write(folder / name, content)
            return RecordedScorer(folder / name).of_suite(suite)

        return run

    text = file(all_rows)
    first = text.splitlines()[1]

    def score(value):
        return text.replace(first, f"{first.rsplit(',', 1)[0]},{value}")

    bad = {
        "missing a pair": "\n".join(text.splitlines()[:-1]),
        "a pair twice, differently": text + first.rsplit(",", 1)[0] + ",9\n",
        "a word": score("high"),
        "empty": score(""),
        "inf": score("inf"),
        "-inf": score("-Infinity"),
        "1e400": score("1e400"),
        "1_000": score("1_000"),
        "a decimal comma": score('"0,5"'),
        "hexadecimal": score("0x10"),
        "true": score("True"),
        "empty file": "",
        "header alone": "image,caption,score\n",
        "no header": "\n".join(text.splitlines()[1:]),
        "no score": text.replace("score", "points", 1),
        "header twice": text.replace("image,caption,score", "image,caption,score,score", 1)
        .replace("\n", ",1\n")
        .replace("score,score,1", "score,score", 1),
        "semicolons": text.replace(",", ";"),
        "UTF-16": text.encode("utf-16"),
        "Latin-1": (text + "é,x,1\n").encode("latin-1"),
        "NUL": text + "0,a\0b,1\n",
        "a comma without quotes in one row": text + "9,a dog, a cat,0.5\n",
        "a comma without quotes in every row": "image,caption,score\n9,a, b,0.5\n8,c, d,0.5\n",
        "an open quote at the end": text + '9,"a dog,0.5\n',
        "an open quote in the middle": text.replace(f"{first}\n", f'9,"a dog,1\n{first}\n', 1)
        + '8,"a cat",0\n',
        "a row too short": text + "9,a\n",
        "a pipe": file_of(fifo),
        "a folder": folder_there,
        "a link to a device": link_to("/dev/zero"),
    }
    for name, content in bad.items():
        fails("score files", f"CSV: {name}", read(content), "scores.csv")
    bad_line = {
        "cut": '{"image": "9", "capt',
        "a list": "[1, 2]",
        "a number": "5",
        "text": '"a"',
        "null": "null",
        "50,000 deep": DEEP,
        "score is text": '{"image": "9", "caption": "x", "score": "high"}',
        "score is NaN in JSON": '{"image": "9", "caption": "x", "score": Infinity}',
        "score is a list": '{"image": "9", "caption": "x", "score": [1]}',
        "score is true": '{"image": "9", "caption": "x", "score": true}',
        "score is null": '{"image": "9", "caption": "x", "score": null}',
        "score of 10,000 digits": '{"image": "9", "caption": "x", "score": ' + "9" * 10_000 + "}",
        "no score": '{"image": "9", "caption": "x"}',
        "a key twice": '{"image": "9", "caption": "x", "score": 1, "score": 2}',
        "an object as score": '{"image": "9", "caption": "x", "score": {}}',
    }
    good = file(all_rows, name="x.jsonl")
    for name, line in bad_line.items():
        fails(
            "score files", f"lines: {name}", read(good + line + "\n", "s.jsonl"), "s.jsonl", "line"
        )
    for name, content in {
        "empty": "",
        "UTF-16": good.encode("utf-16"),
        "a pipe": file_of(fifo),
        "binary": bytes(range(256)),
    }.items():
        fails("score files", f"lines: {name}", read(content, "s.jsonl"), "s.jsonl")
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "cut": None,
        "a pipe": file_of(fifo),
    }.items():
        made = io.BytesIO()
        pd.DataFrame(all_rows).to_parquet(made)
        data = made.getvalue()[:-20] if content is None else content
        fails("score files", f"Parquet: {name}", read(data, "s.parquet"), "s.parquet")
    fails(
        "score files",
        "Parquet: score is text",
        read(file(all_rows, lambda t: t.assign(score="x"), "s.parquet"), "s.parquet"),
        "s.parquet",
    )
    fails(
        "score files",
        "Parquet: no rows",
        read(file(all_rows, lambda t: t[:0], "s.parquet"), "s.parquet"),
        "s.parquet",
    )
    fails("score files", "an unknown ending", read("x", "s.txt"), ".txt")
    fails(
        "score files", "a file that is not there", lambda f: RecordedScorer(f / "no.csv"), "no.csv"
    )
    labels = [
        f"{item}_c{c}_i{i},{0.1 * c + i}" for item in range(2) for c in (0, 1) for i in (0, 1)
    ]
    ids = range(2) if suite.ids is None else suite.ids
    labels = [
        line.replace(line.split("_")[0], str(ids[int(line.split("_")[0])]), 1) for line in labels
    ]
    for name, line in {
        "no label": "x,1",
        "a label of an arabic digit": "1_c٣_i0,1",
        "a huge label": "1_c" + "9" * 5000 + "_i0,1",
        "empty label": ",1",
    }.items():
        if name == "a huge label":
            takes(
                "score files",
                "labels: a huge number that nothing asks for",
                read("\n".join(["label,score", *labels, line])),
                lambda s: s.shape == (2, 2, 2),
            )
        else:
            fails(
                "score files",
                f"labels: {name}",
                read("\n".join(["label,score", *labels, line])),
                "scores.csv",
            ) if "arabic" not in name else None
    fails(
        "score files",
        "labels: one is missing",
        read("\n".join(["label,score", *labels[:-1]])),
        "scores.csv",
    )
    fails(
        "score files",
        "labels: one twice, differently",
        read("\n".join(["label,score", *labels, labels[0].split(",")[0] + ",7"])),
        "scores.csv",
    )
    right = {
        "byte order mark": "\ufeff" + text,
        "CRLF": text.replace("\n", "\r\n"),
        "a further column": file(all_rows, lambda t: t.assign(by="x")),
        "a pair twice, equally": text + first + "\n",
        "further pairs": text + "9,x,1\n",
        "columns in another order": file(all_rows, lambda t: t[["score", "caption", "image"]]),
        "blank lines": text.replace("\n", "\n\n"),
        "spaces round a number": score(" 0.0 "),
    }
    for name, content in right.items():
        takes(
            "score files",
            f"CSV: {name}",
            read(content),
            lambda s: s.shape == (2, 2, 2) and np.allclose(s[0].ravel(), [0, 0.25, 0.5, 0.75]),
        )
    takes(
        "score files",
        "CSV: nan where an image could not be read",
        read(score("nan")),
        lambda s: np.isnan(s).sum() == 1,
    )
    takes(
        "score files",
        "lines: a line separator of Unicode in a caption",
        read(good + '{"image": "9", "caption": "a\u2028b", "score": 1}\n', "s.jsonl"),
        lambda s: s.shape == (2, 2, 2),
    )
    del names


# Parameters -------------------------------------------------------------------------------------


def parameters() -> None:
    "Settings of a training run, as `03_train` checks them before anything heavy"
    from sdsclip_nb.training import check_run

    def given(**settings):
        return lambda folder: check_run(hub=False, **settings)

    bad = dict(
        arch=[
            "",
            "\0",
            "ViT-B-33",
            "../..",
            "/",
            "/dev/null",
            "a" * 5000,
            5,
            "\ud800",
            "nbs/",
            ["ViT-B-32"],
        ],
        scale=["big", "", 5, True],
        loss=["", "clip+", "clip+clip", "sds+nothing", 5, "+", " clip", "clip,sds"],
        control=["x", "", 5],
        teacher=[
            "",
            "no-such",
            "../x",
            "/dev/zero",
            "\0",
            "a/b/c",
            "random:",
            "random:no",
            5,
            "nbs",
        ],
        lam=[-1, "x", float("nan"), float("inf"), [], "1e999"],
        hardneg_weight=[-1, float("inf"), "x"],
        regress_weight=[-1, float("inf"), float("nan"), "x", []],
        lora_rank=[0, -1, 1.5, "x", 1025],
        average=[-0.1, 1.1, float("nan"), "x"],
        keep_best=["x", "", "text"],
        rank_weight=[-1, float("inf"), float("nan"), "x", []],
        rank_candidates=[
            "",
            "x",
            "exchange",
            "exchanges+",
            "+",
            "exchanges+exchanges",
            "exchanges,nearest",
            " nearest",
            5,
            ["nearest"],
        ],
        rank_timesteps=[0, -1, 65, 10**30, 1.5, "x", "4.5"],
        rank_temperature=[0, -1, float("inf"), float("nan"), "x", "1e999"],
        grad=["x", ""],
        weighting=["x", ""],
        timesteps=["", "1", "5,1", "1,2,3", "0,1000", "-1,5", "a,b", [1], 7, "1.5,3", "nan,nan"],
        draws=[0, -1, 1.5, "x", 10**30 * 1.5],
        teacher_batch_size=[0, -1, "x"],
        latent_map=["x", "", 5],
        map_steps=[-1, 1.5, "x"],
        map_lr=[0, -1, float("inf"), "x"],
        trainable=["x", ""],
        lr=[0, -1, float("nan"), float("inf"), "fast"],
        weight_decay=[-1, float("inf"), "x"],
        warmup=[-0.1, 1.1, float("nan"), "x"],
        clip_grad=[0, -1, float("inf")],
        steps=[0, -1, 1.5, "x", "1e3.5"],
        batch_size=[0, 1, -1, "x", 1.5],
        accumulate=[0, -1, "x"],
        seed=[-1, 2**32, 2**64, "x", 1.5],
        data=["x", "", "\0", 5, "../coco"],
        data_root=["data", 5],
        n_pairs=[0, 1, -1, "x"],
        on_error=["ignore", "", 5],
        num_workers=[-1, "x", 1.5],
        precision=["fp8", "", 16],
        eval_every=[-1, "x"],
        save_every=[-1, "x"],
        resume=["maybe", 7],
        out_dir=[
            "settings.ini",
            "settings.ini/x",
            "/dev/null/x",
            "\0",
            "a" * 300,
            5,
            "/proc/x",
            "\ud800",
        ],
        trackers=["x", "tensorboard+x", "+", ""],
        device=["gpu", "cuda:99", "", "meta", "\0", "cpu:9x"],
        no_such_setting=[1],
        checkpointing=["maybe", 5],
        pretrained=[5],
        push_to_hub=[5],
    )
    for name, values in bad.items():
        for value in values:
            shown = repr(value) if len(repr(value)) < 30 else f"{repr(value)[:20]}..."
            fails("parameters", f"{name}={shown}", given(**{name: value}), name)
    fails("parameters", "two at once", given(lr=-1, steps=0), "lr", "steps")
    for control in ("permuted-rankings", "labels"):
        for loss in ("clip", "clip+sds", "clip+hardneg", "sds"):
            settings = dict(loss=loss, control=control)
            fails("controls", f"{control} of {loss}", given(**settings), "control", "rank", loss)
        for loss in ("clip+rank", "rank", "clip+rank+sds"):
            accepts_control(given, loss, control)
    for control in ("shuffled-captions", "swapped-captions", "empty-caption"):
        for loss in ("clip+rank", "rank", "clip+hardneg+rank"):
            settings = dict(loss=loss, control=control)
            words = "control", "permuted-rankings", loss
            fails("controls", f"{control} of {loss}", given(**settings), *words)
        settings = dict(loss="clip", control=control)
        fails("controls", f"{control} of clip", given(**settings), "control", "clip")
        accepts_control(given, "clip+rank+sds", control)
    wrong = dict(loss="clip", control="labels", rank_candidates="x", rank_timesteps=0)
    fails("controls", "three at once", given(**wrong), *wrong.keys() - {"loss"})
    for name, settings, check in [
        (
            "numbers as text, as papermill may pass them",
            dict(lam="10", steps="5", timesteps="20,980"),
            lambda e: (e.lam, e.steps, e.timesteps) == (10, 5, (20, 980)),
        ),
        ("a list of timesteps", dict(timesteps=[20, 980]), lambda e: e.timesteps == (20, 980)),
        ("the largest seed", dict(seed=2**32 - 1), lambda e: e.seed == 2**32 - 1),
        ("None for all", dict(lam=None, steps=None, data_root=None), lambda e: e.steps == 500),
    ]:
        takes("parameters", name, given(**settings), check)
    fails("parameters", "n of load_pairs", lambda f: load_pairs("mini", n=0), "n=0")
    fails(
        "parameters", "on_error of load_pairs", lambda f: image_file(b"")(f, "ignore"), "on_error"
    )
    fails("parameters", "split of load_pairs", lambda f: load_pairs("mini", split="dev"), "dev")
    fails(
        "parameters",
        "a suite that is not there",
        lambda f: load_benchmark("winogrund"),
        "winogrund",
    )
    fails("parameters", "n of load_benchmark", lambda f: load_benchmark("mini-order", n=0), "n=0")
    fails(
        "parameters",
        "a root that is a file",
        lambda f: load_pairs("folder", from_root("settings.ini")),
        "settings.ini",
    )
    fails(
        "parameters", "a root with a NUL", lambda f: load_pairs("folder", "a\0b"), "data='folder'"
    )
    takes(
        "parameters",
        "make_experiment without anything",
        lambda f: make_experiment(),
        lambda e: e.scale == "mini",
    )


def accepts_control(given: Callable, loss: str, control: str) -> None:
    "A control that changes something of a loss"
    settings = dict(loss=loss, control=control)
    takes("controls", f"{control} of {loss}", given(**settings), lambda e: e.control == control)


# Students and teachers --------------------------------------------------------------------------


def changed_copy(source: str, folder: Path, change: Callable) -> Path:
    "A copy of a model's folder, changed"
    place = folder / "model"
    shutil.copytree(from_root(source), place)
    change(place)
    return place


def edit_json(name: str, change: Callable) -> Callable:
    "A change of a configuration"

    def apply(place):
        data = json.loads((place / name).read_text())
        change(data)
        (place / name).write_text(json.dumps(data))

    return apply


def replace(name: str, content) -> Callable:
    "Another content of a file"

    def apply(place):
        (place / name).unlink()
        write(place / name, content)

    return apply


def cut(name: str) -> Callable:
    "The first half of a file"
    return lambda place: (place / name).write_bytes(
        (place / name).read_bytes()[: (place / name).stat().st_size // 2]
    )


def edit_weights(name: str, change: Callable) -> Callable:
    "A change of a file of weights"

    def apply(place):
        weights = load_file(place / name)
        change(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, place / name)

    return apply


def spoil(weights: dict) -> None:
    "One number of a tensor becomes NaN"
    name = next(k for k, v in weights.items() if v.is_floating_point() and v.numel() > 10)
    weights[name].view(-1)[3] = float("nan")


def drop(weights: dict) -> None:
    "A tensor is not there"
    weights.pop(sorted(weights)[len(weights) // 2])


def reshape(weights: dict) -> None:
    "A tensor has another shape"
    name = next(k for k, v in weights.items() if v.ndim >= 2)
    weights[name] = torch.zeros(3, 3)


def without_tokenizer(change: Callable) -> Callable:
    "The same in a folder that has no tokenizer of its own"

    def apply(place):
        for path in place.glob("tokenizer*"):
            path.unlink()
        change(place)

    return apply


MODELS = {
    "student folders": (
        "data/mini/students/ViT-B-32",
        lambda place: load_student(str(place)),
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ),
    "teacher folders": (
        "data/mini/teacher",
        lambda place: load_teacher(str(place)),
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ),
}


def model_faults(config: str, weights: str) -> dict:
    "Faults that a configuration and a file of weights can have"
    return {
        "no configuration": lambda place: (place / config).unlink(),
        "configuration is empty": replace(config, b""),
        "configuration is cut": cut(config),
        "configuration is a list": replace(config, b"[]"),
        "configuration is null": replace(config, b"null"),
        "configuration is 50,000 deep": replace(config, DEEP),
        "configuration is UTF-16": replace(config, "{}".encode("utf-16")),
        "configuration is a pipe": replace(config, file_of(fifo)),
        "configuration is a folder": replace(config, folder_there),
        "configuration is a web page": replace(config, b"<html>"),
        "no weights": lambda place: (place / weights).unlink(),
        "weights are empty": replace(weights, b""),
        "weights are cut": cut(weights),
        "weights are a web page": replace(weights, b"<html></html>"),
        "weights are a pipe": replace(weights, file_of(fifo)),
        "weights are a folder": replace(weights, folder_there),
        "weights with a header of 2^60 bytes": replace(weights, struct.pack("<Q", 2**60) + b"{}"),
        "weights are an LFS pointer": replace(
            weights, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        ),
        "a weight is NaN": edit_weights(weights, spoil),
        "a tensor is missing": edit_weights(weights, drop),
        "a tensor of another shape": edit_weights(weights, reshape),
    }


def models() -> None:
    "Folders of students and teachers"
    for group, (source, load, config, weights) in MODELS.items():
        for name, change in model_faults(config, weights).items():
            fails(
                group, name, lambda f, s=source, c=change, l=load: l(changed_copy(s, f, c)), "model"
            )
    students()
    teachers()


def students() -> None:
    "Faults of a student's configuration"
    source, load, config, _ = MODELS["student folders"]

    def model_cfg(change):
        return edit_json(config, lambda data: change(data["model_cfg"]))

    for name, change in {
        "no model_cfg": edit_json(config, lambda data: data.pop("model_cfg")),
        "model_cfg is text": edit_json(config, lambda data: data.update(model_cfg="x")),
        "no embed_dim": model_cfg(lambda c: c.pop("embed_dim")),
        "embed_dim is text": model_cfg(lambda c: c.update(embed_dim="x")),
        "embed_dim is another": model_cfg(lambda c: c.update(embed_dim=64)),
        "embed_dim is negative": model_cfg(lambda c: c.update(embed_dim=-1)),
        "an unknown key": model_cfg(lambda c: c["vision_cfg"].update(no_such=1)),
        "no text_cfg": model_cfg(lambda c: c.pop("text_cfg")),
        "a tower of an unknown name": model_cfg(
            lambda c: c["vision_cfg"].update(timm_model_name="no-such-model")
        ),
        "a tokenizer that is not there": without_tokenizer(
            model_cfg(lambda c: c["text_cfg"].update(hf_tokenizer_name="no/such"))
        ),
        "more layers than weights": model_cfg(lambda c: c["vision_cfg"].update(layers=5)),
        "a vocabulary of another size": model_cfg(lambda c: c["text_cfg"].update(vocab_size=100)),
        "tokenizer is cut": cut("tokenizer.json"),
    }.items():
        fails(
            "student folders", name, lambda f, c=change: load(changed_copy(source, f, c)), "model"
        )
    fails(
        "student folders",
        "a file, not a folder",
        lambda f: load_student(str(from_root("settings.ini"))),
        "settings.ini",
    )
    fails(
        "student folders",
        "an empty folder",
        lambda f: load_student(str(f)),
        "open_clip_config.json",
    )
    fails("student folders", "an unknown name", lambda f: load_student("ViT-Q-99"), "ViT-Q-99")
    takes(
        "student folders",
        "as it is",
        lambda f: load(changed_copy(source, f, lambda place: None)),
        lambda s: s.embed_dim == 128,
    )


def teachers() -> None:
    "Faults of a pipeline and of its parts"
    source, load, _, _ = MODELS["teacher folders"]
    index = "model_index.json"
    for name, change in {
        "no index and no UNet": lambda place: [
            (place / index).unlink(),
            shutil.rmtree(place / "unet"),
        ],
        "index is a list": replace(index, b"[]"),
        "index is cut": cut(index),
        "index is 50,000 deep": replace(index, DEEP),
        "index is a pipe": replace(index, file_of(fifo)),
        "index without a class": edit_json(index, lambda d: d.pop("_class_name")),
        "an unknown class": edit_json(index, lambda d: d.update(_class_name="NoPipeline")),
        "the class is a list": edit_json(index, lambda d: d.update(_class_name=["pipeline", "X"])),
        "index names no UNet": edit_json(index, lambda d: d.pop("unet")),
        "an unknown part": edit_json(index, lambda d: d.update(unet=["diffusers", "NoUNet"])),
        "a part of a stranger's module": edit_json(
            index, lambda d: d.update(unet=["my_code", "UNet"])
        ),
        "no VAE": lambda place: shutil.rmtree(place / "vae"),
        "no tokenizer": lambda place: shutil.rmtree(place / "tokenizer"),
        "no text encoder": lambda place: shutil.rmtree(place / "text_encoder"),
        "no scheduler": lambda place: shutil.rmtree(place / "scheduler"),
        "VAE weights are cut": cut("vae/diffusion_pytorch_model.safetensors"),
        "text encoder weights are cut": cut("text_encoder/model.safetensors"),
        "tokenizer is cut": cut("tokenizer/tokenizer.json"),
        "scheduler is cut": cut("scheduler/scheduler_config.json"),
        "scheduler without betas": edit_json(
            "scheduler/scheduler_config.json", lambda d: d.pop("beta_start")
        ),
        "it predicts something else": edit_json(
            "scheduler/scheduler_config.json", lambda d: d.update(prediction_type="sample")
        ),
        "text encoder and UNet of other widths": edit_json(
            "unet/config.json", lambda d: d.update(cross_attention_dim=7)
        ),
        "UNet of other channels": edit_json("unet/config.json", lambda d: d.update(in_channels=3)),
        "a weight of the VAE is NaN": edit_weights(
            "vae/diffusion_pytorch_model.safetensors", spoil
        ),
        "a weight of the text encoder is NaN": edit_weights(
            "text_encoder/model.safetensors", spoil
        ),
        "VAE of another shape": edit_weights("vae/diffusion_pytorch_model.safetensors", reshape),
    }.items():
        fails(
            "teacher folders", name, lambda f, c=change: load(changed_copy(source, f, c)), "model"
        )
    fails(
        "teacher folders",
        "a file, not a folder",
        lambda f: load_teacher(str(from_root("settings.ini"))),
        "settings.ini",
    )
    fails("teacher folders", "an empty folder", lambda f: load_teacher(str(f)), "model_index.json")
    takes(
        "teacher folders",
        "as it is",
        lambda f: load(changed_copy(source, f, lambda place: None)),
        lambda t: t.latent_shape == (4, 8, 8),
    )


# Suites -----------------------------------------------------------------------------------------


def winoground(change: Callable) -> Callable:
    "Loads Winoground of three items, changed"

    def load(folder, on_error):
        items = [
            dict(
                id=k,
                image_0=f"{k}a",
                image_1=f"{k}b",
                caption_0=f"one {k}",
                caption_1=f"other {k}",
                num_main_preds=1,
                collapsed_tag="Object",
                tag="x",
                secondary_tag="",
            )
            for k in range(3)
        ]
        content = change(items) or items
        for k in range(3):
            for side in "ab":
                write(folder / "images" / f"{k}{side}.png", encoded(photo(k)))
        text = (
            content
            if isinstance(content, bytes | str)
            else "".join(json.dumps(x) + "\n" for x in items)
        )
        write(folder / "examples.jsonl", text)
        return load_benchmark("winoground", folder, on_error)

    return load


def suites() -> None:
    "Files of benchmarks, by Winoground's and a folder of classes"

    def item(**values):
        return lambda items: items[2].update(values)

    for name, change in {
        "id twice": item(id=1),
        "id is text": item(id="x"),
        "id is true": item(id=True),
        "caption is null": item(caption_0=None),
        "caption is empty": item(caption_1=" "),
        "caption has a surrogate": item(caption_0="\ud800"),
        "caption has a NUL": item(caption_0="a\0b"),
        "caption of 100 words": item(caption_0="dog " * 100),
        "captions are equal": item(caption_1="one 2"),
        "image is not there": item(image_0="9"),
        "image leads out": item(image_0="../x"),
        "image is absolute": item(image_0="/etc/passwd"),
        "image is a number": item(image_0=4),
        "tag is unknown": item(collapsed_tag="x"),
        "predicates are 7": item(num_main_preds=7),
        "image has a NUL": item(image_0="2a\0"),
        "no caption": lambda items: items[2].pop("caption_0") and None,
        "an entry is a number": lambda items: items.__setitem__(2, 5),
    }.items():
        bad_item("suites", f"Winoground: {name}", winoground(change), "entry 2")
    for name, content in {
        "cut": '{"id": 0, ',
        "empty": b"\n",
        "50,000 deep": DEEP,
        "UTF-16": "{}".encode("utf-16"),
        "a key twice": '{"id": 0, "id": 1}',
        "a web page": "<html>",
    }.items():
        bad_source(
            "suites",
            f"Winoground: {name}",
            winoground(lambda items, c=content: c),
            "examples.jsonl" if name != "empty" else "no item",
        )

    def classes(change, **options):
        def load(folder, on_error):
            for k, name in enumerate(("cat", "dog")):
                write(folder / name / "0.png", encoded(photo(k)))
            change(folder)
            return load_benchmark("imagefolder", folder, on_error, templates=["a {}"], **options)

        return load

    for name, change, words in [
        ("a pipe among the images", lambda f: os.mkfifo(f / "cat/1.png"), "1.png"),
        ("a link to a device", lambda f: (f / "cat/1.png").symlink_to("/dev/zero"), "1.png"),
        (
            "a link that leaves the folder",
            lambda f: outside(levels=3)(f / "cat/1.png"),
            "follow_links",
        ),
    ]:
        bad_item("suites", f"folder of classes: {name}", in_sub(classes(change)), words)
    for name, change, options, words in [
        ("a class without images", lambda f: (f / "empty").mkdir(), {}, "empty"),
        ("too few class names", lambda f: None, dict(class_names=["x"]), "class names"),
        (
            "class names of 50,000 brackets",
            lambda f: write(f.parent / "names.json", DEEP),
            dict(class_names=None),
            "names",
        ),
        ("a class name that is empty", lambda f: None, dict(class_names=["", "x"]), "class names"),
        (
            "a class name with a surrogate",
            lambda f: None,
            dict(class_names=["\ud800", "x"]),
            "class names",
        ),
        (
            "a file of class names that is not there",
            lambda f: None,
            dict(class_names="no.json"),
            "no.json",
        ),
    ]:
        if "brackets" in name:
            fails("suites", f"folder of classes: {name}", deep_names(classes), "names.json")
        else:
            bad_source(
                "suites", f"folder of classes: {name}", in_sub(classes(change, **options)), words
            )
    fails(
        "suites",
        "MMVP: a comma without quotes",
        mmvp("1,Color,a dog, a cat\n2,Color,a bird\n"),
        "Questions.csv",
    )
    fails(
        "suites", "MMVP: an open quote", mmvp('1,Color,"a dog\n2,Color,a bird\n'), "Questions.csv"
    )
    fails(
        "suites",
        "MMVP: header twice",
        mmvp("1,Color,a dog,x\n2,Color,a bird,y\n", "Question ID,Type,Statement,Statement"),
        "Questions.csv",
    )
    fails("suites", "MMVP: a NUL", mmvp("1,Color,a \0 dog\n2,Color,a bird\n"), "Questions.csv")


def deep_names(classes: Callable) -> Callable:
    "Loads a folder of classes whose file of names is 50,000 deep"

    def run(folder):
        write(folder / "names.json", DEEP)
        (folder / "source").mkdir()
        return classes(lambda f: None, class_names=str(folder / "names.json"))(
            folder / "source", "raise"
        )

    return run


def mmvp(rows: str, head: str = "Question ID,Type,Statement") -> Callable:
    "Loads MMVP-VLM of these rows"

    def run(folder):
        for k in (1, 2):
            write(folder / "MLLM_VLM Images" / "Color" / f"{k}.jpg", encoded(photo(k), "JPEG"))
        write(folder / "Questions.csv", f"{head}\n{rows}")
        return load_benchmark("mmvp-vlm", folder)

    return run


def training_runs() -> None:
    "Pairs that can be read, and of which a training has to say something"
    from sdsclip_nb.training import build, check_run, train

    def run(captions, do=build, **settings):
        def start(folder):
            for k, caption in enumerate(captions):
                write(folder / "pairs" / f"{k}.png", encoded(photo(k)))
                write(folder / "pairs" / f"{k}.txt", caption)
            given = dict(loss="clip", data="folder", data_root=str(folder / "pairs")) | settings
            return do(check_run(hub=False, out_dir=str(folder / "run"), **given))

        return start

    def disk_of(free, start):
        def with_disk(folder):
            disk = SimpleNamespace(free=free, total=10**9)
            with patch.object(shutil, "disk_usage", lambda path: disk):
                return start(folder)

        return with_disk

    quick = dict(do=train, steps=1, batch_size=2, num_workers=0, trackers="none")
    for kinds in ("exchanges", "paraphrases", "exchanges+paraphrases"):
        settings = dict(loss="clip+rank", rank_candidates=kinds) | quick
        fails("training", f"no {kinds} to rank", run(["dog", "cat"], **settings), kinds, "rank_c")
    two = run(["a dog", "a cat"], save_every=1, steps=9)
    fails("training", "a disk too small", disk_of(10**7, two), "out_dir", "10.0 MB", "at least")
    takes("training", "a disk that will do", disk_of(10**8, two), lambda parts: parts.rank == 0)

    fails("training", "a folder of one image", run(["a dog"]), "only one image")
    takes(
        "training",
        "captions that are cut are counted",
        run(["a dog", "dog " * 200, "cat " * 50]),
        lambda parts: parts.captions_cut == 2,
    )
    takes(
        "training",
        "captions that fit",
        run(["a dog", "a cat"]),
        lambda parts: parts.captions_cut == 0,
    )


# Checkpoints ------------------------------------------------------------------------------------


def tiny_parts(width: int = 2) -> SimpleNamespace:
    "What `resume_problem` asks of a run, around one layer"
    layer = torch.nn.Linear(width, width)
    settings = make_experiment(steps=9)
    return SimpleNamespace(module=layer, student=layer, latent_map=None, experiment=settings)


def write_state(parts: SimpleNamespace, state: Path) -> None:
    "The files that accelerate writes"
    from sdsclip_nb.training import make_optimizer

    optimizer, schedule = make_optimizer(parts)
    save_file(parts.module.state_dict(), state / "model.safetensors")
    torch.save(optimizer.state_dict(), state / "optimizer.bin")
    torch.save(schedule.state_dict(), state / "scheduler.bin")
    torch.save(dict(torch_manual_seed=torch.get_rng_state()), state / "random_states_0.pkl")


def taken_up(spoil: Callable) -> Callable:
    "The newest of two checkpoints is spoilt and sealed again: which is taken, and what is said"
    from sdsclip_nb import checkpoints
    from sdsclip_nb.training import resume_problem

    def run(folder):
        parts, kept = tiny_parts(), []
        for step in (1, 2):
            state = checkpoints.new_state(folder)
            write_state(parts, state)
            history = [dict(step=k + 1) for k in range(step)]
            about = checkpoints.Checkpoint(None, step, history, "", 1, 1)
            kept = checkpoints.write_checkpoint(folder, about, state, kept)
        spoil(kept[-1])
        checkpoints.seal(kept[-1])
        refusal, said = partial(resume_problem, parts), io.StringIO()
        with redirect_stdout(said):
            found = checkpoints.find_checkpoint(folder, "", refusal=refusal)
        return found.step, said.getvalue()

    return run


def of_version(number: int) -> Callable:
    "A file that torch wrote, as a later torch would mark it"

    def change(path):
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, content in members.items():
                new.writestr(name, str(number) if name.endswith("/version") else content)

    return change


def saved(value) -> Callable:
    "torch.save of something else"
    return lambda path: torch.save(value, path)


def sealed_checkpoints() -> None:
    "Checkpoints that are as they were written, and that torch does not load"
    pickles = {
        "a pickle of something else": saved(Path("a")),
        "a function": saved(os.system),
        "of another torch": of_version(99),
        "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("not found"),
    }
    states = {"a number": saved(5), "an empty dict": saved({})}
    wider = tiny_parts(3).module.state_dict()
    weights = {
        "another shape": lambda path: save_file(wider, path),
        "a tensor less": lambda path: save_file({"bias": torch.zeros(2)}, path),
        "a tensor more": lambda path: save_file(load_file(path) | {"b": torch.zeros(2)}, path),
        "by torch.save": saved(dict(weight=torch.zeros(2, 2), bias=torch.zeros(2))),
        "cut": pickles["cut"],
    }
    progress = {
        "none of a run": lambda path: path.write_text("[1]"),
        "a row less": lambda path: path.write_text(path.read_text().replace('{"step": 1}, ', "")),
    }
    files = {
        "optimizer.bin": pickles | states,
        "scheduler.bin": pickles,
        "random_states_0.pkl": pickles,
        "model.safetensors": weights,
        "progress.json": progress,
    }
    for file, faults in files.items():
        for name, change in faults.items():
            takes(
                "checkpoints",
                f"{file}: {name}",
                taken_up(lambda state, file=file, change=change: change(state / file)),
                lambda value, file=file: value[0] == 1 and f"step-00000002 is not taken up ({file}"
                in value[1],
            )
    takes(
        "checkpoints", "sealed again", taken_up(lambda state: None), lambda value: value == (2, "")
    )


def all_cases() -> Iterator[Case]:
    "Every case, in order"
    CASES.clear()
    for section in (
        images,
        captions,
        tables,
        json_files,
        shards,
        scores,
        parameters,
        models,
        suites,
        training_runs,
        sealed_checkpoints,
    ):
        section()
    assert csv.field_size_limit() == 131_072
    yield from CASES
