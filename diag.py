"""Answer questions about checkpoints, LoRAs and runs. Each subcommand is a file in diagnostics/.

python diag.py inspect PATH...             contents of checkpoints, weight files, LoRAs and videos, from their headers
python diag.py plan SCRIPT FLAGS           memory, disk space and time of train_lora, train_te or sample; --ckpt may
                                           also name a released variant, such as ti2v-5B, whose files are not needed
python diag.py plan --gpus 1x24:4090 SCRIPT FLAGS     also proposes flags with which the run fits one 24 GB RTX 4090
python diag.py advise --data DIR --ckpt DIR --keywords a,b     training commands for your clips, and the reasons
python diag.py scale --ckpt t2v-A14B       predicted seconds per sample of a LoRA step on 1 to 64 GPUs
python diag.py delta FILE --ckpt DIR       how much a LoRA, another checkpoint or an encoder changes each weight
python diag.py delta LORA --ckpt DIR --cap 0.02 --out FILE     also writes a copy that changes no weight by over 2 %
python diag.py logits --ckpt DIR --lora FILE     attention logits with and without a LoRA; --ci exits with 1 on drift
python diag.py blocks --ckpt DIR --keywords a,b --data DIR     which blocks read a word; proposes a range for --blocks
python diag.py drift OLD NEW --prompts FILE      how far an encoder's embeddings moved, and words nearest to keywords
python diag.py listen --ckpt DIR --lora FILE     prompt adherence: a contact sheet and, on nano, accuracies
python diag.py listen --ckpt DIR --lora FILE --clip DIR --words crimson=red,blue,green     accuracies, judged by CLIP
python diag.py listen --ckpt DIR --text_encoder FILE:0,0.5,1     prompt adherence, with the encoder at several strengths
python diag.py reuse --ckpt DIR --prompts FILE   how many steps sample.py --reuse skips, and how much clips change
python diag.py convert IN OUT --to comfyui       writes a text encoder, DiT or LoRA in another layout
python diag.py report RUN                  writes a report of a training run, in one HTML file
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
    """Remove ".py" from the name of a script: "sample.py" -> "sample"."""
    return text.removesuffix(".py")


def add_model_flags(add):
    """Add the flags of a command that runs a checkpoint with LoRAs or with another text encoder."""
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the toy checkpoint in the repository)")
    add("--lora", action="append", default=[], help="LoRA, FILE[:weight][:high|low|both]; may be repeated")
    add(
        "--text_encoder",
        action="append",
        help="text encoder to use, FILE[:strength]: a full encoder, a delta or a LoRA; repeat it to stack several; "
        "`diag.py listen` also takes several strengths, as in FILE:0,0.5,1 (default: the checkpoint's own)",
    )
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=list(DTYPES), help="dtype of the weights (default: bf16 on cuda, fp32 on cpu)")
    add("--json", help="also write the result to this JSON file")


def add_data_flags(add):
    """Add the flags of a command that reads training data; they become arguments of logits.open_dataset."""
    add("--data", help="data set, in the form of train_lora.py --data (default: generated clips of moving shapes)")
    add("--cache", help="folder of the cache (default: cache/ in --data, or beside --data if that is a file)")
    add_sample_flags(add)


def add_sample_flags(add):
    """Add the flags that set the size of samples."""
    add(
        "--resolution",
        help="WxH of the samples in px; buckets with other aspect ratios have the same area (default: that of "
        "train_lora.py)",
    )
    add("--frames", type=int, help="maximum number of frames per sample, 4k+1 (default: that of train_lora.py)")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def command(name, module, text):
        c = commands.add_parser(name, help=text, description=text)
        c.set_defaults(run=module.run)
        return c.add_argument

    add = command("inspect", inspect, "what is in checkpoint folders, weight files, LoRA files and videos")
    add("paths", nargs="+", metavar="PATH", help="folders and files")
    add("--json", help="also write the result to this JSON file")

    add = command("plan", plan, "memory, disk space and time that a run will take")
    add("--json", help="also write the plan, in bytes and seconds per step, to this JSON file")
    add(
        "--gpus",
        help="GPUs for which to propose flags, COUNTxGB or COUNTxGB:CARD, such as 8x80 or 1x24:4090. GB: the memory "
        "that the card is sold with; 24 means 25.8e9 bytes. CARD: the GPU whose speed is assumed, one of "
        f"{', '.join(flops.CARDS)}; without CARD, this machine's GPU or, if there is none, {' and '.join(plan.CARDS)} "
        "(default: no proposal)",
    )
    add("--host", type=float, help="host memory per machine in GB, for --gpus (default: no limit)")
    add("script", type=script_name, choices=list(plan.SCRIPTS), help="the script to run")
    add("flags", nargs=argparse.REMAINDER, help="flags of that script, after all other arguments")

    add = command(
        "advise",
        advise,
        "training commands for your clips, the reason for each number, and advice on which command to run",
    )
    add("--data", required=True, help="data set, in the form of train_lora.py --data")
    add(
        "--ckpt",
        default="nano",
        help="checkpoint folder, or the name of a released variant, such as ti2v-5B, whose files are not needed "
        "(default: nano, the toy checkpoint in the repository)",
    )
    add("--keywords", help="words a,b,c to teach (default: none)")
    add_sample_flags(add)
    add("--device", help="device to plan for, cpu or cuda (default: cuda if --ckpt is a name or a GPU exists)")
    add("--json", help="also write the commands to this JSON file")

    add = command(
        "scale", scaling, "predicted seconds per sample of a LoRA step on 1 to 64 GPUs, for each way to divide the work"
    )
    add("--ckpt", default="ti2v-5B", help=f"released variant: {', '.join(VARIANTS)} (default: %(default)s)")
    add("--size", help="size of the clips, WxH in px (default: the variant's default size)")
    add("--frames", type=int, help="number of frames per clip, 4k+1 (default: the variant's default number)")
    add("--tflops", type=float, default=400, help="TFLOP/s that a GPU sustains in training (default: %(default)s)")
    add("--inside", type=float, default=200, help="GB/s that a GPU sends within its machine (default: %(default)s)")
    add("--between", type=float, default=25, help="GB/s that a GPU sends to another machine (default: %(default)s)")
    add("--per_machine", type=int, default=8, help="number of GPUs in a machine (default: %(default)s)")
    add("--gb", type=int, default=80, help="memory of a GPU in GB (default: %(default)s)")

    add = command("delta", delta, "how much a LoRA, another checkpoint or an encoder changes each weight")
    add(
        "changed",
        metavar="FILE",
        help="LoRA, changed checkpoint or changed encoder, a file or folder; if a LoRA file is for both experts, "
        "FILE:high or FILE:low selects one",
    )
    add("--ckpt", default="nano", help="checkpoint folder or file with the original weights (default: nano)")
    add("--cap", type=float, help="maximum ||dW||/||W|| of each weight in the copy for --out (default: no copy)")
    add("--out", help="file for a copy of the LoRA with changes limited by --cap (default: no copy)")
    add("--json", help="also write the result for every weight to this JSON file")

    add = command("logits", logits, "attention logits (self, cross) per head, with and without a LoRA or new encoder")
    add_model_flags(add)
    add_data_flags(add)
    add("--n", type=int, default=4, help="number of samples, each at four timesteps (default: %(default)s)")
    add(
        "--threshold",
        type=float,
        default=0.25,
        help="relative change of a head's logits above which the head counts as drifted (default: %(default)s)",
    )
    add("--ci", action="store_true", help="exit with status 1 if any head has drifted")

    add = command("blocks", blocks, "which DiT blocks read a word, found by hiding the word from one block at a time")
    add_model_flags(add)
    add_data_flags(add)
    add("--keywords", required=True, help="words a,b,c that occur in captions of the data")
    add("--n", type=int, default=4, help="number of samples per word, each at four timesteps (default: %(default)s)")

    add = command("drift", drift, "how far training moved a text encoder's embeddings")
    add("old", metavar="OLD", help="checkpoint folder or file of the encoder before the change")
    add("new", metavar="NEW", help="checkpoint folder or file of the encoder after the change")
    add(
        "--ckpt",
        help="checkpoint folder with the tokenizer; if OLD or NEW is a delta or a LoRA, it is applied to the encoder "
        "in this folder (default: OLD, if that is a folder)",
    )
    add("--prompts", help="text file, one prompt per line (default: twenty prompts for nano)")
    add("--keywords", help="words a,b,c; for each, the nearest words in OLD and in NEW are printed (default: none)")
    add("--json", help="also write the result to this JSON file")

    add = command("listen", listen, "whether a changed model follows its prompts better")
    add_model_flags(add)
    add(
        "--skip_before",
        action="store_true",
        help="sample only the model with all changes, without the base model and partly changed models",
    )
    add(
        "--words",
        nargs="+",
        default=[],
        help="words to put in the prompts. On nano: its new words, or your own as WORD=MEANING, such as scarlet=red. "
        "With --clip: WORD=RIGHT,WRONG,..., what the word should look like and what it should not, such as "
        "crimson=red,blue,green. With --grader alone: WORD (default: on nano, its new words)",
    )
    add(
        "--prompts",
        help="text file of prompts for a contact sheet. With --clip or --grader, each word of --words replaces {} in a "
        "prompt; a prompt that contains neither {} nor one of the words shows what else has changed (default: "
        "built-in prompts)",
    )
    add(
        "--clip",
        metavar="DIR",
        help="folder of an Animate checkpoint, or a folder with only its CLIP and tokenizer; this CLIP then judges "
        "the clips",
    )
    add(
        "--grader",
        metavar="CMD",
        help="command that takes an mp4 and its prompt and prints a score; its scores are then the result",
    )
    add(
        "--n",
        type=int,
        help="number of prompts per word of --words; besides all these, nano's grader gets equally many prompts with "
        "known words only (default: 40 for nano's grader, 8 for --clip and --grader)",
    )
    add("--size", help="size of the clips, WxH in px (default: as the checkpoint recommends)")
    add("--frames", type=int, help="number of frames per clip, 4k+1 (default: as the checkpoint recommends)")
    add("--steps", type=int, help="number of sampling steps (default: as the checkpoint recommends)")
    add("--seed", type=int, default=0, help="random seed for prompts and noise (default: %(default)s)")
    add(
        "--out",
        default="out/listen.png",
        help="image file for the contact sheet; not written with --clip or --grader (default: %(default)s)",
    )

    add = command("reuse", reuse, "how many steps sample.py --reuse skips, and how much this changes the clips")
    add_model_flags(add)
    add("--prompts", help="text file, one prompt per line (default: four prompts for nano)")
    thresholds = [0.02, 0.05, 0.1, 0.2]
    add(
        "--thresholds",
        type=float,
        nargs="+",
        default=thresholds,
        help="values of --reuse to try (default: 0.02 0.05 0.1 0.2)",
    )

    add = command("convert", convert, "write a text encoder, a DiT or a LoRA in another layout, with the same values")
    add("source", metavar="IN", help="file or folder of an encoder or DiT, a checkpoint folder, or a LoRA file")
    add(
        "out",
        metavar="OUT",
        help=".safetensors file to write; for a DiT, and for an encoder in diffusers' layout, a folder",
    )
    layouts = list(dict.fromkeys([*LAYOUTS, *LORA_LAYOUTS]))
    add(
        "--to",
        required=True,
        choices=layouts,
        help="layout to write. DiT: official, diffusers; encoder: official, diffusers, comfyui; LoRA: comfyui, musubi",
    )
    add(
        "--part",
        choices=["dit", "text"],
        help="component to convert (default: the one that IN contains; if it contains both, text)",
    )
    add("--tokenizer", help="spiece.model to store in the file, with --to comfyui (default: that of IN)")

    add = command("report", report, "write a report of a training run, in one HTML file")
    add("folder", metavar="RUN", help="folder of the run: the --out of the trainer")
    add(
        "--n",
        type=int,
        default=20,
        help="nano: number of prompts per new word to grade, 0 for none (default: %(default)s)",
    )
    add(
        "--words",
        nargs="+",
        default=[],
        help="nano: more words that the run taught, with their meanings, such as "
        "scarlet=red disc=circle (default: none)",
    )
    add("--out", help="HTML file to write (default: RUN/report.html)")
    return p.parse_args(argv)


def main():
    args = arguments()
    args.run(args)


if __name__ == "__main__":
    cli(main)
