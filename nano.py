"""The nano world: moving shapes with captions, an exact grader, and the script that trains the checkpoint in nano/.

    python nano.py clips --out DIR --n N --seed S          mp4 + txt files, and attributes.jsonl beside them
    python nano.py eval --ckpt DIR [--lora FILE] ...       how well a checkpoint listens to captions
    python nano.py train --out DIR                         everything in nano/, from nothing

A clip is 64x64 px, 9 frames: one shape with a colour and a motion before a plain background. A checkpoint trained on it
is a whole Wan 2.2 TI2V in the official layout, small enough for two CPU cores, that really follows its captions; so
each step of the research loop (teach a word, train a translator, measure) runs here as it does at full size.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
import zlib
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import BadInput, atomic, cli, save
from denoising import decode
from flow import add_noise, sample_timesteps
from media import write_grid, write_mp4
from sample import load, sample_latents
from t5 import TextEncoder, Tokenizer
from vae import LATENT_STATS, VAE, channels_last
from wan import Wan, WanConfig

# ---- the world ---------------------------------------------------------------------------------------------------
SIZE, FRAMES, FPS, RADIUS, STEP = 64, 9, 8, 13, 4  # px, frames, frames/s, px, px per frame
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 225, 40),
    "purple": (160, 60, 210),
    "cyan": (50, 215, 225),
    "white": (248, 248, 248),
}
UNDRAWN = {"orange": (245, 135, 30)}  # known to the grader and to `clips`, never seen by the base DiT
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS = {"dark": (20, 20, 24), "grey": (128, 128, 128)}
ATTRIBUTES = ("color", "shape", "motion")
VERBS = {
    "left": ("moves left", "slides left", "drifts to the left"),
    "right": ("moves right", "slides right", "drifts to the right"),
    "up": ("moves up", "rises", "climbs"),
    "down": ("moves down", "falls", "drops"),
    "still": ("stays still", "rests", "does not move"),
}
TEMPLATES = (
    "a {color} {shape} {verb}",
    "the {color} {shape} {verb}",
    "{background} background, a {color} {shape} {verb}",
    "a {color} {shape} {verb} on a {background} background",
    "a {shape} that is {color} {verb}",
    "there is a {color} {shape} and it {verb}",
)
# Words the base has never read, and what they mean; `clips --words` writes them, `eval --words` asks for them.
NEW_WORDS = {
    "crimson": ("color", "red"),
    "azure": ("color", "blue"),
    "box": ("shape", "square"),
    "orb": ("shape", "circle"),
    "wedge": ("shape", "triangle"),
    "sinks": ("motion", "down"),
    "ascends": ("motion", "up"),
    "halts": ("motion", "still"),
    "retreats": ("motion", "left"),
    "advances": ("motion", "right"),
    "orange": ("color", "orange"),
    "plus": ("shape", "cross"),
}
TRIPLES = list(product(COLORS, SHAPES, MOTIONS))
UNSEEN = set(random.Random(0).sample(TRIPLES, 20))  # never trained; composition is graded on them apart


def template(shape, radius, center, size=SIZE):
    """Anti-aliased coverage in [0,1] of shapes. shape (B,) index into SHAPES, radius (B,), center (B,T,2) as x,y px ->
    (B,T,size,size).
    """
    grid = torch.arange(size) + 0.5
    x = grid[None, None, None, :] - center[..., 0, None, None]
    y = grid[None, None, :, None] - center[..., 1, None, None]
    r = radius.view(-1, 1, 1, 1).float()
    box = lambda a, b: torch.maximum(x.abs() - a, y.abs() - b)
    distance = torch.stack(
        [  # signed, in px, negative inside
            (x * x + y * y).sqrt() - r,
            box(0.89 * r, 0.89 * r),
            torch.maximum(y - 0.6 * r, x.abs() * 0.866 - y * 0.5 - 0.6 * r),
            torch.minimum(box(1.08 * r, 0.38 * r), box(0.38 * r, 1.08 * r)),
        ],
        1,
    )
    distance = distance[torch.arange(len(shape)), shape]
    return (0.5 - distance).clamp(0, 1)


def render(shape, color, background, center, size=SIZE):
    """Draw clips: shape (B,), color and background (B,3) in 0..255, center (B,T,2) px -> (B,3,T,size,size) in [-1,1]."""
    cover = template(shape, torch.full((len(shape),), float(RADIUS)), center, size)[:, None]
    color, background = (c.float().view(-1, 3, 1, 1, 1) / 127.5 - 1 for c in (color, background))
    return background + (color - background) * cover


def courses(motion):
    """Every path of a motion, 9 centres (x, y) each: through the middle of the frame, jittered by -4, 0 or 4 px across
    it (both ways when still).
    """
    dx, dy = MOTIONS[motion]
    return [
        [
            (SIZE / 2 + jx + dx * STEP * (t - FRAMES // 2), SIZE / 2 + jy + dy * STEP * (t - FRAMES // 2))
            for t in range(FRAMES)
        ]
        for jx in ((0,) if dx else (-4, 0, 4))
        for jy in ((0,) if dy else (-4, 0, 4))
    ]


def paint(attributes, centers):
    """Clips (B,3,9,64,64) in [-1,1] of a list of {"color", "shape", "motion", "background"} along the given centres."""
    palette = COLORS | UNDRAWN
    return render(
        torch.tensor([SHAPES.index(a["shape"]) for a in attributes]),
        torch.tensor([palette[a["color"]] for a in attributes]),
        torch.tensor([BACKGROUNDS[a["background"]] for a in attributes]),
        torch.tensor(centers),
    )


def draw(attributes, seed):
    """`paint` with paths drawn by the seed."""
    rng = random.Random(seed)
    return paint(attributes, [rng.choice(courses(a["motion"])) for a in attributes])


def say(a, rng, words=(), form=None):
    """A caption of attributes `a`. `words` are new words to use wherever they fit."""
    value = {
        "color": a["color"],
        "shape": a["shape"],
        "verb": rng.choice(VERBS[a["motion"]]),
        "background": a["background"],
    }
    for word in words:
        kind, meaning = NEW_WORDS[word]
        if a[kind] == meaning:
            value["verb" if kind == "motion" else kind] = word
    return re.sub(r"\ba (?=[aeiou])", "an ", (form or rng.choice(TEMPLATES)).format(**value))


def held_out(caption, word=None):
    """One caption in ten, by its checksum, is kept out of training; of those with a new word, of which there are fewer,
    every second.
    """
    return zlib.crc32(caption.encode()) % (2 if word else 10) == 0


def sample_attributes(rng, triples=None):
    color, shape, motion = rng.choice(triples or [t for t in TRIPLES if t not in UNSEEN])
    return {"color": color, "shape": shape, "motion": motion, "background": rng.choice(list(BACKGROUNDS))}


def training_caption(a, rng):
    """What the base reads: mostly a sentence that is not held out, 10 % a single word, 10 % nothing (for guidance)."""
    u = rng.random()
    if u < 0.1:
        return ""
    if u < 0.2:
        return say(a, rng, form=rng.choice(("{color}", "{shape}", "{verb}")))
    while held_out(caption := say(a, rng)):
        pass
    return caption


def prompts(n, seed, unseen=False, words=()):
    """n different prompts with their attributes, none of which was trained on.

    Held-out captions of trained triples; with `unseen`, any captions of the triples never trained; with `words`,
    captions that use one of these new words each, in turn, held out from what `clips` writes. Raises BadInput where
    there are not n different ones.
    """
    rng, found = random.Random(f"prompts {seed} {unseen}"), {}
    for attempt in range(200 * n):
        if len(found) == n:
            break
        word = words[len(found) % len(words)] if words else None
        a = sample_attributes(rng, fitting(word) if word else sorted(UNSEEN) if unseen else None)
        caption = say(a, rng, [word] if word else [])
        if unseen or held_out(caption, word):
            found[caption] = {"prompt": caption, **a, **({"word": word} if word else {})}
    if len(found) < n:
        raise BadInput(f"--n {n}: there are only about {len(found)} such prompts")
    return list(found.values())


def fitting(word):
    """The trained triples that a new word can describe; for a colour never drawn, any trained shape and motion in it."""
    kind, meaning = NEW_WORDS[word]
    if meaning in UNDRAWN:
        return [(meaning, shape, motion) for shape in SHAPES for motion in MOTIONS]
    return [t for t in TRIPLES if t not in UNSEEN and t[ATTRIBUTES.index(kind)] == meaning]


# ---- the grader --------------------------------------------------------------------------------------------------
def nearest(rgb, palette):
    return min(palette, key=lambda name: sum((float(a) - b) ** 2 for a, b in zip(rgb, palette[name])))


def grade(clip):
    """What a clip (3,T,64,64) in [-1,1] shows, from its pixels alone: color, shape, motion, background, and iou, the
    overlap (0..1, soft, mean over frames) with the best-fitting shape template. All but background are None where
    nothing is drawn.
    """
    x = (clip.float().nan_to_num() + 1) * 127.5
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).flatten(1)
    ground = border.median(1).values
    distance = (x - ground[:, None, None, None]).norm(dim=0)  # (T,H,W)
    background = nearest(ground, BACKGROUNDS)
    core = distance > 0.75 * distance.flatten().quantile(0.98)
    nothing = {"color": None, "shape": None, "motion": None, "background": background, "iou": 0.0}
    if not distance.flatten().quantile(0.98) >= 25:
        return nothing
    rgb = x[:, core].median(1).values
    axis = (rgb - ground)[:, None, None, None]
    mask = (((x - ground[:, None, None, None]) * axis).sum(0) / (axis * axis).sum()).clamp(0, 1)
    solid = (mask > 0.5).float()
    area = solid.flatten(1).sum(1).clamp(min=1)  # (T,)
    grid = torch.arange(clip.shape[-1]) + 0.5
    center = (
        torch.stack([(solid * grid).flatten(1).sum(1), (solid * grid[:, None]).flatten(1).sum(1)], 1) / area[:, None]
    )
    scores = []
    for i in range(len(SHAPES)):
        index, full = torch.full((len(area),), i), torch.full((len(area),), float(RADIUS))
        unit = template(index, full, center[:, None])[:, 0].flatten(1).sum(1)
        shape = template(index, full * (mask.flatten(1).sum(1) / unit).sqrt(), center[:, None])[:, 0]
        scores.append(
            (torch.minimum(shape, mask).flatten(1).sum(1) / torch.maximum(shape, mask).flatten(1).sum(1)).mean().item()
        )
    if max(scores) < 0.5:  # not one solid shape
        return nothing
    dx, dy = (center[-3:].mean(0) - center[:3].mean(0)).tolist()
    far = STEP * (len(area) - 3) / 2
    motion = (
        "still"
        if max(abs(dx), abs(dy)) < far
        else ("left" if dx < 0 else "right")
        if abs(dx) > abs(dy)
        else ("up" if dy < 0 else "down")
    )
    return {
        "color": nearest(rgb, COLORS | UNDRAWN),
        "shape": SHAPES[scores.index(max(scores))],
        "motion": motion,
        "background": background,
        "iou": max(scores),
    }


def gradable(settings):
    """Whether a checkpoint's clips, by its settings, are of the size that the grader reads."""
    return (tuple(settings.size), settings.frames) == ((SIZE, SIZE), FRAMES)


def wilson(right, n):
    """95 % interval of a proportion (Wilson, 1927)."""
    if not n:
        return 0.0, 1.0
    z, p = 1.96, right / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)


def shares(graded, wanted):
    """Share right per attribute, over the rows of `wanted` that ask for it."""
    accuracy = {}
    for kind in ATTRIBUTES:
        pairs = [(g[kind], w[kind]) for g, w in zip(graded, wanted) if kind in w]
        if pairs:
            accuracy[kind] = sum(a == b for a, b in pairs) / len(pairs)
    return accuracy


# ---- training the checkpoint ---------------------------------------------------------------------------------------
def run_stage(out, name, steps, params, lr, loss_at, decay=0.4, ema=0.0):
    """One stage of training: AdamW, gradient norm clipped to 1, 100 steps of warm-up, linear decay over the last
    `decay` of the steps, and the parameters' moving average put in place at the end (`ema` per step). `loss_at(step)`
    draws by the step alone, so a killed run goes on from its last state (out/state_NAME.pt) as if it had not been
    killed.
    """
    params = list(params)
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average, start = [p.detach().clone() for p in params], 0
    state = out / f"state_{name}.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start, average = saved["step"], saved["average"]
        opt.load_state_dict(saved["opt"])
        for p, q in zip(params, saved["params"]):
            p.data.copy_(q)
    losses, began = [], time.time()
    for step in range(start, steps):
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, (steps - step) / (decay * steps))
        loss = loss_at(step)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(ema, step / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"{name} {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} {1000 * (time.time() - began) / len(losses):.0f} ms/step",
                flush=True,
            )
            losses, began = [], time.time()
            with atomic(state) as tmp:
                torch.save(
                    {"step": step + 1, "average": average, "opt": opt.state_dict(), "params": [p.data for p in params]},
                    tmp,
                )
    for p, m in zip(params, average):
        p.data.copy_(m)


def vae_batch(rng, n, frames, size):
    """n clips for the VAE alone: half in the world's colours, half in any; windows of `size` px around the shape."""
    shapes, colors, grounds, centers = [], [], [], []
    for _ in range(n):
        ground = rng.choice(list(BACKGROUNDS.values()))
        color = rng.choice(list(COLORS.values()))
        if rng.random() < 0.5:
            while math.dist(color := [rng.randrange(256) for _ in range(3)], ground) < 60:
                pass
        at = rng.randrange(FRAMES - frames + 1)
        course = rng.choice(courses(rng.choice(list(MOTIONS))))[at : at + frames]
        x, y = (min(max(int(c - size / 2) + rng.randint(-RADIUS, RADIUS), 0), SIZE - size) for c in course[frames // 2])
        shapes.append(rng.randrange(len(SHAPES)))
        colors.append(color)
        grounds.append(ground)
        centers.append([(cx - x, cy - y) for cx, cy in course])
    return render(torch.tensor(shapes), torch.tensor(colors), torch.tensor(grounds), torch.tensor(centers), size=size)


def train_vae(out, seed):
    """Images, then 5-frame windows, then whole clips; then the decoder alone. Returns the VAE with its latent
    statistics folded in.
    """
    torch.manual_seed(seed)
    vae = channels_last(VAE("2.2", 8, 12))
    with torch.no_grad():  # a posterior of standard deviation 0.05 to begin with: a wider one drowns the mean
        vae.conv1.weight[48:] = 0
        vae.conv1.bias[48:] = -6
    encoder = [*vae.encoder.parameters(), *vae.conv1.parameters()]
    decoder = [*vae.decoder.parameters(), *vae.conv2.parameters()]

    def reconstruction(z, x):
        error = torch.cat(list(vae.frame_chunks(z)), 2) - x
        weight = 1 + 3 * ((x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.02)  # the shape and its edge
        return (weight * (error**2 + 0.1 * error.abs())).mean()

    def joint(stage, n, frames, size):
        def loss_at(step):
            rng = random.Random(f"{seed} {stage} {step}")
            x = vae_batch(rng, n, frames, size)
            mean, logvar = torch.cat(list(vae.moment_chunks(x)), 2).chunk(2, 1)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
            kl = (mean**2 + logvar.exp() - logvar - 1).mean() / 2
            return reconstruction(mean + noise * (logvar / 2).exp(), x) + 1e-5 * kl

        return loss_at

    run_stage(out, "vae_images", 1500, encoder + decoder, 3e-3, joint("images", 64, 1, 32), ema=0.99)
    run_stage(out, "vae_windows", 800, encoder + decoder, 2e-3, joint("windows", 16, 5, 32), ema=0.99)
    run_stage(out, "vae_clips", 600, encoder + decoder, 2e-3, joint("clips", 8, 9, 64), ema=0.99)

    def decoder_loss(step):
        x = vae_batch(random.Random(f"{seed} decoder {step}"), 8, 9, 64)
        with torch.no_grad():
            z = torch.cat([m[:, :48] for m in vae.moment_chunks(x)], 2)
        return reconstruction(z, x)

    run_stage(out, "vae_decoder", 4000, decoder, 2e-3, decoder_loss, ema=0.995)
    fold_stats(vae, vae_batch(random.Random(f"{seed} stats"), 256, 9, 64))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_stats(vae, clips):
    """Scale the latents, inside the two 1x1x1 convolutions, so that each channel has the mean and standard deviation
    that the full-size VAE's has: then the constants in vae.py serve this VAE too.
    """
    z = torch.cat([torch.cat([m[:, :48] for m in vae.moment_chunks(c)], 2) for c in clips.split(16)])
    mean, std = (torch.tensor(s) for s in LATENT_STATS[48])
    scale = std / z.std((0, 2, 3, 4))
    shift = mean - scale * z.mean((0, 2, 3, 4))
    vae.conv1.weight[:48] *= scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:48] = vae.conv1.bias[:48] * scale + shift
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= vae.conv2.weight.flatten(1) @ shift


def every_clip():
    """All clips of the trained triples: ([attributes], (N,3,9,64,64))."""
    attributes, centers = [], []
    for color, shape, motion in TRIPLES:
        if (color, shape, motion) not in UNSEEN:
            for background in BACKGROUNDS:
                for course in courses(motion):
                    attributes.append({"color": color, "shape": shape, "motion": motion, "background": background})
                    centers.append(course)
    return attributes, paint(attributes, centers)


def train_tokenizer(file):
    """A sentencepiece model of the world's captions, with T5's special ids. As UMT5's has a piece for most words, this
    has one for each of the new words, which the base then never reads; every letter is in it, so that others can be
    spelled.
    """
    import io

    import sentencepiece

    rng, model = random.Random(0), io.BytesIO()
    lines = [training_caption(sample_attributes(rng), rng) for _ in range(4000)] + [
        "abcdefghijklmnopqrstuvwxyz",
        " ".join("abcdefghijklmnopqrstuvwxyz"),
    ] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line]),
        model_writer=model,
        vocab_size=256,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        user_defined_symbols=["\u2581" + word for word in NEW_WORDS],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as tmp:
        tmp.write_bytes(model.getvalue())


def train_dit(out, seed, vae, tokenizer, steps):
    """The DiT and the text encoder together, from nothing, on cached latents of every clip."""
    torch.manual_seed(seed)
    model, encoder = Wan(DIT), TextEncoder(tokenizer.pieces.get_piece_size(), DIT.text_dim, 128, 256, 2, 2)
    for m in [*model.modules(), *encoder.modules()]:
        if isinstance(m, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
    torch.nn.init.normal_(encoder.token_embedding.weight, std=0.3)
    for m in (*model.blocks, model.head):
        torch.nn.init.normal_(m.modulation, std=DIT.dim**-0.5)
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.pos_embedding.embedding.weight)
    torch.nn.init.zeros_(model.head.head.weight)
    model.train()
    attributes, clips = every_clip()
    latents = torch.cat([vae.encode(c) for c in clips.split(32)])

    def loss_at(step):
        rng = random.Random(f"{seed} dit {step}")
        chosen = [rng.randrange(len(attributes)) for _ in range(16)]
        ids, lens = tokenizer([training_caption(attributes[i], rng) for i in chosen])
        x0 = latents[chosen].repeat(2, 1, 1, 1, 1)
        g = torch.Generator().manual_seed(rng.getrandbits(62))
        t = sample_timesteps(32, 1.5, "uniform", generator=g)
        xt, target = add_noise(x0, torch.randn(x0.shape, generator=g), t)
        text = encoder(ids, lens)
        return F.mse_loss(model(xt, 1000 * t, text.repeat(2, 1, 1), lens.repeat(2)), target)

    run_stage(out, "dit", steps, [*model.parameters(), *encoder.parameters()], 1.5e-3, loss_at, ema=0.999)
    return model.eval().requires_grad_(False), encoder.eval().requires_grad_(False)


@torch.no_grad()
def introduce(encoder):
    """Give the new words the embedding that a text encoder pretrained on books would have for them: one that tells
    their kind (the mean of the known words of that kind, and noise), so that they are read as a color, a shape or a
    verb, but not which.
    """
    rows, ids = encoder.token_embedding.weight, encoder.tokenizer.ids
    kin = {"color": COLORS, "shape": SHAPES, "motion": [v for forms in VERBS.values() for v in forms if " " not in v]}
    g = torch.Generator().manual_seed(0)
    for word, (kind, _) in NEW_WORDS.items():
        known = rows[[ids(w)[0] for w in kin[kind]]]
        rows[ids(word)[0]] = known.mean(0) + 0.05 * torch.randn(rows.shape[1], generator=g)


DIT = WanConfig("ti2v", dim=256, ffn_dim=384, num_heads=4, num_layers=4, in_dim=48, out_dim=48, text_dim=128)
SAMPLE = dict(size=[SIZE, SIZE], frames=FRAMES, fps=FPS, steps=12, shift=2.0, guidance=4.0, solver="euler", negative="")
TRAIN = dict(resolution=f"{SIZE}x{SIZE}", frames=FRAMES, shift=1.5, t_distribution="uniform")


def train(args):
    """Train everything and write it to --out in the official layout of TI2V-5B."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(out, args.seed)
    rng = random.Random("reconstructions")
    attributes = [sample_attributes(rng) for _ in range(200)]
    clips = draw(attributes, 1)
    again = torch.cat([vae.decode(vae.encode(c)) for c in clips.split(20)])
    graded = [grade(c) for c in again]
    print(
        f"reconstructions: {shares(graded, attributes)}, iou {sum(g['iou'] for g in graded) / 200:.3f}, "
        f"psnr {-10 * math.log10(F.mse_loss(again, clips).item() / 4):.1f} dB",
        flush=True,
    )

    spiece = out / "google" / "umt5-xxl" / "spiece.model"
    train_tokenizer(spiece)
    tokenizer = Tokenizer(spiece)
    model, encoder = train_dit(out, args.seed, vae, tokenizer, args.steps)
    encoder.tokenizer = tokenizer
    introduce(encoder)
    half = lambda m, dtype: {k: v.to(dtype).contiguous() for k, v in m.state_dict().items()}
    save(out / "diffusion_pytorch_model.safetensors", half(model, torch.float16))
    for name, state in (
        ("Wan2.2_VAE.pth", half(vae, torch.float16)),
        ("models_t5_umt5-xxl-enc-bf16.pth", half(encoder, torch.bfloat16)),
    ):
        with atomic(out / name) as tmp:
            torch.save(state, tmp)
    config = {k: v for k, v in asdict(DIT).items() if k not in ("text_dim", "patch_size")}
    with atomic(out / "config.json") as tmp:
        tmp.write_text(
            json.dumps({"_class_name": "WanModel", **config, "sample": SAMPLE, "train": TRAIN}, indent=1) + "\n"
        )
    print(f"written to {out}; look at it with: python nano.py eval --ckpt {out}")


# ---- commands ----------------------------------------------------------------------------------------------------
def write_clips(args):
    """mp4 + txt files and attributes.jsonl."""
    words = parse_words(args.words)
    whole, rng, lines = Path(args.out), random.Random(f"clips {args.seed}"), []
    if whole.exists() and any(whole.iterdir()):
        raise BadInput(f"--out {whole}: holds something already; choose another folder")
    whole.parent.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(dir=whole.parent, prefix=".tmp-"))  # so that a folder of clips holds all of them
    out.chmod(0o755)
    for i in range(args.n):
        word = words[i // 2 % len(words)] if words and i % 2 else None  # every second clip shows what a new word means
        caption = None
        while caption is None or held_out(caption, word):
            a = sample_attributes(rng, fitting(word) if word else None)
            caption = say(a, rng, [word] if word else [])
        name = f"clip_{i:04d}"
        write_mp4(out / f"{name}.mp4", draw([a], rng.random())[0], FPS)
        (out / f"{name}.txt").write_text(caption + "\n")
        lines.append(json.dumps({"file": f"{name}.mp4", "caption": caption, **a}))
    (out / "attributes.jsonl").write_text("\n".join(lines) + "\n")
    out.replace(whole)
    print(f"{args.n} clips in {whole}")


def parse_words(text):
    words = text.split(",") if text else []
    unknown = [w for w in words if w not in NEW_WORDS]
    if unknown:
        raise BadInput(
            f"--words {','.join(unknown)}: the nano world defines {', '.join(NEW_WORDS)}; for others give eval --prompts FILE"
        )
    return words


def read_prompts(file):
    """Lines {"prompt": ..., "color": ..., "shape": ..., "motion": ...}; only the attributes given are graded."""
    known = {"color": COLORS | UNDRAWN, "shape": SHAPES, "motion": MOTIONS}
    rows = []
    try:
        for i, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines()):
            if line.strip():
                row = json.loads(line)
                for kind in ATTRIBUTES:
                    if kind in row and row[kind] not in known[kind]:
                        raise BadInput(
                            f"{file}, line {i + 1}: {kind} {row[kind]!r} is none of {', '.join(known[kind])}"
                        )
                if not isinstance(row["prompt"], str):
                    raise BadInput(f"{file}, line {i + 1}: the prompt is not text")
                rows.append(row)
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f'{file}: not lines of {{"prompt": ..., "color": ...}} ({type(e).__name__}: {e})') from None
    if not rows:
        raise BadInput(f"{file}: holds no prompts")
    return rows


def listen(models, rows, seed=0, batch=50, **given):
    """Sample every row's prompt (row i from seed + i) and grade it: (graded, clips)."""
    clips = []
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        z = sample_latents(
            models, [r["prompt"] for r in part], [seed + i + j for j in range(len(part))], progress=False, **given
        )
        clips.append(decode(models, z))
    clips = torch.cat(clips)
    return [grade(c) for c in clips], clips


def table(name, rows, accuracy, graded):
    iou = sum(g["iou"] for g in graded) / len(graded)
    print(f"{name} (n = {len(rows)}, iou {iou:.3f})")
    for kind, share in accuracy.items():
        n = sum(kind in r for r in rows)
        low, high = wilson(round(share * n), n)
        print(f"  {kind:8} {share:.3f}   95 % [{low:.3f}, {high:.3f}]")


def evaluate(args):
    """The listening score of a checkpoint, by attribute."""
    models = load(args.ckpt, "cpu", torch.float32, args.lora, args.text_encoder)
    if not gradable(models.settings):
        raise BadInput(
            f"--ckpt {args.ckpt}: the grader reads the nano world's clips only, {SIZE}x{SIZE} and {FRAMES} frames"
        )
    given = {} if args.guidance is None else {"guidance": (args.guidance,)}
    words = parse_words(args.words)
    if args.prompts:
        if words:
            raise BadInput("--words with --prompts: give one of them")
        suites = {"prompts": read_prompts(args.prompts)[: args.n]}
    elif words:
        suites = {"new words": prompts(args.n or 40 * len(words), args.seed, words=words)}
    else:
        suites = {
            "seen triples": prompts(args.n or 200, args.seed),
            "unseen triples": prompts(args.n or 200, args.seed, unseen=True),
        }
    result, first = {}, None
    for name, rows in suites.items():
        asked = [{NEW_WORDS[r["word"]][0]: r[NEW_WORDS[r["word"]][0]]} for r in rows] if words else rows
        graded, clips = listen(models, rows, args.seed, **given)
        accuracy = shares(graded, asked)
        table(name, asked, accuracy, graded)
        result[name] = {"n": len(rows), "accuracy": accuracy, "iou": sum(g["iou"] for g in graded) / len(graded)}
        first = first or (rows, clips)
    if args.json:
        top = next(iter(result.values()))
        with atomic(args.json) as tmp:
            tmp.write_text(json.dumps({"n": top["n"], "accuracy": top["accuracy"], "suites": result}, indent=1) + "\n")
    if args.grid:
        write_grid(args.grid, list(first[1][:24]), [r["prompt"] for r in first[0]], columns=3)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("train", help="train nano/ from nothing (about an hour on two cores)")
    c.add_argument("--out", default="out/nano", help="where to write; an unfinished run there is continued")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--steps", type=int, default=14000, help="of the DiT")
    c.set_defaults(run=train)
    c = commands.add_parser("clips", help="write captioned clips")
    c.add_argument("--out", default="out/clips")
    c.add_argument("--n", type=int, default=100)
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--words", help=f"new words to use in every second caption, of {','.join(NEW_WORDS)}")
    c.set_defaults(run=write_clips)
    c = commands.add_parser("eval", help="grade how a checkpoint listens")
    c.add_argument("--ckpt", default="nano")
    c.add_argument("--lora", action="append", default=[])
    c.add_argument("--text_encoder")
    c.add_argument("--prompts", help="a JSONL of prompts and attributes, instead of the built-in held-out ones")
    c.add_argument("--words", help="ask for these new words instead")
    c.add_argument("--n", type=int, help="prompts of each suite (default: 200, 40 per new word, or the whole file)")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--guidance", type=float)
    c.add_argument("--json")
    c.add_argument("--grid", help="write a contact sheet PNG of the first 24")
    c.set_defaults(run=evaluate)
    args = p.parse_args()
    if getattr(args, "n", None) is not None and args.n < 1:
        raise BadInput(f"--n {args.n}: at least 1")
    args.run(args)


if __name__ == "__main__":
    cli(main)
