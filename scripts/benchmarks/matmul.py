"""The kernels' matmul, for float32, bfloat16, its 12-bit form, int8 and weights in groups: GB/s of weights and GFLOP/s.

    scripts/bench matmul [--rows 1 8 512] [--forms bf16 int8] [--threads 2] [--against COMMIT]

Beside them, of the same run: the read bandwidth, and the peak of products. `--against` compares with the kernels of a
commit: runs of both alternate, because memory changes its speed from second to second on a shared machine.
TRITONLM_NATIVE_FLAGS excludes instruction sets, for example "-mno-avx512bf16 -mno-avx512vnni", or -march=haswell for
AVX2. It knows the kernels' headers, not models.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "model_repository" / "generate" / "1" / "engine" / "runners" / "native"
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))

from engine.runners.native import build  # noqa: E402

# The letters that matmul.cpp takes.
FORMS = {"float32": "f", "bf16": "b", "12-bit": "p", "int8": "i", "4-bit-k": "k"} | {
    f"{bits}-bit": str(bits) for bits in (4, 5, 6, 8)
}
# The peak that a form is compared with.
PEAKS = {**dict.fromkeys(FORMS, "int8"), "float32": "float32", "bf16": "bf16", "12-bit": "bf16"}


KERNELS, SOURCE = NATIVE / "kernels", Path(__file__).resolve().with_suffix(".cpp")
# For all runs of two programs: far more than they take.
RUNS_SECONDS = 1800.0


class Line(NamedTuple):
    """A line of the program's output; `runs` are seconds for one matrix."""

    name: str
    rows: int
    bytes: int
    operations: float
    runs: tuple[float, ...]


def compile_benchmark(folder: Path, source: Path, kernels: Path) -> Path:
    flags = ["-std=c++17", "-pthread", "-Wno-psabi", "-O2"]
    flags += build.flags_for_this_machine(os.environ.get(build.FLAGS, "").split())
    compiler = shutil.which(os.environ.get("CXX") or "g++") or "c++"
    program = folder / "matmul"
    folder.mkdir(exist_ok=True)
    subprocess.run([compiler, *flags, f"-I{kernels}", str(source), "-o", str(program)], check=True)
    return program


def sources_of(commit: str, folder: Path) -> tuple[Path, Path]:
    """The commit's own benchmark and kernels, whose functions differ from today's."""
    paths = [str(path.relative_to(ROOT)) for path in (SOURCE, KERNELS)]
    archive = subprocess.run(["git", "archive", commit, *paths], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        sys.exit(f"--against: git has no kernels of {commit!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    source, kernels = (folder / path for path in paths)
    if "turns" not in source.read_text(encoding="utf-8"):
        sys.exit(f"--against: the benchmark of {commit!r} takes no turns; name ecaa8fe or a later commit")
    return source, kernels


def parse(output: str) -> list[Line]:
    lines = []
    for name, rows, size, operations, *runs in map(str.split, output.splitlines()):
        lines.append(Line(name, int(rows), int(size), float(operations), tuple(map(float, runs))))
    return lines


def in_alternation(programs: list[Path], arguments: list[str], row_counts: list[str], runs: int) -> list[list[Line]]:
    """The output of each program. A byte goes around: who has it runs."""
    pipes = [os.pipe() for _ in programs]
    os.write(pipes[0][1], b"\0")
    running = []
    for number, program in enumerate(programs):
        ends = pipes[number][0], pipes[(number + 1) % len(pipes)][1]
        command = [str(program), *arguments, f"{ends[0]},{ends[1]},{runs}", *row_counts]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=ends))
    # A program that ends early closes its pipes, and the other one ends.
    for end in [end for pipe in pipes for end in pipe]:
        os.close(end)
    try:
        outputs = [process.communicate(timeout=RUNS_SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        sys.exit("a program ended before its last run")
    return [parse(output) for output in outputs]


def show(lines: list[Line], threads: int) -> Table:
    """The fastest of each measurement's runs: other processes only add to them."""
    read = max(line.bytes / min(line.runs) for line in lines if line.name == "read")
    peaks = {line.name: line.operations / min(line.runs) for line in lines}
    table = Table(title=f"{threads} threads, {read / 1e9:.1f} GB/s read; the fastest of each measurement's runs")
    for column in ("weights", "rows", "ms", "GB/s", "of the read bandwidth", "GFLOP/s", "of the peak"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for line in (line for line in lines if line.name in FORMS):
        bandwidth, speed = line.bytes / min(line.runs), line.operations / min(line.runs)
        table.add_row(
            line.name, str(line.rows), f"{1000 * min(line.runs):.2f}", f"{bandwidth / 1e9:.1f}",
            f"{bandwidth / read:.0%}", f"{speed / 1e9:.0f}", f"{speed / peaks[PEAKS[line.name] + '-peak']:.0%}",
        )  # fmt: skip
    return table


def show_ratios(before: list[Line], after: list[Line], commit: str) -> Table:
    """Medians of runs, and of the ratios of runs that followed each other."""
    read = statistics.median(line.bytes / run / 1e9 for line in after if line.name == "read" for run in line.runs)
    table = Table(title=f"{len(after[0].runs)} runs in alternation, {read:.1f} GB/s read; medians")
    for column in ("weights", "rows", f"ms, {commit}", "ms", "of it"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for old, new in zip(before, after, strict=True):
        if new.name in FORMS:
            ratio = statistics.median(b / a for a, b in zip(old.runs, new.runs, strict=True))
            milliseconds = [f"{1000 * statistics.median(line.runs):.3f}" for line in (old, new)]
            table.add_row(new.name, str(new.rows), *milliseconds, f"{ratio:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128, 512])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.4, help="for each measurement")
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit's kernels")
    parser.add_argument("--runs", type=int, default=40, help="with --against, of each measurement")
    options = parser.parse_args()
    arguments = [str(options.threads), str(options.seconds), "".join(FORMS[form] for form in options.forms)]
    row_counts = [str(count) for count in options.rows]
    with tempfile.TemporaryDirectory() as folder:
        program = compile_benchmark(Path(folder) / "new", SOURCE, KERNELS)
        if options.against is None:
            command = [str(program), *arguments, "-1,-1,0", *row_counts]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            table = show(parse(output), options.threads)
        else:
            old = compile_benchmark(Path(folder) / "old", *sources_of(options.against, Path(folder)))
            before, after = in_alternation([old, program], arguments, row_counts, options.runs)
            table = show_ratios(before, after, options.against)
    Console().print(table)


if __name__ == "__main__":
    main()
