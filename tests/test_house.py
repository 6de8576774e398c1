"""The structure: imports between packages point down, there are no cycles, files are short, architectures stay apart."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparsessm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package may import from an earlier row and from itself; some names are single files.
PACKAGES = [
    {"sparsessm", "compiled", "lanes", "threads", "version"},
    {"errors"},
    {"files"},
    {"kernels", "pruning"},
    {"models"},
    {"layerwise"},
    {"corpora", "metrics"},
    {"checks"},
    {"options"},
    {"commandline"},
    {"procedure"},
    {"result"},
    {"report"},
    {"runs"},
    {"steps", "rehearsal"},
    {"run", "api"},
    {"compacting", "training"},
    {"__main__"},
]
LEVEL = {package: level for level, row in enumerate(PACKAGES) for package in row}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, for types as well."""
    known, found = {module_of(other) for other in FILES}, set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, file
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        found |= {name for name in names if name in known}
    return found


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


GRAPH = {module_of(file): imports_of(file) - {module_of(file)} for file in FILES if file != PACKAGE / "__init__.py"}


def test_every_package_has_a_level():
    assert {package_of(module) for module in GRAPH} <= LEVEL.keys()


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_down(module):
    for other in GRAPH[module]:
        mine, theirs = package_of(module), package_of(other)
        assert mine == theirs or LEVEL[theirs] < LEVEL[mine], f"{module} imports {other}"


def test_there_are_no_import_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_pruning_knows_no_model_no_file_and_no_flag():
    for module, others in GRAPH.items():
        if package_of(module) == "pruning":
            known = ("pruning", "errors", "threads", "compiled", "lanes", "sparsessm")
            assert all(package_of(other) in known for other in others), module


def test_no_file_but_the_models_knows_an_architecture():
    names = r"backbone|MambaForCausalLM|\bfalcon_mamba\b|x_proj|dt_proj|state_size|num_heads|in_proj|out_proj"
    allowed = {"out_proj"}  # --compensate out_proj is a word of the command line
    for file in FILES:
        if file.parent.name == "models":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not re.fullmatch(names, node.attr), f"{file.name}:{node.lineno} {node.attr}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in allowed:
                assert not re.fullmatch(names, node.value), f"{file.name}:{node.lineno} {node.value}"


@pytest.mark.parametrize("file", [*FILES, ROOT / "main.py"], ids=lambda file: file.name)
def test_no_file_is_longer_than_four_hundred_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_core_needs_only_the_core():
    """What one kind of run alone needs is imported where it is used."""
    optional = {"datasets", "wandb", "lm_eval", "mamba_ssm", "causal_conv1d", "matplotlib", "jinja2", "triton", "accelerate"}
    on_gpus = ("triton_kernels", "triton_gradient", "scan_cuda", "scan_gradient_cuda")
    apart = {f"kernels/{name}.py" for name in on_gpus}  # imported where they are used
    for file in FILES:
        if str(file.relative_to(PACKAGE)) in apart:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not {name.split(".")[0] for name in names} & optional, file.name
