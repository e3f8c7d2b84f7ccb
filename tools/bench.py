"""Time the main job as a user runs it: papermill on nbs/03_train.ipynb, in a process of its own.

Options that are not listed here go to papermill, such as `-p arch RN50 -p steps 200`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["torch", "open_clip_torch", "diffusers", "transformers", "accelerate"]


def time_once(options: list[str]) -> float:
    "Seconds that one run of the main job takes"
    papermill = Path(sys.executable).with_name("papermill")
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        subprocess.run(
            [
                papermill,
                "nbs/03_train.ipynb",
                Path(tmp) / "run.ipynb",
                "--no-progress-bar",
                *options,
            ],
            cwd=ROOT,
            check=True,
        )
        return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=1, help="number of runs (default 1)")
    args, options = parser.parse_known_args()
    try:
        seconds = [round(time_once(options), 1) for _ in range(args.repeat)]
    except subprocess.CalledProcessError as error:
        print(f"the main job failed with exit status {error.returncode}", file=sys.stderr)
        return 1
    unit = (
        1 if sys.platform == "darwin" else 1024
    )  # ru_maxrss is in bytes on macOS, in KiB on Linux
    result = {
        "seconds": seconds,
        "peak_memory_mb": round(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6
        ),
        "options": options,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    out = ROOT / "out" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written to {out.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
