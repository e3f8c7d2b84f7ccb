"""Run every check of this repository and end with a line `N passed, M failed`.

Each check prints one line; the notebooks are tested one at a time, one line each. The exit status is 1 when any failed.
"""
import argparse
import ast
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import papermill
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIB = "sdsclip_nb"
LOCKS = ["requirements.lock", "requirements-3.10.lock"]
MAX_FILE_MB = 8  # any tracked file
MAX_MINI_MB = 60  # the folder data/mini
TEST_MINUTES = 15  # one notebook
TAIL = 40  # lines of output shown when a check fails
CLEAN_CURE = "run `make notebooks NB=<the notebook>`, or `nbdev_clean` where only metadata is wrong"
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
# A path of the machine a notebook ran on. Not preceded by what would make it part of a URL or of a relative path.
MACHINE_PATH = re.compile(
    r"(?:(?<![\w.~:/-])|(?<=file://))/(?:home|Users|root|tmp|work|var/folders)/[^\s'\"<>)]*"
    r"|\b[A-Z]:\\+Users\\[^\s'\"<>)]*|" + re.escape(f"{ROOT}/") + r"[^\s'\"<>)]*"
)
EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]*")


class CheckError(Exception):
    """A check that failed, with the reason as its text."""


# Helpers -------------------------------------------------------------------------------------------------------------

def run(*command, cwd: Path = ROOT, timeout: float | None = None, **env: str) -> subprocess.CompletedProcess:
    "Run a command of this environment and catch stdout and stderr together"
    full = {**os.environ, **env}
    full.pop("IN_TEST", None)  # nbdev_export does nothing where it is set
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=full, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def expect(done: subprocess.CompletedProcess, what: str) -> str:
    "The output of a finished command, or a failed check"
    if done.returncode:
        raise CheckError(f"{what}\n{tail(done.stdout)}")
    return done.stdout


def tail(text: str) -> str:
    "The last lines of a long output"
    lines = text.strip().splitlines()
    return "\n".join(["..."] * (len(lines) > TAIL) + lines[-TAIL:])


def fail_if(problems: list[str], cure: str = "") -> None:
    "Fail with all problems, one a line, and what to do about them"
    if problems:
        raise CheckError("\n".join([*problems, *([cure] if cure else [])]))


def tracked(*paths: str) -> set[str]:
    "Files known to git, relative to the root"
    return set(expect(run("git", "ls-files", "-z", "--", *paths), "git cannot list the tracked files").split("\0")) - {""}


def notebooks() -> list[Path]:
    "All notebooks that nbdev sees, relative to the root, in name order, subfolders last"
    found = [p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb")]
    found = [p for p in found if not any(part.startswith((".", "_")) for part in p.parts)]
    if not found:
        raise CheckError("there is no notebook in nbs/")
    return sorted(found, key=lambda p: (len(p.parts), p))


def copy_to(folder: str, *extra: Path) -> Path:
    "Copy the configuration, the notebooks and `extra` files to `folder`"
    for path in [Path("settings.ini"), *notebooks(), *extra]:
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)
    return Path(folder)


def text_of(value: str | list[str]) -> str:
    "A text of a notebook file, which may be stored as a list of lines"
    return value if isinstance(value, str) else "".join(value)


# Checks --------------------------------------------------------------------------------------------------------------

def check_modules() -> str:
    "exported modules equal the notebooks"
    init = Path(LIB, "__init__.py")
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_to(tmp, init)
        expect(run(BIN / "nbdev_export", cwd=copy), "nbdev_export failed")
        made = {p.relative_to(copy).as_posix(): p.read_bytes() for p in (copy / LIB).rglob("*.py")}
    here = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (ROOT / LIB).rglob("*.py")}
    known = tracked(LIB)
    problems = [f"{name} is missing" for name in sorted(made.keys() - here.keys())]
    problems += [f"{name} comes from no notebook" for name in sorted(here.keys() - made.keys())]
    problems += [f"{name} is not what its notebook exports" for name in sorted(made.keys() & here.keys()) if made[name] != here[name]]
    problems += [f"{name} is not tracked by git" for name in sorted(here.keys() - known)]
    fail_if(problems, "edit the notebook, run `make export`, and `git add` what is new")
    return f"{len(made)} modules"


def untidy(nb: dict) -> Iterator[str]:
    "What does not belong into the stored notebook `nb`"
    kernel = nb["metadata"].get("kernelspec", {})
    if not kernel.get("name") or kernel.get("language") != "python":  # nbdev_test passes over other languages
        yield "kernelspec needs a name and the language python"
    if nb["metadata"].get("widgets"):
        yield "widget state in the metadata"
    for i, cell in enumerate(nb["cells"]):
        source = text_of(cell["source"])
        if re.search(r"^\s*-?\s*skip_exec\s*:\s*true", source, re.MULTILINE | re.IGNORECASE):
            yield f"cell {i}: skip_exec would keep nbdev_test from running this notebook"
        if "injected-parameters" in cell["metadata"].get("tags", []):
            yield f"cell {i}: parameters injected by papermill"
        texts = [("source", source)]
        for out in cell.get("outputs", []):
            kind, data = out["output_type"], out.get("data", {})
            if kind == "error":
                yield f"cell {i}: stored error {out.get('ename')}"
            if kind == "stream" and out["name"] == "stderr":
                yield f"cell {i}: stderr output"
            if kind == "stream" and "\r" in text_of(out["text"]):
                yield f"cell {i}: progress bar (carriage return) in the output"
            if any(mime in data for mime in WIDGETS):
                yield f"cell {i}: widget output"
            texts += [("output", text_of(out.get("text", "")))]
            texts += [("output", text_of(v)) for k, v in data.items() if k.startswith("text/") or k == "image/svg+xml"]
        for where, text in texts:
            for match in MACHINE_PATH.finditer(EMBEDDED.sub("", text)):
                yield f"cell {i}: path of one machine in the {where}: {match[0]}"


def check_clean() -> str:
    "notebooks are clean"
    problems = []
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_to(tmp)
        for path in notebooks():
            try:
                problems += [f"{path} {problem}" for problem in untidy(json.loads((ROOT / path).read_bytes()))]
            except (ValueError, KeyError) as error:
                problems.append(f"{path} is not a notebook: {error}")
        fail_if(problems, CLEAN_CURE)
        output = expect(run(BIN / "nbdev_clean", cwd=copy), "nbdev_clean failed")
        if "Failed to clean" in output:  # it only warns and goes on
            raise CheckError(f"nbdev_clean failed\n{tail(output)}")
        problems = [f"{path}: nbdev_clean changes it" for path in notebooks() if (ROOT / path).read_bytes() != (copy / path).read_bytes()]
    fail_if(problems, CLEAN_CURE)
    return f"{len(notebooks())} notebooks"


def parameter_problems(path: Path, source: str) -> Iterator[str]:
    "Where papermill's reading of the parameters cell `source` of notebook `path` differs from Python's"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    seen = papermill.inspect_notebook(str(path))
    names = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            yield f"line {node.lineno} of the parameters cell is not of the form `name = value  # help`"
            continue
        name = targets[0].id
        names.append(name)
        if name not in seen:
            yield f"papermill does not see the parameter {name} (is there a second `=` in its line?)"
            continue
        try:
            default = ast.dump(ast.parse(seen[name]["default"], mode="eval").body)
        except SyntaxError:
            default = None
        if default != ast.dump(node.value):
            yield f"papermill reads the default of {name} as {seen[name]['default']!r} (is there a `#` in the value?)"
        if not seen[name]["help"]:
            yield f"the parameter {name} has no help comment"
    if len(names) != len(set(names)):
        yield "a parameter is assigned twice"
    for name in seen.keys() - set(names):
        yield f"papermill sees a parameter {name} that is none"
    if not names:
        yield "the parameters cell holds no parameter"


def check_parameters() -> str:
    "papermill finds the parameters"
    main_job = Path("nbs/03_train.ipynb")
    problems = [] if main_job in notebooks() else [f"{main_job} is missing"]
    count = 0
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_to(tmp)
        expect(run(BIN / "nbdev_clean", cwd=copy), "nbdev_clean failed")  # it strips tags where settings.ini is wrong
        for path in notebooks():
            cells = json.loads((copy / path).read_text(encoding="utf-8"))["cells"]
            tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
            wanted = path == main_job or path.parts[1] in ("jobs", "pretrain", "paper")
            if len(tagged) > 1 or (wanted and not tagged):
                problems.append(f"{path} has {len(tagged)} cells tagged `parameters`; {'1 is' if wanted else '0 or 1 are'} needed")
            elif tagged:
                count += 1
                problems += [f"{path}: {p}" for p in parameter_problems(copy / path, text_of(tagged[0]["source"]))]
                if path.parts[1] == "pretrain" and "retrain" not in papermill.inspect_notebook(str(copy / path)):
                    problems.append(f"{path} lacks the parameter retrain, which `make pretrain` sets")
    fail_if(problems)
    return f"{count} notebooks with parameters"


def check_readme() -> str:
    "README.md is what index.ipynb gives"
    expect(run(sys.executable, "tools/readme.py", "--check"), "tools/readme.py --check")
    return "up to date"


def check_lint() -> str:
    "ruff finds nothing"
    expect(run(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "nbs", "tools", "setup.py"), "ruff check")
    return "nbs, tools, setup.py"


def check_sizes() -> str:
    "files are small"
    sizes = {name: (ROOT / name).stat().st_size / 1e6 for name in tracked() if (ROOT / name).is_file()}
    problems = [f"{name} has {mb:.1f} MB; a file may have {MAX_FILE_MB}" for name, mb in sorted(sizes.items()) if mb > MAX_FILE_MB]
    mini = sum(p.stat().st_size for p in (ROOT / "data/mini").rglob("*") if p.is_file()) / 1e6
    if mini > MAX_MINI_MB:
        problems.append(f"data/mini has {mb_text(mini)}; it may have {MAX_MINI_MB} MB")
    fail_if(problems)
    return f"{mb_text(sum(sizes.values()))} tracked, {mb_text(mini)} in data/mini"


def mb_text(mb: float) -> str:
    "A size for reading"
    return f"{mb:.1f} MB"


def check_pins() -> str:
    "the locks satisfy settings.ini"
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = [Requirement(r) for key in ("requirements", "dev_requirements") for r in config["DEFAULT"][key].split()]
    problems = []
    for lock in LOCKS:
        pins = {}
        for number, line in enumerate((ROOT / lock).read_text(encoding="utf-8").splitlines(), 1):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)( ; [a-z_]+ [<>=]+ \"[\w.]+\")?", line)
            if match:
                pins[canonicalize_name(match[1])] = match[2]
            else:
                problems.append(f"{lock}:{number}: not `name==version`: {line}")
        for req in wanted:
            pin = pins.get(canonicalize_name(req.name))
            if pin is None:
                problems.append(f"{lock} lacks {req.name}")
            elif not req.specifier.contains(pin, prereleases=True):
                problems.append(f"{lock} pins {req.name}=={pin}, settings.ini wants {req.specifier}")
    fail_if(problems)
    return f"{len(wanted)} requirements in {len(LOCKS)} locks"


def test_notebook(path: Path) -> str:
    "Run one notebook by nbdev_test in a process of its own: its workers keep state from one notebook to the next"
    # HF_HUB_OFFLINE makes a test that would download fail at once instead of passing only where there is a network.
    try:
        done = run(
            BIN / "nbdev_test", "--path", path, "--n_workers", "0", "--do_print", "--timing",
            timeout=60 * TEST_MINUTES, OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1",
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"stopped after {TEST_MINUTES} minutes") from None
    expect(done, "nbdev_test failed")
    # A notebook that nbdev_test leaves out (beside a .notest file) is not a failure to it.
    if "Success." not in done.stdout or "- Completed" not in done.stdout:
        raise CheckError(f"nbdev_test did not run it\n{tail(done.stdout)}")
    return ""


def papermill_train(out: Path, **parameters) -> subprocess.CompletedProcess:
    "The main job from the repository's root, as a user calls it"
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = (BIN/"papermill", "--no-progress-bar", "nbs/03_train.ipynb", out/"out.ipynb", *options)
    return run(*command, timeout=TEST_MINUTES*60, HF_HUB_OFFLINE="1")


def check_commands() -> str:
    "The main job's command line: what it refuses and how, and a short run on real COCO files where they are"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        refused = {
            "scale=paper": (dict(scale="paper", data_root=out/"nothing"),
                            ["captions_train2017.json", "train2017", "What works now: papermill"]),
            "an unknown arch": (dict(arch="ViT-B-33"), ["choose one of ViT-B-32"]),
            "an unknown loss": (dict(loss="sds"), ["'clip' or 'clip+sds'"]),
            "a missing data_root": (dict(data="coco", data_root=out/"nothing"), [str(out/"nothing"), "cocodataset"]),
        }
        problems = []
        for name, (parameters, words) in refused.items():
            done = papermill_train(out, **parameters)
            lacking = [w for w in words if w not in done.stdout]
            if done.returncode == 0 or lacking:
                problems.append(f"{name}: exit {done.returncode}, without {lacking}\n{tail(done.stdout)}")
        fail_if(problems)
        coco = ROOT.parent/"shared"/"data"/"coco-mini"
        if not coco.is_dir():
            return f"{len(refused)} refusals; the run on COCO files is skipped: ../shared/data/coco-mini is not here"
        expect(papermill_train(out, data="coco", data_root=coco, steps=8, n_items=100, out_dir=out/"run"), "the run on COCO files")
        record = json.loads((out/"run"/"record.json").read_text())
        fail_if([] if record["values"]["last_clip"] > 0 else [f"record.json of the run on COCO files: {record['values']}"])
        return f"{len(refused)} refusals, and a run of 8 steps on real COCO files"


def check_records() -> str:
    "every file in figures/ stands in the record of a result"
    files = sorted(p.relative_to(ROOT) for p in (ROOT / "figures").rglob("*") if p.is_file() and not p.name.startswith("."))
    named, problems = set(), []
    for path in (p for p in files if p.suffix == ".json"):
        record = json.loads((ROOT / path).read_text())
        lacking = [k for k in ("name", "scale", "parameters", "inputs", "made_by", "seconds", "values") if k not in record]
        problems += [f"{path} lacks {', '.join(lacking)}"] if lacking else []
        made = (record.get("values") or {}).get("files", [f"{path.stem}.{e}" for e in ("csv", "png", "svg", "md")])
        named |= {path, *(path.parent / f for f in made)}
        problems += [f"{path.parent / f} is in {path}, but not there" for f in made if "files" in (record["values"] or {})
                     and not (ROOT / path.parent / f).is_file()]
    problems += [f"{f} is in no record beside it" for f in files if f not in named]
    fail_if(problems, "run `make reproduce`, or remove what nothing makes any more")
    return f"{len(files)} files, {sum(p.suffix == '.json' for p in files)} records"


def check_graph() -> str:
    "what the Snakefile takes for stale"
    done = run(sys.executable, ROOT / "tools" / "graph_test.py")
    out = expect(done, "the graph makes too much or too little anew:").splitlines()
    return f"{out[-1].split(',')[0]}: {', '.join(line[7:28].strip() for line in out if line.startswith('ok'))}"


def check_paper_scale() -> str:
    "every result can be made at paper scale, from made-up outcomes"
    done = run(sys.executable, ROOT / "tools" / "paper_scale_test.py")
    return expect(done, "results that cannot be made at paper scale:").splitlines()[-1].split(",")[0]


CHECKS: dict[str, Callable[[], str]] = {
    "modules": check_modules,
    "clean": check_clean,
    "parameters": check_parameters,
    "readme": check_readme,
    "lint": check_lint,
    "sizes": check_sizes,
    "pins": check_pins,
    "records": check_records,
    "commands": check_commands,
    "graph": check_graph,
    "paper_scale": check_paper_scale,
}


# The run -------------------------------------------------------------------------------------------------------------

def report(name: str, check: Callable[[], str]) -> bool:
    "Run one check, print its line, and say whether it passed"
    start = time.time()
    try:
        detail, ok = check(), True
    except CheckError as error:
        detail, ok = str(error), False
    except Exception as error:  # a broken file is a failed check, not the end of the run
        detail, ok = f"{type(error).__name__}: {error}", False
    first, _, rest = detail.partition("\n")
    line = f"{'ok    ' if ok else 'FAILED'} {name:<28} {time.time() - start:6.1f} s  {first}".rstrip()
    print("\n".join([line, *(f"       | {r}" for r in rest.splitlines())]), flush=True)
    return ok


def select(only: list[str]) -> tuple[list[str], list[Path]]:
    "The checks and notebooks that `only` names: checks, `tests` for all notebooks, or a notebook by name or path"
    try:
        books = notebooks()
    except CheckError:
        books = []
    if not only:
        return list(CHECKS), books
    names = {str(key): path for path in books for key in (path, path.name, path.stem)}
    unknown = [o for o in only if o not in CHECKS and o != "tests" and o not in names]
    if unknown:
        known = ", ".join([*CHECKS, "tests", *map(str, books)])
        raise SystemExit(f"--only {unknown[0]}: not known; there are {known}")
    chosen = {names[o] for o in only if o in names}
    return [c for c in CHECKS if c in only], [b for b in books if "tests" in only or b in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help=f"run only this: {', '.join(CHECKS)}, tests (all notebooks), or a notebook; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, choices=[1, 2], help="notebooks tested at the same time (default 1)")
    args = parser.parse_args()
    checks, books = select(args.only)
    results = [report(name, CHECKS[name]) for name in checks]
    with ThreadPoolExecutor(args.jobs) as pool:
        results += pool.map(lambda p: report(p.relative_to("nbs").as_posix(), lambda: test_notebook(p)), books)
    if not results:
        raise SystemExit("nothing was checked: there is no notebook in nbs/")
    failed = results.count(False)
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
