"""Checks the imports against the layering table and for circles. Exit code 1, and a line for each violation.

It parses the source (every `import`, also inside functions) and runs none of it.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders from which modules are imported by name, in this repository.
SOURCE_ROOTS = ("client", "model_repository/*/1", "scripts", "tests")

ENGINE = "model_repository/*/1/engine"
GPU_MACHINE = ("numpy", "safetensors", "tokenizers", "torch", "transformers", "triton")
# Imported for the first grammar, and for a GGUF file; tests/inference/test_gpu_check.py runs without them.
IMPORTED_LATE = ("gguf", "llguidance")
HTTP = ("httpx", "fastapi", "requests", "aiohttp", "urllib3")


@dataclass(frozen=True)
class Rule:
    """Files (globs from the root) that never import the packages `never`, or import nothing but the packages `only`."""

    files: tuple[str, ...]
    never: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    # Parts of a forbidden package that are allowed.
    but: tuple[str, ...] = ()
    # Check the modules of this repository that the file imports, too.
    transitive: bool = False
    why: str = ""


RULES = (
    Rule(
        (f"{ENGINE}/**/*.py",),
        only=(*GPU_MACHINE, *IMPORTED_LATE, "engine", "tritonlm.contract"),
        why="the engine speaks token ids, and needs no packages that a GPU machine lacks",
    ),
    Rule(
        (f"{ENGINE}/scheduling/*.py", f"{ENGINE}/request.py", f"{ENGINE}/output/release.py"),
        never=("torch",),
        transitive=True,
        why="bookkeeping is plain Python",
    ),
    Rule(
        ("model_repository/*/1/model.py",),
        never=("torch", "tritonclient", *HTTP),
        why="model.py is a thin adapter; torch belongs to the engine",
    ),
    Rule(
        ("client/tritonlm/contract/**/*.py",),
        only=("numpy", "tritonlm.contract"),
        why="the contract needs the standard library and numpy",
    ),
    Rule(
        ("client/tritonlm/serving/**/*.py",), never=("torch", "fastapi", "tritonclient"), why="processes, not tensors"
    ),
    Rule(
        ("client/tritonlm/client/*.py",),
        never=("fastapi", "torch", "grpc", "tritonclient", "tokenizers"),
        why="the client reaches Triton through its transport",
    ),
    Rule(
        ("client/tritonlm/client/chat_parsing/**/*.py",),
        only=("tritonlm.client.chat_parsing", "tritonlm.contract", "transformers.utils.chat_parsing"),
        why="parsers are plain Python, and the client installs without more",
    ),
    Rule(
        ("client/tritonlm/client/responses_api/**/*.py", "client/tritonlm/client/messages_api/**/*.py"),
        only=("pydantic", "pydantic_core", "tritonlm.client", "tritonlm.contract"),
        why="conversions are plain Python, and the client installs without more",
    ),
    Rule(
        ("client/tritonlm/client/transport/**/*.py",),
        never=("fastapi", "torch", "tokenizers"),
        why="the client installs without them",
    ),
    Rule(
        ("client/tritonlm/gateway/**/*.py",),
        never=("torch", "grpc", "tritonclient", "tokenizers"),
        why="the gateway knows AsyncClient",
    ),
    Rule(
        ("client/tritonlm/gateway/http/*.py",),
        never=tuple(f"tritonlm.gateway.{name}" for name in ("limits", "models", "routes", "services")),
        why="HTTP itself knows neither callers nor models",
    ),
    Rule(
        ("client/tritonlm/commands/**/*.py", "client/tritonlm/cli.py"),
        never=("torch", "transformers", "tokenizers", "grpc", "tritonclient"),
        why="a command is a client like any other",
    ),
    Rule(
        ("load_tests/**/*.py",),
        never=("tritonlm", "engine"),
        but=("tritonlm.client",),
        why="load tests use the public API",
    ),
)


@dataclass(frozen=True)
class Import:
    line: int
    name: str


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    breaches = check(root)
    for breach in breaches:
        print(breach)
    return 1 if breaches else 0


def check(root: Path) -> list[str]:
    modules = find_modules(root)
    breaches = [
        breach
        for rule in RULES
        for pattern in rule.files
        for path in sorted(root.glob(pattern))
        for breach in breaches_of(rule, path, root, modules)
    ]
    return breaches + circles(root, modules)


def circles(root: Path, modules: dict[str, Path]) -> list[str]:
    """A line for a circle of modules that import each other; imports in functions and for types count."""
    imports = {
        path: {local_module(statement.name, modules) for statement in imports_of(path, root)} - {None, path}
        for path in modules.values()
    }
    order = graphlib.TopologicalSorter(imports)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        names = " → ".join(str(path.relative_to(root)) for path in reversed(error.args[1]))
        return [f"modules import each other in a circle: {names}: put what both need into a third"]
    return []


def breaches_of(rule: Rule, path: Path, root: Path, modules: dict[str, Path]) -> Iterator[str]:
    for imported, via in imports_reached(path, root, modules, rule.transitive):
        if not is_allowed(rule, imported.name):
            through = "".join(f" through {module.relative_to(root)}" for module in via)
            yield f"{path.relative_to(root)}:{imported.line}: imports {imported.name}{through}: {rule.why}"


def is_allowed(rule: Rule, name: str) -> bool:
    if rule.only:
        return name.split(".", maxsplit=1)[0] in sys.stdlib_module_names or is_in(name, rule.only)
    return not is_in(name, rule.never) or is_in(name, rule.but)


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports_reached(
    path: Path, root: Path, modules: dict[str, Path], transitive: bool
) -> Iterator[tuple[Import, tuple[Path, ...]]]:
    """The imports of a file with the modules between; the line is that of the file's own import."""
    seen = {path}
    pending: list[tuple[Import, Import, tuple[Path, ...]]] = [(own, own, ()) for own in imports_of(path, root)]
    while pending:
        own, imported, via = pending.pop(0)
        yield Import(own.line, imported.name), via
        module = local_module(imported.name, modules)
        if transitive and module is not None and module not in seen:
            seen.add(module)
            pending += [(own, further, (*via, module)) for further in imports_of(module, root)]


def local_module(name: str, modules: dict[str, Path]) -> Path | None:
    """`a.b.thing` is module a.b.thing or the name `thing` out of a.b."""
    return modules.get(name) or modules.get(name.rpartition(".")[0])


def imports_of(path: Path, root: Path) -> list[Import]:
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    imports = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            imports += [Import(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            imports += [Import(node.lineno, f"{stem}.{alias.name}".strip(".")) for alias in node.names]
    return imports


def find_modules(root: Path) -> dict[str, Path]:
    paths = [path for source in SOURCE_ROOTS for folder in root.glob(source) for path in sorted(folder.rglob("*.py"))]
    return {module_name(path, root): path for path in paths}


def module_name(path: Path, root: Path) -> str:
    for source in SOURCE_ROOTS:
        for folder in root.glob(source):
            if path.is_relative_to(folder):
                parts = path.relative_to(folder).with_suffix("").parts
                return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return path.stem


if __name__ == "__main__":
    sys.exit(main())
