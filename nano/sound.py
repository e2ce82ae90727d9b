"""The nano world with sound: shapes whose size follows the loudness of a sound, and a measure of how well it follows.

A clip is 64x64 px, 32 frames at 16 per second: one shape of the nano world moves through the middle, and its radius
grows with the loudness of a voice-like sound, from 6 px in silence to 15 px. The checkpoint to train on these clips has
S2V's layout. It is made of nano's components and a random, untrained wav2vec2.
"""

import json
import math
import random
import shutil
import wave
from dataclasses import asdict

import torch

from nano.pretrain import DIT
from nano.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZE, caption_of, sample_attributes, template
from nanowan.formats.header import load, save
from nanowan.settings import NANO
from nanowan.variants.s2v.model import STATES, S2VConfig, WanS2V
from nanowan.variants.s2v.wav2vec2 import SAMPLE_RATE, STRIDES, VIDEO_RATE, Wav2Vec2, Wav2Vec2Sizes
from nanowan.video import to_uint8, write_frames

FRAMES, RADII, REACH = 32, (6, 15), 12  # per clip; px when silent and loudest; px from the middle to a path's ends
SAMPLES = SAMPLE_RATE // VIDEO_RATE  # samples of sound per frame
SPEECH = dict(conv_dim=32, kernels=(10, 3, 3, 3, 3, 2, 2), strides=STRIDES, dim=64, ffn_dim=64, heads=4)
SAMPLE = dict(size=[SIZE, SIZE], frames=FRAMES, fps=VIDEO_RATE, steps=12, shift=2.0, guidance=1.5, solver="euler")
TRAIN = dict(resolution=f"{SIZE}x{SIZE}", frames=FRAMES, shift=1.5, t_distribution="uniform")


# ---- sounds and clips --------------------------------------------------------------------------------------------
def voice(seed):
    """Return two seconds of sound (N,) at 16 kHz: a buzz with a voice's pitch and harmonics, in syllables that are
    alternately loud and soft. The syllables are long enough for nano's VAE, which has one latent frame for four frames.
    """
    rng, g = random.Random(f"voice {seed}"), torch.Generator().manual_seed(seed)
    n = FRAMES * SAMPLES
    t = torch.arange(n, dtype=torch.float64) / SAMPLE_RATE
    level, at, is_loud = torch.zeros(n, dtype=torch.float64), -rng.uniform(0, 0.6), rng.random() < 0.5
    while at < t[-1]:
        length, peak = rng.uniform(0.6, 1), rng.uniform(0.7, 1) if is_loud else rng.uniform(0, 0.3)
        inside = (t >= at) & (t < at + length)
        level[inside] = peak * torch.sin(math.pi * (t[inside] - at) / length) ** 2
        at, is_loud = at + length, not is_loud
    pitch = rng.uniform(100, 250) * (1 + 0.1 * torch.sin(2 * math.pi * rng.uniform(0.5, 3) * t))
    phase = 2 * math.pi * pitch.cumsum(0) / SAMPLE_RATE
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 8)) + 0.2 * torch.randn(n, generator=g, dtype=torch.float64)
    return (0.4 * level * buzz).float()


def loudness(samples):
    """Return (F,) in [0,1]: for each video frame, the root mean square of the sound `samples` (N,) at 16 kHz, divided
    by the largest root mean square of all frames.
    """
    power = samples.unflatten(0, (-1, SAMPLES)).square().mean(1).sqrt()
    return power / power.max()


def paint(a, level):
    """Return a clip (3,F,64,64) in [-1,1] with the attributes `a` {"color", "shape", "motion", "background"}, in which
    the shape's radius follows the loudness `level` (F,).
    """
    frames = len(level)
    radius = RADII[0] + (RADII[1] - RADII[0]) * level
    way = torch.linspace(-REACH, REACH, frames)[:, None] * torch.tensor(MOTIONS[a["motion"]])
    cover = template(torch.full((frames,), SHAPES.index(a["shape"])), radius, SIZE / 2 + way[:, None])[:, 0]
    color, ground = (
        torch.tensor(c).view(3, 1, 1, 1) / 127.5 - 1 for c in (COLORS[a["color"]], BACKGROUNDS[a["background"]])
    )
    return ground + (color - ground) * cover


def example(seed):
    """Return (attributes, sound (N,), clip (3,F,64,64)), drawn at random from a seed."""
    a, sound = sample_attributes(random.Random(f"clip {seed}")), voice(seed)
    return a, sound, paint(a, loudness(sound))


def write_wav(path, samples):
    """Write a sound (N,) in [-1,1] at 16 kHz to a WAV file as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).round().to(torch.int16).numpy().tobytes())


def write_clips(folder, seeds):
    """Write a clip of each seed into a folder: SEED.mp4 with its sound, and SEED.txt with its caption. Clips that exist
    are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        file, sound_file = folder / f"{seed:04d}.mp4", folder / "sound.tmp"
        if not file.exists():
            a, sound, clip = example(seed)
            file.with_suffix(".txt").write_text(caption_of(a, random.Random(seed)) + "\n")
            write_wav(sound_file, sound)
            write_frames(file, [to_uint8(clip)], VIDEO_RATE, sound=sound_file)
            sound_file.unlink()


# ---- measures ----------------------------------------------------------------------------------------------------
def pulse(clip):
    """Return (T,) in px, the size of the shape in each frame of a clip (3,T,H,W): the radius of a circle with the area
    of the pixels that differ from the background. A difference below a quarter of the shape's contrast does not count.
    The background is the colour of the border.
    """
    x = clip.float()
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).flatten(1)
    distance = (x - border.median(1).values.view(3, 1, 1, 1)).norm(dim=0)  # (T,H,W)
    cover = distance / distance.flatten().quantile(0.98).clamp(min=0.1)
    return ((cover - 0.25) * 2).clamp(0, 1).sum((1, 2)).div(math.pi).sqrt()


def correlation(a, b):
    """Return Pearson's correlation of two curves (T,), or 0 if one of them is flat."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-6))


# ---- a checkpoint ------------------------------------------------------------------------------------------------
@torch.no_grad()
def write_checkpoint(folder, seed):
    """Write a checkpoint in S2V's layout to a folder. The VAE, the text encoder and the DiT's blocks are nano's, so the
    latents are those of VAE 2.2, with 48 channels. The DiT's modules for sound are new, and add nothing to the tokens
    of the noisy latents until they are trained. The wav2vec2 is random, with the structure and the 24 layers of the
    released wav2vec2. seed: random seed of the new modules.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    sizes = asdict(DIT) | dict(model_type="s2v", cond_dim=DIT.in_dim, audio_dim=SPEECH["dim"])
    model = WanS2V(S2VConfig(**sizes, audio_inject_layers=(*range(DIT.num_layers),)))
    model.load_state_dict(load(NANO / "diffusion_pytorch_model.safetensors")[0], strict=False)
    outputs = [attention.o for attention in model.audio_injector.injector]
    for module in (model.trainable_cond_mask, model.cond_encoder, *outputs):
        for p in module.parameters():
            p.zero_()
    write_dit(folder, model)
    for file in NANO.iterdir():
        if file.name.startswith(("Wan", "models")):
            shutil.copy(file, folder)
    shutil.copytree(NANO / "google", folder / "google", dirs_exist_ok=True)

    speech = folder / "wav2vec2-large-xlsr-53-english"
    speech.mkdir(exist_ok=True)
    torch.manual_seed(0)
    encoder = Wav2Vec2(Wav2Vec2Sizes(**SPEECH, layers=STATES - 1, pos_groups=4, pos_kernel=16))
    for p in (encoder.encoder.pos_conv_embed.conv.weight_v, encoder.encoder.pos_conv_embed.conv.bias):
        p.normal_(std=0.1)
    encoder.encoder.pos_conv_embed.conv.weight_g.fill_(1)
    config = dict(model_type="wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    (speech / "config.json").write_text(json.dumps(config | {"num_attention_heads": SPEECH["heads"]}))
    save(speech / "model.safetensors", encoder.state_dict())


def write_dit(folder, model):
    vae = dict(z_dim=DIT.in_dim, stride=[4, 16, 16], negative="")
    config = {k: v for k, v in asdict(model.config).items() if k not in ("text_dim", "patch_size")}
    config = {"_class_name": "WanModel_S2V", **config, "sample": SAMPLE | vae, "train": TRAIN}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save(folder / "diffusion_pytorch_model.safetensors", {k: v.contiguous() for k, v in model.state_dict().items()})
