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
import time
import zlib
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import BadInput, atomic, cli, save
from vae import LATENT_STATS, VAE, channels_last

# ---- the world ---------------------------------------------------------------------------------------------------
SIZE, FRAMES, FPS, RADIUS, STEP = 64, 9, 8, 13, 4  # px, frames, frames/s, px, px per frame
COLORS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 240), "yellow": (240, 225, 40),
          "purple": (160, 60, 210), "cyan": (50, 215, 225), "white": (248, 248, 248)}
UNDRAWN = {"orange": (245, 135, 30)}  # known to the grader and to `clips`, never seen by the base DiT
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS = {"dark": (20, 20, 24), "grey": (128, 128, 128)}
ATTRIBUTES = ("color", "shape", "motion")
VERBS = {"left": ("moves left", "slides left", "drifts to the left"), "right": ("moves right", "slides right", "drifts to the right"),
         "up": ("moves up", "rises", "climbs"), "down": ("moves down", "falls", "drops"),
         "still": ("stays still", "rests", "does not move")}
TEMPLATES = ("a {color} {shape} {verb}", "the {color} {shape} {verb}", "{background} background, a {color} {shape} {verb}",
             "a {color} {shape} {verb} on a {background} background", "a {shape} that is {color} {verb}",
             "there is a {color} {shape} and it {verb}")
# Words the base has never read, and what they mean; `clips --words` writes them, `eval --words` asks for them.
NEW_WORDS = {"crimson": ("color", "red"), "azure": ("color", "blue"), "box": ("shape", "square"), "orb": ("shape", "circle"),
             "sinks": ("motion", "down"), "ascends": ("motion", "up"), "orange": ("color", "orange")}
TRIPLES = list(product(COLORS, SHAPES, MOTIONS))
UNSEEN = set(random.Random(0).sample(TRIPLES, 20))  # never trained; composition is graded on them apart


def template(shape, radius, center, size=SIZE):
    """Anti-aliased coverage in [0,1] of shapes. shape (B,) index into SHAPES, radius (B,), center (B,T,2) as x,y px -> (B,T,size,size)."""
    grid = torch.arange(size) + 0.5
    x = grid[None, None, None, :] - center[..., 0, None, None]
    y = grid[None, None, :, None] - center[..., 1, None, None]
    r = radius.view(-1, 1, 1, 1).float()
    box = lambda a, b: torch.maximum(x.abs() - a, y.abs() - b)
    distance = torch.stack([  # signed, in px, negative inside
        (x * x + y * y).sqrt() - r,
        box(0.89 * r, 0.89 * r),
        torch.maximum(y - 0.6 * r, x.abs() * 0.866 - y * 0.5 - 0.6 * r),
        torch.minimum(box(1.08 * r, 0.38 * r), box(0.38 * r, 1.08 * r))], 1)
    distance = distance[torch.arange(len(shape)), shape]
    return (0.5 - distance).clamp(0, 1)


def render(shape, color, background, center, size=SIZE):
    """Draw clips: shape (B,), color and background (B,3) in 0..255, center (B,T,2) px -> (B,3,T,size,size) in [-1,1]."""
    cover = template(shape, torch.full((len(shape),), float(RADIUS)), center, size)[:, None]
    color, background = (c.float().view(-1, 3, 1, 1, 1) / 127.5 - 1 for c in (color, background))
    return background + (color - background) * cover


def path(motion, rng):
    """Centres (9,2) of a motion through the middle of the frame, with a small jitter across it (both ways when still)."""
    dx, dy = MOTIONS[motion]
    jx, jy = (0 if dx else rng.choice((-4, 0, 4))), (0 if dy else rng.choice((-4, 0, 4)))
    return [(SIZE / 2 + jx + dx * STEP * (t - FRAMES // 2), SIZE / 2 + jy + dy * STEP * (t - FRAMES // 2)) for t in range(FRAMES)]


def draw(attributes, seed):
    """Clips (B,3,9,64,64) in [-1,1] of a list of {"color", "shape", "motion", "background"}; the seed decides the jitter."""
    rng, palette = random.Random(seed), COLORS | UNDRAWN
    return render(torch.tensor([SHAPES.index(a["shape"]) for a in attributes]),
                  torch.tensor([palette[a["color"]] for a in attributes]),
                  torch.tensor([BACKGROUNDS[a["background"]] for a in attributes]),
                  torch.tensor([path(a["motion"], rng) for a in attributes]))


def say(a, rng, words=(), form=None):
    """A caption of attributes `a`. `words` are new words to use wherever they fit."""
    value = {"color": a["color"], "shape": a["shape"], "verb": rng.choice(VERBS[a["motion"]]), "background": a["background"]}
    for word in words:
        kind, meaning = NEW_WORDS[word]
        if a[kind] == meaning:
            value["verb" if kind == "motion" else kind] = word
    return re.sub(r"\ba (?=[aeiou])", "an ", (form or rng.choice(TEMPLATES)).format(**value))


def held_out(caption):
    """One caption in ten, by its checksum, is kept out of training."""
    return zlib.crc32(caption.encode()) % 10 == 0


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
    """n held-out prompts with their attributes; `unseen`: from the triples never trained; `words`: each prompt has one of these."""
    rng, found = random.Random(f"prompts {seed} {unseen}"), []
    pool = [t for t in TRIPLES if (t in UNSEEN) == unseen]
    if words:
        pool = [t for t in product(COLORS | UNDRAWN, SHAPES, MOTIONS) if t not in UNSEEN]
    while len(found) < n:
        word = [words[len(found) % len(words)]] if words else []
        kind, meaning = NEW_WORDS[word[0]] if word else (None, None)
        fits = [t for t in pool if word and t[ATTRIBUTES.index(kind)] == meaning or not word]
        if word:  # the rest of the prompt is made of old words
            fits = [t for t in fits if t[0] not in UNDRAWN or kind == "color"]
        a = sample_attributes(rng, fits)
        caption = say(a, rng, word)
        if word or held_out(caption):
            found.append({"prompt": caption, **a, **({"word": word[0]} if word else {})})
    return found


# ---- the grader --------------------------------------------------------------------------------------------------
def nearest(rgb, palette):
    return min(palette, key=lambda name: sum((float(a) - b) ** 2 for a, b in zip(rgb, palette[name])))


def grade(clip):
    """What a clip (3,T,64,64) in [-1,1] shows, from its pixels alone: color, shape, motion, background, and iou, the overlap
    (0..1, soft, mean over frames) with the best-fitting shape template. All but background are None where nothing is drawn."""
    x = (clip.float() + 1) * 127.5
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).flatten(1)
    ground = border.median(1).values
    distance = (x - ground[:, None, None, None]).norm(dim=0)                        # (T,H,W)
    background = nearest(ground, BACKGROUNDS)
    core = distance > 0.75 * distance.flatten().quantile(0.98)
    if distance.flatten().quantile(0.98) < 25:
        return {"color": None, "shape": None, "motion": None, "background": background, "iou": 0.0}
    rgb = x[:, core].median(1).values
    axis = (rgb - ground)[:, None, None, None]
    mask = (((x - ground[:, None, None, None]) * axis).sum(0) / (axis * axis).sum()).clamp(0, 1)
    solid = (mask > 0.5).float()
    area = solid.flatten(1).sum(1).clamp(min=1)                                     # (T,)
    grid = torch.arange(clip.shape[-1]) + 0.5
    center = torch.stack([(solid * grid).flatten(1).sum(1), (solid * grid[:, None]).flatten(1).sum(1)], 1) / area[:, None]
    scores = []
    for i in range(len(SHAPES)):
        index, full = torch.full((len(area),), i), torch.full((len(area),), float(RADIUS))
        unit = template(index, full, center[:, None])[:, 0].flatten(1).sum(1)
        shape = template(index, full * (mask.flatten(1).sum(1) / unit).sqrt(), center[:, None])[:, 0]
        scores.append((torch.minimum(shape, mask).flatten(1).sum(1) / torch.maximum(shape, mask).flatten(1).sum(1)).mean().item())
    dx, dy = (center[-3:].mean(0) - center[:3].mean(0)).tolist()
    far = STEP * (len(area) - 3) / 2
    motion = "still" if max(abs(dx), abs(dy)) < far else \
        ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")
    return {"color": nearest(rgb, COLORS | UNDRAWN), "shape": SHAPES[scores.index(max(scores))], "motion": motion,
            "background": background, "iou": max(scores)}


def wilson(right, n):
    """95 % interval of a proportion (Wilson, 1927)."""
    if not n:
        return 0.0, 1.0
    z, p = 1.96, right / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)


def score(clips, wanted):
    """Grade clips (B,3,T,H,W) against a list of {"color", "shape", "motion"} (those given): (share right per attribute, graded)."""
    graded = [grade(c) for c in clips]
    accuracy = {}
    for kind in ATTRIBUTES:
        pairs = [(g[kind], w[kind]) for g, w in zip(graded, wanted) if kind in w]
        if pairs:
            accuracy[kind] = sum(a == b for a, b in pairs) / len(pairs)
    return accuracy, graded


# ---- training the checkpoint ---------------------------------------------------------------------------------------
def run_stage(out, name, steps, params, lr, loss_at, decay=0.4, ema=0.0):
    """One stage of training: AdamW, gradient norm clipped to 1, 100 steps of warm-up, linear decay over the last `decay` of the
    steps, and the parameters' moving average put in place at the end (`ema` per step). `loss_at(step)` draws by the step alone,
    so a killed run goes on from its last state (out/state_NAME.pt) as if it had not been killed."""
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
            print(f"{name} {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} {1000 * (time.time() - began) / len(losses):.0f} ms/step", flush=True)
            losses, began = [], time.time()
            with atomic(state) as tmp:
                torch.save({"step": step + 1, "average": average, "opt": opt.state_dict(), "params": [p.data for p in params]}, tmp)
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
        course = path(rng.choice(list(MOTIONS)), rng)[at:at + frames]
        x, y = (min(max(int(c - size / 2) + rng.randint(-RADIUS, RADIUS), 0), SIZE - size) for c in course[frames // 2])
        shapes.append(rng.randrange(len(SHAPES)))
        colors.append(color)
        grounds.append(ground)
        centers.append([(cx - x, cy - y) for cx, cy in course])
    return render(torch.tensor(shapes), torch.tensor(colors), torch.tensor(grounds), torch.tensor(centers), size=size)


def train_vae(out, seed):
    """Images, then 5-frame windows, then whole clips; then the decoder alone. Returns the VAE with its latent statistics folded in."""
    torch.manual_seed(seed)
    vae = channels_last(VAE(True, 8, 12, 48))
    with torch.no_grad():  # a posterior of standard deviation 0.05 to begin with: a wider one drowns the mean
        vae.conv1.weight[48:] = 0
        vae.conv1.bias[48:] = -6
    encoder = [*vae.encoder.parameters(), *vae.conv1.parameters()]
    decoder = [*vae.decoder.parameters(), *vae.conv2.parameters()]

    def reconstruction(z, x):
        error = torch.cat(list(vae.frame_chunks(z)), 2) - x
        weight = 1 + 3 * ((x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.02)  # the shape and its edge
        return (weight * (error ** 2 + 0.1 * error.abs())).mean()

    def joint(stage, n, frames, size):
        def loss_at(step):
            rng = random.Random(f"{seed} {stage} {step}")
            x = vae_batch(rng, n, frames, size)
            mean, logvar = torch.cat(list(vae.moment_chunks(x)), 2).chunk(2, 1)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
            kl = (mean ** 2 + logvar.exp() - logvar - 1).mean() / 2
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

    run_stage(out, "vae_decoder", 1800, decoder, 2e-3, decoder_loss, ema=0.995)
    fold_stats(vae, vae_batch(random.Random(f"{seed} stats"), 256, 9, 64))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_stats(vae, clips):
    """Scale the latents, inside the two 1x1x1 convolutions, so that each channel has the mean and standard deviation that the
    full-size VAE's has: then the constants in vae.py serve this VAE too."""
    z = torch.cat([torch.cat([m[:, :48] for m in vae.moment_chunks(c)], 2) for c in clips.split(16)])
    mean, std = (torch.tensor(s) for s in LATENT_STATS[48])
    scale = std / z.std((0, 2, 3, 4))
    shift = mean - scale * z.mean((0, 2, 3, 4))
    vae.conv1.weight[:48] *= scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:48] = vae.conv1.bias[:48] * scale + shift
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= vae.conv2.weight.flatten(1) @ shift


def train(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(out, args.seed)
    rng = random.Random("reconstructions")
    attributes = [sample_attributes(rng) for _ in range(200)]
    clips = draw(attributes, 1)
    again = torch.cat([vae.decode(vae.encode(c)) for c in clips.split(20)])
    accuracy, graded = score(again, attributes)
    print("reconstructions", accuracy, "iou", sum(g["iou"] for g in graded) / 200,
          "psnr", -10 * math.log10(F.mse_loss(again, clips).item() / 4))
    torch.save(vae.state_dict(), out / "vae.pt")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("command")
    p.add_argument("--out", default="out/nano")
    p.add_argument("--seed", type=int, default=0)
    train(p.parse_args())


if __name__ == "__main__":
    cli(main)
