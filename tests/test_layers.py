"""The import direction of the design is a test: a module imports only from layers above its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "iir_dist"
LAYERS = [
    {"", "client", "credentials", "errors", "vectors", "metrics", "progress", "provenance", "telemetry"},
    {"config", "storage"},
    {"lock", "session"},
    {"artifact"},
    {"leftovers"},
    {"data"},
    {"models", "losses", "overlap"},
    {"train"},
    {"ingest", "embed", "whiten", "whiten_regions", "index", "evaluate", "compare", "report"},
    {"rerank", "mine"},
    {"bench", "doctor", "demo", "serve", "sizing", "study"},
    {"submit"},
    {"cli"},
    {"__main__"},
]
TORCH = {
    "losses",
    "models",
    "train",
    "data/augment",
    "embed",
    "whiten",
    "whiten_regions",
    "doctor",
    "serve/embedding",
    "study/classify",
}
RAY = {"session", "telemetry", "embed", "train/launch", "submit/jobs", "serve/deploy"}
FAISS = {"index/build", "index/train", "index/shard", "index/export"}


def modules() -> dict[str, ast.Module]:
    return {
        path.relative_to(PACKAGE)
        .with_suffix("")
        .as_posix()
        .removesuffix("/__init__")
        .removesuffix("__init__"): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(module: str) -> int:
    top = module.split("/")[0]
    matches = [number for number, names in enumerate(LAYERS) if top in names]
    assert matches, f"{module} is in no layer: add it to LAYERS"
    return matches[0]


def test_modules_import_only_from_above() -> None:
    known = modules()
    for name, tree in known.items():
        for target in imports(tree):
            if target.startswith("iir_dist."):
                path = target.removeprefix("iir_dist.").replace(".", "/")
                while path not in known and "/" in path:
                    path = path.rpartition("/")[0]
                if path in known and path:
                    assert layer(path) <= layer(name), f"{name} imports {path}"


def test_stages_do_not_import_each_other() -> None:
    stages = {"ingest", "embed", "whiten", "evaluate", "report", "index", "train"}
    for name, tree in modules().items():
        own = _stage(name.split("/")[0])
        if own in stages:
            others = {_stage(t.split(".")[1]) for t in imports(tree) if t.startswith("iir_dist.")} & stages - {own}
            assert not others, f"{name} imports {others}"


def _stage(module: str) -> str:
    """`whiten_regions` is a part of `whiten`."""
    return module.removesuffix("_regions")


@pytest.mark.parametrize(("package", "allowed"), [("torch", TORCH), ("ray", RAY), ("faiss", FAISS)])
def test_heavy_packages_have_their_places(package: str, allowed: set[str]) -> None:
    importing = {name for name, tree in modules().items() if package in {t.split(".")[0] for t in imports(tree)}}
    for name in importing:
        assert name in allowed or name.split("/")[0] in allowed, f"{name} imports {package}"
    unused = allowed - importing - {name.split("/")[0] for name in importing}
    assert not unused, f"{unused} import no {package}"


def test_docstrings_everywhere() -> None:
    for name, tree in modules().items():
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_doctests() -> None:
    import doctest
    import importlib

    attempted = 0
    for name in modules():
        if name not in ("__main__", ""):
            module = importlib.import_module("iir_dist." + name.replace("/", "."))
            result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
            assert result.failed == 0, name
            attempted += result.attempted
    assert attempted > 15
