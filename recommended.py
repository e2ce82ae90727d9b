"""What is recommended of the trainers' flags where they are not given, for a checkpoint."""

from checkpoint import BadInput

# At full size; nano's config.json has its own, under "train".
RECOMMENDED = {
    "train_lora": {"t_distribution": "logit-normal", "steps": 2000, "batch": 1, "lr": 1e-4, "weight_decay": 0.01},
    "train_te": {"t_distribution": "logit-normal", "steps": 2000, "batch": 1, "lr": 1e-5, "weight_decay": 0.0}
    | {"caption_mode_probs": "15,35,50", "trim_prob": 0.2, "keyword_init": "own", "keyword_lr": None},
}


def recommended_flags(s, script):
    """{flag: value} of a trainer for a checkpoint, by its Settings: the "train" entry of its config.json, in which
    {script: {flag: value}} is what differs between them, over RECOMMENDED.
    """
    general = {"resolution": "{}x{}".format(*s.size), "frames": s.frames, "shift": s.shift}
    known = {name: {*general, *flags} for name, flags in RECOMMENDED.items()}
    both = {k: v for k, v in s.train.items() if k not in RECOMMENDED}
    for entry, allowed in ((both, set().union(*known.values())), *((s.train.get(n, {}), known[n]) for n in known)):
        if strange := sorted(entry.keys() - allowed):
            raise BadInput(f'config.json, "train": {strange[0]} is none of {", ".join(sorted(allowed))}')
    both = {k: v for k, v in both.items() if k in known[script]}
    return general | RECOMMENDED[script] | both | s.train.get(script, {})
