"""`python -m benchmarks` on this CPU, fp32: the DiT, training steps, the encoders, sampling end to end, loading.

The function of a benchmark returns (contenders {name: function}, the FLOPs of one call or None). The contenders are
"ours" and the peer that "ours" is compared with: "diffusers", "transformers" or what the function's docstring names.
The FLOPs are None where they are not counted.
"""

import functools
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import lora
from benchmarks import tiny, tiny_animate, tiny_s2v
from benchmarks.common import add_peer_adapter, add_reference, interleaved, peak_memory, seconds_of, trainable
from flow import make_noisy_batch
from nanowan.cache import cache_latents
from nanowan.formats.dit import load_wan
from nanowan.long_video import SegmentFiles
from nanowan.training.preservation import with_base_targets
from nanowan.training.scan import scan
from nanowan.variants.s2v.model import WanS2V
from nanowan.video import write_mp4
from sample import encode_text, generate, load, open_video, sample_segments
from t5 import TextEncoder
from vae import VAE
from wan import Wan, WanConfig

GRID = (3, 20, 32)  # latent frames, height, width in the DiT's benchmarks: 480 tokens


def dit_flops(c, tokens, text, batch=1):
    """Return the FLOPs of a DiT's forward pass, without those that compute the text's keys and values. c: the
    WanConfig. tokens: number of tokens in a clip. text: number of tokens in a prompt.
    """
    linear = tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    return 2 * batch * (c.num_layers * (linear + 2 * tokens * (tokens + text) * c.dim) + tokens * c.dim * 8 * c.in_dim)


@functools.cache
def dit():
    """Return (our DiT of width 768, diffusers' DiT with the same weights, x, t, a 40-token prompt's embeddings, the
    same embeddings padded to 512 tokens).
    """
    model = tiny.randomize(Wan(WanConfig("ti2v", 768, 3072, 6, 6, 48, 48, text_dim=768)), 0)
    x, t, context = torch.randn(1, 48, *GRID), torch.tensor([500.0]), torch.randn(1, 40, 768)
    return model, tiny.diffusers_dit(model), x, t, context, F.pad(context, (0, 0, 0, 472))


def dit_forward():
    model, peer, x, t, context, padded = dit()
    flops = dit_flops(model.config, 480, 42)
    run = torch.no_grad()(lambda: model(x, t, context))
    return {"ours": run, "diffusers": torch.no_grad()(lambda: peer(x, t, padded, return_dict=False)[0])}, flops


def lora_step(blocks=range(6), checkpointing=False):
    """Make the contenders for a LoRA step: forward and backward pass with a translator (a LoRA of rank 16 on k and v of
    cross-attention). blocks: the blocks that our translator is in; the peer's translator is in all blocks.
    """
    model, peer, x, t, context, padded = dit.__wrapped__()
    lora.inject(model, rank=16, blocks=list(blocks))
    add_peer_adapter(peer)
    model.checkpointing = checkpointing
    if checkpointing:
        peer.enable_gradient_checkpointing()
    target = torch.randn_like(x)

    def step(run, parameters):
        def go():
            F.mse_loss(run(), target).backward()
            for p in parameters:
                p.grad = None

        return go

    return {
        "ours": step(lambda: model(x, t, context), trainable(model)),
        "diffusers": step(lambda: peer.train()(x, t, padded, return_dict=False)[0], trainable(peer)),
    }, None


def preserving_step():
    """Make the contenders for a LoRA step on four samples. In "ours", the targets of two samples are the base model's
    predictions, as with --preserve. "plain" has no such samples.
    """
    model, _, x, _, context, _ = dit.__wrapped__()
    lora.inject(model, rank=16)
    context, lens, t = context.repeat(4, 1, 1), torch.full((4,), 40), torch.rand(4)
    preserved = torch.tensor([True, False, True, False])
    batch = make_noisy_batch([{"latents": x[0]}] * 4, [""] * 4, t, torch.randn(4, *x.shape[1:]), None, preserved)

    def step(batch):
        def go():
            aimed = with_base_targets(batch, model, context, lens)
            aimed.loss(model, context, lens).backward()
            for p in trainable(model):
                p.grad = None

        return go

    return {"ours": step(batch), "plain": step(batch._replace(preserved=None))}, None


@functools.cache
def vae():
    model = tiny.vae_of(VAE("2.2", 80, 128))
    return model, tiny.diffusers_vae(model)


def vae_decode():
    model, peer = vae()
    z = torch.randn(1, 48, 3, 8, 8) * 0.5
    return {
        "ours": torch.no_grad()(lambda: model.decode(z)),
        "diffusers": torch.no_grad()(lambda: peer.decode(z).sample),
    }, None


def vae_encode():
    model, peer = vae()
    video = torch.rand(1, 3, 9, 128, 128) * 2 - 1
    return {
        "ours": torch.no_grad()(lambda: model.encode(video)),
        "diffusers": torch.no_grad()(lambda: peer.encode(video).latent_dist.mode()),
    }, None


def text_encoder():
    """Make the contenders for encoding four prompts of 20 tokens. The peer pads them to 512 tokens, as diffusers'
    pipelines do.
    """
    model = tiny.randomize(TextEncoder(1000, 512, 512, 1280, 8, 6), 2)
    peer, ids = tiny.transformers_t5(model), torch.randint(3, 1000, (4, 20))
    padded, mask = F.pad(ids, (0, 492)), F.pad(torch.ones_like(ids), (0, 492))
    lens = torch.full((4,), 20)
    return {
        "ours": torch.no_grad()(lambda: model(ids, lens)),
        "transformers": torch.no_grad()(lambda: peer(padded, attention_mask=mask).last_hidden_state),
    }, None


def sample_video():
    """Make the contenders for sampling with a small TI2V from prompt to pixels: ten guided UniPC steps, 9 frames of
    128x128. Loading the weights is not timed.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import T5TokenizerFast

    folder = Path(tempfile.mkdtemp())
    models = {
        "dit": tiny.randomize(Wan(WanConfig("ti2v", 512, 2048, 4, 6, 48, 48, text_dim=tiny.TEXT_DIM)), 0),
        "text": tiny.text_encoder(),
        "vae": tiny.vae_of(VAE("2.2", 16, 24)),
    }
    tiny.write_dit(folder, models["dit"], shards=1)
    torch.save(models["vae"].state_dict(), folder / "Wan2.2_VAE.pth")
    torch.save(models["text"].state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    spiece = folder / "google" / "umt5-xxl" / "spiece.model"
    spiece.parent.mkdir(parents=True)
    spiece.write_bytes(tiny.spiece())
    ours = load(folder)
    ours.acquire("text"), ours.acquire("dit"), ours.acquire("vae")
    pipe = WanPipeline(
        T5TokenizerFast(vocab_file=str(spiece), extra_ids=0),
        tiny.transformers_t5(models["text"]),
        tiny.diffusers_vae(models["vae"]),
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
        tiny.diffusers_dit(models["dit"]),
        expand_timesteps=True,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red square moves left"
    size = dict(height=128, width=128, num_frames=9, num_inference_steps=10, guidance_scale=5.0)

    def sample_ours():
        how = dict(size=(128, 128), frames=9, steps=10, shift=5.0, guidance=5.0, negative="")
        return generate(ours, prompt, progress=False, **how)

    def sample_peer():
        generator = torch.Generator().manual_seed(0)
        how = dict(output_type="pt", max_sequence_length=512, negative_prompt="")
        return pipe(prompt, generator=generator, **size, **how).frames

    return {"ours": sample_ours, "diffusers": sample_peer}, None


def speech_step():
    """Make the contenders for a denoising step of an S2V clip that continues another clip. Some inputs of the DiT are
    the same at every step: "ours" embeds them once, before the timed step, and "recomputed" embeds them within it.
    """
    config = replace(tiny_s2v.CONFIG, dim=768, ffn_dim=3072, num_heads=6, num_layers=6, audio_dim=1024)
    model, inputs = tiny_s2v.fill(WanS2V(config)), tiny_s2v.inputs(T=5, h=32, w=32, audio_dim=1024)
    x, t, context = inputs.pop("x"), inputs.pop("t"), inputs.pop("context")
    del inputs["context_lens"]
    with torch.no_grad():
        text, prepared = model.embed_text(context, cache=True), model.prepare_inputs(**inputs)
    return {
        "ours": torch.no_grad()(lambda: model(x, t, text, **prepared)),
        "recomputed": torch.no_grad()(lambda: model(x, t, context, **inputs)),
    }, None


def speech_clips():
    """Make the contenders for sampling S2V videos: one of ten clips ("ours") and one of two clips ("two clips"). The
    longer video takes more time, but no more memory.
    """
    folder = Path(tempfile.mkdtemp())
    pipe = load(tiny_s2v.checkpoint(folder / "s2v"))
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(10)[None])
    tiny_s2v.write_picture(folder / "picture.png", 64, 64)
    s = pipe.settings.with_overrides(size=(64, 64), steps=1, guidance=1.0)

    def clips(count):
        how = dict(audio=str(folder / "sound.wav"), infer_frames=16, num_clip=count)
        video = open_video(pipe, s, image=folder / "picture.png", **how)
        segments = SegmentFiles(folder / f"{count}.mp4", {}, resume=False)
        sample_segments(pipe, s, video, encode_text(pipe, s, ["a prompt"]), 0, segments, progress=False)

    return {"ours": lambda: clips(10), "two clips": lambda: clips(2)}, None


@torch.no_grad()
def animate_step():
    """Make the contenders for a denoising step, other than the first, of a small Animate of width 768. diffusers
    encodes the driving video's faces and the character's picture at every step, nanoWan only at the first.
    """
    model = tiny_animate.animate(layers=5, dim=768, heads=6)
    peer, frames, side = tiny_animate.diffusers_animate(model), 6, model.motion_encoder.side
    x, t, context = torch.randn(1, 36, frames, 16, 32), torch.tensor([500.0]), torch.randn(1, 40, tiny.TEXT_DIM)
    pose, face = torch.randn(1, 16, frames - 1, 16, 32), torch.rand(1, 3, 4 * frames - 7, side, side) * 2 - 1
    clip, padded = torch.randn(1, 5, tiny_animate.CLIP_SIZES["dim"]), F.pad(context, (0, 0, 0, 472))
    text, prepared = model.embed_text(context, cache=True), model.prepare_inputs(pose=pose, face=face, clip=clip)
    pictures = dict(encoder_hidden_states_image=clip, pose_hidden_states=pose, face_pixel_values=face)
    return {
        "ours": torch.no_grad()(lambda: model(x, t, text, **prepared)),
        "diffusers": torch.no_grad()(lambda: peer(x, t, padded, **pictures, return_dict=False)[0]),
    }, None


def loading():
    """Make the contenders for loading a DiT of 1 GB into memory, in fp32."""
    from diffusers import WanTransformer3DModel

    ours, theirs = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    model = tiny.randomize(Wan(WanConfig("ti2v", 1536, 6144, 12, 5, 48, 48, text_dim=512)), 0)
    tiny.write_dit(ours, model, shards=2)
    tiny.diffusers_dit(model).save_pretrained(theirs)
    del model
    return {
        "ours": lambda: load_wan(ours, dtype=torch.float32),
        "diffusers": lambda: WanTransformer3DModel.from_pretrained(theirs),
    }, None


def cache_clip():
    """Make the contenders for caching a 1080p clip of 120 frames, with a stub instead of the VAE. "ours" finds the
    times of all frames, and prepares 49 frames at 832x480 as the VAE's input. "plain" is a loop with PyAV and PIL:
    every frame becomes a picture, and the first 49 pictures are resized.
    """
    import av
    from PIL import Image

    folder, count = Path(tempfile.mkdtemp()), itertools.count()
    wave = torch.linspace(-1, 1, 2160).view(1, 1, 1, -1) + torch.linspace(0, 2, 1080).view(1, 1, -1, 1)
    frames = torch.cat([(6 * wave[..., 2 * t : 2 * t + 1920]).sin().expand(3, -1, -1, -1) for t in range(120)], 1)
    write_mp4(folder / "clip.mp4", frames, 24)
    (folder / "clip.txt").write_text("a caption")
    (folder / "vae.pth").touch()
    vae = torch.nn.Linear(1, 1)
    vae.encode = lambda video: video[:, :, :1, :1, :1].clone()

    def ours():
        cache = folder / f"cache{next(count)}"
        items, _ = scan(folder, 832 * 480, 32, 49, 24, "first", cache)
        cache_latents(items, cache, folder / "vae.pth", lambda: vae)

    def plain():
        with av.open(str(folder / "clip.mp4")) as container:
            pictures = [frame.to_image() for frame in container.decode(video=0)][:49]
        return torch.from_numpy(
            np.stack([p.resize((853, 480), Image.LANCZOS).crop((10, 0, 842, 480)) for p in pictures])
        )

    return {"ours": ours, "plain": plain}, None


WORKS = {
    "dit": (dit_forward, "DiT forward, width 768, 480 tokens"),
    "lora": (lora_step, "LoRA step, the same model"),
    "lora_upper": (
        functools.partial(lora_step, blocks=(4, 5)),
        "LoRA step, upper third of our blocks (the peer: all blocks)",
    ),
    "lora_ckpt": (functools.partial(lora_step, checkpointing=True), "LoRA step with checkpointing"),
    "lora_preserve": (preserving_step, "LoRA step of four, half of them preserved (the peer: none)"),
    "vae_decode": (vae_decode, "VAE 2.2 decode, 9 frames of 128x128"),
    "vae_encode": (vae_encode, "VAE 2.2 encode, the same"),
    "text": (text_encoder, "text encoder, four short prompts"),
    "sample": (sample_video, "guided 10-step sample, end to end"),
    "s2v": (speech_step, "S2V step, width 768, 1,280 tokens and those of the clip before"),
    "s2v_clips": (speech_clips, "S2V, ten clips (the peer: two)"),
    "animate": (animate_step, "Animate step, width 768, 768 tokens"),
    "load": (loading, "load a 1 GB DiT"),
    "cache": (cache_clip, "cache a 1080p clip of 120 frames, 49 of them at 832x480, without the VAE"),
}


def matmul_peak():
    """Return the FLOP/s of a large matrix product, the median of seven runs."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    return 2 * 1024 * 2048 * 2048 / seconds_of(lambda: a @ b, 7)


def on_cpu(names, rounds):
    """Measure the benchmarks with these names, which are keys of WORKS. Print a table row for each as soon as it is
    measured, and return all measurements. rounds: number of timed runs of each contender.
    """
    results, peak = {}, matmul_peak()
    columns = ("benchmark", "ours, ms", "ref, ms", "peer, ms", "ours / peer", "spread", "memory, ours / peer")
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for key in names:
        make, label = WORKS[key]
        contenders, flops = make()
        seconds = interleaved(add_reference(contenders), rounds)
        peer = list(seconds)[-1]
        ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds[peer]))
        mid = {name: median(s) for name, s in seconds.items()}
        memory = {name: peak_memory(key, name) for name in ("ours", peer)}
        result = {"work": label, "peer": peer, "seconds": seconds, "ratio": mid["ours"] / mid[peer]}
        results[key] = result | {"memory": memory, "flops": flops}
        rate = f" ({flops / mid['ours'] / 1e9:.0f} GFLOP/s)" if flops else ""
        cells = [
            f"{label}{rate}",
            *(f"{1000 * mid[name]:.0f}" for name in ("ours", "ref")),
            f"{1000 * mid[peer]:.0f} ({peer})",
            f"{result['ratio']:.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{memory['ours'] / 1e6:.0f} / {memory[peer] / 1e6:.0f} MB",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return {"matmul_peak": peak, "works": results}


@torch.no_grad()
def growth():
    """Measure how cost grows with tokens and frames. Returns {"dit": [(tokens, seconds, FLOPs)], "decode": [(frames,
    seconds)]}.
    """
    model, _, _, t, context, _ = dit()
    decoder, curves = vae()[0], {"dit": [], "decode": []}
    for frames in (1, 2, 4, 6, 8):
        run = functools.partial(model, torch.randn(1, 48, frames, *GRID[1:]), t, context)
        tokens = 160 * frames
        curves["dit"].append((tokens, seconds_of(run, 3), dit_flops(model.config, tokens, 42)))
    for frames in (1, 2, 3, 5):
        run = functools.partial(decoder.decode, torch.randn(1, 48, frames, 4, 4))
        curves["decode"].append((4 * frames - 3, seconds_of(run, 3)))
    return curves


def plot(path, curves):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    tokens, seconds, flops = zip(*curves["dit"])
    rate = flops[-1] / seconds[-1]
    left.plot(tokens, seconds, "o-", label="measured")
    left.plot(tokens, [f / rate for f in flops], "--", label=f"its FLOPs at {rate / 1e9:.0f} GFLOP/s")
    left.set(title="DiT forward", xlabel="tokens", ylabel="s")
    left.legend()
    right.plot(*zip(*curves["decode"]), "o-")
    right.set(title="VAE decode", xlabel="frames")
    plt.tight_layout()
    plt.savefig(path, dpi=110)
