"""Train the checkpoint in nano/ from scratch, on all clips but those of 20 combinations of colour, shape and motion."""

import nanowan.environment  # noqa: F401  # isort: skip

import io
import json
import math
import random
import struct
import time
from dataclasses import asdict, replace
from pathlib import Path
from string import ascii_lowercase

import sentencepiece
import torch
import torch.nn.functional as F

from flow import add_noise, sample_timesteps
from nano.grader import grade, shares
from nano.world import (
    BACKGROUNDS,
    COLORS,
    FPS,
    FRAMES,
    MOTIONS,
    NEW_WORDS,
    RADIUS,
    SHAPES,
    SIZE,
    VERBS,
    draw,
    every_clip,
    paths_of,
    render,
    sample_attributes,
    training_caption,
)
from nanowan.errors import BadInput
from nanowan.files import atomic, save_pickle
from nanowan.formats.header import save
from nanowan.formats.t5 import message
from nanowan.formats.vae import load_vae
from nanowan.settings import checkpoint_dir
from t5 import TextEncoder, Tokenizer
from vae import LATENT_STATS, VAE, channels_last
from wan import Wan, WanConfig

DIT = WanConfig("ti2v", dim=256, ffn_dim=384, num_heads=4, num_layers=4, in_dim=48, out_dim=48, text_dim=128)
SAMPLE = dict(size=[SIZE, SIZE], frames=FRAMES, fps=FPS, steps=12, shift=2.0, guidance=4.0, solver="euler", negative="")
# the values with which words were learned best on nano, as runs/listen.sh and runs/claims.sh measured
TRAIN_LORA = dict(steps=400, batch=16, lr=4e-3, shift=8.0)
TRAIN_TE = dict(steps=500, batch=32, lr=3e-4, keyword_lr=0.01, keyword_init="search", shift=3.0)
TRAIN_TE |= dict(caption_mode_probs="0,0,100", trim_prob=0.3)
TRAIN = dict(resolution=f"{SIZE}x{SIZE}", frames=FRAMES, t_distribution="uniform")
TRAIN |= dict(train_lora=TRAIN_LORA, train_te=TRAIN_TE)


def run_stage(out, name, steps, params, lr, loss_at, decay=0.4, ema=0.0):
    """Train `params` for one stage, with AdamW, gradient norm clipped to 1 and 100 steps of warm-up. Over the last
    fraction `decay` of the steps, the learning rate falls linearly towards zero. After the last step, each parameter is
    replaced by its exponential moving average with coefficient `ema`; in early steps, the coefficient is lower.
    loss_at: a function that takes a step's number and returns the loss; its random numbers depend on this number alone.
    So a killed run that continues from its last state (out/state_NAME.pt) gives the same result as an unbroken run.
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
    losses, began = [], time.monotonic()
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
            ms = 1000 * (time.monotonic() - began) / len(losses)
            print(f"{name} {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} {ms:.0f} ms/step", flush=True)
            losses, began = [], time.monotonic()
            now = {"step": step + 1, "average": average, "opt": opt.state_dict(), "params": [p.data for p in params]}
            save_pickle(state, now)
    for p, m in zip(params, average):
        p.data.copy_(m)


def vae_batch(rng, n, frames, size):
    """Return clips (n,3,frames,size,size) to train the VAE on, half of them in the nano world's colours, half in random
    colours. Each clip is a window of `size` px around the shape. rng: a random.Random.
    """
    shapes, colors, grounds, centers = [], [], [], []
    for _ in range(n):
        ground = rng.choice(list(BACKGROUNDS.values()))
        color = rng.choice(list(COLORS.values()))
        if rng.random() < 0.5:
            while math.dist(color := [rng.randrange(256) for _ in range(3)], ground) < 60:
                pass
        at = rng.randrange(FRAMES - frames + 1)
        path = rng.choice(paths_of(rng.choice(list(MOTIONS))))[at : at + frames]
        x, y = (min(max(int(c - size / 2) + rng.randint(-RADIUS, RADIUS), 0), SIZE - size) for c in path[frames // 2])
        shapes.append(rng.randrange(len(SHAPES)))
        colors.append(color)
        grounds.append(ground)
        centers.append([(cx - x, cy - y) for cx, cy in path])
    return render(torch.tensor(shapes), torch.tensor(colors), torch.tensor(grounds), torch.tensor(centers), size=size)


def train_vae(out, seed):
    """Train a VAE and return it: on images, then on 5-frame windows, then on full clips, and at last the decoder alone.
    The returned VAE has its latents scaled by fold_stats. out: folder for the states of run_stage.
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
    """Change the weights of the VAE's two 1x1x1 convolutions, in place, so that on `clips` each latent channel has the
    mean and standard deviation of that channel in the full-size VAE. The constants in vae.py then fit this VAE too.
    """
    z = torch.cat([torch.cat([m[:, :48] for m in vae.moment_chunks(c)], 2) for c in clips.split(16)])
    mean, std = (torch.tensor(s) for s in LATENT_STATS[48])
    scale = std / z.std((0, 2, 3, 4))
    shift = mean - scale * z.mean((0, 2, 3, 4))
    vae.conv1.weight[:48] *= scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:48] = vae.conv1.bias[:48] * scale + shift
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= vae.conv2.weight.flatten(1) @ shift


def captions_for_pieces():
    rng = random.Random(0)
    return [caption for caption in (training_caption(sample_attributes(rng), rng) for _ in range(4000)) if caption]


def train_tokenizer(file):
    """Write a sentencepiece model of the world's captions, with T5's special ids, to `file`. UMT5's model has a piece
    for most words; likewise, this model has a piece for each new word, although the base never reads these words. Every
    letter has a piece too, so that any other word can be tokenised as letters.
    """
    letters, model = [ascii_lowercase, " ".join(ascii_lowercase)], io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions_for_pieces() + letters * 40),
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


def with_letter_pairs(model, words):
    """Return a sentencepiece model (bytes) to which pieces have been added for any two letters at the beginning of a
    word. Without these pieces, a word that a user invents would be tokenised into single letters, which all other
    words use too. With the pairs, invented words get different pieces, as they do in UMT5's vocabulary of 256,384. A
    pair that would change how `words` are split is left out.
    """
    before = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = {before.id_to_piece(i): before.get_score(i) for i in range(before.get_piece_size())}
    pairs = ["\u2581" + a + b for a in ascii_lowercase for b in ascii_lowercase]

    def entry(pair):  # a ModelProto's field 1, with piece (1) and score (2); appended, it adds the pair
        score = 0.01 + sum(scores[part] for part in before.encode(pair[1:], out_type=str))  # above its parts' sum
        return message(1, message(1, pair.encode()) + b"\x15" + struct.pack("<f", score))

    pairs = [pair for pair in pairs if pair not in scores]
    while True:
        longer = model + b"".join(map(entry, pairs))
        after = sentencepiece.SentencePieceProcessor(model_proto=longer)
        changed = {p for w in words if before.encode(w) != after.encode(w) for p in after.encode(w, out_type=str)}
        if not changed & set(pairs):
            return longer
        pairs = [pair for pair in pairs if pair not in changed]


def train_dit(out, seed, vae, tokenizer, steps, config):
    """Train a DiT and a text encoder together, from scratch, on the latents of every_clip(), and return (DiT, encoder).
    steps: number of training steps. config: the DiT's WanConfig.
    """
    torch.manual_seed(seed)
    model, encoder = Wan(config), TextEncoder(tokenizer.pieces.get_piece_size(), config.text_dim, 128, 256, 2, 2)
    for m in [*model.modules(), *encoder.modules()]:
        if isinstance(m, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
    torch.nn.init.normal_(encoder.token_embedding.weight, std=0.3)
    for m in (*model.blocks, model.head):
        torch.nn.init.normal_(m.modulation, std=config.dim**-0.5)
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
def introduce(encoder, spiece):
    """Set the embedding of each new word to the mean of the embeddings of the known words of its kind, plus noise. So
    the embedding tells whether the word is a colour, a shape or a verb, but not which one. Also add letter pairs to the
    tokenizer's file `spiece`, and random embeddings of these pairs to the encoder.
    """
    rows, ids = encoder.token_embedding.weight, encoder.tokenizer.ids
    kin = {"color": COLORS, "shape": SHAPES, "motion": [v for forms in VERBS.values() for v in forms if " " not in v]}
    g = torch.Generator().manual_seed(0)
    for word, (kind, _) in NEW_WORDS.items():
        known = rows[[ids(w)[0] for w in kin[kind]]]
        rows[ids(word)[0]] = known.mean(0) + 0.05 * torch.randn(rows.shape[1], generator=g)
    words = {word for caption in captions_for_pieces() for word in caption.split()}
    longer = with_letter_pairs(spiece.read_bytes(), words)
    with atomic(spiece) as tmp:
        tmp.write_bytes(longer)
    encoder.tokenizer = Tokenizer(spiece.read_bytes())
    more = encoder.tokenizer.pieces.get_piece_size() - len(rows)
    encoder.token_embedding.weight.data = torch.cat([rows, 0.3 * torch.randn(more, rows.shape[1], generator=g)])


def state_in(dtype, model):
    return {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}


def train(out, seed, steps, layers, vae_of):
    """Train a VAE, a tokenizer, a text encoder and a DiT, and write them to the folder `out` in the official layout of
    TI2V-5B. steps: training steps of the DiT. layers: number of blocks in the DiT. vae_of: a checkpoint whose VAE is
    used instead of a new one, or None. Raises BadInput if the run in `out` was begun with other flags.
    """
    out, dit = Path(out), replace(DIT, num_layers=layers)
    out.mkdir(parents=True, exist_ok=True)
    flags, begun_file = json.dumps({"seed": seed, "layers": layers, "vae": vae_of}), out / "begun.json"
    if not begun_file.exists():
        with atomic(begun_file) as tmp:
            tmp.write_text(flags)
    elif (before := begun_file.read_text()) != flags:
        raise BadInput(f"--out {out}: begun with {before}; choose another folder, or these flags again")
    vae = load_vae(checkpoint_dir(vae_of)) if vae_of else train_vae(out, seed)
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
    tokenizer = Tokenizer(spiece.read_bytes())
    model, encoder = train_dit(out, seed, vae, tokenizer, steps, dit)
    encoder.tokenizer = tokenizer
    introduce(encoder, spiece)
    save(out / "diffusion_pytorch_model.safetensors", state_in(torch.float16, model))
    save_pickle(out / "Wan2.2_VAE.pth", state_in(torch.float16, vae))
    save_pickle(out / "models_t5_umt5-xxl-enc-bf16.pth", state_in(torch.bfloat16, encoder))
    config = {k: v for k, v in asdict(dit).items() if k not in ("text_dim", "patch_size")}
    with atomic(out / "config.json") as tmp:
        tmp.write_text(
            json.dumps({"_class_name": "WanModel", **config, "sample": SAMPLE, "train": TRAIN}, indent=1) + "\n"
        )
    print(f"written to {out}; look at it with: python -m nano eval --ckpt {out}")
