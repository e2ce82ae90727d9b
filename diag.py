"""The command for questions about checkpoints, LoRAs and runs; each of its commands is a file in diagnostics/.

python diag.py inspect PATH...             what is in checkpoints, weight files, LoRA files and videos; headers only
python diag.py plan SCRIPT FLAGS           memory, disk and time of train_lora, train_te or sample; --ckpt may also be
                                           a released variant, such as ti2v-5B, of which no file is needed
python diag.py plan --gpus 1x24:4090 SCRIPT FLAGS     and flags that make it fit on one RTX 4090 of 24 GB
python diag.py advise --data DIR --ckpt DIR --keywords a,b     the training commands, and what they rest on
python diag.py scale --ckpt t2v-A14B       predicted seconds per sample of a LoRA step on 1 to 64 GPUs, by strategy
python diag.py delta FILE --ckpt DIR       how far a LoRA, another checkpoint or an encoder moves each weight
python diag.py delta LORA --ckpt DIR --cap 0.02 --out FILE     and a copy held to that
python diag.py logits --ckpt DIR --lora FILE     attention logits per head, before and after; --ci fails on drift
python diag.py blocks --ckpt DIR --keywords a,b --data DIR     which blocks read a word: a range for --blocks
python diag.py drift OLD NEW --prompts FILE      how far a text encoder's embeddings moved, and what its words are near
python diag.py listen --ckpt DIR --lora FILE     does it follow prompts better? nano: graded; others: a sheet
python diag.py listen --ckpt DIR --lora FILE --clip DIR --words crimson=red,blue,green     or judged by CLIP
python diag.py listen --ckpt DIR --text_encoder FILE:0,0.5,1     or a sheet by strength of the encoder's change
python diag.py reuse --ckpt DIR --prompts FILE   what sample.py --reuse saves and costs, at several thresholds
python diag.py convert IN OUT --to comfyui a text encoder, DiT or LoRA in another layout
python diag.py report RUN                  everything about a training run in one HTML file
"""

import nanowan.environment  # noqa: F401  # isort: skip

import argparse

from diagnostics import advise, blocks, convert, delta, drift, inspect, listen, logits, plan, report, reuse, scaling
from nanowan import flops
from nanowan.devices import DTYPES
from nanowan.errors import cli
from nanowan.formats.lora import LORA_LAYOUTS
from nanowan.formats.t5 import LAYOUTS
from nanowan.variants.registry import VARIANTS


def script_name(text):
    """ "sample" or "sample.py"."""
    return text.removesuffix(".py")


def add_model_flags(add):
    """Flags of a command that runs a checkpoint with changes."""
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the one in the repository)")
    add("--lora", action="append", default=[], help="LoRA, FILE[:weight][:high|low|both]; may be repeated")
    add(
        "--text_encoder",
        action="append",
        help="text encoder to use, FILE[:strength]: a full encoder, a delta or a LoRA; repeat to stack several; "
        "listen also takes several strengths, FILE:0,0.5,1 (default: the checkpoint's own)",
    )
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=list(DTYPES), help="default: bf16 on cuda, fp32 on cpu")
    add("--json", help="also write the result to this file")


def add_data_flags(add):
    """Flags of a command that looks at training data, as logits.open_dataset takes them."""
    add("--data", help="a dataset, as in training (default: clips of the nano world)")
    add("--cache", help="folder of the cache (default: cache/ beside the data)")
    add("--resolution", help="WxH px: the area that buckets fill (default: the checkpoint's)")
    add("--frames", type=int, help="4k+1, at most, of each clip (default: the checkpoint's)")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def command(name, module, text):
        c = commands.add_parser(name, help=text, description=text)
        c.set_defaults(run=module.run)
        return c.add_argument

    add = command("inspect", inspect, "what is in checkpoint folders, weight files, LoRA files and videos")
    add("paths", nargs="+", metavar="PATH", help="any mix of them")
    add("--json", help="also write what was found to this file")

    add = command("plan", plan, "memory, disk and time of a run, before it starts")
    add("--json", help="also write the plan, in bytes and seconds a step, to this file")
    add(
        "--gpus",
        help="COUNTxGB or COUNTxGB:CARD, such as 8x80 or 1x24:4090: propose flags that fit. GB as cards are sold: one "
        f"of 24 has 25.8e9 bytes. CARD, whose times are printed: one of {', '.join(flops.CARDS)} (default: the GPU "
        f"that is here, or {' and '.join(plan.CARDS)})",
    )
    add("--host", type=float, help="host memory of a machine in GB, for --gpus (default: as much as it takes)")
    add("script", type=script_name, choices=list(plan.SCRIPTS), help="which script is to run")
    add("flags", nargs=argparse.REMAINDER, help="as that script takes them; these come last")

    add = command(
        "advise", advise, "the training commands for some clips, what their numbers rest on, and which of them to run"
    )
    add("--data", required=True, help="a dataset, as in training")
    add(
        "--ckpt",
        default="nano",
        help="checkpoint folder, or a released variant, such as ti2v-5B, of which no file is needed (default: nano, "
        "the one in the repository)",
    )
    add("--keywords", help="a,b,c: the words to teach (default: none)")
    add("--resolution", help="WxH px: the area that buckets fill (default: the checkpoint's)")
    add("--frames", type=int, help="4k+1, at most, of each clip (default: the checkpoint's)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--json", help="also write the commands to this file")

    add = command("scale", scaling, "predicted seconds per sample of a LoRA step on 1 to 64 GPUs, by strategy")
    add("--ckpt", default="ti2v-5B", help=f"a released variant, of {', '.join(VARIANTS)} (default: %(default)s)")
    add("--size", help="WxH px (default: the variant's)")
    add("--frames", type=int, help="4k+1 (default: the variant's)")
    add("--tflops", type=float, default=400, help="that a GPU sustains in training (default: %(default)s)")
    add("--inside", type=float, default=200, help="GB/s that a GPU sends within its machine (default: %(default)s)")
    add("--between", type=float, default=25, help="GB/s that a GPU sends to another machine (default: %(default)s)")
    add("--per_machine", type=int, default=8, help="GPUs of a machine (default: %(default)s)")
    add("--gb", type=int, default=80, help="memory of a GPU (default: %(default)s)")

    add = command("delta", delta, "how far a LoRA, another checkpoint or an encoder moves each weight")
    add("changed", metavar="FILE", help="a file or folder; FILE:high or FILE:low picks one expert of a LoRA for both")
    add("--ckpt", default="nano", help="what it changes: a checkpoint folder or a file (default: nano)")
    add("--cap", type=float, help="write a copy of a LoRA in which no ||dW||/||W|| is above this (default: none)")
    add("--out", help="where to write that copy")
    add("--json", help="also write every row to this file")

    add = command("logits", logits, "attention logits per block and head, before and after a change")
    add_model_flags(add)
    add_data_flags(add)
    add("--n", type=int, default=4, help="samples, each at four times (default: %(default)s)")
    add("--threshold", type=float, default=0.25, help="a relative change above this is drift (default: %(default)s)")
    add("--ci", action="store_true", help="exit with 1 where a head drifts")

    add = command("blocks", blocks, "which of the DiT's blocks read a word, by hiding it from one at a time")
    add_model_flags(add)
    add_data_flags(add)
    add("--keywords", required=True, help="a,b,c: words that captions of the data hold")
    add("--n", type=int, default=4, help="samples for each word, each at four timesteps (default: %(default)s)")

    add = command("drift", drift, "how far a text encoder's embeddings moved")
    add("old", metavar="OLD", help="a checkpoint folder or an encoder's file")
    add("new", metavar="NEW", help="another one")
    add("--ckpt", help="whose tokenizer a file uses, and what --save delta changes (default: OLD where it is a folder)")
    add("--prompts", help="a text file, one prompt per line (default: twenty of the nano world)")
    add("--keywords", help="a,b,c: show which words they are near")
    add("--json", help="also write the result to this file")

    add = command("listen", listen, "does a changed model follow its prompts better?")
    add_model_flags(add)
    add("--skip_before", action="store_true", help="only the last column: everything that was changed")
    add(
        "--words",
        nargs="+",
        default=[],
        help="words to put in the prompts; on nano of your own WORD=MEANING, such as scarlet=red; with --clip "
        "WORD=RIGHT,WRONG,...: what it should look like, then what it should not, such as crimson=red,blue,green "
        "(default: nano's new words)",
    )
    add(
        "--prompts",
        help="a text file: make a contact sheet of these; with --clip or --grader, {} stands for each word, and "
        "prompts without a word show what else has changed (default: built-in ones)",
    )
    add("--clip", metavar="DIR", help="judge by CLIP: an Animate checkpoint, or a folder with its CLIP and tokenizer")
    add("--grader", metavar="CMD", help="judge by a command that is given an mp4 and its prompt and prints a number")
    add("--n", type=int, help="prompts per word; of old words, as many together (default: nano 40, others 8)")
    add("--size", help="WxH px of the clips (default: the checkpoint's)")
    add("--frames", type=int, help="4k+1, frames of the clips (default: the checkpoint's)")
    add("--steps", type=int, help="sampling steps (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="random seed of prompts and noise (default: %(default)s)")
    add("--out", default="out/listen.png", help="the contact sheet; none with --clip, --grader (default: %(default)s)")

    add = command("reuse", reuse, "what sample.py --reuse saves and costs, against exact clips of the same seeds")
    add_model_flags(add)
    add("--prompts", help="a text file, one prompt per line (default: four of the nano world)")
    thresholds = [0.02, 0.05, 0.1, 0.2]
    add("--thresholds", type=float, nargs="+", default=thresholds, help="of --reuse (default: 0.02 0.05 0.1 0.2)")

    add = command("convert", convert, "a text encoder, a DiT or a LoRA in another layout, with the same bits")
    add("source", metavar="IN", help="file or folder of an encoder or DiT, a checkpoint folder, or a LoRA's file")
    add("out", metavar="OUT", help="a .safetensors file; for a DiT, or an encoder of diffusers, a folder")
    layouts = list(dict.fromkeys([*LAYOUTS, *LORA_LAYOUTS]))
    add(
        "--to",
        required=True,
        choices=layouts,
        help="DiT: official, diffusers; encoder: also comfyui; LoRA: comfyui, musubi",
    )
    add("--part", choices=["dit", "text"], help="default: what IN is; of a checkpoint folder, the encoder (text)")
    add("--tokenizer", help="a spiece.model to put inside, for comfyui (default: the one of IN)")

    add = command("report", report, "everything about a training run in one HTML file")
    add("folder", metavar="RUN", help="--out of the run")
    add("--n", type=int, default=20, help="nano: prompts for each new word, 0 for no listening (default: %(default)s)")
    add(
        "--words",
        nargs="+",
        default=[],
        help="nano: words of the run's own to grade, and what they mean: scarlet=red disc=circle (default: none)",
    )
    add("--out", help="default: RUN/report.html")
    return p.parse_args(argv)


def main():
    args = arguments()
    args.run(args)


if __name__ == "__main__":
    cli(main)
