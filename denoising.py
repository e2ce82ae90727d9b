"""The loop from noise to latents: the expert for each time, guidance, the step cache, the solver; and the decode."""

import math

import torch
from tqdm import tqdm

import flow
from checkpoint import BadInput
from media import latent_preview, latent_to_rgb, write_grid
from models import activation_bytes


class GuidedModel:
    """One expert on B clips of so many tokens under classifier-free guidance (Ho and Salimans, 2022).

    embeds, negative: (embeddings (B,S,D), lens (B,)); negative is None where no step is guided. What a prompt's
    attention needs (Wan.embed_text) is computed here, once.
    """

    def __init__(self, models, expert, tokens, embeds, negative, conditions):
        batch = len(embeds[1])
        local_tokens = tokens // models.world.sp_size
        self.model = models.acquire(expert, activation_bytes(models.config(expert).dim, local_tokens, batch))
        self.mode = models.guidance_mode(tokens, batch)
        self.world, self.conditions = models.world, conditions
        self.copies_output = models.runtime.compile == "graphs"  # a graph's next replay overwrites what it gave
        inputs = conditions.inputs
        uncond_inputs = inputs if conditions.uncond_inputs is None else conditions.uncond_inputs
        self.cond, self.uncond, self.both = self._embed(embeds, inputs), None, None
        if negative is not None and self.mode == "batched":
            pairs = [torch.cat([a, b]) for a, b in zip(embeds, negative)]
            self.both = self._embed(pairs, {k: torch.cat([v, uncond_inputs[k]]) for k, v in inputs.items()})
        elif negative is not None:
            self.uncond = self._embed(negative, uncond_inputs)

    def _embed(self, embeds, inputs):
        """What does not change from step to step: the prepared text, and a variant's prepared inputs."""
        context, lens = embeds
        text = self.model.embed_text(context[:, : lens.max()], lens, cache=True)
        return text, self.model.prepare_inputs(**inputs)

    def _forward(self, x, times, half):
        text, inputs = half
        v = self.model(x, times, text, **inputs)
        return v.clone() if self.copies_output else v

    def velocity(self, x, t, scale):
        """Velocity (B,C,T',h,w) of latents x (B,C,T',h,w) at time t in 0..1000: uncond + scale (cond - uncond)."""
        x, times = self.conditions.model_inputs(x, t)
        if scale == 1:
            return self._forward(x, times, self.cond)
        if self.mode == "parallel":
            half = self.uncond if self.world.cfg_rank else self.cond
            cond, uncond = self.world.exchange_cfg(self._forward(x, times, half))
        elif self.mode == "batched":
            cond, uncond = self._forward(torch.cat([x, x]), torch.cat([times, times]), self.both).chunk(2)
        else:
            cond = self._forward(x, times, self.cond)
            uncond = self._forward(x, times, self.uncond)
        return uncond + scale * (cond - uncond)


class EasyCache:
    """Steps taken without the model (Zhou et al., "Less is Enough", 2025): velocity minus latent changes slowly, so the
    last one computed serves again while the change expected since then stays below `threshold` of the velocity.
    Inexact; `diag.py reuse` measures by how much. threshold 0: never. computed: model evaluations so far.
    """

    def __init__(self, threshold=0.0):
        self.threshold, self.computed = threshold, 0
        self.reset()

    def reset(self):
        """Forget what was computed: another expert is next."""
        self.v = self.rate = None

    def predict(self, x):
        """The velocity at x, or None where it is to be computed."""
        if not self.threshold or self.rate is None:
            return None
        self.error += (self.rate * (x - self.seen).norm() / self.v.norm()).item()
        self.seen = x
        return x + self.offset if self.error < self.threshold else None

    def update(self, x, v):
        """The velocity v was computed at x."""
        if self.v is not None:
            self.rate = (v - self.v).norm() / (x - self.x).norm()
        self.computed, self.x, self.seen, self.v, self.offset, self.error = self.computed + 1, x, x, v, v - x, 0.0


@torch.no_grad()
def denoise(models, s, x, embeds, negative, conditions, progress=True, step_cache=None, callback_on_step_end=None):
    """From noise x (B,C,T',h,w) to latents of the same shape, fp32.

    s: the Settings in force. embeds, negative: as GuidedModel takes them. conditions: of conditions/. step_cache: an
    EasyCache. callback_on_step_end(i, x0) sees the estimate of the clean latents after every model evaluation. Raises
    BadInput where the result is not finite.
    """
    solver, cache = flow.solver(s.solver, s.steps, s.shift), step_cache or EasyCache()
    timesteps, tokens = solver.timesteps.tolist(), math.prod(x.shape[2:]) // 4
    x = conditions.put_known(x)
    expert = guided = None
    for i, t in enumerate(tqdm(timesteps, disable=not progress, unit="step")):
        # the expert for this time
        needed_expert, scale = s.expert_at(t)
        if needed_expert != expert:
            guided = None  # the other expert, and its keys and values, go before this one comes
            expert = needed_expert
            guided = GuidedModel(models, expert, tokens, embeds, negative, conditions)
            cache.reset()

        # its velocity, or what the step cache expects of it
        v = cache.predict(x) if i < len(timesteps) - 1 else None
        if v is None:
            v = guided.velocity(x, t, scale)
            cache.update(x, v)
        if callback_on_step_end:
            callback_on_step_end(i, conditions.put_known(x - float(solver.sigma) * v))

        # one step towards the clip
        x = conditions.put_known(solver.step(v, x))
    if not x.isfinite().all():
        raise BadInput(
            f"{models.dir}: the latents are not finite; with these settings, or this dtype, the model overflows"
        )
    return x


def encode_prompts(models, s, prompts):
    """What `denoise` is given of prompts: their (embeddings (B,S,D), lens (B,)), and those of the negative prompt, or
    None where no step is guided.
    """
    embeds, lens = models.encode_prompts([*prompts, *([s.negative] if s.guided else [])])
    B = len(prompts)
    negative = (embeds[B:].expand(B, -1, -1), lens[B:].expand(B)) if s.guided else None
    return (embeds[:B], lens[:B]), negative


def draw_noise(shape, seed, device):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def decode(models, latents, tile=0):
    """Latents (B,C,T',h,w) -> videos (B,3,T,H,W) in [-1,1]; tile as in VAE.decode. Ranks that share a clip share it."""
    _, sh, sw = models.settings.stride
    vae, split = models.acquire_vae((latents.shape[4] * sw, latents.shape[3] * sh)), models.world.split_tiles
    if split and not tile:
        tile = smallest_tile(latents.shape[3:], vae.decoder.receptive_radius(), split[1])
    return vae.decode(latents, tile, split)


def smallest_tile(size, least, ranks):
    """The side, `least` or more, of square tiles that cover latents of `size` (h,w), at most one for each rank."""
    h, w = size
    side = least
    while math.ceil(h / side) * math.ceil(w / side) > ranks and side < max(h, w):
        side += 1
    return side


def preview_colors(models):
    """What a preview_writer draws with (latent_to_rgb); the VAE, which it is from, leaves a GPU to the DiT."""
    colors = latent_to_rgb(models.acquire("vae"))
    if models.runtime.cuda:
        models.evict("vae")
    return colors


def preview_writer(colors, path, every, label):
    """A callback for denoise that writes a small picture of the clip to come, to `path`, every so many steps."""

    def write(step, x0):
        if (step + 1) % every == 0:
            video = latent_preview(x0[0].cpu(), colors)
            write_grid(path, [video], [f"step {step + 1}: {label}"], shown=min(5, video.shape[1]))

    return write
