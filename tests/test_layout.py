"""The layout: imports run downwards only, the core stays small and loads little, and `--help` explains every flag."""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train_lora
import train_te
from nanowan.variants.animate import prepare

ROOT = Path(__file__).parent.parent
FIRST_EVENING = ("flow", "wan", "lora", "data", "train_lora", "sample")
CORE = (*FIRST_EVENING, "vae", "t5", "train_te")
SCRIPTS = ("sample", "train_lora", "train_te", "diag")


def project_files():
    """What git tracks, as paths from the root; in a copy without git all that is there."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [path for path in map(Path, done.stdout.splitlines()) if (ROOT / path).is_file()]
    found = [f.relative_to(ROOT) for f in ROOT.rglob("*") if f.is_file()]
    return [f for f in found if not f.parts[0].startswith(".") and f.parts[0] not in ("build", "out")]


FILES = project_files()
SOURCES = [f for f in FILES if f.suffix == ".py" and f.parts[0] != "tests"]
MODULES = {".".join(f.with_suffix("").parts).removesuffix(".__init__"): f for f in SOURCES}


def parse(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported_names(file):
    """All that a file imports, inside its functions too. `from a import b` is a.b if that is a module here, else a."""
    names = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = file.parts[:-1]
            base = [*folders[: len(folders) + 1 - node.level], node.module] if node.level else [node.module]
            base = ".".join(filter(None, base))
            full = [f"{base}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else base for name in full}
    return names


GRAPH = {name: (imported_names(file) & MODULES.keys()) - {name} for name, file in MODULES.items()}


def top(module):
    return module.split(".")[0]


# ---- imports ---------------------------------------------------------------------------------------------------------
def test_imports_have_no_circles():
    graph = dict(GRAPH)
    assert len(graph) > 80 and sum(map(len, graph.values())) > 300  # the graph is really drawn
    while graph:
        leaves = {name for name, names in graph.items() if not names & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: names for name, names in graph.items() if name not in leaves}


# of the project's modules, those that each may import, by the first part of their names
MAY_IMPORT = {
    **dict.fromkeys(("flow", "lora"), set()),
    **dict.fromkeys(("wan", "vae", "t5", "kernels"), {"kernels"}),
    **dict.fromkeys(("nanowan", "data"), {*CORE} - {*SCRIPTS} | {"kernels", "nanowan"}),
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    """Models import kernels; the machinery imports models; only scripts, and what is for people to run, import scripts;
    and nothing imports tests.
    """
    above = {top(name) for name in GRAPH[module]}
    if top(module) in MAY_IMPORT:
        assert above <= MAY_IMPORT[top(module)]
    elif module in SCRIPTS:
        assert above & {*SCRIPTS} <= {"sample"} and "benchmarks" not in above
    tests = {f.stem for f in FILES if f.parts[0] == "tests"} | {"tests", "helpers"}
    assert not {top(name) for name in imported_names(MODULES[module])} & (tests - MODULES.keys())


@pytest.mark.parametrize("module", ["flow", "lora", "wan", "vae", "t5"])
def test_a_models_file_needs_torch_alone(module):
    """But for what single functions import, such as the tokenizer's library."""
    body = parse(MODULES[module]).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert {top(name) for name in names} - sys.stdlib_module_names <= {"torch", "kernels"}


def test_models_know_no_ranks():
    """Parallelism is done to a built model from outside."""
    models = [m for m in MODULES if top(m) in ("flow", "lora", "wan", "vae", "t5", "kernels")]
    models += [m for m in MODULES if m.startswith("nanowan.variants.")]
    assert len(models) > 25
    for name in models:
        assert not any(n.startswith("nanowan.parallel") for n in GRAPH[name]), name
        assert "torch.distributed" not in (ROOT / MODULES[name]).read_text(), name


def test_no_import_is_hidden():
    """importlib and __import__ would hide an arrow; kernels/ asks it whether the extension is built."""
    hidden = ("import_module(", "__import__(")
    files = [f for f in SOURCES if f.parts[0] != "kernels"]
    assert not [f for f in files if any(word in (ROOT / f).read_text() for word in hidden)]


def loaded_by(module):
    """The project's modules in a fresh process that has imported one."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {*done.stdout.split()} & MODULES.keys()


def test_a_models_file_loads_little():
    found = loaded_by("wan")
    assert {"wan", "kernels.ops"} <= found and len(found) <= 12, sorted(found)


def test_training_a_lora_loads_no_variant_that_it_does_not_train():
    found = loaded_by("train_lora")
    unused = ("nanowan.variants.s2v", "nanowan.variants.animate", "nanowan.formats.gguf")
    unused += ("nanowan.parallel.pipeline_parallel",)
    assert "nanowan.variants.registry" in found and not [name for name in found if name.startswith(unused)]


# ---- sizes -----------------------------------------------------------------------------------------------------------
def test_the_root_is_the_core_and_nothing_else():
    assert {f.name for f in SOURCES if len(f.parts) == 1} == {f"{name}.py" for name in (*CORE, "diag", "setup")}
    folders = {f.parts[0] for f in FILES if len(f.parts) > 1} - {".ci", ".github"}
    assert len(folders) <= 10, sorted(folders)


def test_the_core_can_be_read_in_two_evenings():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) <= 2_600, lines


def test_lines_are_short():
    code = [f for f in FILES if f.suffix in (".py", ".cpp", ".cu", ".h")]
    wide = [f"{f}:{i}" for f in code for i, text in enumerate((ROOT / f).read_text().split("\n"), 1) if len(text) > 120]
    assert len(code) > 100 and not wide


def test_functions_take_few_parameters():
    """Eight at most, without self: values that travel together are a dataclass."""
    long = []
    for file in SOURCES:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.FunctionDef) and file.parts[0] != "kernels":
                a = node.args
                names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p]
                if len({*names} - {"self", "cls"}) > 8:
                    long.append(f"{file}:{node.lineno} {node.name}")
    assert not long


# ---- what a file and a flag are --------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", MODULES)
def test_first_lines_say_what_a_file_is(module):
    """A whole sentence, by which a reader of the tree finds the place of a change."""
    first = (ast.get_docstring(parse(MODULES[module])) or "").split("\n")[0]
    assert first.endswith(".") and sum(map(str.isalpha, first)) > 20


# flags whose absence leaves something out, so that there is no default to name
LEAVES_OUT = {
    sample: "config prompts image last_image lora audio pose_video src_root_path video save_latents grid",
    train_lora: "config init_lora trigger preserve_prompts previews wandb",
    train_te: "config previews wandb",
    prepare: "video image out process_checkpoint keypoints pose_video faces mask_video",
}


@pytest.mark.parametrize("script", LEAVES_OUT)
def test_every_flag_is_explained(script, monkeypatch):
    """By a phrase that can be read alone; where it takes a value, with its default. diag.py: tests/test_diag.py."""
    parsers, real = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p, *a: parsers.append(p) or real(p, *a))
    script.arguments([])
    for action in parsers[0]._actions:
        flag = next(option for option in action.option_strings if option.startswith("--"))
        assert action.help and not action.help.startswith(("of ", "in ", "by ", "with ", "for ", "default")), flag
        has_default = "default" in action.help
        assert has_default or action.nargs == 0 or flag.removeprefix("--") in LEAVES_OUT[script].split(), flag
        if has_default and action.nargs != 0 and action.default not in (None, []):
            shown = action.help % {"default": action.default}
            default = action.default[0] if isinstance(action.default, list) else action.default
            assert str(default).removesuffix(".0") in shown, (flag, shown)
