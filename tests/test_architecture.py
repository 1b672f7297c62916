"""The house rules that a reader cannot keep in mind: who imports whom, what a file may touch, what a notebook may hold.

Each rule is a function from a module (or a notebook, or a text) to the lines that break it. It is applied to the whole project,
and to a snippet that breaks it, so that a rule which finds nothing is known to be able to.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kit
from kit import manifest
from tests import packed
from tests.packed import write_rows

ROOT = Path(__file__).parents[1]

# A module imports only from the lines above its own. On an ORDERED line also from what stands before it; elsewhere never from its own line.
LINES: tuple[tuple[str, ...], ...] = (
    ("errors", "runtime", "metrics", "budget"),
    ("manifest", "paths", "config", "packing"),
    ("data", "tasks", "models", "retrieval", "vendor", "sample"),
    ("assemble", "predict"),
    ("training", "inference", "rehearsal", "report"),
    ("cli",),
    ("__main__",),
)
PLACES = {name: number for number, line in enumerate(LINES) for name in line}
ORDERED = (0, 1)

# Package → modules that may import it at the top, modules that may import it inside functions only. A room stands for all of its files.
OWNERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "torch": (
        ("kit.models", "kit.packing", "kit.predict", "kit.training", "kit.inference.scorer", "kit.retrieval.dense", "kit.retrieval.embedding"),
        ("kit.runtime", "kit.tasks", "kit.vendor.capture", "kit.vendor.tensors"),
    ),
    "faiss": (("kit.retrieval.dense",), ()),
    "peft": ((), ("kit.models.adapters",)),
    "bitsandbytes": ((), ("kit.models.adapters",)),
    "kaggle": ((), ("kit.vendor.session",)),
    "kagglesdk": ((), ("kit.vendor.session",)),
    "requests": ((), ("kit.vendor.session",)),
}
HEAVY = {"torch", "transformers", "pandas", "numpy", "accelerate", "sentence_transformers", "sklearn", "faiss"}
PRINTERS = ("kit.cli",)
ENVIRONMENT_READERS = ("kit.runtime", "kit.vendor.capture")  # the latter is pasted into notebooks, so it cannot ask kit.runtime
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
MACHINE = re.compile(r"(?<![\w.>-])/(?:root|home|Users|work)/|\b[A-Z]:\\+Users|\b[\w-]+\.(?:internal|localdomain|lan|corp)\b")
GENERATED = {"__pycache__", "artifacts", "dist"}


class Module(NamedTuple):
    """A parsed file of the kit: dotted name, whether it is a package's __init__, syntax tree."""

    name: str
    is_package: bool
    tree: ast.Module


class Import(NamedTuple):
    """One imported thing. module: dotted name; names: what is taken from it (empty: the module itself); lazy: inside a function."""

    line: int
    module: str
    names: frozenset[str]
    lazy: bool


def module_of(source: str, name: str = "kit.snippet") -> Module:
    return Module(name, False, ast.parse(source))


def project_modules() -> list[Module]:
    found = []
    for path in sorted((ROOT / "kit").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append(Module(".".join(parts[:-1] if is_package else parts), is_package, ast.parse(path.read_text("utf-8"), str(path))))
    return found


MODULES = project_modules()
NAMES = {module.name for module in MODULES}


# --- what a module imports -------------------------------------------------------------------------------------------------------


def imports(module: Module, known: set[str] = NAMES) -> Iterator[Import]:
    """Everything a module imports at run time: statements and import_module("…"), not what stands under `if TYPE_CHECKING`."""
    for node, lazy in walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, frozenset(), lazy)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module)
            names = {alias.name for alias in node.names}
            submodules = {name for name in names if f"{base}.{name}" in known}
            yield from (Import(node.lineno, f"{base}.{name}", frozenset(), lazy) for name in sorted(submodules))
            if names - submodules:
                yield Import(node.lineno, base, frozenset(names - submodules), lazy)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            literal = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from (Import(node.lineno, str(name), frozenset(), lazy) for name in literal)


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes that can run, and whether they stand inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other, lazy
                yield from walk(other, lazy)
            continue
        yield child, lazy
        yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def absolute(node: ast.ImportFrom, module: Module) -> str:
    """The dotted name of what `from … import` names, relative forms resolved."""
    if not node.level:
        return node.module or ""
    up = node.level - module.is_package
    package = module.name.split(".")[: -up or None]
    return ".".join([*package, *(node.module or "").split(".")]).rstrip(".")


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


# --- rules -----------------------------------------------------------------------------------------------------------------------


def wrong_order(module: Module) -> list[str]:
    """Imports that go up the table of LINES, or across it."""
    return [
        f"{module.name}:{found.line} imports {found.module}, {why}"
        for found in imports(module)
        if found.module.split(".")[0] == "kit" and module.name != "kit" and (why := objection(module.name, found))
    ]


def objection(name: str, found: Import) -> str:
    """Why a module may not import this; empty if it may."""
    here, there = name.split(".")[1], ".".join(found.module.split(".")[1:2])
    if not there:
        return "" if found.names <= {"__version__"} else "whose public names are for users: import from the module that owns them"
    if here == there:
        return ""
    mine, other = PLACES.get(here), PLACES.get(there)
    if mine is None or other is None:
        return f"but kit.{here if mine is None else there} has no place in the import order: give it one in LINES"
    is_earlier = mine in ORDERED and LINES[mine].index(there) < LINES[mine].index(here) if mine == other else other < mine
    return "" if is_earlier else "which does not stand above it"


def foreign_packages(module: Module) -> list[str]:
    """Imports of a package by a file that does not own it."""
    return [
        f"{module.name}:{found.line} imports {package}, which only {', '.join([*anywhere, *inside])} may"
        for found in imports(module)
        for package, (anywhere, inside) in OWNERS.items()
        if found.module.split(".")[0] == package and not is_in(module.name, anywhere) and not (found.lazy and is_in(module.name, inside))
    ]


def is_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def prints(module: Module) -> list[str]:
    """Uses of print outside the command line."""
    return [
        f"{module.name}:{node.lineno} prints: raise, return, or use tqdm"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and node.id == "print" and not is_in(module.name, PRINTERS)
    ]


def touches_environment(module: Module) -> list[str]:
    """Reads and writes of environment variables outside the one file that may."""
    if is_in(module.name, ENVIRONMENT_READERS):
        return []
    found = []
    for node in ast.walk(module.tree):
        used = {node.attr} if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os" else set()
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            used = {alias.name for alias in node.names}
        found += [f"{module.name}:{node.lineno} touches os.{name}: ask kit.runtime" for name in sorted(used & ENVIRONMENT)]
    return found


def undocumented(module: Module) -> list[str]:
    """Modules, public classes and public functions without a docstring."""
    found = [] if ast.get_docstring(module.tree) else [f"{module.name}:1 has no docstring"]
    return found + [
        f"{module.name}:{node.lineno} {node.name} has no docstring" for node in public(module.tree) if not ast.get_docstring(node)
    ]


def unannotated(module: Module) -> list[str]:
    """Public functions and constructors that leave a parameter or the result without a type."""
    found = []
    for node in public(module.tree, also=("__init__",)):
        if isinstance(node, ast.ClassDef):
            continue
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        missing = [arg.arg for arg in every if arg and not arg.annotation and arg.arg not in ("self", "cls")]
        missing += [] if node.returns else ["return"]
        found += [f"{module.name}:{node.lineno} {node.name}: {name} has no type" for name in missing]
    return found


def public(node: ast.Module | ast.ClassDef, also: tuple[str, ...] = ()) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes that others may use: of the module, and of its public classes."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (child.name[0] != "_" or child.name in also):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child, also)


def notebook_logic(text: str, name: str = "notebook") -> list[str]:
    """What a notebook may not hold: definitions, loops, magics, stored outputs."""
    found = []
    for number, cell in enumerate(json.loads(text)["cells"], start=1):
        if cell["cell_type"] != "code":
            continue
        if cell.get("outputs") or cell.get("execution_count") is not None:
            found.append(f"{name}, cell {number}: stores outputs or an execution count: clear them")
        source = "".join(cell["source"])
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            found.append(f"{name}, cell {number}: is not plain Python (a magic or a shell line?)")
            continue
        forbidden = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.For | ast.AsyncFor | ast.While
        found += [
            f"{name}, cell {number}, line {node.lineno}: {type(node).__name__}: put it into kit/, with a test"
            for node in nodes
            if isinstance(node, forbidden)
        ]
    return found


def machine_names(text: str, name: str = "file") -> list[str]:
    """Paths and hosts of somebody's machine."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"{name}:{number} names a machine: {line.strip()[:80]}" for number, line in lines if MACHINE.search(line)]


def project_texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project that is not generated: its name and content."""
    for folder, subfolders, files in os.walk(ROOT):
        subfolders[:] = sorted(name for name in subfolders if name == ".ci" or (name[0] != "." and name not in GENERATED))
        for name in sorted(files):
            content = (Path(folder) / name).read_bytes()
            if b"\0" not in content:
                yield str((Path(folder) / name).relative_to(ROOT)), content.decode("utf-8", errors="replace")


# --- the project keeps the rules -------------------------------------------------------------------------------------------------

RULES: list[Callable[[Module], list[str]]] = [wrong_order, foreign_packages, prints, touches_environment, undocumented, unannotated]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Callable[[Module], list[str]]) -> None:
    broken = [line for module in MODULES for line in rule(module)]
    assert not broken, "\n" + "\n".join(broken)


def test_notebooks_only_install_import_call_and_show() -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    broken = [line for path in notebooks for line in notebook_logic(path.read_text("utf-8"), path.name)]
    assert not broken, "\n" + "\n".join(broken)


def test_no_file_names_somebodys_machine() -> None:
    broken = [line for name, text in project_texts() for line in machine_names(text, name)]
    assert not broken, "\n" + "\n".join(broken)


def test_importing_kit_loads_nothing_heavy() -> None:
    code = "import sys, kit; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "kit" in loaded
    assert not HEAVY & set(loaded)


WATCHED = """
import sys
from pathlib import Path
from kit.budget import Budget
from kit.inference.pipeline import infer

class Nobody:
    slots = ("cpu",)

    def send(self, slot, order):
        print(type(order).__name__, *{name.split(".")[0] for name in sys.modules})
        sys.exit()

    def close(self):
        pass

folder = Path(sys.argv[1])
members = [folder / name for name in sys.argv[2:]]
infer(members, test=folder / "test.csv", out=folder / "submission.csv", root=folder, budget=Budget(1000), open_crew=lambda run: Nobody())
"""


@pytest.mark.parametrize("index", [None, "passages"], ids=["scores", "retrieves"])
def test_a_run_imports_no_torch_until_its_first_order_is_given(tmp_path: Path, index: str | None) -> None:
    """So that the process that directs the others starts at once and stays small."""
    write_rows(tmp_path / "test.csv", [("id", "prompt", *"ABCDE"), ("1", "Why?", *"vwxyz")])
    (tmp_path / "passages").mkdir()
    manifest.write(tmp_path / "passages", "passages", "index")
    members = [packed.write_member(tmp_path, name, index=index) for name in ("one", "other")]
    packed.complement(members)
    arguments = [str(tmp_path), *(folder.name for folder in members)]
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    order, *loaded = done.stdout.split()
    assert order == ("Fetch" if index else "Order")
    assert {"kit", "numpy", "pandas", "scipy"} <= set(loaded)
    assert not {"torch", "transformers", "sentence_transformers", "faiss"} & set(loaded)


def test_there_are_few_public_names_and_each_resolves() -> None:
    assert len(kit.__all__) <= 12
    broken = []
    for name in kit.__all__:
        try:
            getattr(kit, name)
        except (ImportError, AttributeError) as error:
            broken.append(f"kit.{name}: {error}")
    assert not broken, "\n" + "\n".join(broken)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        kit.nonsense  # noqa: B018


# --- each rule can find what it looks for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kit.data.tables", "from kit.tasks import Task"),
        ("kit.data.tables", "import kit.cli"),
        ("kit.errors", "from kit.manifest import read"),
        ("kit.errors", "from kit import budget"),
        ("kit.manifest", "from kit import paths"),
        ("kit.predict", "from kit import assemble"),
        ("kit.training.loop", "from kit.inference.pipeline import infer"),
        ("kit.tasks.multiple_choice", "from ..models import Model"),
        ("kit.tasks.multiple_choice", "def late():\n    from kit.predict import predict"),
        ("kit.models.encoder", "from kit.tasks import Batch"),
        ("kit.budget", "import importlib\nimportlib.import_module('kit.config')"),
        ("kit.config", "from kit import Recipe"),
        ("kit.data.tables", "if TYPE_CHECKING:\n    pass\nelse:\n    import kit.cli"),
    ],
)
def test_an_import_against_the_order_is_found(name: str, source: str) -> None:
    assert len(wrong_order(module_of(source, name))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kit.data.tables", "from kit.errors import DataError, nearest"),
        ("kit.data.tables", "from kit import manifest, runtime"),
        ("kit.paths", "from kit import manifest"),
        ("kit.budget", "from kit.errors import BudgetError"),
        ("kit.tasks.multiple_choice", "from . import Task\nfrom kit.tasks.essay_regression import Essay"),
        ("kit.models.encoder", "if TYPE_CHECKING:\n    from kit.tasks import Tokens"),
        ("kit.vendor.bundle", "from kit import __version__"),
        ("kit.__main__", "from kit.cli import main"),
    ],
)
def test_an_import_along_the_order_is_fine(name: str, source: str) -> None:
    assert wrong_order(module_of(source, name)) == []


def test_a_module_without_a_place_in_the_order_is_found() -> None:
    assert "kit.helpers has no place" in wrong_order(module_of("from kit.helpers import everything", "kit.cli"))[0]
    assert "kit.helpers has no place" in wrong_order(module_of("from kit.errors import KitError", "kit.helpers"))[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kit.data.tables", "import torch"),
        ("kit.retrieval.bm25", "from torch.nn import functional"),
        ("kit.runtime", "import torch"),
        ("kit.tasks.multiple_choice", "import torch"),
        ("kit.inference.pipeline", "def score():\n    import torch"),
        ("kit.retrieval.hybrid", "def search():\n    import faiss"),
        ("kit.models.causal", "def attach():\n    import peft"),
        ("kit.models.adapters", "import peft"),
        ("kit.models.adapters", "from bitsandbytes.nn import Linear4bit"),
        ("kit.training.loop", "import importlib\nimportlib.import_module('bitsandbytes')"),
        ("kit.vendor.session", "import kaggle"),
        ("kit.vendor.publish", "def push():\n    import requests"),
        ("kit.vendor.bundle", "def push():\n    import kaggle.api"),
    ],
)
def test_a_package_imported_by_a_file_that_does_not_own_it_is_found(name: str, source: str) -> None:
    assert len(foreign_packages(module_of(source, name))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kit.runtime", "def choose():\n    import torch"),
        ("kit.inference.scorer", "import torch"),
        ("kit.data.tables", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("kit.vendor.session", "def sign_in():\n    import kaggle"),
        ("kit.models.adapters", "def attach():\n    import peft"),
    ],
)
def test_a_package_imported_by_its_owner_is_fine(name: str, source: str) -> None:
    assert foreign_packages(module_of(source, name)) == []


@pytest.mark.parametrize("source", ["print('done')", "log = print"])
def test_printing_is_found_and_allowed_in_the_command_line_only(source: str) -> None:
    assert len(prints(module_of(source, "kit.client"))) == 1
    assert prints(module_of(source, "kit.cli")) == []


@pytest.mark.parametrize("source", ["os.environ['A'] = '1'", "x = os.getenv('A')", "from os import environ"])
def test_touching_the_environment_is_found_and_allowed_in_runtime_only(source: str) -> None:
    assert len(touches_environment(module_of(source))) == 1
    assert touches_environment(module_of(source, "kit.runtime")) == []


def test_missing_docstrings_are_found() -> None:
    assert (
        len(undocumented(module_of("class A:\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\nclass _E:\n    def f(self): ...")))
        == 4
    )
    assert undocumented(module_of("'''m'''\nclass A:\n    '''a'''\n    def b(self):\n        '''b'''")) == []


def test_missing_annotations_are_found() -> None:
    source = "class A:\n    def __init__(self, a): ...\n    def b(self, *c, d: int, **e) -> None: ...\ndef _f(g): ..."
    assert [line.split(": ")[1].split()[0] for line in unannotated(module_of(source))] == ["a", "return", "c", "e"]
    assert unannotated(module_of("def f(a: int, *b: str, **c: float) -> None: ...")) == []


def notebook(source: str, **cell: object) -> str:
    return json.dumps({"cells": [{"cell_type": "code", "source": source.splitlines(True), "outputs": [], "execution_count": None, **cell}]})


@pytest.mark.parametrize(
    "text",
    [
        notebook("def f():\n    return 1"),
        notebook("class A: ..."),
        notebook("x = 1\nfor i in range(3):\n    x += i"),
        notebook("while True: ..."),
        notebook("!pip install kit"),
        notebook("%matplotlib inline"),
        notebook("1 + 1", execution_count=1),
        notebook("1 + 1", outputs=[{"output_type": "stream", "text": "2"}]),
    ],
)
def test_logic_magics_and_outputs_in_a_notebook_are_found(text: str) -> None:
    assert len(notebook_logic(text)) == 1


def test_a_notebook_that_calls_and_shows_is_fine() -> None:
    text = notebook("import kit\n\nresult = kit.infer([kit.Budget(1)])\nresult.frame.head()")
    assert notebook_logic(text) == []


@pytest.mark.parametrize("line", ["open('/" + "root/x')", "cd /" + "home/me", "C:\\" + "Users\\me", "ssh build7." + "internal"])
def test_a_path_or_host_of_a_machine_is_found(line: str) -> None:
    assert len(machine_names(f"first\n{line}\n")) == 1


@pytest.mark.parametrize("line", ["/kaggle/working/submission.csv", "artifacts/home/x", "kit/root/notes", "https://example.org/home/page"])
def test_other_paths_are_fine(line: str) -> None:
    assert machine_names(line) == []
