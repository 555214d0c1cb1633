"""Imports go downward only, heavy libraries stay in their place, packages form no cycle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "confidantd"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

FOUNDATION, DECIDE, ACT, JOBS, SURFACE = range(5)  # compute stands beside act
LAYERS = {
    "errors": FOUNDATION,
    "ids": FOUNDATION,
    "config": FOUNDATION,
    "confinement": FOUNDATION,
    "tasks": FOUNDATION,
    "allocator": FOUNDATION,
    "wire.codec": DECIDE,
    "wire": DECIDE,
    "models": DECIDE,
    "planner": DECIDE,
    "schedule": DECIDE,
    "swarm.decide": DECIDE,
    "compiler": ACT,
    "engine": ACT,
    "worker": ACT,
    "net": ACT,
    "identity": ACT,
    "discovery": ACT,
    "profile": ACT,
    "store": ACT,
    "swarm": ACT,
    "jobs": JOBS,
    "api": SURFACE,
    "cli": SURFACE,
    "daemon": SURFACE,
    "home_lock": SURFACE,
    "service_manager": SURFACE,
}
# The pure steps of the swarm; the rest of that package is its thin service.
SWARM_DECIDES = {
    "state",
    "detector",
    "election",
    "member",
    "addresses",
    "pairing",
    "links",
    "diagnosis",
}
COMPUTE = {"compiler", "engine"}

HOMES = {
    "torch": {"compiler"},
    "functorch": {"compiler"},
    "transformers": set(),
    "gguf": set(),  # headers are read here: faster, and within bounds
    "onnxscript": {"compiler"},
    "onnx_ir": {"compiler"},
    "onnxruntime": {"engine"},
    "numpy": {"engine", "worker", "compiler", "cli"},  # cli: the demo makes random weights
    "aiohttp": {"net", "worker", "api", "cli"},
    "zeroconf": {"discovery"},
    "cryptography": {"identity"},
    "msgpack": {"wire.codec"},
    "tokenizers": {"jobs", "cli"},  # cli: the demo makes a byte tokenizer
    "jinja2": {"jobs"},
    "click": {"cli"},
    "segno": {"cli"},
    "spake2": {"swarm.decide"},
    "rich": {"cli"},
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
}
NOT_IN_DECIDE = {"asyncio", "socket", "subprocess", "threading", "time"}
# The CLI asks the daemon over its socket. Only what it needs to make the demo's model is shared.
CLI_MAY_USE = {"cli", "errors", "ids", "config", "tasks", "models"}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: where it stands and the dotted name it asks for."""

    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT.parent)}:{self.line} imports {self.name}"


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit with a layer that a module belongs to, by its path below the package."""
    match parts:
        case ("swarm", module, *_) if module in SWARM_DECIDES:
            return "swarm.decide"
        case ("wire", "codec", *_):  # turns any dataclass into a map: it knows no message
            return "wire.codec"
        case _:
            return parts[0]


def unit_of_file(file: Path) -> str:
    """`confidantd/net/tls.py` is of unit `net`."""
    return unit_of(file.relative_to(ROOT).with_suffix("").parts)


def own_unit(name: str) -> str | None:
    """The unit an import of this package leads to; None for other packages and its root."""
    parts = tuple(name.split("."))
    return unit_of(parts[1:]) if parts[0] == PACKAGE and len(parts) > 1 else None


@cache
def imports() -> tuple[Import, ...]:
    """Every import of the package, those inside functions included."""
    return tuple(found for file in sorted(ROOT.rglob("*.py")) for found in imports_of(file))


def imports_of(file: Path) -> Iterator[Import]:
    """The imports of one file; `from a import b` counts as `a.b` if that may be a module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(file, node.lineno, alias.name)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for alias in names:
                    yield Import(file, node.lineno, f"{module}.{alias.name}")
            case ast.ImportFrom(level=level):
                assert level == 0, f"{file}:{node.lineno}: relative imports are not used here"
            case _:
                pass


def between_units() -> Iterator[tuple[Import, str, str]]:
    """Imports that lead from one unit to another: (import, from, to)."""
    for found in imports():
        here, there = unit_of_file(found.file), own_unit(found.name)
        if there is None or here == "__init__":
            continue
        if there not in LAYERS:  # `from confidantd import __version__`
            continue
        if here != there:
            yield found, here, there


def test_every_unit_has_a_layer() -> None:
    units = {unit_of_file(file) for file in ROOT.rglob("*.py")} - {"__init__"}
    assert units <= set(LAYERS)


def test_imports_go_downward_only() -> None:
    wrong = [str(found) for found, here, there in between_units() if LAYERS[there] > LAYERS[here]]
    assert not wrong, "\n".join(wrong)


def test_compute_and_act_do_not_mix() -> None:
    wrong = [
        str(found)
        for found, here, there in between_units()
        if (here in COMPUTE and LAYERS[there] == ACT)
        or (there in COMPUTE and (here, there) != ("worker", "engine"))
    ]
    assert not wrong, "\n".join(wrong)


def test_units_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for _, here, there in between_units():
        graph.setdefault(here, set()).add(there)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("library", sorted(HOMES))
def test_libraries_stay_at_home(library: str) -> None:
    wrong = [
        str(found)
        for found in imports()
        if found.name.split(".")[0] == library and unit_of_file(found.file) not in HOMES[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_deciding_neither_waits_nor_reads_the_clock() -> None:
    wrong = [
        str(found)
        for found in imports()
        if LAYERS.get(unit_of_file(found.file)) == DECIDE
        and found.name.split(".")[0] in NOT_IN_DECIDE
    ]
    assert not wrong, "\n".join(wrong)


def test_computing_is_synchronous() -> None:
    wrong = [
        str(found)
        for found in imports()
        if unit_of_file(found.file) in COMPUTE and found.name.split(".")[0] == "asyncio"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_is_a_client_only() -> None:
    wrong = [
        str(found)
        for found, here, there in between_units()
        if here == "cli" and there not in CLI_MAY_USE
    ]
    assert not wrong, "\n".join(wrong)
