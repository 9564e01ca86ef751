"""What the source itself must keep to: who imports whom, what stays unloaded, and a few things that may not be called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlr_trainer"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("diffusers", "transformers", "accelerate", "trl", "peft", "datasets")

# Folder of the package -> the folders that it may import, itself aside; lazy imports count.
_BELOW_ROLLOUTS = {"estimators", "schedules", "pipelines", "rewards"}
DIRECTIONS: dict[str, set[str]] = {
    "estimators": set(),
    "schedules": set(),
    "digits": set(),
    "pipelines": {"estimators", "schedules"},
    "rewards": {"estimators"},
    "rollouts": _BELOW_ROLLOUTS,
    "persistence": _BELOW_ROLLOUTS | {"rollouts"},
    "observing": {"rewards", "rollouts", "persistence"},
    "diagnosis": _BELOW_ROLLOUTS | {"rollouts"},
    "training": _BELOW_ROLLOUTS | {"rollouts", "persistence", "observing", "diagnosis"},
    "testing": _BELOW_ROLLOUTS | {"rollouts", "training"},
    "cli": _BELOW_ROLLOUTS | {"rollouts", "persistence", "observing", "diagnosis", "training", "digits"},
}
TORCH_ONLY = {"estimators"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Top-level part of a module of the package; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def for_type_checkers_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imported(tree: ast.AST, nested: bool = True) -> Iterator[str]:
    """Names of the modules imported at run time; `nested` includes those imported inside functions."""
    for node in ast.iter_child_nodes(tree):
        if for_type_checkers_only(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:  # `from package import module` imports the module
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported(node, nested)


def test_the_reader_sees_the_package():
    assert {"rlr_trainer.estimators.plan", "rlr_trainer.estimators.sweep"} <= set(MODULES)
    assert "rlr_trainer.estimators.chain" in set(imported(MODULES["rlr_trainer.estimators.sweep"]))


def test_the_root_holds_a_dozen_entries_and_each_has_its_rule():
    entries = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed", "__init__.py")}
    assert entries == set(DIRECTIONS) and len(entries) <= 12


def test_the_rules_allow_no_circle():
    assert all(part not in DIRECTIONS[other] for part, others in DIRECTIONS.items() for other in others)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_in_one_direction(module):
    part = part_of(module)
    if part:
        targets = {part_of(name) for name in imported(MODULES[module]) if name.split(".")[0] == "rlr_trainer"} - {part, ""}
        assert targets <= DIRECTIONS[part], f"{module} imports {sorted(targets - DIRECTIONS[part])}"


def test_the_package_itself_loads_nothing_of_its_own():
    """Public names are loaded on first use; otherwise `import rlr_trainer.estimators` would load them all."""
    assert not [name for name in imported(MODULES["rlr_trainer"], nested=False) if name.startswith("rlr_trainer")]


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) in TORCH_ONLY])
def test_estimators_need_nothing_but_torch(module):
    allowed = {"torch", "rlr_trainer", *sys.stdlib_module_names}
    foreign = {name.split(".")[0] for name in imported(MODULES[module])} - allowed
    assert not foreign


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions count, too."""
    graph = {module: {name for name in imported(tree) if name in MODULES and name != module} for module, tree in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                if not module.startswith(f"{name}."):  # a module of a subpackage and its __init__
                    visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_estimators_load_no_pipeline_libraries():
    """In a fresh interpreter, with the names that docs/estimators.md imports for a chain of one's own."""
    program = (
        "import sys, rlr_trainer.estimators\n"
        "from rlr_trainer import EstimatorPlan, estimate_gradient\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


# ---- calls that do not belong in a library ----


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute, `a` of a name, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(tree: ast.AST, outside: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every call that is not inside a `with` block on one of `outside`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With) and any(
            dotted(item.context_expr.func) in outside for item in node.items if isinstance(item.context_expr, ast.Call)
        ):
            continue
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno
        yield from calls(node, outside)


GLOBAL_SEEDS = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.default_generator.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.set_rng_state",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "set_seed",
    "transformers.set_seed",
    "accelerate.utils.set_seed",
    "seed_everything",
}


def test_nothing_seeds_the_global_generators():
    """Except on a fork of them, which leaves the caller's where it was."""
    found = [
        f"{module}:{line} {name}"
        for module, tree in MODULES.items()
        for name, line in calls(tree, outside=("torch.random.fork_rng",))
        if name in GLOBAL_SEEDS
        and (module, name) != ("rlr_trainer.persistence.run_state", "torch.set_rng_state")  # resuming restores what was saved
    ]
    assert not found


def test_the_reader_of_calls_sees_a_seed_and_a_fork():
    tree = ast.parse("def f():\n    torch.manual_seed(0)\n    with torch.random.fork_rng():\n        np.random.seed(1)\n")
    assert [name for name, _ in calls(tree) if name in GLOBAL_SEEDS] == ["torch.manual_seed", "np.random.seed"]
    assert [name for name, _ in calls(tree, ("torch.random.fork_rng",)) if name in GLOBAL_SEEDS] == ["torch.manual_seed"]


def test_only_the_command_line_prints():
    found = [
        f"{module}:{line}"
        for module, tree in MODULES.items()
        for name, line in calls(tree)
        if name in ("print", "pprint.pprint") and part_of(module) != "cli"
    ]
    assert not found


def test_no_exception_is_caught_without_a_name():
    found = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and (node.type is None or dotted(node.type) == "BaseException")
    ]
    assert not found
