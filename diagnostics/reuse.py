"""diag.py reuse: measure how many steps sample.py --reuse skips at several thresholds, and how far clips change."""

import math

import torch.nn.functional as F

from diagnostics.common import given_prompts, runtime, write_json
from nanowan.errors import BadInput
from nanowan.pipeline import Pipeline
from nanowan.step_cache import EasyCache
from sample import decode, sample_latents


def reuse(models, prompts, threshold, exact):
    """Sample the prompts with an EasyCache of this threshold, as sample.py --reuse does, and compare the clips with
    those sampled without reuse. models: a Pipeline. exact: [(latents, video)] of each prompt without reuse; prompt i
    has seed i.

    Returns {"threshold", "computed", "steps", "latent_error", "psnr"}. computed: how many of a clip's `steps` steps
    computed a velocity, as a mean over the prompts. latent_error: ||z' - z|| / ||z|| of the latents, as a mean over the
    prompts. psnr: in dB, from the mean squared error of all videos.
    """
    computed, error, square = 0, 0.0, 0.0
    for seed, (prompt, (z, video)) in enumerate(zip(prompts, exact)):
        cache = EasyCache(threshold)
        other = sample_latents(models, [prompt], [seed], progress=False, cache=cache)
        computed += cache.computed / len(prompts)
        error += ((other - z).norm() / z.norm()).item() / len(prompts)
        square += F.mse_loss(decode(models, other), video).item() / len(prompts)
    psnr = -10 * math.log10(max(square, 1e-12) / 4)  # pixels are in [-1,1]
    steps = models.settings.steps
    return {"threshold": threshold, "computed": computed, "steps": steps, "latent_error": error, "psnr": psnr}


def run(args):
    if wrong := [t for t in args.thresholds if not 0 <= t < 1]:
        raise BadInput(f"--thresholds {wrong[0]}: from 0 to below 1")
    prompts = given_prompts(args.prompts, 4)
    models = Pipeline(args.ckpt, runtime(args), args.lora, args.text_encoder)
    exact, rows = [], []
    for seed, prompt in enumerate(prompts):
        z = sample_latents(models, [prompt], [seed], progress=False)
        exact.append((z, decode(models, z)))
    for threshold in args.thresholds:
        row = reuse(models, prompts, threshold, exact)
        print(
            f"--reuse {threshold:g}: {row['computed']:.1f} of {row['steps']} steps computed, latents off by "
            f"{100 * row['latent_error']:.2f} %, video {row['psnr']:.1f} dB",
            flush=True,
        )
        rows.append(row)
    write_json(args.json, rows)
