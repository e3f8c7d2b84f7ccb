# Every table and figure of the paper, and what each is made from:
#
#   weights -> fine-tuned students -> outcomes of every item -> tables and figures -> claims
#
# Each step is a notebook run by papermill; the executed one is kept in out/reproduce/SCALE/logs, also when it failed.
#   make reproduce                         mini scale, as configured below
#   snakemake -n                           what would run, and why
#   snakemake --cores 2 figures/teachers.json   one figure with what it needs
#   snakemake --cores 4 --resources gpu=1 --config scale=paper     the paper's models, on one GPU
# Stale is what a changed module, notebook source, setting, weight or input makes so. A notebook's outputs and prose do not count.
import json
import os
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from sdsclip_nb.experiment import SCALES, TEACHERS, Experiment
from sdsclip_nb.plan import plan, result_needs, RESULTS, SUITES_OF, TEACHER_ITEMS, TEACHERS_OF
from sdsclip_nb.record import commit, module_closure, notebook_imports

SCALE = config.get("scale", "mini")  # mini or paper
SEEDS = int(config.get("seeds", 3))  # of ViT-B-32
OTHER_SEEDS = int(config.get("other_seeds", config.get("all_seeds", 1)))  # of the other students
EXTRA_SEEDS = int(config.get("extra_seeds", config.get("all_seeds", 1)))  # of the variants: what changes one thing of the method
STEPS = config.get("steps")  # optimizer steps; none: the scale's own
ITEMS = config.get("items")  # of each suite, to try the graph out; none: all
if SCALE not in SCALES:
    raise WorkflowError(f"scale={SCALE!r} is unknown: give --config scale=mini or scale=paper")

OUT = config.get("out", f"out/reproduce/{SCALE}")
# What stands in figures/ is what a commit makes. From files that are not committed, figures go to out/figures/. Asked once:
# Snakemake reads this file again in the process of every job, and an edit meanwhile shall not move what is being made.
COMMITTED = "figures" if SCALE == "mini" else f"figures/{SCALE}"
if "SDSCLIP_FIGURES" not in os.environ:
    os.environ["SDSCLIP_FIGURES"] = f"out/{COMMITTED}" if commit()["dirty"] else COMMITTED
    if "figures" not in config and os.environ["SDSCLIP_FIGURES"] != COMMITTED:
        print(
            f"Files differ from the last commit (`git status` lists them): tables and figures go to out/{COMMITTED}, not to "
            f"{COMMITTED}. Commit and run again to have them there; what was trained and measured is kept.",
            file=sys.stderr,
        )
FIGURES = config.get("figures", os.environ["SDSCLIP_FIGURES"])
RUNS = {r.name: r for r in plan(SCALE, SEEDS, OTHER_SEEDS, EXTRA_SEEDS)}
PAPERMILL = f"{Path(sys.executable).parent}/papermill"
GPU = 1 if SCALE == "paper" else 0
# A core prepares about 180 of COCO's images a second at 224 pixels, and a GPU trains on up to 400: eight keep ahead of it.
# With fewer, Snakemake gives what there is.
THREADS = 8 if GPU else 1
TFLOP = {"exact": 1.726, "sds": 0.803}  # an image through SD v1-4 at 512 pixels and, if exact, back; computed
PIXELS = {"sd-v2-1": (768 / 512) ** 2}  # beside v1-4's
SLOW_GPU = 31  # TFLOP/s: a fifth of an A6000's bf16 peak

# The kernel says at every start that its port is not encrypted; nothing to read there.
shell.prefix("set -euo pipefail; ( ")
shell.suffix(" ) 2>&1 | sed '/IPKernelApp/d; /^Input Notebook/d; /^Executing notebook/d'")

# The terms that need the teacher, from their registry. It is in a module that imports torch, and Snakemake reads this file
# again in the process of every job: asked once, the answer is handed down.
ASK = "from sdsclip_nb.losses import TERMS; print(*(t.name for t in TERMS.values() if {'teacher', 'latent_map', 'image_latents'} & {*t.needs}))"
if "SDSCLIP_TEACHER_TERMS" not in os.environ:
    os.environ["SDSCLIP_TEACHER_TERMS"] = subprocess.run(
        [sys.executable, "-c", ASK], cwd=workflow.basedir, capture_output=True, text=True, check=True
    ).stdout
TEACHER_TERMS = os.environ["SDSCLIP_TEACHER_TERMS"].split()

NO_NUMBERS = ["plots"]  # modules that decide no number
TRAIN_JOB, MEASURE_JOB = "nbs/03_train.ipynb", "nbs/jobs/measure.ipynb"


def modules(roots, *leave_out):
    "The files of some modules and of all that they import"
    return [f"sdsclip_nb/{name}.py" for name in module_closure(roots, [*NO_NUMBERS, *leave_out])]


# What the plan says of a step stands in its params, so that a new student or training leaves the others alone.
TRAIN_CODE = modules(["training"])
MEASURE_CODE = modules(notebook_imports(MEASURE_JOB), "plan")


def report_code(name):
    "The modules of a result: those of the measurements, which it reads, are in its input already"
    return [f"sdsclip_nb/{m}.py" for m in module_closure(notebook_imports(f"nbs/paper/{name}.ipynb"))]


def source(notebook, tag=None):
    "A digest of a notebook's code, or of its cells with a tag, so that outputs, prose and plots may change freely"
    cells = json.loads(Path(workflow.basedir, notebook).read_text())["cells"]
    code = [
        "".join(c["source"]) for c in cells
        if c["cell_type"] == "code" and (tag is None or tag in c["metadata"].get("tags", []))
    ]
    return sha256("\0".join(code).encode()).hexdigest()[:16]


def student_weights(student):
    "The shipped weights of a mini student; at paper scale they come from the hub"
    return [f"data/mini/students/{student}/open_clip_model.safetensors"] if SCALE == "mini" else []


def teacher_weights(teacher):
    "The weights of a mini teacher, by the name load_teacher takes"
    source = TEACHERS.get(teacher.removeprefix("random:"), teacher)
    return [f"{source}/unet/diffusion_pytorch_model.safetensors"] if source.startswith("data/mini") else []


def training_weights(wildcards):
    e = RUNS[f"{wildcards.student}/{wildcards.training}/seed{wildcards.seed}"].experiment()
    with_teacher = any(term in TEACHER_TERMS for term in e.loss.split("+"))
    return student_weights(wildcards.student) + (teacher_weights(e.teacher) if with_teacher else [])


def settings(wildcards):
    "The settings of a training run that differ from the scale's own, as options of papermill"
    run = RUNS.get(f"{wildcards.student}/{wildcards.training}/seed{wildcards.seed}")
    if run is None:
        return ""
    steps = {"steps": int(STEPS)} if STEPS else {}
    own, wanted = Experiment(scale=SCALE).model_dump(), run.experiment(**steps).model_dump()
    changed = {"scale": SCALE} | {name: value for name, value in wanted.items() if value != own[name]}
    return " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in changed.items())


def training_minutes(wildcards, attempt):
    "Two hours for loading, the student and its evaluation, and the teacher's share on a slow GPU; more at a second try"
    if not GPU:
        return 60 * attempt
    e = RUNS[f"{wildcards.student}/{wildcards.training}/seed{wildcards.seed}"].experiment()
    with_teacher = any(term in TEACHER_TERMS for term in e.loss.split("+"))
    tflop = TFLOP[e.grad] * PIXELS.get(e.teacher, 1) * e.draws if with_teacher else 0
    images = int(STEPS or e.steps) * e.batch_size
    return attempt * (120 + round(images * tflop / SLOW_GPU / 60))


def memory(wildcards, attempt):
    "MB of the main memory: models, and images on their way from eight processes; more at a second try"
    return attempt * (32000 if GPU else 3000)


def outcomes(names):
    return [f"{OUT}/outcomes/{n}/metrics.json" for n in names]


wildcard_constraints:
    student="[^/]+",
    training="[^/]+",
    seed=r"\d+",
    teacher="[^/]+",


localrules:
    all,
    measured,


rule all:
    input:
        [f"{FIGURES}/{name}.json" for name in RESULTS if name != "claims"],
        f"{FIGURES}/claims.md",


rule measured:
    "Every student and teacher, without tables and figures"
    input:
        outcomes(RUNS),
        outcomes(f"teacher:{t}" for t in TEACHERS_OF[SCALE]),


rule fine_tune:
    input:
        weights=training_weights,
        code=TRAIN_CODE,
    output:
        directory(f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}/student"),
        history=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}/history.csv",
        record=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}/record.json",
    log:
        notebook=f"{OUT}/logs/fine_tune/{{student}}-{{training}}-seed{{seed}}.ipynb",
    params:
        source=source(TRAIN_JOB, "run"),
        settings=settings,
        folder=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}",
    threads: THREADS
    resources:
        gpu=GPU,
        runtime=training_minutes,  # for a cluster
        mem_mb=memory,
    shell:
        "{PAPERMILL} {TRAIN_JOB} {log.notebook} --no-progress-bar {params.settings} -p out_dir {params.folder} "
        "-p threads {threads} -p benchmarks none -p progress False -p wait True"


rule measure:
    input:
        record=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}/record.json",
        code=MEASURE_CODE,
    output:
        f"{OUT}/outcomes/{{student}}/{{training}}/seed{{seed}}/metrics.json",
    log:
        notebook=f"{OUT}/logs/measure/{{student}}-{{training}}-seed{{seed}}.ipynb",
    params:
        source=source(MEASURE_JOB),
        suites=SUITES_OF[SCALE],
        n=ITEMS,
        folder=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}",
        to=f"{OUT}/outcomes/{{student}}/{{training}}/seed{{seed}}",
    threads: THREADS
    resources:
        gpu=GPU,
        runtime=lambda w, attempt: attempt * (240 if GPU else 30),
        mem_mb=memory,
    shell:
        "{PAPERMILL} {MEASURE_JOB} {log.notebook} --no-progress-bar -p scale {SCALE} -p student {wildcards.student} "
        "-p training {wildcards.training} -p seed {wildcards.seed} -p n {params.n} -p threads {threads} -p run_dir {params.folder} -p out_dir {params.to}"


use rule measure as measure_untouched with:
    input:
        weights=lambda w: student_weights(w.student),
        code=MEASURE_CODE,
    output:
        f"{OUT}/outcomes/{{student}}/{{training,base}}/seed{{seed}}/metrics.json",
    params:
        source=source(MEASURE_JOB),
        suites=SUITES_OF[SCALE],
        n=ITEMS,
        folder=None,
        to=f"{OUT}/outcomes/{{student}}/{{training}}/seed{{seed}}",


ruleorder: measure_untouched > measure


rule measure_teacher:
    input:
        weights=lambda w: teacher_weights(TEACHERS_OF[SCALE][w.teacher]),
        code=MEASURE_CODE,
    output:
        f"{OUT}/outcomes/teacher:{{teacher}}/metrics.json",
    log:
        notebook=f"{OUT}/logs/measure/teacher-{{teacher}}.ipynb",
    params:
        source=source(MEASURE_JOB),
        n=ITEMS,
        suites=TEACHER_ITEMS[SCALE],
        to=f"{OUT}/outcomes/teacher:{{teacher}}",
    threads: THREADS
    priority: 1  # the longest steps: begun last, one of them would keep the other cores waiting
    resources:
        gpu=GPU,
        runtime=lambda w, attempt: attempt * (600 if GPU else 60),
        mem_mb=memory,
    shell:
        "{PAPERMILL} {MEASURE_JOB} {log.notebook} --no-progress-bar -p scale {SCALE} -p student teacher:{wildcards.teacher} "
        "-p n {params.n} -p threads {threads} -p out_dir {params.to}"


rule result:
    input:
        outcomes=lambda w: outcomes(result_needs(w.name, SCALE, SEEDS, OTHER_SEEDS, EXTRA_SEEDS)),
        code=lambda w: report_code(w.name),
    output:
        f"{FIGURES}/{{name}}.json",
        f"{FIGURES}/{{name}}.csv",
        f"{FIGURES}/{{name}}.png",
        f"{FIGURES}/{{name}}.svg",
    log:
        notebook=f"{OUT}/logs/paper/{{name}}.ipynb",
    wildcard_constraints:
        name="|".join(k for k in RESULTS if k != "claims"),
    params:
        source=lambda w: source(f"nbs/paper/{w.name}.ipynb"),
    threads: 1
    resources:
        gpu=lambda w: GPU if w.name == "probes" else 0,  # the one that runs students itself
        runtime=30,
        mem_mb=4000,
    shell:
        "{PAPERMILL} nbs/paper/{wildcards.name}.ipynb {log.notebook} --no-progress-bar -p results {OUT} -p scale {SCALE} "
        "-p seeds {SEEDS} -p other_seeds {OTHER_SEEDS} -p extra_seeds {EXTRA_SEEDS} -p figures {FIGURES}"


rule claims:
    input:
        outcomes=outcomes(result_needs("claims", SCALE, SEEDS, OTHER_SEEDS, EXTRA_SEEDS)),
        code=report_code("claims"),
        published="data/published/claims.csv",
    output:
        f"{FIGURES}/claims.md",
        f"{FIGURES}/claims.json",
    log:
        notebook=f"{OUT}/logs/paper/claims.ipynb",
    params:
        source=lambda w: source("nbs/paper/claims.ipynb"),
    threads: 1
    shell:
        "{PAPERMILL} nbs/paper/claims.ipynb {log.notebook} --no-progress-bar -p results {OUT} -p scale {SCALE} "
        "-p seeds {SEEDS} -p other_seeds {OTHER_SEEDS} -p extra_seeds {EXTRA_SEEDS} -p figures {FIGURES}"


def failed_notebooks():
    "(notebook, the last line of its error) of all executed notebooks that stopped in an error"
    for path in sorted(Path(OUT, "logs").rglob("*.ipynb")):
        try:
            cells = json.loads(path.read_text())["cells"]
        except ValueError:
            yield path, "not a whole notebook: its run was cut off"
            continue
        errors = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
        if errors:
            yield path, f"{errors[-1]['ename']}: {' '.join(errors[-1]['evalue'].split())}"


onerror:
    print("\nNot everything could be made. What failed, and the notebook that shows where:", file=sys.stderr)
    for path, why in failed_notebooks():
        print(f"  {path}\n      {why[:300]}", file=sys.stderr)
    print("Mend the cause and run the same command again: what is done is kept.", file=sys.stderr)
