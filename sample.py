"""Sample videos from prompts, images, sound and driving videos, by a denoising loop with classifier-free guidance.

python sample.py --ckpt Wan2.2-TI2V-5B --prompt "a fox in the snow" --device cuda
python sample.py --ckpt Wan2.2-TI2V-5B --prompt TEXT --image FILE
python sample.py --ckpt Wan2.2-T2V-A14B --prompts FILE --lora adapter_model_high.safetensors \\
    --lora adapter_model_low.safetensors
python sample.py --prompt "a red square moves left"        on nano, the toy checkpoint in the repository

With --device cpu, --dtype fp32 and the same seed, the latents equal the official pipelines' up to fp32 rounding.
"""

import nanowan.environment  # noqa: F401  # isort: skip

import functools
import json
import math
import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

import flow
from kernels import ops
from nanowan import sampling
from nanowan.devices import DTYPES, activation_bytes, pick_device, pick_dtype, select_attention
from nanowan.errors import BadInput, cli
from nanowan.files import numbered
from nanowan.flags import Parser
from nanowan.formats.header import save
from nanowan.long_video import SegmentFiles, SegmentsInMemory, check_disk
from nanowan.memory.tiled_vae import decode_tiled, receptive_radius, smallest_tile, tile_report
from nanowan.parallel import World
from nanowan.pipeline import Pipeline, Runtime
from nanowan.prompts import Prompt
from nanowan.step_cache import EasyCache
from nanowan.variants.registry import PARTS, parts_of
from nanowan.video import open_image, write_grid, write_mp4

EXPERT_GROUP = 8  # number of clips that one expert of an A14B denoises before the other expert is loaded


def arguments(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the toy checkpoint in the repository)")
    add("--prompt", help="text prompt (default, without --prompts: an example that suits the checkpoint)")
    lines = "text file, one prompt per line, then kohya's options, if any: --w W --h H --f FRAMES --d SEED --s STEPS "
    add("--prompts", help=lines + "--l GUIDANCE --i IMAGE --n NEGATIVE; or JSONL with keys such as prompt, size, seed")
    add("--image", help="first frame of the video; S2V: picture of the speaker; Animate-2: picture of the character")
    add("--last_image", help="last frame of the video (TI2V-5B, I2V-A14B)")
    ckpt = "(default: as the checkpoint recommends)"
    add("--size", help=f"WIDTHxHEIGHT in px; with --image, it sets only the area, not the aspect ratio {ckpt}")
    add("--frames", type=int, help=f"number of frames, 4k+1; for Animate, the number per segment {ckpt}")
    add("--steps", type=int, help=f"number of sampling steps; heun runs the DiT twice in each {ckpt}")
    add("--shift", type=float, help=f"shift of the timesteps, towards noise if above 1 {ckpt}")
    add("--guidance", help=f"guidance scale, or LOW,HIGH for an A14B's low- and high-noise experts; 1: off {ckpt}")
    add("--solver", choices=list(flow.SOLVERS), help=f"ODE solver {ckpt}")
    add("--seed", type=sampling.seed_list, default=[0], help="seed, or several a,b,c; -1: a random one (default: 0)")
    add("--num_videos", type=int, default=1, help="videos per prompt and --seed, with SEED, SEED+1, ... (default: 1)")
    add("--negative", help=f'negative prompt; "" for an empty one {ckpt}')
    add("--lora", action="append", default=[], help="DiT or encoder LoRA, FILE[:weight][:high|low|both]; repeatable")
    encoder = "text encoder, FILE[:strength]: a full one, a delta or a LoRA; repeatable (default: the checkpoint's own)"
    add("--text_encoder", action="append", help=encoder)
    add("--dtype", choices=list(DTYPES), help="dtype of weights and matrix products (default: bf16 on cuda, else fp32)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    for conditioning in (parts_of(kind).conditioning for kind in PARTS):
        if conditioning.flags:
            group = p.add_argument_group(conditioning.title)
            for name, how in conditioning.flags.items():
                group.add_argument(f"--{name}", **how)
    sampling.add_flags(p)
    return p.parse_args(argv)


# ---- denoising ---------------------------------------------------------------------------------------------------
@dataclass
class Clip:
    """B clips that are being denoised. x: their latents. text, negative: (embeddings (B,S,D), lens (B,)) of the prompts
    and of the negative prompt; negative is None if no step is guided. on_step(i, x0): called at each step i with an
    estimate x0 of the clean latents.
    """

    x: torch.Tensor  # (B,C,T',h,w)
    text: tuple
    negative: tuple | None
    conditions: object
    solver: flow.Solver
    cache: EasyCache
    on_step: object = None
    progress: bool = True


class GuidedModel:
    """A DiT (in an A14B, one expert) with classifier-free guidance (Ho and Salimans, 2022). The keys and values of the
    prompts, and everything else that is the same at every step, are computed once, in __init__.
    """

    def __init__(self, pipe, expert, clip):
        batch, tokens = len(clip.x), math.prod(clip.x.shape[2:]) // 4
        config, part = pipe.config(expert), tokens // pipe.world.sp_size
        need = activation_bytes(config.dim, part, batch)
        need += batch * pipe.settings.parts.model.kept_bytes(config, part, pipe.runtime.dtype.itemsize)
        self.model = pipe.acquire(expert, need)
        self.mode, self.world, self.conditions = pipe.guidance_mode(tokens, batch), pipe.world, clip.conditions
        self.copies_output = pipe.runtime.compile == "graphs"  # the next replay of a CUDA graph overwrites its output
        inputs, differing = clip.conditions.inputs, clip.conditions.uncond_inputs
        self.cond, self.uncond, self.both = self._embed(clip.text, inputs), None, None
        if clip.negative is not None and self.mode == "batched":
            pairs = [torch.cat([a, b]) for a, b in zip(clip.text, clip.negative)]
            self.both = self._embed(pairs, {k: torch.cat([v, differing.get(k, v)]) for k, v in inputs.items()})
        elif clip.negative is not None:  # inputs that both predictions share are prepared once
            self.uncond = self._embed(clip.negative, self.cond[1] | differing)

    def _embed(self, text, inputs):
        context, lens = text
        text = self.model.embed_text(context[:, : lens.max()], lens, cache=True)
        return text, self.model.prepare_inputs(**inputs)

    def _forward(self, x, times, half):
        text, inputs = half
        v = self.model(x, times, text, **inputs)
        return v.clone() if self.copies_output else v

    def velocity(self, x, t, scale):
        """Return the velocity, uncond + scale (cond - uncond), at latents x (B,C,T',h,w) and timestep t in 0..1000."""
        x, times = self.conditions.model_inputs(x, t)
        if scale == 1:
            return self._forward(x, times, self.cond)
        if self.mode == "parallel":
            half = self.uncond if self.world.cfg_rank else self.cond
            cond, uncond = self.world.exchange_cfg(self._forward(x, times, half))
        elif self.mode == "batched":
            cond, uncond = self._forward(torch.cat([x, x]), torch.cat([times, times]), self.both).chunk(2)
        else:
            cond, uncond = self._forward(x, times, self.cond), self._forward(x, times, self.uncond)
        return uncond + scale * (cond - uncond)


@torch.no_grad()
def denoise(pipe, settings, clip, expert):
    """Do the Clip's remaining steps whose timesteps belong to `expert`. Raises BadInput if the result is not finite."""
    timesteps, cache = clip.solver.timesteps.tolist(), clip.cache
    steps = [i for i in range(clip.solver.i, len(timesteps)) if settings.expert_at(timesteps[i])[0] == expert]
    if not steps:
        return
    model, x = GuidedModel(pipe, expert, clip), clip.conditions.put_known(clip.x)
    cache.reset()
    for i in tqdm(steps, initial=steps[0], total=len(timesteps), disable=None if clip.progress else True, unit="step"):
        # the velocity, from the model or predicted by the step cache
        v = cache.predict(x) if i < len(timesteps) - 1 else None
        if v is None:
            v = model.velocity(x, timesteps[i], settings.expert_at(timesteps[i])[1])
            cache.update(x, v)
        if clip.on_step:
            clip.on_step(i, clip.conditions.put_known(x - float(clip.solver.sigma) * v))
        # one step of the solver
        x = clip.conditions.put_known(clip.solver.step(v, x))
    if not x.isfinite().all():
        raise BadInput(
            f"{pipe.dir}: the latents are not finite; with these settings, or this dtype, the model overflows"
        )
    clip.x = x


def encode_text(pipe, settings, prompts, encoder=None):
    """Return (text, negative), as in Clip, for a list of prompts and the negative prompt of `settings`."""
    embeddings, lens = pipe.encode_prompts([*prompts, *([settings.negative] if settings.guided else [])], encoder)
    B = len(prompts)
    negative = (embeddings[B:].expand(B, -1, -1), lens[B:].expand(B)) if settings.guided else None
    return (embeddings[:B], lens[:B]), negative


def new_clip(settings, x, text, conditions, cache=None, **more):
    """Return a Clip before its first step. x: noise; text: from encode_text; cache, more: further fields of Clip."""
    solver = flow.solver(settings.solver, settings.steps, settings.shift)
    return Clip(x, *text, conditions, solver, cache or EasyCache(), **more)


def sample_clip(pipe, settings, text, noise, conditions, **more):
    """Denoise noise (B,C,T',h,w) -> latents, fp32. text: from encode_text; more: further fields of Clip."""
    clip = new_clip(settings, noise, text, conditions, **more)
    for expert in settings.expert_names:
        denoise(pipe, settings, clip, expert)
    return clip.x


def decode(pipe, latents, tile=0):
    """Decode (B,C,T',h,w) to (B,3,T,H,W) in [-1,1]. tile: side in latent px; 0: full frame, or a tile per rank."""
    _, sh, sw = pipe.settings.stride
    vae, ranks = pipe.acquire_vae((latents.shape[4] * sw, latents.shape[3] * sh)), pipe.world.split_tiles
    if ranks and not tile:
        tile = smallest_tile(latents.shape[3:], receptive_radius(vae.decoder), ranks[1])
    return decode_tiled(vae, latents, tile, ranks) if tile else vae.decode(latents)


# ---- videos ------------------------------------------------------------------------------------------------------
def load(ckpt_dir, device="cpu", dtype=torch.float32, lora=(), text_encoder=None, **how):
    """Return a Pipeline for `generate`, from a checkpoint folder or "nano". Weights are read when first needed.

    lora: list of "FILE[:weight][:high|low|both]". text_encoder: "FILE[:strength]" or a list of these. how: other fields
    of nanowan.pipeline.Runtime, such as fp8 and stream_blocks. Raises BadInput if a folder or LoRA cannot be read.
    """
    return Pipeline(ckpt_dir, Runtime(device, dtype, **how), lora, text_encoder)


def open_video(pipe, settings, **inputs):
    """Return the Video to sample. inputs: named like the flags; images may be PIL images. Bad ones raise BadInput."""
    known = {"image", "last_image", *settings.conditioning.flags}
    if strange := sorted(inputs.keys() - known):
        raise BadInput(f"--{strange[0]} {inputs[strange[0]]}: {pipe.dir} takes no such input")
    settings.conditioning.check(pipe.dir, **inputs)
    opened = {k: open_image(v) for k, v in inputs.items() if k.endswith("image") and v is not None}
    return settings.conditioning.video(pipe, settings, **inputs | opened)


def sample_latents(pipe, prompts, seeds, image=None, progress=True, cache=None, on_step=None, **settings):
    """Sample B clips in one batch, each from its own seed -> latents (B,C,T',h,w) fp32. Apart from rounding, a clip
    does not depend on the others. prompts: list, or from encode_text. cache, on_step: as in Clip; rest: as in generate.
    """
    s = pipe.settings.with_overrides(**settings)
    text = encode_text(pipe, s, prompts) if isinstance(prompts, list) else prompts
    video = open_video(pipe, s, **({} if image is None else {"image": image}))
    noise = torch.stack([video.noise(0, seed) for seed in seeds])
    return sample_clip(pipe, s, text, noise, video.conditions(0), cache=cache, on_step=on_step, progress=progress)


def generate(pipe, prompt, image=None, seed=0, progress=True, **settings):
    """Sample one video -> (video (3,T,H,W) in [-1,1], latents (C,T',h,w)), both fp32.

    pipe: from `load`. image: file or PIL image to start from; its aspect ratio is kept, at the area of `size`.
    settings (default: what the checkpoint recommends): size (width, height) px, frames 4k+1, steps, shift of the sigma
    grid, guidance (a scale, or scales for low and high noise; 1: off), solver from flow.SOLVERS, negative prompt; and
    the inputs, named like sample.py's flags, of S2V (audio, pose_video, infer_frames, num_clip, start_from_ref,
    sync_sound), Animate (src_root_path, replace_flag, refert_num) or Animate-2 (video, prompt_ref). For these three
    variants, latents is a list with one entry per segment.
    """
    overrides = {k: settings.pop(k) for k in list(settings) if k in pipe.settings.__dataclass_fields__}
    s = pipe.settings.with_overrides(**overrides)
    inputs = settings | ({} if image is None else {"image": image})
    video, segments = open_video(pipe, s, **inputs), SegmentsInMemory()
    text = encode_text(pipe, s, [prompt])
    sample_segments(pipe, s, video, text, seed, segments, progress=progress)
    latents = segments.latents if s.conditioning.by_segments else segments.latents[0]
    return torch.cat(segments.frames, 1), latents


def sample_segments(pipe, settings, video, text, seed, segments, reuse=0.0, **more):
    """Sample the segments of a Video that are not done yet, and save them in `segments`: a SegmentsInMemory, filled on
    every rank, or a SegmentFiles, written by one rank. reuse: the value of --reuse; more: further fields of the Clips.
    """
    done = segments.count()
    if done:
        video.restore(segments.state(done - 1))
    for r in range(done, video.count):
        if video.count > 1:
            print(f"segment {r + 1} of {video.count}", flush=True)
        noise, cache = video.noise(r, seed)[None], EasyCache(reuse)
        latents = sample_clip(pipe, settings, text, noise, video.conditions(r), cache=cache, **more)
        frames = video.decode(r, latents, lambda z: decode(pipe, z))
        if pipe.world.is_writer or segments.on_every_rank:
            segments.save(r, video.output(latents[0]), frames, video.state())
        latents = frames = None
        pipe.world.barrier()


# ---- the script --------------------------------------------------------------------------------------------------
def main():
    args = arguments()
    device = pick_device(args.device)
    sampling.check_flags(args, device)
    prompts = sampling.given_prompts(args)
    with World(device, ulysses_size=args.ulysses_size, cfg_parallel=args.guidance_parallel) as world:
        run(args, prompts, world)


def run(args, prompts, world):
    # the checkpoint, and the videos that are requested
    dtype = DTYPES[pick_dtype(args.dtype, world.device)]
    select_attention(args.attention, world.device, dtype)
    compile = "blocks" if args.compile else "graphs" if args.cuda_graphs else None
    runtime = Runtime(world.device, dtype, args.base_dtype == "fp8", args.stream_blocks, compile, world)
    pipe = Pipeline(args.ckpt, runtime, args.lora, args.text_encoder)
    random_seed = world.broadcast_from_rank0(lambda: random.randrange(2**31))
    seeds = [random_seed if seed < 0 else seed for seed in args.seed]
    seeds = [seed + i for seed in seeds for i in range(args.num_videos)]
    requests = sampling.requests_of(args, prompts or [Prompt(pipe.settings.prompt)], pipe.settings, seeds)
    keys = {r.out: r.key(args, pipe) for r in requests}
    if args.resume and (done := [r for r in requests if r.is_done(keys[r.out])]):
        print(f"{len(done)} of {len(requests)} videos are done already")
        requests = [r for r in requests if r not in done]
        if not requests:
            return
    by_segments = pipe.settings.conditioning.by_segments
    mine = sampling.share_of(requests, world)
    # videos made in segments may be large, so only the first of them is opened here
    videos = [open_video(pipe, mine[0].settings, **mine[0].inputs)]
    videos += [] if by_segments else [open_video(pipe, r.settings, **r.inputs) for r in mine[1:]]
    print(json.dumps(mine[0].record(args, pipe, videos[0]), ensure_ascii=False))
    print(ops.describe(world.device), f"{len(requests)} videos", sep="\n")
    need = sampling.plan_largest(args, pipe, mine, videos)

    # encode the texts of all videos; then the text encoder leaves memory
    texts = [encode_text(pipe, r.settings, [r.prompt]) for r in mine]
    pipe.drop("text")
    colors = sampling.preview_colors(pipe) if args.preview_every and world.is_writer else None

    def comment(r, video):
        return json.dumps(r.record(args, pipe, video) | {"key": keys[r.out]}, ensure_ascii=False)

    # videos made in segments are sampled one after another
    for i, (r, text) in enumerate(zip(mine, texts) if by_segments else ()):
        video = videos[0] if not i else open_video(pipe, r.settings, **r.inputs)
        segments = SegmentFiles.open(r.out, keys[r.out], args.resume, world)
        check_disk(r.out, video, segments.count())
        sample_segments(
            pipe, r.settings, video, text, r.seed, segments, args.reuse, on_step=r.previewer(colors, args.preview_every)
        )
        if world.is_writer:
            segments.write_video(video, comment(r, video), r.latents)
            print(r.out, flush=True)

    # single clips, each written once it is done; an A14B's expert denoises several before the other expert is loaded
    shown, group_size = [], EXPERT_GROUP if pipe.settings.is_moe else 1
    for first in range(0, 0 if by_segments else len(mine), group_size):
        group = []
        for r, video, text in list(zip(mine, videos, texts))[first : first + group_size]:
            x = video.noise(0, r.seed)[None]
            clip = new_clip(
                r.settings,
                x,
                text,
                video.conditions(0),
                EasyCache(args.reuse),
                on_step=r.previewer(colors, args.preview_every),
            )
            group.append((clip, r, video))
        for expert in pipe.settings.expert_names:
            for clip, r, video in group:
                denoise(pipe, r.settings, clip, expert)
                if expert != pipe.settings.expert_names[-1]:
                    continue
                if r is mine[-1]:  # the DiT is not needed any more
                    for stream in pipe.streams():
                        print(stream.report())
                    pipe.drop(*pipe.settings.expert_names)
                frames = decode(pipe, clip.x, args.vae_tile)[0].cpu()
                if args.reuse:
                    print(f"{clip.cache.computed} of {len(clip.solver.timesteps)} steps computed")
                if args.vae_tile and not shown and world.clip_group_size == 1:
                    whole = functools.partial(decode, pipe, clip.x[:, :, :1])
                    print(tile_report(pipe.acquire("vae").decoder, args.vae_tile, frames, whole))
                if world.is_writer:
                    write_mp4(r.out, frames, video.fps, comment(r, video))
                    if r.latents:
                        save(r.latents, {"latents": clip.x[0]}, {"prompt": r.prompt})
                    print(r.out, flush=True)
                shown.append(frames[:, [0, frames.shape[1] // 2, -1]])
            pipe.drop(*([expert] if first + group_size >= len(mine) else []))
    if args.grid and world.is_writer and shown:
        sheet = numbered(args.grid, world.dp_rank, world.dp_size)
        write_grid(sheet, shown, [r.prompt for r in mine])
        print(sheet)
    print(need.compare(world.device))


if __name__ == "__main__":
    cli(main)
