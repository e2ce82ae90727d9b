"""Parser, the command-line parser of the scripts: it reads flags from --config files too, and hints at misspelt flags.

A config file is TOML or JSON. Its keys are the flags without dashes; flags on the command line take precedence. A flag
that takes "a,b,c", or that can be repeated, may be given a list. A data set with its own settings is a table
`[[data]]`, whose keys are among DATA_KEYS.
"""

import argparse
import difflib
import json
import re
import sys
import tomllib
from pathlib import Path

from nanowan.errors import BadInput
from nanowan.files import atomic
from nanowan.memory_estimate import ParallelLayout

# {what other tools call a flag: its name here}
ELSEWHERE = {
    "ckpt_dir": "ckpt", "dit": "ckpt", "model": "ckpt", "pretrained_model_name_or_path": "ckpt", "frame_num": "frames",
    "num_frames": "frames", "video_length": "frames", "sample_steps": "steps", "infer_steps": "steps",
    "num_inference_steps": "steps", "max_train_steps": "steps", "sample_shift": "shift", "flow_shift": "shift",
    "discrete_flow_shift": "shift", "sample_guide_scale": "guidance", "guidance_scale": "guidance",
    "sample_solver": "solver", "base_seed": "seed", "save_file": "out", "save_path": "out", "output_dir": "out",
    "negative_prompt": "negative", "learning_rate": "lr", "network_dim": "rank", "lora_rank": "rank",
    "network_alpha": "alpha", "lora_alpha": "alpha", "gradient_accumulation_steps": "accumulate",
    "train_batch_size": "batch", "batch_size": "batch", "dataset_config": "config", "dataset": "data",
    "blocks_to_swap": "stream_blocks", "lora_weight": "lora", "t5": "text_encoder", "sample_prompts": "previews",
    "save_every_n_steps": "save_every", "sample_every_n_steps": "preview_every", "max_grad_norm": "grad_clip",
    "lr_warmup_steps": "warmup", "lr_scheduler": "schedule", "output_name": "name", "trigger_word": "trigger",
    "mixed_precision": "dtype", "fp8_base": "base_dtype", "gradient_checkpointing": "checkpointing",
    "network_weights": "init_lora", "lora_target_modules": "targets", "log_with": "wandb",
}  # fmt: skip
UNSAVED = ("help", "config", "resume")  # flags that a run does not write to its config.toml
DATA_KEYS = ("source", "resolution", "frames", "clip_mode", "repeats", "weight")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --config. Its errors are one line, with a suggestion for an unknown flag."""

    def __init__(self, description):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)
        self.add_argument("--config", help="TOML or JSON file of flags; flags on the command line take precedence")

    def flags(self):
        """Return {name of a flag: its argparse action}."""
        return {a.dest: a for a in self._actions if f"--{a.dest}" in a.option_strings}

    def nearest(self, name):
        """Return a sentence that says which flag was probably meant by `name`, an unknown one."""
        name = name.lstrip("-").split("=")[0].replace("-", "_")
        if name == "task":
            return "the task follows from the checkpoint"
        if ELSEWHERE.get(name) in self.flags():
            return f"it is --{ELSEWHERE[name]} here"
        close = difflib.get_close_matches(name, self.flags(), 1, 0.5)
        return f"did you mean --{close[0]}?" if close else "--help lists all flags"

    def error(self, message):
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"{match[1]}: there is no such flag; {self.nearest(match[1])}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        before, _ = _only_config(argv)
        return super().parse_args([*(self._words(before, argv) if before else []), *argv])

    def _words(self, file, argv):
        """Return the flags of a config file as words of a command line. Repeatable flags that are also in `argv` are
        left out.
        """
        words, on_command_line = [], {w.split("=")[0] for w in argv}
        for key, value in read_config(file).items():
            action = self.flags().get(key)
            if action is None or key in UNSAVED:
                raise BadInput(f"--config {file}: {key}: there is no such flag; {self.nearest(key)}")
            if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
                negated = [o for o in action.option_strings if o.startswith("--no-")]
                if not isinstance(value, bool):
                    raise BadInput(f"--config {file}: {key} = {value!r}: should be true or false")
                words += [f"--{key}"] if value else negated
            elif isinstance(action, argparse._AppendAction):
                entries = value if isinstance(value, list) else [value]
                if f"--{key}" not in on_command_line:
                    words += [f"--{key}={json.dumps(v) if isinstance(v, dict) else v}" for v in entries]
            else:
                value = ",".join(map(str, value)) if isinstance(value, list) else value
                words.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
        return words


def _only_config(argv):
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--config")
    known, rest = p.parse_known_args(argv)
    return known.config, rest


def read_config(file):
    """Read {flag: value} from a TOML or JSON file. Raises BadInput if it cannot be read."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        config = json.loads(text) if str(file).endswith(".json") else tomllib.loads(text)
    except OSError as e:
        raise BadInput(f"--config {file}: {e.strerror}") from None
    except ValueError as e:
        raise BadInput(f"--config {file}: not {'JSON' if str(file).endswith('.json') else 'TOML'} ({e})") from None
    if not isinstance(config, dict):
        raise BadInput(f"--config {file}: should hold flags and their values")
    return config


def in_force(args, defaults):
    """Return one line that lists the flags whose values differ from the defaults. It does not matter whether these
    values come from the user or from the checkpoint.
    """
    changed = {k: v for k, v in vars(args).items() if v != vars(defaults)[k]}
    plain = {k: v[0]["source"] if _is_tables(v) and len(v) == 1 and len(v[0]) == 1 else v for k, v in changed.items()}
    return "flags: " + ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in plain.items())


def write_config(file, values):
    """Write {flag: value} to a TOML file that read_config can read. Values that are None, and the flags in UNSAVED, are
    left out.
    """
    plain = {k: v for k, v in values.items() if v is not None and k not in UNSAVED and not _is_tables(v)}
    lines = [f"{k} = {_toml(v)}" for k, v in plain.items()]
    for key, tables in ((k, v) for k, v in values.items() if _is_tables(v)):
        for table in tables:
            lines += ["", f"[[{key}]]", *(f"{k} = {_toml(v)}" for k, v in table.items() if v is not None)]
    with atomic(file) as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_tables(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _toml(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings and integers are valid in TOML too, except for one character
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parallel_layout(args, ranks, fp8=False):
    """Return the ParallelLayout of a run with these flags on this number of ranks. fp8: whether the DiT's blocks are in
    8 bits, by a flag or because the checkpoint's files have them so.
    """
    fsdp_size, pp_size = ranks if getattr(args, "fsdp", False) else 1, getattr(args, "pipeline_stages", 1)
    return ParallelLayout(fp8, args.stream_blocks, fsdp_size, args.ulysses_size, pp_size, ranks)
