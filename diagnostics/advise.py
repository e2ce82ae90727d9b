"""diag.py advise: the two commands to run on some clips and a checkpoint, and what each number in them rests on."""

import shlex

from diagnostics.common import write_json
from diagnostics.logits import open_dataset
from diagnostics.plan import planned
from nanowan.devices import pick_device
from nanowan.formats.t5 import load_tokenizer, read_encoder
from nanowan.memory_estimate import gb
from nanowan.pipeline import Pipeline, Runtime
from nanowan.training.captions import without_keywords
from nanowan.training.flags import recommended_flags
from nanowan.training.keywords import check_keywords

# DiffSynth-Studio's script for Wan 2.2: rank 32, 1e-4, five epochs of a hundred repeats
PEER, PEER_VIEWS = "DiffSynth-Studio's published LoRA script for Wan 2.2", 500
FEW = 10  # captions of a word
CONFIG = "the checkpoint's config.json"
NANO_ONLY = "measured on nano only"


def advice(s, blocks, ckpt, data, keywords, samples, others):
    """{script: [(flag, value, what it rests on)]} for `samples` clips and a checkpoint of these Settings, whose DiT has
    so many blocks. others: whether there are captions without keywords.
    """
    te, lora = (recommended_flags(s, script) for script in ("train_te", "train_lora"))

    def common(flags, script):
        measured = {"lr", "steps"} <= s.train.get(script, {}).keys()
        views = flags["steps"] * flags["batch"] / samples
        rate = CONFIG if measured else PEER if script == "train_lora" else "a tenth of a LoRA's; unmeasured"
        steps = f"each clip is seen {views:.0f} times"
        steps += f"; {CONFIG}" if measured else f"; {PEER}: {PEER_VIEWS} times"
        return [("lr", f"{flags['lr']:g}", rate), ("batch", flags["batch"], None), ("steps", flags["steps"], steps)]

    where = [("ckpt", ckpt, None), ("data", data, None)]
    rows = f"rows and blocks: own; rows alone, --train_blocks 0, change nothing else: own_rows; {NANO_ONLY}"
    words = [("keywords", ",".join(keywords), rows)] if keywords else []
    encoder = [*where, ("out", "out/te", None), *words, *common(te, "train_te")]
    translator = [
        *where,
        ("out", "out/lora", None),
        ("text_encoder", "out/te/text_encoder.safetensors", "the encoder first: own against own_lora"),
        ("rank", 16, f"rank_16 finds words that rank_4 does not, rank_64 few more; {NANO_ONLY}"),
        ("targets", ",".join(s.parts.samples.lora_targets), f"k and v beside all of cross-attention; {NANO_ONLY}"),
        ("blocks", f"0-{blocks - 1}", f"the upper third alone finds nearly as much: upper against all; {NANO_ONLY}"),
        *([("trigger", ",".join(keywords), "captions without them are preserved")] if keywords else []),
        *([("preserve", 2, f"preserve_2 against rank_16; {NANO_ONLY}")] if keywords and others else []),
        *common(lora, "train_lora"),
    ]
    return {"train_te": encoder, "train_lora": translator}


def command(script, flags):
    return f"python {script}.py " + " ".join(f"--{flag} {shlex.quote(str(value))}" for flag, value, _ in flags)


def run(args):
    keywords = [k.strip() for k in (args.keywords or "").split(",") if k.strip()]
    device = pick_device(args.device)
    pipe = Pipeline(args.ckpt, Runtime(device))
    where = {"data": args.data, "resolution": args.resolution, "frames": args.frames}
    dataset = open_dataset(pipe, **where)
    if keywords:
        tokenizer = load_tokenizer(pipe.dir, read_encoder(pipe.files("text")).spiece)
        counts = check_keywords(keywords, dataset.captions, tokenizer, True)
        for keyword, count in counts.items():
            if count < FEW:
                print(f"  {keyword!r} is in {count} different captions; more teach it better")
    others = any(without_keywords(dataset.captions, keywords))
    if keywords and not others:
        print("  every caption has a keyword: to preserve anything, give train_lora.py --preserve_prompts FILE")
    size = [(k, v, None) for k, v in where.items() if v is not None and k != "data"]
    blocks, samples = pipe.config().num_layers, len(dataset.items)
    advised, plans = advice(pipe.settings, blocks, args.ckpt, args.data, keywords, samples, others), {}
    for i, (script, flags) in enumerate(advised.items()):
        flags = advised[script] = [*flags[:2], *size, *flags[2:]]
        print(f"\n{i + 1}. {command(script, flags)}")
        for flag, value, why in flags:
            if why:
                print(f"     --{flag} {value}: {why}")
        argv = [str(word) for flag, value, _ in flags if flag != "text_encoder" for word in (f"--{flag}", value)]
        need = planned(script, [*argv, "--device", device])
        plans[script] = need.peak
        print(f"     needs {gb(need.peak)} on {device}, and on disk {gb(sum(need.disk.values()))}")
    print("\nNames such as rank_16 are rows of docs/listening.md, which says how sure they are.")
    write_json(args.json, {"commands": {s: command(s, f) for s, f in advised.items()}, "peak": plans})
