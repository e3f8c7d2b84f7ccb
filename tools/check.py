"""Run every check of this repository and end with a line `N passed, M failed`.

Each check prints one line; the notebooks are tested one at a time, one line each. The exit status
is 1 when any failed.
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
from configparser import ConfigParser, SectionProxy
from pathlib import Path

import papermill
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIB = "sdsclip_nb"
LOCKS = ["requirements.lock", "requirements-3.10.lock"]
MAIN_JOB = Path("nbs/03_train.ipynb")
JOB_FOLDERS = ("jobs", "paper", "pretrain")  # papermill runs every notebook in these
LINTED = ["nbs", LIB, "tools", "setup.py"]
WORKFLOW = ".github/workflows"
# What the import of a module may not load: Snakemake reads the plan at every call.
LIGHT = {"plan": ["torch"]}
MAX_FILE_MB = 8  # any tracked file
MAX_MINI_MB = 60  # the folder data/mini
TEST_MINUTES = 15  # one notebook
TAIL = 40  # lines of output shown when a check fails
CLEAN_CURE = "run `make notebooks NB=<the notebook>`, or `nbdev_clean` where only metadata is wrong"
WIDGETS = (
    "application/vnd.jupyter.widget-view+json",
    "application/vnd.jupyter.widget-state+json",
)
# A path of the machine a notebook ran on, not a part of a URL or of a relative path.
MACHINE_PATH = re.compile(
    r"(?:(?<![\w.~:/-])|(?<=file://))"
    r"/(?:home|Users|root|tmp|work|var/folders)/[^\s'\"<>)]*"
    r"|\b[A-Z]:\\+Users\\[^\s'\"<>)]*|" + re.escape(f"{ROOT}/") + r"[^\s'\"<>)]*"
)
EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]*")
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)( ; [a-z_]+ [<>=]+ \"[\w.]+\")?")
BENCH = ("bench.json", "bench.md")  # of `make bench`: they name their machine themselves
MODEL = re.compile(r".+/seed\d+|teacher:.+")  # among the inputs of a record
RECORD_KEYS = ("name", "scale", "parameters", "inputs", "made_by", "seconds", "values")


class CheckError(Exception):
    """A check that failed, with the reason as its text."""


# Helpers ----------------------------------------------------------------------------------------

def run(
    *command, cwd: Path = ROOT, timeout: float | None = None, **env: str
) -> subprocess.CompletedProcess:
    "Run a command of this environment and catch stdout and stderr together"
    full = {**os.environ, **env}
    full.pop("IN_TEST", None)  # nbdev_export does nothing where it is set
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=full, timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    listed = expect(run("git", "ls-files", "-z", "--", *paths), "git cannot list the tracked files")
    return set(listed.split("\0")) - {""}


def notebooks() -> list[Path]:
    "All notebooks that nbdev sees, relative to the root, in name order, subfolders last"
    found = [path.relative_to(ROOT) for path in (ROOT / "nbs").rglob("*.ipynb")]
    found = [path for path in found if not any(part.startswith((".", "_")) for part in path.parts)]
    if not found:
        raise CheckError("there is no notebook in nbs/")
    return sorted(found, key=lambda path: (len(path.parts), path))


def modules() -> list[Path]:
    "All modules of the library, relative to the root"
    return sorted(path.relative_to(ROOT) for path in (ROOT / LIB).rglob("*.py"))


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


# Checks -----------------------------------------------------------------------------------------

def check_modules() -> str:
    "exported modules equal the notebooks"
    init = Path(LIB, "__init__.py")
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_to(tmp, init)
        expect(run(BIN / "nbdev_export", cwd=copy), "nbdev_export failed")
        made = {path.relative_to(copy): path.read_bytes() for path in (copy / LIB).rglob("*.py")}
    here = {path: (ROOT / path).read_bytes() for path in modules()}
    known = {Path(name) for name in tracked(LIB)}
    changed = [path for path in made.keys() & here.keys() if made[path] != here[path]]
    problems = [f"{path} is missing" for path in sorted(made.keys() - here.keys())]
    problems += [f"{path} comes from no notebook" for path in sorted(here.keys() - made.keys())]
    problems += [f"{path} is not what its notebook exports" for path in sorted(changed)]
    problems += [f"{path} is not tracked by git" for path in sorted(here.keys() - known)]
    fail_if(problems, "edit the notebook, run `make export`, and `git add` what is new")
    return f"{len(made)} modules"


def untidy(nb: dict) -> Iterator[str]:
    "What does not belong into the stored notebook `nb`"
    kernel = nb["metadata"].get("kernelspec", {})
    if not kernel.get("name") or kernel.get("language") != "python":
        # nbdev_test passes over other languages.
        yield "kernelspec needs a name and the language python"
    if nb["metadata"].get("widgets"):
        yield "widget state in the metadata"
    for number, cell in enumerate(nb["cells"]):
        for problem in (*untidy_source(cell), *untidy_outputs(cell)):
            yield f"cell {number}: {problem}"


def untidy_source(cell: dict) -> Iterator[str]:
    "What does not belong into the source of a stored cell"
    source = text_of(cell["source"])
    if re.search(r"^\s*-?\s*skip_exec\s*:\s*true", source, re.MULTILINE | re.IGNORECASE):
        yield "skip_exec would keep nbdev_test from running this notebook"
    if "injected-parameters" in cell["metadata"].get("tags", []):
        yield "parameters injected by papermill"
    yield from machine_paths(source, "source")


def untidy_outputs(cell: dict) -> Iterator[str]:
    "What does not belong into the outputs of a stored cell"
    for out in cell.get("outputs", []):
        kind, data, text = out["output_type"], out.get("data", {}), text_of(out.get("text", ""))
        if kind == "error":
            yield f"stored error {out.get('ename')}"
        if kind == "stream" and out["name"] == "stderr":
            yield "stderr output"
        if kind == "stream" and "\r" in text:
            yield "progress bar (carriage return) in the output"
        if any(mime in data for mime in WIDGETS):
            yield "widget output"
        readable = [mime for mime in data if mime.startswith("text/") or mime == "image/svg+xml"]
        for shown in (text, *(text_of(data[mime]) for mime in readable)):
            yield from machine_paths(shown, "output")


def machine_paths(text: str, where: str) -> Iterator[str]:
    "Paths of one machine in `text`"
    for match in MACHINE_PATH.finditer(EMBEDDED.sub("", text)):
        yield f"path of one machine in the {where}: {match[0]}"


def check_clean() -> str:
    "notebooks are clean"
    problems = [problem for path in notebooks() for problem in untidy_file(path)]
    fail_if(problems, CLEAN_CURE)
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_to(tmp)
        output = expect(run(BIN / "nbdev_clean", cwd=copy), "nbdev_clean failed")
        if "Failed to clean" in output:  # it only warns and goes on
            raise CheckError(f"nbdev_clean failed\n{tail(output)}")
        changed = [p for p in notebooks() if (ROOT / p).read_bytes() != (copy / p).read_bytes()]
    fail_if([f"{path}: nbdev_clean changes it" for path in changed], CLEAN_CURE)
    return f"{len(notebooks())} notebooks"


def untidy_file(path: Path) -> list[str]:
    "What does not belong into the notebook at `path`, or that it is none"
    try:
        return [f"{path} {problem}" for problem in untidy(json.loads((ROOT / path).read_bytes()))]
    except (ValueError, KeyError) as error:
        return [f"{path} is not a notebook: {error}"]


def parameter_problems(path: Path, source: str) -> Iterator[str]:
    "Where papermill reads the parameters cell `source` of a notebook otherwise than Python"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    seen = papermill.inspect_notebook(str(path))
    names = []
    for node in ast.parse(source).body:
        name = assigned_name(node)
        if name is None:
            yield f"line {node.lineno} of the parameters cell is not `name = value  # help`"
            continue
        names.append(name)
        if name in seen:
            yield from reading_problems(name, node.value, seen[name])
        else:
            yield f"papermill does not see the parameter {name}: is there a second `=` in its line?"
    if len(names) != len(set(names)):
        yield "a parameter is assigned twice"
    for name in seen.keys() - set(names):
        yield f"papermill sees a parameter {name} that is none"
    if not names:
        yield "the parameters cell holds no parameter"


def assigned_name(node: ast.stmt) -> str | None:
    "The one name that a statement assigns to"
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and len(targets) == 1:
        return targets[0].id if isinstance(targets[0], ast.Name) else None
    return None


def reading_problems(name: str, value: ast.expr, seen: dict) -> Iterator[str]:
    "Where papermill reads another default than Python, or no help"
    try:
        default = ast.dump(ast.parse(seen["default"], mode="eval").body)
    except SyntaxError:
        default = None
    if default != ast.dump(value):
        yield (
            f"papermill reads the default of {name} as {seen['default']!r} "
            "(is there a `#` in the value?)"
        )
    if not seen["help"]:
        yield f"the parameter {name} has no help comment"


def check_parameters() -> str:
    "papermill finds the parameters"
    problems = [] if MAIN_JOB in notebooks() else [f"{MAIN_JOB} is missing"]
    count = 0
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_to(tmp)
        # nbdev_clean strips the tags where settings.ini is wrong.
        expect(run(BIN / "nbdev_clean", cwd=copy), "nbdev_clean failed")
        for path in notebooks():
            sources = parameter_cells(copy / path)
            problems += [f"{path}: {problem}" for problem in tag_problems(path, len(sources))]
            if len(sources) == 1:
                count += 1
                found = parameter_problems(copy / path, sources[0])
                problems += [f"{path}: {problem}" for problem in found]
                if path.parts[1] == "pretrain" and not re.search(r"^retrain\b", sources[0], re.M):
                    problems.append(f"{path} lacks the parameter retrain of `make pretrain`")
    fail_if(problems)
    return f"{count} notebooks with parameters"


def parameter_cells(path: Path) -> list[str]:
    "The sources of the cells tagged `parameters`"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return [text_of(cell["source"]) for cell in tagged]


def tag_problems(path: Path, count: int) -> Iterator[str]:
    "Whether a notebook has as many parameters cells as it needs"
    wanted = path == MAIN_JOB or path.parts[1] in JOB_FOLDERS
    if count > 1 or (wanted and not count):
        needed = "1 is" if wanted else "0 or 1 are"
        yield f"{count} cells are tagged `parameters`; {needed} needed"


def check_settings() -> str:
    "the main job's parameters are the settings of a training run, with their help and choices"
    expect(run(sys.executable, "tools/parameters.py", "--check"), "tools/parameters.py --check")
    return f"{MAIN_JOB} has them all"


def check_readme() -> str:
    "README.md is what index.ipynb gives"
    expect(run(sys.executable, "tools/readme.py", "--check"), "tools/readme.py --check")
    return "up to date"


def check_lint() -> str:
    "ruff finds nothing"
    command = (BIN / "ruff", "check", "--no-cache", "--output-format", "concise", *LINTED)
    expect(run(*command), "ruff check")
    return ", ".join(LINTED)


def check_security() -> str:
    "nothing unpickles, runs a stranger's code or trusts it; ruff's rules S are part of lint"
    sources = {path: python_of(path) for path in [*notebooks(), *modules(), *tool_files()]}
    fail_if(
        [f"{path}: {problem}" for path, text in sources.items() for problem in unsafe_calls(text)],
        "open weights with safetensors, or torch.load(..., weights_only=True)",
    )
    return f"{len(sources)} files"


def tool_files() -> list[Path]:
    "The Python files of tools/, relative to the root"
    return sorted(path.relative_to(ROOT) for path in (ROOT / "tools").rglob("*.py"))


def python_of(path: Path) -> str:
    "The code of a module, or of a notebook's cells without lines for the shell"
    text = (ROOT / path).read_text("utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    lines = "\n".join(text_of(cell["source"]) for cell in cells).splitlines()
    return "\n".join("" if line.startswith(("%", "!")) else line for line in lines)


def unsafe_calls(source: str) -> Iterator[str]:
    "Calls that may unpickle or unpack anywhere, and keywords that trust what was downloaded"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = ast.unparse(node.func)
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name.split(".")[-1] in ("extractall", "unpack_archive"):  # ruff knows tarfile's alone
            yield f"line {node.lineno}: {name} writes wherever the archive says"
        for trust in ("trust_remote_code", "allow_pickle"):
            if given.get(trust, "False") != "False":
                yield f"line {node.lineno}: {name} with {trust}={given[trust]}"


def check_imports() -> str:
    "every module is imported alone, in a process of its own"
    names = [path.stem for path in modules() if not path.stem.startswith("_")]
    with ThreadPoolExecutor(2) as pool:
        problems = [problem for problem in pool.map(import_problem, names) if problem]
    fail_if(problems)
    return f"{len(names)} modules, {', '.join(LIGHT)} without {', '.join(*LIGHT.values())}"


def import_problem(name: str) -> str:
    "What is wrong with importing one module, empty where nothing is"
    script = f"import sys, {LIB}.{name}; print(*{{*sys.argv[1:]}} & {{*sys.modules}})"
    done = run(sys.executable, "-c", script, *LIGHT.get(name, []), OMP_NUM_THREADS="1")
    if done.returncode:
        return f"{LIB}.{name} cannot be imported alone\n{tail(done.stdout)}"
    loaded = done.stdout.strip()
    return f"{LIB}.{name} loads {loaded}" if name in LIGHT and loaded else ""


def check_repository() -> str:
    "the workflow, CITATION.cff and the pre-commit configuration are valid"
    schema = (BIN / "check-jsonschema", "--builtin-schema")
    workflows = sorted((ROOT / WORKFLOW).glob("*.yml"))
    expect(run(*schema, "vendor.github-workflows", *workflows), f"{WORKFLOW} has a wrong workflow")
    expect(run(BIN / "zizmor", "--offline", "--quiet", WORKFLOW), f"zizmor on {WORKFLOW}")
    expect(run(*schema, "vendor.citation-file-format", "CITATION.cff"), "CITATION.cff is wrong")
    expect(run(BIN / "pre-commit", "validate-config"), "pre-commit cannot read its configuration")
    version = re.search(r"^version: *(\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if version is None or version[1] != settings()["version"]:
        raise CheckError("CITATION.cff has another version than settings.ini")
    return f"{len(workflows)} workflow, CITATION.cff, .pre-commit-config.yaml"


def settings() -> SectionProxy:
    "settings.ini"
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def check_sizes() -> str:
    "files are small"
    files = [ROOT / name for name in sorted(tracked()) if (ROOT / name).is_file()]
    sizes = {path.relative_to(ROOT): megabytes(path) for path in files}
    problems = [
        f"{name} has {size:.1f} MB; a file may have {MAX_FILE_MB} MB"
        for name, size in sizes.items() if size > MAX_FILE_MB
    ]
    mini = sum(megabytes(path) for path in (ROOT / "data/mini").rglob("*") if path.is_file())
    if mini > MAX_MINI_MB:
        problems.append(f"data/mini has {mini:.1f} MB; it may have {MAX_MINI_MB} MB")
    fail_if(problems)
    return f"{sum(sizes.values()):.1f} MB tracked, {mini:.1f} MB in data/mini"


def megabytes(path: Path) -> float:
    "Size of a file"
    return path.stat().st_size / 1e6


def check_pins() -> str:
    "the locks satisfy settings.ini"
    listed = [settings()[key] for key in ("requirements", "dev_requirements")]
    wanted = [Requirement(text) for text in " ".join(listed).split()]
    fail_if([problem for lock in LOCKS for problem in lock_problems(lock, wanted)])
    return f"{len(wanted)} requirements in {len(LOCKS)} locks"


def lock_problems(lock: str, wanted: list[Requirement]) -> Iterator[str]:
    "Lines of a lock that pin nothing, and requirements that it lacks or breaks"
    pins = {}
    for number, line in enumerate((ROOT / lock).read_text(encoding="utf-8").splitlines(), 1):
        match = PIN.fullmatch(line)
        if match:
            pins[canonicalize_name(match[1])] = match[2]
        else:
            yield f"{lock}:{number}: not `name==version`: {line}"
    for req in wanted:
        pin = pins.get(canonicalize_name(req.name))
        if pin is None:
            yield f"{lock} lacks {req.name}"
        elif not req.specifier.contains(pin, prereleases=True):
            yield f"{lock} pins {req.name}=={pin}, settings.ini wants {req.specifier}"


def test_notebook(path: Path) -> str:
    "Run one notebook by nbdev_test"
    # In a process of its own: nbdev_test's workers keep state from one notebook to the next.
    command = (BIN / "nbdev_test", "--path", path, "--n_workers", "0", "--do_print", "--timing")
    # HF_HUB_OFFLINE makes a test that would download fail at once instead of passing only where
    # there is a network.
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    limits = {"timeout": 60 * TEST_MINUTES, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    try:
        done = run(*command, **limits)
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
    command = (BIN / "papermill", "--no-progress-bar", MAIN_JOB, out / "out.ipynb", *options)
    return run(*command, timeout=60 * TEST_MINUTES, HF_HUB_OFFLINE="1")


def check_commands() -> str:
    "the main job's command line refuses what it must, and runs on real COCO files where they are"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        refused = refusals(out / "nothing")
        fail_if([p for given, words in refused for p in refusal_problems(out, given, words)])
        return f"{len(refused)} refusals; {run_on_coco(out)}"


def refusals(nothing: Path) -> list[tuple[dict, list[str]]]:
    "Parameters that the main job must refuse, and the words its message must hold"
    return [
        (
            dict(scale="paper", data_root=nothing),
            ["captions_train2017.json", "train2017", "What works now: papermill"],
        ),
        (
            dict(arch="ViT-B-33", loss="clip+sdss"),
            ["2 wrong", "Did you mean ViT-B-32?", "Did you mean sds?"],
        ),
        (dict(lamda=3), ["lamda", "lam?"]),
        (dict(data="coco", data_root=nothing), [str(nothing), "cocodataset"]),
    ]


def refusal_problems(out: Path, given: dict, words: list[str]) -> Iterator[str]:
    "Whether the main job refuses the parameters `given`, in these words"
    done = papermill_train(out, **given)
    lacking = [word for word in words if word not in done.stdout]
    if done.returncode == 0 or lacking:
        yield f"{given}: exit {done.returncode}, without {lacking}\n{tail(done.stdout)}"


def run_on_coco(out: Path) -> str:
    "A short run of the main job on real COCO files, where they are"
    coco = ROOT.parent / "shared" / "data" / "coco-mini"
    if not coco.is_dir():
        return "the run on COCO files is skipped: ../shared/data/coco-mini is not here"
    parameters = dict(data="coco", data_root=coco, steps=8, n_items=100, out_dir=out / "run")
    expect(papermill_train(out, **parameters), "the run on COCO files")
    record = json.loads((out / "run" / "record.json").read_text())
    if not record["values"]["last_clip"] > 0:
        raise CheckError(f"record.json of the run on COCO files: {record['values']}")
    return "a run of 8 steps on real COCO files"


def check_records() -> str:
    "every file in figures/ stands in the record of a result"
    here = (path for path in (ROOT / "figures").rglob("*") if path.is_file())
    files = sorted(
        path.relative_to(ROOT) for path in here
        if not path.name.startswith(".") and path.name not in BENCH
    )
    shipped = [path for path in files if "outcomes" in path.parts]
    records = [path for path in files if path.suffix == ".json" and path not in shipped]
    problems = [problem for path in records for problem in record_problems(path)]
    named = {*records, *(made for path in records for made in recorded(path)[1])}
    digests = {made: of for path in records for made, of in outcomes_behind(path).items()}
    if shipped:
        problems += [problem for made in digests for problem in shipped_problems(made, digests)]
        named |= {*digests}
    problems += [f"{path} is in no record beside it" for path in files if path not in named]
    fail_if(problems, "run `make reproduce`, or remove what nothing makes any more")
    return f"{len(files)} files, {len(records)} records, {answers_said(bool(shipped))}"


def outcomes_behind(path: Path) -> dict[Path, str]:
    "Where the outcomes that the record at `path` was made from are shipped, with their digests"
    inputs = json.loads((ROOT / path).read_text()).get("inputs") or {}
    return {
        path.parent / "outcomes" / f"{name.replace(':', '/')}.json": digest
        for name, digest in inputs.items() if MODEL.fullmatch(name)
    }


def shipped_problems(made: Path, digests: dict[Path, str]) -> Iterator[str]:
    "Shipped outcomes that are not there, or not those that a record was made from"
    if not (ROOT / made).is_file():
        yield f"{made} is behind a figure, but not there"
    elif json.loads((ROOT / made).read_text()).get("sha256") != digests[made]:
        yield f"{made} has another digest than the record of a figure made from it"


def answers_said(shipped: bool) -> str:
    "That the numbers in figures/ follow from the answers shipped with them, or that there are none"
    if not shipped:
        return "no outcomes shipped with them yet"
    done = run(sys.executable, "tools/compare_figures.py")
    return expect(done, "figures do not follow from their answers").splitlines()[-1]


def recorded(path: Path) -> tuple[dict, list[Path]]:
    "The record at `path`, and the files it names or, where it names none, may stand beside"
    record = json.loads((ROOT / path).read_text())
    guessed = [f"{path.stem}.{suffix}" for suffix in ("csv", "png", "svg", "md")]
    names = (record.get("values") or {}).get("files", guessed)
    return record, [path.parent / name for name in names]


def record_problems(path: Path) -> Iterator[str]:
    "What a record lacks, files it names that are not there, and files that no commit makes"
    record, files = recorded(path)
    lacking = [key for key in RECORD_KEYS if key not in record]
    if lacking:
        yield f"{path} lacks {', '.join(lacking)}"
    if (record.get("made_by") or {}).get("dirty"):
        yield f"{path} says dirty: it was made from files that are not committed; make it again"
    if "files" in (record.get("values") or {}):
        missing = [made for made in files if not (ROOT / made).is_file()]
        yield from (f"{made} is in {path}, but not there" for made in missing)


def check_graph() -> str:
    "what the Snakefile takes for stale"
    done = run(sys.executable, ROOT / "tools" / "graph_test.py")
    lines = expect(done, "the graph makes too much or too little anew:").splitlines()
    passed = [line[7:28].strip() for line in lines if line.startswith("ok")]
    return f"{lines[-1].split(',')[0]}: {', '.join(passed)}"


def check_measure() -> str:
    "the command that measures a model: own pairs, recorded scores without images, a sample"
    done = run(sys.executable, ROOT / "tools" / "measure_test.py")
    return expect(done, "what cannot be measured:").splitlines()[-1].split(",")[0]


def check_paper_scale() -> str:
    "every result can be made at paper scale, from made-up outcomes"
    done = run(sys.executable, ROOT / "tools" / "paper_scale_test.py")
    lines = expect(done, "results that cannot be made at paper scale:").splitlines()
    return lines[-1].split(",")[0]


def check_paper_train() -> str:
    "the documented command at paper scale finishes on stand-ins in genuine layouts"
    done = run(sys.executable, ROOT / "tools" / "paper_train_test.py")
    lines = expect(done, "the main job at paper scale:").splitlines()
    return next((line for line in lines if line.startswith("skipped")), lines[-1].split(",")[0])


def check_ranks() -> str:
    "two processes, and one in two parts, train as one process does"
    done = run(sys.executable, ROOT / "tools" / "ranks_test.py", OMP_NUM_THREADS="1")
    lines = expect(done, "training by several processes:").splitlines()
    return lines[-1].split(",")[0]


def check_faults() -> str:
    "a full disk, a lost image, a killed worker, no memory, signals: one message, and equal again"
    done = run(sys.executable, ROOT / "tools" / "faults_test.py", "--short", OMP_NUM_THREADS="1")
    lines = expect(done, "training runs that meet a fault:").splitlines()
    skipped = [line for line in lines if line.startswith("skipped")]
    return "; ".join([lines[-1], *skipped])


def check_determinism() -> str:
    "the main job twice: equal in all that it records"
    done = run(sys.executable, ROOT / "tools" / "determinism_test.py")
    return expect(done, "the main job twice:").splitlines()[-1].split(",")[0]


def check_kills() -> str:
    "runs killed at some moments end as a run that was left alone"
    done = run(sys.executable, ROOT / "tools" / "kill_test.py", "--short")
    return expect(done, "runs killed and taken up again:").splitlines()[-1].split(",")[0]


def check_bad_input() -> str:
    "bad input of every kind ends in a clear error, a counted skip, or is rightly taken"
    done = run(sys.executable, ROOT / "tools" / "bad_input_test.py", OMP_NUM_THREADS="1")
    return expect(done, "bad input:").splitlines()[-1].split(",")[0]


def check_hostile() -> str:
    "hostile files run no code, shown text is escaped, a token stays secret"
    done = run(sys.executable, ROOT / "tools" / "hostile_test.py", OMP_NUM_THREADS="1")
    return expect(done, "hostile files:").splitlines()[-1].split(",")[0]


CHECKS: dict[str, Callable[[], str]] = {
    "modules": check_modules,
    "clean": check_clean,
    "parameters": check_parameters,
    "settings": check_settings,
    "readme": check_readme,
    "lint": check_lint,
    "security": check_security,
    "imports": check_imports,
    "sizes": check_sizes,
    "pins": check_pins,
    "repository": check_repository,
    "records": check_records,
    "commands": check_commands,
    "graph": check_graph,
    "measure": check_measure,
    "paper_scale": check_paper_scale,
    "paper_train": check_paper_train,
    "ranks": check_ranks,
    "bad_input": check_bad_input,
    "hostile": check_hostile,
    "faults": check_faults,
    "determinism": check_determinism,
    "kills": check_kills,
}


# The run ----------------------------------------------------------------------------------------

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
    verdict = "ok    " if ok else "FAILED"
    line = f"{verdict} {name:<28} {time.time() - start:6.1f} s  {first}".rstrip()
    print("\n".join([line, *(f"       | {more}" for more in rest.splitlines())]), flush=True)
    return ok


def select(only: list[str]) -> tuple[list[str], list[Path]]:
    "The checks and notebooks named in `only`: checks, `tests` (all notebooks), or names and paths"
    try:
        books = notebooks()
    except CheckError:
        books = []
    if not only:
        return list(CHECKS), books
    names = {str(key): path for path in books for key in (path, path.name, path.stem)}
    unknown = [word for word in only if word not in {*CHECKS, "tests", *names}]
    if unknown:
        known = ", ".join([*CHECKS, "tests", *map(str, books)])
        raise SystemExit(f"--only {unknown[0]}: not known; there are {known}")
    chosen = {names[word] for word in only if word in names}
    return [name for name in CHECKS if name in only], [
        path for path in books if "tests" in only or path in chosen
    ]


def test(path: Path) -> bool:
    "Run one notebook, and print its line"
    return report(path.relative_to("nbs").as_posix(), lambda: test_notebook(path))


def parse_args() -> argparse.Namespace:
    "What to check"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help=f"run only this: {', '.join(CHECKS)}, tests (all notebooks), or a notebook; "
        "may be repeated",
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), choices=[1, 2],
        help="notebooks tested at the same time, with one thread each (default: 2)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    checks, books = select(args.only)
    results = [report(name, CHECKS[name]) for name in checks]
    if args.jobs > 1:  # two processes with two threads each on two cores wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(args.jobs) as pool:
        results += pool.map(test, books)
    if not results:
        raise SystemExit("nothing was checked: there is no notebook in nbs/")
    failed = results.count(False)
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
