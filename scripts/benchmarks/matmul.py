"""The kernels' matmul, for float32, bfloat16, its 12-bit form, int8 and weights in groups: GB/s of weights and GFLOP/s.

    scripts/bench matmul [--rows 1 8 512] [--forms bf16 int8] [--threads 2]

Beside them, of the same run: the read bandwidth, and the peak of products. TRITONLM_NATIVE_FLAGS excludes instruction
sets, for example "-mno-avx512bf16 -mno-avx512vnni", or -march=haswell for AVX2.
It knows the kernels' headers, not models.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "model_repository" / "generate" / "1" / "engine" / "runners" / "native"
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))

from engine.runners.native import build  # noqa: E402

# The letters that matmul.cpp takes.
FORMS = {"float32": "f", "bf16": "b", "12-bit": "p", "int8": "i", **{f"{bits}-bit": str(bits) for bits in (4, 5, 6, 8)}}
# The peak that a form is compared with.
PEAKS = {**dict.fromkeys(FORMS, "int8"), "float32": "float32", "bf16": "bf16", "12-bit": "bf16"}


def compile_benchmark(folder: Path) -> Path:
    flags = ["-std=c++17", "-pthread", "-Wno-psabi", "-O2"]
    flags += build.flags_for_this_machine(os.environ.get(build.FLAGS, "").split())
    compiler = shutil.which(os.environ.get("CXX") or "g++") or "c++"
    source, program = Path(__file__).with_suffix(".cpp"), folder / "matmul"
    subprocess.run([compiler, *flags, f"-I{NATIVE / 'kernels'}", str(source), "-o", str(program)], check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128, 512])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.4, help="for each measurement")
    options = parser.parse_args()
    letters = "".join(FORMS[form] for form in options.forms)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(options.threads), str(options.seconds), letters, *map(str, options.rows)]
        command = [str(compile_benchmark(Path(folder))), *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [(name, int(count), float(seconds), int(size), float(operations))
            for name, count, seconds, size, operations in map(str.split, output.splitlines())]  # fmt: skip
    read = max(size / seconds for name, _, seconds, size, _ in rows if name == "read")
    peaks = {name: operations / seconds for name, _, seconds, _, operations in rows}
    table = Table(
        title=f"{options.threads} threads, {read / 1e9:.1f} GB/s read; the fastest of each measurement's runs"
    )
    for column in ("weights", "rows", "ms", "GB/s", "of the read bandwidth", "GFLOP/s", "of the peak"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, count, seconds, size, operations in rows:
        if name in FORMS:
            bandwidth, speed = size / seconds, operations / seconds
            table.add_row(
                name, str(count), f"{1000 * seconds:.2f}", f"{bandwidth / 1e9:.1f}", f"{bandwidth / read:.0%}",
                f"{speed / 1e9:.0f}", f"{speed / peaks[PEAKS[name] + '-peak']:.0%}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
