"""diag.py advise: print the training commands for given clips and a checkpoint, with reasons for the flags."""

import shlex
from pathlib import Path
from typing import NamedTuple

from data import Batches
from diagnostics.common import write_json
from diagnostics.plan import CARDS, Job, data_items
from nanowan.devices import pick_device
from nanowan.errors import BadInput
from nanowan.formats.t5 import load_tokenizer, read_encoder
from nanowan.memory_estimate import gb
from nanowan.training import report
from nanowan.training.captions import count_files, without_keywords
from nanowan.training.flags import encoder_lora_lr, recommended_flags
from nanowan.training.keywords import check_keywords, keyword_token_ids, shared_token_ids
from nanowan.variants.registry import VARIANTS

FEW = 20  # files per word: with 5, the worst word's accuracy was 0.75; with more than 20, accuracy was no higher
HELD_OUT = 0.05  # the default of the trainers' --held_out
CONFIG = "the checkpoint's config.json"
STYLE_TARGETS = "cross_attn.q,cross_attn.k,cross_attn.v,cross_attn.o,ffn.0,ffn.2"
CHOICE = f"""
Which of them to run (numbers are accuracy on the toy, docs/experiments.md; nothing was measured at full size):
  a word for what the model can draw already: 1 alone. Training embeddings brought six such words to 0.98, and so did
    training blocks; clips of known words stayed as they were with embeddings (87 dB) and changed with blocks (42 dB)
  a word for what the model has never drawn: 1, then 2. One such colour scored 0.24 with the trained encoder, and 0.62
    with a translator trained on top of it
  a style or a motion (neither was measured): 2 without --trigger and --text_encoder, but with
    --targets {STYLE_TARGETS}: docs/recipes.md
Check the result of each: python diag.py listen --ckpt DIR --text_encoder FILE --lora FILE"""


class Flag(NamedTuple):
    """A flag of a command, with its value. why: the reason for the value, or None."""

    name: str
    value: object
    why: str | None = None


class Clips(NamedTuple):
    """The clips in --data. items: their scan.Items. captions: the empty caption, then all captions of the clips.
    shared: the keywords that have no token of their own, since all of their tokens also occur in captions without
    keywords.
    """

    items: list
    captions: list
    shared: tuple = ()

    def trained(self):
        """Return the Items that a trainer does not hold out, with its default --held_out."""
        digests = sorted({item.digest for item in self.items})
        held = {*digests[: min(16, int(HELD_OUT * len(digests)))]}
        return [item for item in self.items if item.digest not in held]

    def views(self, steps, batch):
        """Return how many times a training run of `steps` steps shows each sample to the model. batch: samples per
        step.
        """
        return steps / Batches(self.trained(), batch, 0).per_epoch


def schedule(s, script, clips):
    """Return the Flags --batch and --steps of a trainer, with the values that are recommended for a checkpoint. s: the
    checkpoint's Settings. script: the trainer's name. clips: a Clips.
    """
    flags = recommended_flags(s, script)
    views = f"each sample is seen {clips.views(flags['steps'], flags['batch']):.0f} times"
    measured = "steps" in s.train.get(script, {})
    why = CONFIG if measured else "a starting point: the best by held-out loss is kept"
    return [Flag("batch", flags["batch"]), Flag("steps", flags["steps"], f"{views}; {why}")]


def encoder_flags(s, keywords, clips):
    """Return the Flags of train_te.py that depend on the checkpoint or on the data. s: the checkpoint's Settings.
    keywords: the words to teach. clips: a Clips.
    """
    flags = recommended_flags(s, "train_te")
    if not keywords or clips.shared:
        why = "without keywords there are no embeddings to train"
        if keywords:
            why = f"every token of {', '.join(clips.shared)} is in captions without it too, so blocks must be trained"
        lr = Flag("lr", f"{encoder_lora_lr(s):g}", "train_te.py's rate for LoRAs")
        advised = [Flag("rank", 16, f"LoRAs in the encoder's blocks, whose file (--save lora) is small; {why}"), lr]
    else:
        advised = [
            Flag("train_blocks", 0, "the words' embeddings alone: as good as blocks, and nothing else changes"),
            Flag("save", "lora", "0.5 MB a word, for ComfyUI too; a full UMT5-XXL would be 11.4 GB"),
        ]
    if keywords:
        search = "with it, words of shared tokens needed a third of the steps; embeddings alone learned all six words"
        rate = Flag("keyword_lr", f"{flags['keyword_lr']:g}", CONFIG) if flags["keyword_lr"] else None
        advised += [
            Flag("keyword_init", "search", search),
            rate
            or Flag("keyword_lr", "0.001", "not measured; at the default, the blocks' rate, embeddings hardly move"),
        ]
    return advised + schedule(s, "train_te", clips)


def translator_flags(s, keywords, clips):
    """Return the Flags of train_lora.py that depend on the checkpoint or on the data. s: the checkpoint's Settings.
    keywords: the words to teach. clips: a Clips.
    """
    flags, targets = recommended_flags(s, "train_lora"), ",".join(s.parts.samples.lora_targets)
    rate = CONFIG if "lr" in s.train.get("train_lora", {}) else "that of DiffSynth-Studio's script for Wan 2.2"
    only = "k and v score as high as q, k, v and o (0.94 each), with which clips of known words lost 2 dB"
    advised = [
        Flag(
            "text_encoder", "out/te/text_encoder.safetensors", "the encoder first: a LoRA alone reached 0.42, both 0.99"
        ),
        Flag("rank", 16, "rank 4 reached 0.88, 16 and 64 reached 0.92"),
        Flag("targets", targets, only if targets.count(",") == 1 else None),
    ]
    preserved = without_keywords(filter(None, clips.captions), keywords) if keywords else []
    if keywords:
        why = "for LoRA managers" + "; captions without them are preserved" * bool(preserved)
        advised.append(Flag("trigger", ",".join(keywords), why))
    if preserved:
        why = "with a trained encoder it cost no words (0.99), and clips of known words changed by 10 dB less"
        advised.append(Flag("preserve", 2, why))
    return [*advised, Flag("lr", f"{flags['lr']:g}", rate), *schedule(s, "train_lora", clips)]


def advice(s, where, keywords, clips):
    """Return {script: [Flag]} with the training commands for a checkpoint. s: the checkpoint's Settings. where: the
    Flags that all commands begin with. keywords: the words to teach. clips: a Clips.
    """
    words = [Flag("keywords", ",".join(keywords))] if keywords else []
    return {
        "train_te": [*where, Flag("out", "out/te"), *words, *encoder_flags(s, keywords, clips)],
        "train_lora": [*where, Flag("out", "out/lora"), *translator_flags(s, keywords, clips)],
    }


def command(script, flags):
    return f"python {script}.py " + " ".join(f"--{name} {shlex.quote(str(value))}" for name, value, _ in flags)


def folder_of(ckpt):
    """Return the folder name under which the released variant `ckpt` is published; if `ckpt` names no released variant,
    return `ckpt` itself, which is a path.
    """
    if ckpt not in VARIANTS:
        return ckpt
    kind, size = ckpt.split("-")
    return f"Wan2.2-{'Animate' if kind == 'animate' else kind.upper()}-{size}"


def look_at_words(keywords, items, captions, pipe):
    """Print the keywords that occur in the captions of fewer than FEW files, and whether every caption has a keyword.
    Return a tuple of the keywords that have no token of their own (see Clips). items, captions: those of --data. pipe:
    a Pipeline with the tokenizer; if it is None, the tuple is empty. Raises BadInput for a keyword that no caption
    contains.
    """
    for keyword in keywords:
        files = count_files(items, keyword)
        if not files:
            raise BadInput(f"--keywords {keyword}: no caption of --data holds it")
        if files < FEW:
            print(f"  {keyword!r} is in the captions of {files} files; {FEW} or so teach it better")
    if keywords and not without_keywords(captions, keywords):
        print("  every caption has a keyword: to preserve anything, give train_lora.py --preserve_prompts FILE")
    if not pipe or not keywords:
        return ()
    tokenizer = load_tokenizer(pipe.dir, read_encoder(pipe.files("text")).spiece)
    check_keywords(keywords, captions, tokenizer, True)
    ids, shared = (f(keywords, captions, tokenizer) for f in (keyword_token_ids, shared_token_ids))
    return tuple(k for k in keywords if not ids[k] - shared)


def run(args):
    keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
    size = [Flag(k, getattr(args, k)) for k in ("resolution", "frames") if getattr(args, k) is not None]
    where = [Flag("ckpt", args.ckpt), Flag("data", args.data), *size]
    device = args.device or ("cuda" if args.ckpt in VARIANTS else pick_device(None))
    if not Path(args.data).exists():
        raise BadInput(f"--data {args.data}: no such folder or list")
    job = Job("train_lora", [*words_of(where), "--device", device])
    items, skipped = data_items(job)
    print(report.text(report.describe_items(items, skipped)))
    captions = ["", *dict.fromkeys(c for item in items for c in item.captions)]
    clips = Clips(items, captions, look_at_words(keywords, items, captions[1:], job.pipe))
    print(f"  {len(clips.trained())} samples to train on, {len(items) - len(clips.trained())} held out")
    commands, peaks = {}, {}
    for i, (script, flags) in enumerate(advice(job.settings, where, keywords, clips).items()):
        shown = [f._replace(value=folder_of(f.value)) if f.name == "ckpt" else f for f in flags]
        commands[script] = command(script, shown)
        print(f"\n{i + 1}. {commands[script]}")
        for name, value, why in shown:
            if why:
                print(f"     --{name} {value}: {why}")
        planned = Job(script, [*words_of(f for f in flags if f.name != "text_encoder"), "--device", device])
        need = planned.plan()
        peaks[script] = need.peak
        print(f"     needs {gb(need.peak)} on {device}, and on disk {gb(sum(need.disk.values()))}")
        if device == "cuda":
            print(f"   {planned.times(peak=need.peak)}")
            if need.peak > CARDS["4090"] * 2**30:
                print(
                    f"     a card of 24 GB: python diag.py plan --gpus 1x24 {script} and these flags proposes what fits"
                )
    blocks = job.config.num_layers
    if blocks >= 12:  # in smaller models, training a third of the blocks gained too little
        upper = f"{blocks - blocks // 3}-{blocks - 1}"
        print(f"\nIf time or memory is short, run 2 with --blocks {upper}: 0.84 of the accuracy that all blocks add.")
    print(CHOICE)
    write_json(args.json, {"commands": commands, "peak": peaks})


def words_of(flags):
    """Return the words of a command line that set these Flags."""
    return [str(word) for name, value, _ in flags for word in (f"--{name}", value)]
