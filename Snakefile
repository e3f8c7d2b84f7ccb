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
import sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from sdsclip_nb.experiment import SCALES, TEACHERS
from sdsclip_nb.plan import plan, result_needs, RESULTS, SUITES_OF, TEACHER_ITEMS, TEACHERS_OF

SCALE = config.get("scale", "mini")  # mini or paper
SEEDS = int(config.get("seeds", 3))  # of ViT-B-32
OTHER_SEEDS = int(config.get("other_seeds", config.get("all_seeds", 1)))  # of the other students
EXTRA_SEEDS = int(config.get("extra_seeds", config.get("all_seeds", 1)))  # of the variants: what changes one thing of the method
STEPS = config.get("steps")  # optimizer steps; none: the scale's own
ITEMS = config.get("items")  # of each suite, to try the graph out; none: all
if SCALE not in SCALES:
    raise WorkflowError(f"scale={SCALE!r} is unknown: give --config scale=mini or scale=paper")

OUT = config.get("out", f"out/reproduce/{SCALE}")
FIGURES = config.get("figures", "figures" if SCALE == "mini" else f"figures/{SCALE}")
RUNS = {r.name: r for r in plan(SCALE, SEEDS, OTHER_SEEDS, EXTRA_SEEDS)}
PAPERMILL = f"{Path(sys.executable).parent}/papermill"
GPU = 1 if SCALE == "paper" else 0

# The kernel says at every start that its port is not encrypted; nothing to read there.
shell.prefix("set -euo pipefail; ( ")
shell.suffix(" ) 2>&1 | sed '/IPKernelApp/d; /^Input Notebook/d; /^Executing notebook/d'")

modules = lambda names: [f"sdsclip_nb/{m}.py" for m in names.split()]
TRAIN_CODE = modules("experiment mini data teacher student losses train")
MEASURE_CODE = modules("experiment suite reader mini benchmarks compositional pairwise order zeroshot teacher student scores evaluate")
REPORT_CODE = modules("evaluate plan report")


def source(notebook):
    "A digest of a notebook's code, so that outputs and prose may change freely"
    cells = json.loads(Path(workflow.basedir, notebook).read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
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
    return student_weights(wildcards.student) + (teacher_weights(e.teacher) if e.loss != "clip" else [])


def settings(wildcards):
    "What decides a run's numbers, as the plan has it"
    run = RUNS.get(f"{wildcards.student}/{wildcards.training}/seed{wildcards.seed}")
    return "" if run is None else run.experiment().model_dump_json(exclude={"device"})


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
        source=source("nbs/jobs/fine_tune.ipynb"),
        settings=settings,
        steps=STEPS,
        folder=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}",
    threads: 1
    resources:
        gpu=GPU,
        runtime=600 if GPU else 60,  # minutes, for a cluster
        mem_mb=32000 if GPU else 3000,
    shell:
        "{PAPERMILL} nbs/jobs/fine_tune.ipynb {log.notebook} --no-progress-bar -p scale {SCALE} -p student {wildcards.student} "
        "-p training {wildcards.training} -p seed {wildcards.seed} -p steps {params.steps} -p threads {threads} -p out_dir {params.folder}"


rule measure:
    input:
        record=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}/record.json",
        code=MEASURE_CODE,
    output:
        f"{OUT}/outcomes/{{student}}/{{training}}/seed{{seed}}/metrics.json",
    log:
        notebook=f"{OUT}/logs/measure/{{student}}-{{training}}-seed{{seed}}.ipynb",
    params:
        source=source("nbs/jobs/measure.ipynb"),
        suites=SUITES_OF[SCALE],
        n=ITEMS,
        folder=f"{OUT}/runs/{{student}}/{{training}}/seed{{seed}}",
        to=f"{OUT}/outcomes/{{student}}/{{training}}/seed{{seed}}",
    threads: 1
    resources:
        gpu=GPU,
        runtime=240 if GPU else 30,
        mem_mb=32000 if GPU else 3000,
    shell:
        "{PAPERMILL} nbs/jobs/measure.ipynb {log.notebook} --no-progress-bar -p scale {SCALE} -p student {wildcards.student} "
        "-p training {wildcards.training} -p seed {wildcards.seed} -p n {params.n} -p threads {threads} -p run_dir {params.folder} -p out_dir {params.to}"


use rule measure as measure_untouched with:
    input:
        weights=lambda w: student_weights(w.student),
        code=MEASURE_CODE,
    output:
        f"{OUT}/outcomes/{{student}}/{{training,base}}/seed{{seed}}/metrics.json",
    params:
        source=source("nbs/jobs/measure.ipynb"),
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
        source=source("nbs/jobs/measure.ipynb"),
        n=ITEMS,
        suites=TEACHER_ITEMS[SCALE],
        to=f"{OUT}/outcomes/teacher:{{teacher}}",
    threads: 1
    priority: 1  # the longest steps: begun last, one of them would keep the other cores waiting
    resources:
        gpu=GPU,
        runtime=600 if GPU else 60,
        mem_mb=32000 if GPU else 3000,
    shell:
        "{PAPERMILL} nbs/jobs/measure.ipynb {log.notebook} --no-progress-bar -p scale {SCALE} -p student teacher:{wildcards.teacher} "
        "-p n {params.n} -p threads {threads} -p out_dir {params.to}"


rule result:
    input:
        outcomes=lambda w: outcomes(result_needs(w.name, SCALE, SEEDS, OTHER_SEEDS, EXTRA_SEEDS)),
        code=REPORT_CODE,
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
        code=REPORT_CODE,
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
