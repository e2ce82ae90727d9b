"""The house: imports only run downwards, files and lines stay short, and `--help` says every default."""

import argparse
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] not in ("tests", ".venv", "build", "out", "setup.py")
)
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in SOURCES}


def imported(file):
    """The project's own modules that a file imports, those inside its functions too."""
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package if node.level else ()), *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if name in MODULES and MODULES[name] != file}


def test_no_file_imports_what_imports_it():
    graph = {name: imported(file) for name, file in MODULES.items()}
    assert len(graph) > 20 and sum(map(len, graph.values())) > 60  # the graph is really drawn
    while graph:
        leaves = {name for name, names in graph.items() if not names & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: names for name, names in graph.items() if name not in leaves}


def test_models_files_know_no_ranks():
    """Parallelism is done to a built model from outside."""
    models = {"wan", "s2v", "animate", "vae", "t5", "wav2vec2", "clip", "lora", "fp8", "conditions"}
    for name in MODULES:
        if name.split(".")[0] in models:
            assert "parallel" not in {n.split(".")[0] for n in imported(MODULES[name])}
            assert "torch.distributed" not in MODULES[name].read_text()


def test_files_and_lines_are_short():
    tests = [f for f in (ROOT / "tests").rglob("*") if f.suffix in (".py", ".h", ".cpp")]
    code = [*SOURCES, *(ROOT / "csrc").iterdir(), *(ROOT / "runs").iterdir(), *tests]
    wide = [f"{f}:{i}" for f in code for i, line in enumerate(f.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide
    assert not [f for f in SOURCES if len(f.read_text().splitlines()) > 500]


def test_first_lines_say_what_a_file_is():
    """A whole sentence in the first line, by which a reader of the tree finds the room for a change."""
    for name, file in MODULES.items():
        first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
        assert first.endswith(".") and len(first) > 20, (name, first)


@pytest.mark.parametrize("script", ["sample", "train_lora", "train_te", "prepare"])
def test_every_flag_is_explained(script, monkeypatch):
    """A sentence for each, and its default unless that is nothing."""
    parsers = []
    real = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p, *a: parsers.append(p) or real(p, *a))
    __import__(script).arguments([])
    for action in parsers[0]._actions:
        assert action.help and not action.help.startswith("default"), action.option_strings
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default" in action.help, action.option_strings
