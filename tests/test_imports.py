"""What is imported, and by whom: quick starts, and a house whose floors know only those below."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import srlm_cli
from commands_table import ECHO, JUDGED, PROMPTS, RESPONSES
from helpers import Srlm, as_lines

HOUSE = Path(srlm_cli.__file__).parent
HEAVY = {
    "torch", "transformers", "trl", "peft", "datasets", "scipy", "numpy", "accelerate", "gguf", "openai", "vllm",
    "matplotlib", "pandas", "numba",
}  # fmt: skip

SPY = """
import json, sys
from srlm_cli.cli import run
code = run(sys.argv[1:])
json.dump([code, sorted(sys.modules)], sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        (["--help"], ""),
        (["judge", "--help"], ""),
        (["sft", "--help"], ""),
        (["make-pairs", "--quiet"], as_lines(JUDGED)),
        (["jury", "--quiet"], as_lines(JUDGED)),
        (["judge", "--quiet", *ECHO], as_lines(RESPONSES)),
        (["sample", "--quiet", *ECHO], as_lines(PROMPTS)),
        (["gen-prompts", "--quiet", "--count", "3", *ECHO], as_lines(PROMPTS)),
        (["settings"], ""),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) and len(value) > 1 else "",
)
def test_no_heavy_library_is_loaded(srlm: Srlm, args: list[str], stdin: str) -> None:
    result = srlm.run([sys.executable, "-c", SPY, *args], stdin)
    code, modules = json.loads(result.err)
    assert code == 0 and "srlm_cli.cli" in modules
    assert not HEAVY & {name.split(".")[0] for name in modules}
    assert bool(stdin) == ("srlm_cli.runner.stage" in modules) or "--help" in args or args == ["settings"]


def test_compiled_code_needs_no_scipy_and_leaves_it_to_others(srlm: Srlm) -> None:
    pytest.importorskip("numba")
    load = "from srlm_cli.forward.cpu import jit; import numba.np.arraymath, sys"
    check = "print('scipy.linalg' in sys.modules); import scipy.linalg; print(scipy.linalg.norm([3, 4]))"
    assert srlm.run([sys.executable, "-c", f"{load}; {check}"], "").out.split() == ["False", "5.0"]


# --- who may import whom ---------------------------------------------------------------------


def imports_of(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports, `from a import b` as `a.b`; those for type checkers do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = iter_top(tree.body) if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def iter_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from iter_top(getattr(node, field, []))


def own_imports(path: Path) -> set[str]:
    """Return the parts of the house that a file imports, as `stages.judge` or `records`."""
    found = set()
    for name in imports_of(path):
        if name.startswith("srlm_cli."):
            inside = name.split(".")[1:]
            folder = (HOUSE / inside[0]).is_dir()
            found.add(".".join(inside[:2]) if folder else inside[0])
    return found


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((HOUSE / folder).glob("*.py"))]
    assert found
    return found


ALL = sorted(HOUSE.rglob("*.py"))
LOWER = {"records", "seeds", "errors", "thoughts", "templates", "engines.base", "stats", "rules"}


def known(name: str, allowed: set[str]) -> bool:
    """Tell whether an import is of one of these modules, or of something in one of them."""
    return name in allowed or name.split(".")[0] in allowed


def name_of(path: Path) -> str:
    return str(path.relative_to(HOUSE))


# From the lowest to the highest: a module knows its own package and what is on lower floors.
FLOORS = (
    {"errors", "seeds", "redact", "thoughts"},
    {"dataset_formats"},
    {"records", "settings", "distributed", "threads"},
    {"streams", "templates", "stats", "recipes", "rules"},
    {"evidence"},
    {"models"},
    {"forward"},
    {"engines"},
    {"stages"},
    {"evaluate", "train"},
    {"options"},
    {"runner"},
    {"report"},
    {"commands"},
    {"cli"},
    {"__main__"},
)


def module_of(name: str) -> str:
    """Return the module that an import inside of the house is of: `stages.judge` for `stages.judge.Judgement`."""
    parts = name.split(".")
    while parts and not ((HOUSE / "/".join(parts)).is_dir() or (HOUSE / "/".join(parts)).with_suffix(".py").exists()):
        parts.pop()
    return ".".join(parts)


def modules_known(path: Path) -> set[str]:
    """Return the modules of the house that a file imports anywhere, for type checkers too."""
    names = {name.removeprefix("srlm_cli.") for name in imports_of(path) if name.startswith("srlm_cli.")}
    return {found for name in names if (found := module_of(name))}


def floor_of(module: str) -> int:
    [floor] = [number for number, floor in enumerate(FLOORS) if module.split(".")[0] in floor]
    return floor


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [path for path in ALL if dotted(path) != "__init__"], ids=name_of)
def test_a_module_knows_its_own_package_and_lower_floors(path: Path) -> None:
    own = dotted(path)
    others = [module for module in modules_known(path) if module.split(".")[0] != own.split(".")[0]]
    assert [module for module in others if floor_of(module) >= floor_of(own)] == []


def test_no_imports_run_in_a_circle() -> None:
    graph = {dotted(path): modules_known(path) - {dotted(path)} for path in ALL}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(ALL)  # raises CycleError, which names it


@pytest.mark.parametrize("path", files("stages"), ids=name_of)
def test_stages_know_records_seeds_templates_and_the_protocol(path: Path) -> None:
    assert [name for name in own_imports(path) if not known(name, LOWER | {"stages"})] == []


@pytest.mark.parametrize("path", files("evaluate"), ids=name_of)
def test_evaluations_are_as_pure_as_stages(path: Path) -> None:
    assert [name for name in own_imports(path) if not known(name, LOWER | {"stages", "evaluate"})] == []


@pytest.mark.parametrize("path", files("engines", "engines/hf", "forward", "forward/cpu"), ids=name_of)
def test_engines_know_their_protocol_and_their_own_library(path: Path) -> None:
    allowed = {"engines", "errors", "seeds", "records", "thoughts", "models", "streams.console", "threads", "forward"}
    allowed |= {"redact"}
    assert [name for name in own_imports(path) if not known(name, allowed)] == []


@pytest.mark.parametrize("path", [p for p in ALL if "commands" not in p.parts and p.name != "cli.py"], ids=name_of)
def test_nothing_below_imports_the_commands(path: Path) -> None:
    found = own_imports(path)
    assert not any(name.startswith("commands") for name in found)
    assert "cli" not in found or path.name == "__main__.py"


@pytest.mark.parametrize("path", [p for p in ALL if "commands" in p.parts], ids=name_of)
def test_commands_do_not_import_the_command_line(path: Path) -> None:
    assert "cli" not in own_imports(path)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_typer_and_rich_stay_at_the_surface(path: Path) -> None:
    outer = {"commands", "options", "runner", "report"} & set(path.relative_to(HOUSE).parts)
    surface = outer or name_of(path) in ("cli.py", "streams/console.py")
    libraries = {name.split(".")[0] for name in imports_of(path)} & {"typer", "rich", "click"}
    assert surface or not libraries
    assert "click" not in libraries


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_heavy_libraries_are_imported_late(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports_of(path, top_only=True)} & HEAVY
    late = {
        f"engines/{name}.py"
        for name in ("reward", "vllm", "openai", "openai_server", "openai_refusals", "openai_draws")
    }
    late |= {
        f"train/{name}.py"
        for name in (
            "chunked_logits",
            "embedding_gradient",
            "float32_logits",
            "implicit",
            "packed_attention",
            "packing",
            "pair_trainer",
            "reference_cache",
            "reference_trainer",
            "scoring",
            "sft_trainer",
            "step_trainer",
            "unpaired_trainer",
        )
    }
    late |= {"models/light_transformers.py", "models/meta_device.py"}
    late_folders = name_of(path).startswith(("engines/hf/", "forward/"))  # themselves imported late
    assert not heavy or name_of(path) in late or late_folders


@pytest.mark.parametrize("path", [p for p in ALL if "cpu" not in p.parts], ids=name_of)
def test_compiled_code_is_imported_late_since_numba_is_optional(path: Path) -> None:
    assert not [name for name in imports_of(path, top_only=True) if name.startswith("srlm_cli.forward.cpu.")]


def test_stages_touch_no_files_no_clock_and_no_environment() -> None:
    worldly = {"os", "sys", "time", "pathlib", "io", "subprocess", "argparse", "datetime", "secrets", "uuid"}
    for path in files("stages", "evaluate"):
        assert not {name.split(".")[0] for name in imports_of(path)} & worldly, path
        assert "open(" not in path.read_text() or path.name == "nothing", path
