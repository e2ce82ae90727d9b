"""README.md and docs/: every command that they print is understood as printed, and runs on miniature checkpoints.

Commands are collected from the pages. A folder holds small files of the names that pages use; placeholders in capitals
are replaced by such names (STAND_INS), sizes and steps by small ones (`shrunk`).
"""

import contextlib
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import scripts
from helpers.adapters import save_lora
from PIL import Image
from test_animate2 import write_pair
from test_data import clip, photo
from test_layout import FILES
from test_long_video import write_relighting
from test_lora import trained
from test_prepare import write_networks
from test_train_variants import pictures as small_pictures
from test_train_variants import write_character, write_clip

import diag
import sample
import train_lora
import train_te
from benchmarks import tiny_animate, tiny_animate2, tiny_s2v
from diagnostics.plan import SCRIPTS as PLANNED
from nanowan.formats.dit import full_config
from nanowan.formats.header import save
from nanowan.sampling import check_flags, given_inputs, given_prompts, requests_of
from nanowan.settings import NANO, released
from nanowan.training.flags import data_config, expert_schedule
from nanowan.variants.animate import prepare
from nanowan.variants.registry import VARIANTS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f.as_posix() for f in FILES if f.parent == Path("docs") and f.suffix == ".md")]
TRAINERS = {"train_lora.py": train_lora, "train_te.py": train_te}
RELEASED = {
    "Wan2.2-TI2V-5B": "ti2v-5B",
    "Wan2.2-T2V-A14B": "t2v-A14B",
    "Wan2.2-I2V-A14B": "i2v-A14B",
    "Wan2.2-S2V-14B": "s2v-14B",
    "Wan2.2-Animate-14B": "animate-14B",
    "Wan2.2-Animate-2-14B": "animate2-14B",
}
CLIPS = {
    "Wan2.2-S2V-14B": "talk",
    "Wan2.2-Animate-14B": "acts",
    "Wan2.2-Animate-2-14B": "pairs",
}  # of the others: "clips"
# what stands in a page for something of the reader's: {flag before it, or "": {word: what it is replaced by}}
STAND_INS = {
    "--ckpt": {"DIR": "Wan2.2-TI2V-5B"},
    "--prompt": {"TEXT": "a crimson fox"},
    "--prompts": {"FILE": "previews.txt", "F": "previews.txt", "prompts.txt": "previews.txt"},
    "--image": {"FILE": "face.png", "I.png": "face.png"},
    "--audio": {"FILE": "speech.wav"},
    "--video": {"FILE": "V.mp4"},
    "--pose_video": {"FILE": "talk/a.pose.mkv"},
    "--lora": {"F": "lora.safetensors", "HIGH.safetensors": "high.safetensors", "LOW.safetensors": "low.safetensors"},
    "--keywords": {"WORD,WORD": "crimson,wedge", "a,b": "crimson,wedge", "WORD": "crimson"},
    "--trigger": {"WORD,WORD": "crimson,wedge"},
    "--src_root_path": {"DIR": "driving"},
    "--process_checkpoint": {"...": "Wan2.2-Animate-14B/process_checkpoint"},
    "--to": {"...": "comfyui"},
    "": {
        "PATH...": "lora.safetensors V.mp4",
        "SCRIPT": "train_lora",
        "FLAGS": "--ckpt ti2v-5B",
        "FILE": "lora.safetensors",
        "OLD": "Wan2.2-TI2V-5B",
        "NEW": "encoder.safetensors",
        "IN": "lora.safetensors",
        "OUT": "converted.safetensors",
        "RUN": "run",
    },
}
NEEDED = {"blocks": "--keywords crimson"}  # what `...` leaves out of a command of diag.py
# commands that are no scripts of this project, or whose work other tests or none do
OTHERS = ("pip", "hf", "make", "python setup.py", "bash runs/", "python -m benchmarks")
PARSED_ONLY = {
    "diag.py scale": "counts operations of full-size models for minutes",
    "diag.py plan": "test_diag.py",
    "diag.py advise": "test_diag.py; two plans take longer than all the rest",
    "--clip Wan2.2-Animate-14B": "test_clip.py has both of CLIP's towers",
    "--nnodes": "two machines",
    "--pipeline_stages": "test_parallel.py",
    "--ulysses_size": "the same",
}


# ---- what pages hold -------------------------------------------------------------------------------------------------
def blocks(page):
    """[(language, lines)] of a page's fenced blocks."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return [(language, body.replace("\\\n", " ").splitlines()) for language, body in found]


def is_data(line):
    """A folder's layout, or a line of JSON."""
    return not line.strip() or re.match(r"[A-Za-z]+/ |[\[{]", line) is not None


COMMANDS = [
    pytest.param(page, line, id=f"{page}: {line[:70]}")
    for page in PAGES
    for language, lines in blocks(page)
    for line in lines
    if not language and not is_data(line) and not line.startswith(OTHERS)
]
CONFIGS = {
    lines[0].removeprefix("# "): "\n".join(lines)
    for page in PAGES
    for language, lines in blocks(page)
    if language == "toml"
}


def words_of(line):
    """(script, its flags, ranks) of a command line, with STAND_INS in the place of the reader's own files."""
    found = shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", line), comments=True)
    ranks = 1
    if found[0] == "torchrun":
        start = next(i for i, word in enumerate(found) if word.endswith(".py"))
        found, ranks = ["python", *found[start:]], 2
    assert found.pop(0) == "python", f"{line}: no script, and none of {OTHERS}"
    script = found.pop(0)
    if script == "-m":
        script += f" {found.pop(0)}"
    words, before = [], ""
    for word in found:
        is_cut = word == "..." and "..." not in STAND_INS.get(before, {})
        word = NEEDED.get(words[0] if words else "", "") if is_cut else STAND_INS.get(before, {}).get(word, word)
        words += [word] if before in STAND_INS and before else word.split()
        before = word if word.startswith("--") else ""
    ckpt = value(words, "--ckpt") or "Wan2.2-TI2V-5B"
    if value(words, "--data") in ("DIR", "DATA"):
        words[words.index("--data") + 1] = CLIPS.get(ckpt, "clips")
    return script, words, ranks


def value(words, flag):
    return words[words.index(flag) + 1] if flag in words else None


# ---- as printed ------------------------------------------------------------------------------------------------------
def check_training(module, words):
    args = module.arguments(words)
    variant = RELEASED.get(args.ckpt, args.ckpt if args.ckpt in VARIANTS else "ti2v-5B")
    s, args.device = released(variant), "cuda"
    module.check(args, s, full_config(variant).num_layers)
    data_config(args, s, lambda: Path("clips"))
    expert_schedule(args.expert, s, args.min_t, args.max_t)


def check_sampling(words):
    args = sample.arguments(words)
    s = released(RELEASED.get(args.ckpt, "ti2v-5B"))
    check_flags(args, "cuda")
    assert requests_of(args, given_prompts(args) or [SimpleNamespace(text="", settings={}, inputs={}, seed=0)], s, [0])
    s.conditioning.check(args.ckpt, **given_inputs(args))


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """A folder with the pages' config files as they are."""
    folder = tmp_path_factory.mktemp("printed")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    (folder / "previews.txt").write_text("a crimson fox\na wedge\n")
    return folder


@pytest.mark.parametrize("page, line", COMMANDS)
def test_a_command_is_understood_as_printed(page, line, printed, monkeypatch):
    monkeypatch.chdir(printed)
    script, words, _ = words_of(line)
    if script in TRAINERS:
        check_training(TRAINERS[script], words)
    elif script == "sample.py":
        check_sampling(words)
    elif script == "diag.py":
        args = diag.arguments(words)
        if words[0] == "plan":
            module = PLANNED[args.script]
            check_sampling(args.flags) if module is sample else check_training(module, args.flags)
    else:
        assert script == "-m nanowan.variants.animate.prepare", f"{line}: the test does not know this script"
        prepare.arguments(words)


# ---- run -------------------------------------------------------------------------------------------------------------
RUN = """
import runpy, sys
from helpers.scripts import NoPlan
from nanowan import memory_estimate
memory_estimate.training = memory_estimate.sampling = lambda *a, **k: NoPlan()  # plans take longer than these runs
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def shrunk(script, words):
    """The flags of a command, with small sizes and few steps."""
    ckpt, small, words = value(words, "--ckpt") or "Wan2.2-TI2V-5B", [], list(words)
    if config := value(words, "--config"):
        ckpt = tomllib.loads(Path(config).read_text())["ckpt"]
    if "--blocks" in words:
        words[words.index("--blocks") + 1] = "1-2"
    is_animate = "Animate" in ckpt
    frames = "16" if ckpt == "Wan2.2-S2V-14B" else "13" if is_animate else "5"
    size = "48x32" if is_animate else "64x64"
    if script in TRAINERS:
        small = f"--steps 2 --steps_per_expert 1 --batch 2 --frames {frames} --resolution {size} --preview_steps 1"
        small += f" --preview_size {size} --preview_frames {frames} --preview_every 2 --held_out 0.3 --log_every 1"
        small += f" --device cpu --dtype fp32 --cache cache/{ckpt}"
        small += "" if {"--ckpt", "--config"} & {*words} else f" --ckpt {ckpt}"
        small += "" if {"--data", "--config"} & {*words} else " --data clips"
        small += "" if "--keywords" in words or config or script != "train_te.py" else " --keywords crimson"
    elif script == "sample.py":
        small = f"--size {size} --steps 2 --device cpu --dtype fp32"
        small += f" --infer_frames {frames} --num_clip 1" if ckpt == "Wan2.2-S2V-14B" else f" --frames {frames}"
        small += "" if "--ckpt" in words else f" --ckpt {ckpt}"
    elif script.endswith("prepare"):
        shutil.rmtree(value(words, "--out"), ignore_errors=True)
        small = f"--size {size} --fps -1"
    elif words[0] in ("logits", "blocks"):
        small = f"--resolution {size} --frames {frames} --device cpu --n 1"
        small += "" if "--data" in words else " --data clips"
    elif words[0] == "listen":
        small = f"--size {size} --frames {frames} --steps 1 --n 1 --device cpu --words crimson=red"
    elif words[0] == "reuse":
        small = "--device cpu --thresholds 0.1 --prompts previews.txt"
    elif words[0] == "report":
        small = "--n 0"
    small = small.split() if small else []
    return [*words, *small]


def small_config(text):
    """A config file whose data sets are small too, which flags cannot say."""
    size = "48x32" if "Animate" in text else "64x64"
    text = re.sub(r'^resolution = ".*"', f'resolution = "{size}"', text, flags=re.M)
    text = re.sub(r"^frames = (?!1$).*", f"frames = {16 if 'S2V' in text else 5}", text, flags=re.M)
    return re.sub(r'^blocks = ".*"', 'blocks = "1-2"', text, flags=re.M)


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory, checkpoints):
    """What a reader of the pages has: checkpoints, clips, adapters, pictures, sounds; all of them tiny."""
    root = tmp_path_factory.mktemp("reader")
    for name, folder in {"TI2V-5B": NANO, "T2V-A14B": checkpoints["t2v"], "I2V-A14B": checkpoints["i2v"]}.items():
        (root / f"Wan2.2-{name}").symlink_to(folder)
    tiny_s2v.checkpoint(root / "Wan2.2-S2V-14B")
    animate = root / "Wan2.2-Animate-14B"
    animate.mkdir()
    tiny_animate.checkpoint(animate)
    write_networks(animate / "process_checkpoint")
    tiny_animate2.checkpoint(root / "Wan2.2-Animate-2-14B")
    (root / "nano").symlink_to(NANO.parent)

    for name in ("clips", "stills", "talk", "acts", "pairs"):
        (root / name).mkdir()
    for i, caption in enumerate(
        ["a crimson fox", "a wedge turns", "a red square", "a crimson wedge", "a boat", "a dog"]
    ):
        clip(root / "clips" / f"{i}.mp4", 9, 64, 64, caption=caption)
        photo(root / "stills" / f"{i}.png", 64, 64, caption)
    for i in range(2):
        write_clip(root / "talk" / f"{i}.mkv", small_pictures(90), sound=tiny_s2v.sound(5.6))
        write_character(root / "acts", f"{i}", scene=True, seed=i)
        write_pair(root / "pairs", f"{i}", seed=i)
    write_clip(root / "talk" / "a.pose.mkv", small_pictures(90), caption=None)
    tiny_animate.source_folder(root / "driving")
    for name in ("V", "MASK"):
        shutil.copy(root / "driving" / f"src_{'bg' if name == 'V' else 'mask'}.mp4", root / f"{name}.mp4")
    Image.fromarray(tiny_s2v.picture(64, 64)).save(root / "face.png")
    for name in ("speech", "other"):
        tiny_s2v.write_wav(root / f"{name}.wav", tiny_s2v.sound(1.2)[None])
    for name, text in CONFIGS.items():
        (root / name).write_text(small_config(text))
    (root / "previews.txt").write_text("a crimson fox\na red square\n")

    run_as_printed("python train_lora.py --data clips --out run", root)
    shutil.copy(root / "run" / "adapter_model.safetensors", root / "lora.safetensors")
    for name in ("high", "low"):
        save_lora(root / f"{name}.safetensors", trained(kind="t2v"), expert=name)
    encoder = torch.load(NANO / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    save(root / "encoder.safetensors", encoder)
    write_relighting(animate / "relighting_lora.ckpt", tiny_animate.animate())
    return root


def run_as_printed(line, folder):
    """Run a command of a page, smaller, in the reader's folder."""
    with contextlib.chdir(folder):
        script, words, ranks = words_of(line)
        words = shrunk(script, words)
        if script in TRAINERS:
            shutil.rmtree(TRAINERS[script].arguments(words).out, ignore_errors=True)
        argv = script.split() if script.startswith("-m") else [ROOT / script]
        done = scripts.run(*argv, *words, code=RUN, ranks=ranks)
    assert done.returncode == 0, f"{line}\n{shlex.join(words)}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"


def shape(line):
    """What tells a command from others that do the same: script, model, and flags; of diag.py what is looked at."""
    script, words, ranks = words_of(line)
    flags = {word for word in words if word.startswith("--")}
    if script == "diag.py":
        return script, words[0], *sorted(flags & {"--lora", "--text_encoder"} if words[0] == "listen" else ())
    return script, value(words, "--config") or value(words, "--ckpt"), ranks, *sorted(flags)


def commands_to_run():
    """Of several commands of one shape the first."""
    found = {}
    for command in COMMANDS:
        if not any(part in command.values[1] for part in PARSED_ONLY):
            found.setdefault(shape(command.values[1]), command)
    return found.values()


@pytest.mark.parametrize("page, line", commands_to_run())
def test_a_command_runs(page, line, readers_folder):
    """In the pages' order, since one command may use what another made."""
    run_as_printed(line, readers_folder)


def test_every_exception_is_of_a_command_that_is_printed():
    lines = [command.values[1] for command in COMMANDS]
    assert all(any(part in line for line in lines) for part in PARSED_ONLY)
    used = "\n".join(lines)
    assert all(word in used for words in STAND_INS.values() for word in words)


def test_every_config_file_is_used_by_a_command():
    lines = [command.values[1] for command in COMMANDS]
    assert CONFIGS and all(any(f"--config {name}" in line for line in lines) for name in CONFIGS)


def test_the_notebooks_code_runs(readers_folder, monkeypatch):
    monkeypatch.chdir(readers_folder)
    code = ["\n".join(lines) for language, lines in blocks("docs/api.md") if language == "python"]
    assert len(code) == 1
    assert scripts.run("notebook", code=code[0], check=True)
    assert Path("out/by_hand.safetensors").is_file()


# ---- what pages point to ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "nano/README.md"])
def test_links_and_paths_lead_to_files(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith(("http", "#"))]
    assert not [link for link in links if not (folder / link).exists()]
    tops = "|".join(sorted({f.parts[0] for f in FILES if len(f.parts) > 1} | {"bench"}))
    named = re.findall(rf"`((?:{tops})/[\w./-]*)`", text)
    commands = re.findall(r"`(?:python|bash) ([\w./]+\.(?:py|sh))", text)
    modules = [m.replace(".", "/") for m in re.findall(r"`python -m ([\w.]+)", text)]
    assert not [p for p in [*named, *commands] if not (ROOT / p).exists()]
    assert not [m for m in modules if not any((ROOT / f"{m}{end}").exists() for end in (".py", "/__main__.py"))]


def test_the_readme_knows_how_long_the_core_is():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert len(rows) == 9 and all(abs(int(said) - lines[name]) <= 0.1 * lines[name] for name, said in rows), lines
