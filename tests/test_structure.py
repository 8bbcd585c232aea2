"""The package's structure: layers that import only what is below them, one place for each name, files one can read."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
# Lowest first: a folder (or a top-level file) imports only from those before it. metrics is a leaf: it imports none.
LAYERS = (
    "modeling",
    "metrics",
    "data",
    "families",
    "tasks",
    "budgets",
    "checkpoints",
    "training",
    "jobs",
    "search",
    "serving",
    "standard_benchmarks",
    "__init__",
    "madtp_hf_cli",
)
# What each file of tasks/ defines under the same name.
TASK_FIELDS = ("predict", "predict_all", "score", "generate")
LONGEST_FILE, LONGEST_FUNCTION = 700, 80


def modules(folder: Path) -> dict[str, Path]:
    """Dotted names of the modules below `folder`, with their files; a package is its `__init__`."""
    names = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in names.items() if name}


MODULES = modules(SOURCE)


def at_import(tree):
    """Yield the nodes that run when a module is imported: not the bodies of functions, not `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def imports(name: str, known: dict[str, Path], nodes=ast.walk) -> set[str]:
    """The modules of `known` that the module `name` imports: the deepest that a statement names."""
    file, found = known[name], set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                found.add(target)
    return found


def place(name: str) -> str:
    """The layer that a module is in."""
    parts = name.split(".")
    return parts[0] if parts[0] != "madtp_hf" else (parts[1] if len(parts) > 1 else "__init__")


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A circle in a graph of names, if there is one."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(graph[name]):
            if found := visit(other):
                return found
        done.add(path.pop())
        return None

    return next(filter(None, map(visit, sorted(graph))), None)


def test_each_folder_imports_only_from_those_below_it():
    unknown = {place(name) for name in MODULES} - set(LAYERS)
    assert not unknown, f"give {unknown} a layer"
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name, MODULES)
        if LAYERS.index(place(other)) > LAYERS.index(place(name))
    ]
    # The package's own name gives its version and its models, which are below.
    wrong = [line for line in wrong if not line.endswith(" imports madtp_hf")]
    assert not wrong, "\n".join(wrong)


def test_what_travels_imports_nothing_of_the_rest_and_metrics_nothing_at_all():
    for name in MODULES:
        if place(name) in ("modeling", "metrics"):
            assert {place(other) for other in imports(name, MODULES)} <= {place(name)}, name


def test_no_circle_of_imports():
    assert circle({name: imports(name, MODULES, at_import) for name in MODULES}) is None
    places = defaultdict(set)
    for name in MODULES:
        places[place(name)] |= {place(other) for other in imports(name, MODULES)} - {place(name), "__init__"}
    assert circle(places) is None


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_no_circle_of_imports_between_scripts(folder):
    known = modules(ROOT / folder)
    known |= {f"{folder}.{name}": file for name, file in known.items()}
    graph = {name: imports(name, known) for name in known}
    same = {name: name.removeprefix(f"{folder}.") for name in known}
    joined = defaultdict(set)
    for name, others in graph.items():
        joined[same[name]] |= {same[other] for other in others} - {same[name]}
    assert len(joined) > 5 and circle(joined) is None


def public_names(tree):
    """Yield the functions and classes of a module that have no underscore in front."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name


def test_no_public_name_is_defined_twice():
    homes = defaultdict(list)
    for name, file in MODULES.items():
        if place(name) not in ("madtp_hf_cli", "metrics"):  # a command is called like what it runs
            for public in public_names(ast.parse(file.read_text())):
                if not (place(name) == "tasks" and public in TASK_FIELDS):
                    homes[public].append(name)
    assert {public: names for public, names in homes.items() if len(names) > 1} == {}


def test_images_are_opened_in_one_file():
    files = {
        name
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    }
    assert files == {"madtp_hf.modeling.images"}


def lines_of(function) -> int:
    """The lines of a function, without its docstring and decorators."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_files_and_functions_are_short(folder):
    long = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        text, name = file.read_text(), file.relative_to(ROOT)
        if text.count("\n") > LONGEST_FILE:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and lines_of(node) > LONGEST_FUNCTION:
                long.append(f"{name}, {node.name}: {lines_of(node)} lines")
    assert not long, "\n".join(long)
