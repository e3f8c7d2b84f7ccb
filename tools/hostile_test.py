"""Hostile files: each is opened the way a user would open it, and none may run code.

A canary file is what the code in them would make. Beside it: captions, ids and settings that hold
HTML or Markdown are escaped wherever they are shown, and a token of the hub reaches no notebook,
log, record or error. Prints a line each and ends with `N passed, M failed`.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

TOKEN = "hf_dummyDUMMYdummyDUMMYdummyDUMMY0123"  # noqa: S105  no token of anyone
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from html.parser import HTMLParser  # noqa: E402
from PIL import Image  # noqa: E402

from sdsclip_nb import publish, training  # noqa: E402
from sdsclip_nb.benchmarks import load_benchmark  # noqa: E402
from sdsclip_nb.checkpoints import seal  # noqa: E402
from sdsclip_nb.evaluate import evaluate  # noqa: E402
from sdsclip_nb.experiment import from_root  # noqa: E402
from sdsclip_nb.mini import load_suite  # noqa: E402
from sdsclip_nb.pairs import load_pairs  # noqa: E402
from sdsclip_nb.recorded_scores import RecordedScorer  # noqa: E402
from sdsclip_nb.student import load_student  # noqa: E402
from sdsclip_nb.suite import subset  # noqa: E402
from sdsclip_nb.teacher import load_teacher  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STUDENT, TEACHER = "data/mini/students/ViT-B-32", "data/mini/teacher"
CANARY = Path(tempfile.mkdtemp()) / "code-ran"
CODE = f"open({str(CANARY)!r}, 'w').close()\n"  # what a module that is imported would do


class Harm:
    "Pickled, it makes the canary when it is loaded"

    def __reduce__(self):
        return open, (str(CANARY), "w")


HARM = pickle.dumps(Harm())


def torch_file() -> bytes:
    "The same as torch.save writes it"
    file = io.BytesIO()
    torch.save(Harm(), file)
    return file.getvalue()


def copy(source: str, folder: Path) -> Path:
    "A model's folder to spoil"
    return Path(shutil.copytree(from_root(source), folder / "model"))


def edit(path: Path, change: Callable) -> None:
    "Change a JSON file"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def png(size: tuple = (8, 6)) -> bytes:
    "A small image"
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


# Files ------------------------------------------------------------------------------------------


def student_pickle(folder: Path, content: bytes = HARM):
    "student: open_clip_pytorch_model.bin is a pickle"
    place = copy(STUDENT, folder)
    (place / "open_clip_model.safetensors").unlink()
    (place / "open_clip_pytorch_model.bin").write_bytes(content)
    load_student(str(place))


def student_torch(folder: Path):
    "student: open_clip_pytorch_model.bin by torch.save"
    student_pickle(folder, torch_file())


def student_renamed(folder: Path):
    "student: a pickle named .safetensors"
    place = copy(STUDENT, folder)
    (place / "open_clip_model.safetensors").write_bytes(torch_file())
    load_student(str(place))


def tokenizer_code(place: Path) -> None:
    "A tokenizer that comes with a module"
    (place / "harm.py").write_text(CODE)
    edit(place / "tokenizer_config.json", lambda data: data.update(
        tokenizer_class="Harm", auto_map={"AutoTokenizer": ["harm.Harm", None]}))  # fmt: skip


def student_trust(folder: Path):
    "student: the configuration trusts the tokenizer's code"
    place = copy(STUDENT, folder)
    tokenizer_code(place)
    edit(place / "open_clip_config.json", lambda data: data["model_cfg"]["text_cfg"].update(
        tokenizer_kwargs={"trust_remote_code": True}))  # fmt: skip
    load_student(str(place))


def student_auto_map(folder: Path):
    "student: tokenizer_config.json names code"
    place = copy(STUDENT, folder)
    tokenizer_code(place)
    load_student(str(place))


def student_tower(folder: Path):
    "student: the text tower is a folder with code"
    place = copy(STUDENT, folder)
    tower = folder / "tower"
    tower.mkdir()
    (tower / "harm.py").write_text(CODE)
    (tower / "config.json").write_text(
        json.dumps(dict(model_type="harm", auto_map={"AutoConfig": "harm.Harm"}))
    )
    edit(place / "open_clip_config.json", lambda data: data["model_cfg"]["text_cfg"].update(
        hf_model_name=str(tower)))  # fmt: skip
    load_student(str(place))


def teacher_pickle(folder: Path, part: str = "unet/diffusion_pytorch_model"):
    "teacher: the UNet's weights are a pickle"
    place = copy(TEACHER, folder)
    (place / f"{part}.safetensors").unlink()
    (place / f"{part}.bin").write_bytes(torch_file())
    load_teacher(str(place))


def teacher_text_pickle(folder: Path):
    "teacher: the text encoder's weights are a pickle"
    place = copy(TEACHER, folder)
    (place / "text_encoder" / "model.safetensors").unlink()
    (place / "text_encoder" / "pytorch_model.bin").write_bytes(torch_file())
    load_teacher(str(place))


def teacher_pipeline(folder: Path):
    "teacher: a pipeline of its own"
    place = copy(TEACHER, folder)
    (place / "pipeline.py").write_text(CODE)
    edit(place / "model_index.json", lambda data: data.update(_class_name=["pipeline", "Harm"]))
    load_teacher(str(place))


def teacher_part(folder: Path):
    "teacher: a UNet of its own"
    place = copy(TEACHER, folder)
    (place / "unet" / "harm.py").write_text(CODE)
    edit(place / "model_index.json", lambda data: data.update(unet=["harm", "Harm"]))
    load_teacher(str(place))


def teacher_tokenizer(folder: Path):
    "teacher: tokenizer_config.json names code"
    place = copy(TEACHER, folder)
    tokenizer_code(place / "tokenizer")
    load_teacher(str(place))


def teacher_ckpt(folder: Path):
    "teacher: a single .ckpt"
    (folder / "model.ckpt").write_bytes(torch_file())
    load_teacher(str(folder / "model.ckpt"))


def checkpoint_pickles(folder: Path):
    "checkpoint: sealed, with pickles for optimizer and random states"
    settings = dict(loss="clip", steps=2, n_pairs=8, batch_size=4, out_dir=str(folder / "run"))
    e = training.check_run(hub=False, save_every=1, trackers="none", **settings)

    def stop(*given):
        raise KeyboardInterrupt

    with patch.object(training, "save_run", stop), contextlib.suppress(KeyboardInterrupt):
        training.train(e, progress=False)
    states = sorted({path.parent for path in (folder / "run").rglob("optimizer.bin")})
    assert states, "there is no checkpoint to spoil"
    for state in states:
        for path in state.iterdir():
            if path.suffix in (".bin", ".pkl"):
                path.write_bytes(torch_file())
        seal(state)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run = training.train(e, progress=False)
    assert "resumed_at_steps" not in run.record.made_by, "it was taken"
    raise ValueError(said.getvalue())  # passed over by name, and the run began anew


def numpy_objects(folder: Path):
    "EqBen: a frame is an array of pickled objects"
    frames = folder / "images" / "eqbenag"
    frames.mkdir(parents=True)
    for name in ("a", "b"):
        np.save(frames / f"{name}.npy", np.array([Harm()], object))
    entry = dict(image0="eqbenag/a.npy", image1="eqbenag/b.npy", caption0="x", caption1="y")
    (folder / "all_select.json").write_text(json.dumps([entry]))
    load_benchmark("eqben", folder).images[0]


def cifar_pickle(folder: Path):
    "CIFAR-10: its files are pickles by design, known by their hashes"
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{k}" for k in range(1, 6))):
        (place / name).write_bytes(HARM)
    load_benchmark("cifar10", folder).images[0]


def loading_script(folder: Path):
    "hub set: a loading script beside the data"
    (folder / f"{folder.name}.py").write_text(CODE)
    (folder / "winoground.py").write_text(CODE)
    load_benchmark("bivlc", folder)


def yaml_tag(folder: Path):
    "hub set: a tag of Python in the YAML of its card"
    tag = f"!!python/object/apply:builtins.open [{json.dumps(str(CANARY))}, w]"
    (folder / "README.md").write_text(f"---\nconfigs: {tag}\n---\n")
    pd.DataFrame(dict(x=[1])).to_parquet(folder / "test-0.parquet")
    load_benchmark("bivlc", folder)


def ghostscript(folder: Path):
    "image: PostScript, which Pillow gives to a program"
    tools = folder / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {CANARY}\n")
    (tools / "gs").chmod(0o755)
    data = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    place = folder / "data"
    place.mkdir()
    (place / "a.png").write_text(data)
    (place / "a.txt").write_text("a caption")
    with patch.dict(os.environ, PATH=f"{tools}:{os.environ['PATH']}"):
        load_pairs("folder", place)[0]


def svg(folder: Path):
    "image: SVG with a script and an entity of the disk"
    text = (
        "<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"
        "<svg xmlns='http://www.w3.org/2000/svg'><script>x()</script><text>&x;</text></svg>"
    )
    (folder / "a.png").write_text(text)
    (folder / "a.txt").write_text("a caption")
    load_pairs("folder", folder)[0]


def bomb(folder: Path):
    "image: 2.5 GB of pixels in 100 bytes"
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in chunks
    )
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    (folder / "a.txt").write_text("a caption")
    load_pairs("folder", folder)[0]


def tar_traversal(folder: Path):
    "shard: members that lead out of the folder, and a link"
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name in ("../code-ran.jpg", str(CANARY) + ".jpg", "../code-ran.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    load_pairs("shards", folder)


def shard_pickle(folder: Path):
    "shard: webdataset would unpickle .pyd; a caption that looks like a pickle in JSON"
    caption = {"py/reduce": [{"py/function": "os.system"}, [f"touch {CANARY}"]]}
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name, data in (
            ("a.jpg", png()),
            ("a.pyd", HARM),
            ("a.pth", torch_file()),
            ("a.json", json.dumps(dict(caption=caption)).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    load_pairs("shards", folder)


def scores_pickle(folder: Path):
    "scores: a pickle named .parquet"
    (folder / "scores.parquet").write_bytes(HARM)
    RecordedScorer(folder / "scores.parquet")


def scores_formula(folder: Path):
    "scores: a number that is an expression"
    code = f"__import__('os').system('touch {CANARY}')"
    (folder / "scores.csv").write_text(f'image,caption,score\n0,a,"{code}"\n')
    RecordedScorer(folder / "scores.csv")


FILES = (
    student_pickle, student_torch, student_renamed, student_trust, student_auto_map, student_tower,
    teacher_pickle, teacher_text_pickle, teacher_pipeline, teacher_part, teacher_tokenizer,
    teacher_ckpt, checkpoint_pickles, numpy_objects, cifar_pickle, loading_script, yaml_tag,
    ghostscript, svg, bomb, tar_traversal, shard_pickle, scores_pickle, scores_formula,
)  # fmt: skip


def open_hostile(opening: Callable) -> str:
    "What is said of a hostile file. Raises AssertionError if it ran code, or was taken"
    with tempfile.TemporaryDirectory() as folder:
        try:
            opening(Path(folder))
        except AssertionError:
            raise
        except Exception as error:  # of any kind: that none ran code is what is tested
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
        else:
            raise AssertionError("it was taken without a word")
        finally:
            ran = CANARY.exists()
            CANARY.unlink(missing_ok=True)
    assert not ran, "its code ran"
    return said


# Shown text -------------------------------------------------------------------------------------

STRANGE = "<script>alert(1)</script> | ![x](javascript:alert(1)) `code`\n<img src=x onerror=y> $x$"


class Tags(HTMLParser):
    "The tags of a page"

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.found |= {name for name, _ in attributes}


def harmless(markup: str) -> str:
    "Raise AssertionError where markup holds a script, an image or a link"
    from markdown_it import MarkdownIt

    rendered = MarkdownIt("commonmark", dict(html=True)).enable("table").render(markup)
    tags = Tags()
    tags.feed(rendered)
    bad = tags.found & {"script", "img", "a", "onerror", "iframe"}
    assert not bad, f"{bad} in {markup[:300]}"
    return f"{len(markup):,} characters"


def pairs_shown(folder: Path) -> str:
    "pairs in a notebook: captions, ids, what was left out"
    name = "<img src=x onerror=y> `a`.png"
    (folder / name).write_bytes(png())
    (folder / Path(name).with_suffix(".txt")).write_text(STRANGE.replace("\n", " "))
    (folder / "<script>|`b.png").write_bytes(b"none")
    (folder / "<script>|`b.txt").write_text("x")
    pairs = load_pairs("folder", folder, on_error="skip")
    assert len(pairs.skipped) == 1
    return harmless(pairs._repr_markdown_())


def result_shown(folder: Path) -> str:
    "results in a notebook: names and notes of suites"
    suite = subset(load_suite("mini-winoground"), np.arange(4))
    suite.name, suite.notes = STRANGE, [STRANGE]
    suite.tags = np.array([STRANGE.replace("|", "")] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(load_student("ViT-B-32"), [suite])
    tags = Tags()
    tags.feed(result._repr_html_())
    assert not tags.found & {"script", "img", "onerror"}, tags.found
    return f"{len(result._repr_html_()):,} characters"


def card_shown(folder: Path) -> str:
    "a model card: names, settings, values"
    student = folder / "student"
    shutil.copytree(from_root(STUDENT), student)
    record = dict(
        name=STRANGE, parameters=dict(arch=STRANGE, loss=STRANGE, scale="mini", data=STRANGE),
        values={STRANGE: STRANGE}, made_by=dict(versions={STRANGE: STRANGE}, commit=STRANGE),
    )  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))
    card = publish.model_card(folder)
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "script" not in front, front
    return harmless(body)


def site_shown(folder: Path) -> str:
    "explore: a caption in a table of scores"
    table = pd.DataFrame({"score": [1.0]}, index=[STRANGE])
    tags = Tags()
    tags.feed(table.to_html())
    assert not tags.found & {"script", "img"}
    source = (ROOT / "nbs" / "explore.ipynb").read_text()
    assert "escape=False" not in source
    return "pandas escapes, and nothing turns it off"


SHOWN = (pairs_shown, result_shown, card_shown, site_shown)


# A token ----------------------------------------------------------------------------------------


def without_token(text: str, where: str) -> None:
    "Raise AssertionError where a text holds the token"
    assert TOKEN not in text, f"the token is in {where}"


def token_in_run(folder: Path) -> str:
    "a run by papermill: notebook, log, record, trackers"
    small = dict(steps=2, map_steps=2, n_pairs=8, batch_size=4, n_items=4)
    settings = dict(**small, out_dir=folder / "run")
    given = [word for k, v in settings.items() for word in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", "nbs/03_train.ipynb", folder / "out.ipynb"]
    done = subprocess.run(
        [*command, *given, "--log-output"], cwd=ROOT, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-800:]
    without_token(done.stdout, "the log")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        without_token(path.read_bytes().decode("latin-1"), str(path.relative_to(folder)))
    return f"{len(files)} files and the log"


def token_in_errors(folder: Path) -> str:
    "errors: a set that is not there, an upload that fails, a teacher of the hub"
    (folder / "student").mkdir()
    (folder / "student" / "open_clip_config.json").write_text("{}")
    (folder / "record.json").write_text("{}")

    def upload(*given, **named):
        raise RuntimeError(f"401 for https://user:{TOKEN}@host with authorization: Bearer {TOKEN}")

    attempts = [
        lambda: load_benchmark("winoground", folder / "none"),
        lambda: load_teacher("nobody/nothing"),
        lambda: publish_with(upload, folder),
        lambda: hub_set_with(upload, folder),
    ]
    for attempt in attempts:
        try:
            attempt()
        except Exception as error:
            without_token(str(error), "an error")
        else:
            raise AssertionError("an attempt did not fail")
    return f"{len(attempts)} errors"


def publish_with(upload: Callable, folder: Path) -> None:
    "An upload that fails and says too much"
    with (
        patch.object(publish, "prepare", lambda *given: folder),
        patch.object(publish.HfApi, "create_repo", upload),
    ):
        publish.publish(folder, "owner/name")


def hub_set_with(fetch: Callable, folder: Path) -> None:
    "A data set whose fetching fails and says too much"
    import datasets

    with patch.object(datasets, "load_dataset", fetch):
        load_benchmark("bivlc", folder / "none")


# The lint -----------------------------------------------------------------------------------------

UNSAFE = (
    "import pickle\npickle.load(open('x', 'rb'))", "import pickle\npickle.loads(b'')",
    "import pandas as pd\npd.read_pickle('x')", "import torch\ntorch.load('x')",
    "import torch\ntorch.load('x', weights_only=False)", "eval('1')", "exec('1')",
    "import tarfile\ntarfile.open('x').extractall()", "import zipfile\nz.ZipFile('x').extractall()",
    "import shutil\nshutil.unpack_archive('x')", "import yaml\nyaml.load('x', yaml.Loader)",
    "f('x', trust_remote_code=True)", "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import os\nos.system('x')", "import subprocess\nsubprocess.run('x', shell=True)",
)  # fmt: skip


def lint_finds(folder: Path) -> str:
    "each unsafe call is found by `make test`'s lint or its check of security"
    from check import unsafe_calls

    for number, source in enumerate(UNSAFE):
        (folder / f"a{number}.py").write_text(source + "\n")
    ruff = [
        Path(sys.executable).parent / "ruff",
        "check",
        "--no-cache",
        "--output-format",
        "concise",
    ]
    config = ["--config", ROOT / "pyproject.toml"]
    done = subprocess.run([*ruff, *config, folder], text=True, capture_output=True, check=False)
    said = done.stdout
    missed = [
        source for number, source in enumerate(UNSAFE)
        if not re.search(rf"a{number}\.py:\d+:\d+: S\d", said) and not list(unsafe_calls(source))
    ]  # fmt: skip
    assert not missed, missed
    return f"{len(UNSAFE)} calls"


TOKENS = (token_in_errors, token_in_run)


def report(kind: str, name: str, test: Callable, *given) -> bool:
    "Run one test, and print its line"
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said, verdict = test(*given), "ok    "
    except Exception as error:
        said, verdict = f"{type(error).__name__}: {error}"[:1200], "FAILED"
    said = re.sub(r"/\S*/tmp\w+", "...", said)
    print(f"{verdict} {kind:<6} {name}: {said}", flush=True)
    return verdict == "ok    "


def in_folder(test: Callable) -> str:
    "A test in a folder of its own"
    with tempfile.TemporaryDirectory() as folder:
        return test(Path(folder))


def main() -> int:
    "Run all; 0 if nothing failed"
    passed = [report("file", test.__doc__.splitlines()[0], open_hostile, test) for test in FILES]
    for kind, tests in (("shown", SHOWN), ("lint", (lint_finds,)), ("token", TOKENS)):
        passed += [report(kind, t.__doc__.splitlines()[0], in_folder, t) for t in tests]
    print(f"{sum(passed)} passed, {passed.count(False)} failed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
