"""Videos from prompts, images, sound and driving videos, with the flags of all of that.

python sample.py --ckpt DIR --prompt "a red square moves left"
python sample.py --ckpt Wan2.2-TI2V-5B --prompt TEXT --image FILE --device cuda
python sample.py --ckpt Wan2.2-T2V-A14B --prompts FILE --lora adapter_model_high.safetensors \\
    --lora adapter_model_low.safetensors

With --device cpu --dtype fp32 and a seed the latents equal the official pipelines' to fp32 rounding.
"""

import argparse
import json
import os
import random
from pathlib import Path

import torch

import clips
import flow
import ops
import plan
from checkpoint import BadInput, cli, save
from conditions import CONDITIONING
from denoising import EasyCache, decode, denoise, draw_noise, encode_prompts, preview_colors, preview_writer
from media import open_image, write_grid, write_mp4
from models import DTYPES, Models, Request, Runtime, parse_size, pick_device, pick_dtype
from parallel import World


def load(
    ckpt_dir, device="cpu", dtype=torch.float32, lora=(), text_encoder=None, fp8=False, stream_blocks=0, world=None
):
    """A checkpoint folder (or "nano") ready for `generate`.

    lora: list of "FILE[:weight][:high|low|both]". text_encoder: a file to use instead of the folder's own encoder. fp8:
    the DiT's blocks in 8 bits. stream_blocks: how many of them stay on the host. world: the ranks that share a clip.
    Weights are read when first needed; a LoRA that cannot be read raises BadInput here.
    """
    runtime = Runtime(device, dtype, fp8, stream_blocks, world=world)
    return Models(ckpt_dir, runtime, lora, text_encoder)


def resolve(settings, ckpt, image=None, **overrides):
    """A Request: a checkpoint's recommended Settings with what is given (not None) over them, checked."""
    s = settings.with_overrides(**overrides)
    s.conditioning.check(ckpt, image)
    flow.solver(s.solver, s.steps, s.shift)
    image = None if image is None else open_image(image)
    return Request(s, image, s.conditioning.video_size(s.size, image))


@torch.no_grad()
def sample_latents(
    models, prompts, seeds, image=None, progress=True, step_cache=None, callback_on_step_end=None, **overrides
):
    """Latents (B,C,T',h,w) fp32 of B prompts, each from its own seed; a clip does not depend on what it is batched
    with, but for rounding. Arguments as in `generate` and `denoise`.
    """
    # prompts and conditions: the encoders are done before the DiT comes
    request = resolve(models.settings, models.dir, image, **overrides)
    s = request.settings
    embeds, negative = encode_prompts(models, s, prompts)
    conditions = models.encode_conditions(request.image, request.pixels, s.frames)
    x = torch.stack([draw_noise(request.shape, seed, models.device) for seed in seeds])
    return denoise(models, s, x, embeds, negative, conditions, progress, step_cache, callback_on_step_end)


def generate(
    models,
    prompt,
    image=None,
    size=None,
    frames=None,
    steps=None,
    shift=None,
    guidance=None,
    solver=None,
    seed=0,
    negative=None,
    progress=True,
    **inputs,
):
    """One video. Whatever is None comes from the checkpoint's recommended settings.

    models: from `load`. prompt: str. image: file or PIL image to start from (then `size` gives the area and the image
    the aspect). size: (width, height) px. frames: 4k+1. shift: of the sigma grid. guidance: scale, or (low-noise,
    high-noise) scales; 1 means without. solver: a name in flow.SOLVERS. Returns (video (3,T,H,W) in [-1,1],
    latents (C,T',h,w)), both fp32.

    inputs: what only S2V (audio, pose_video, infer_frames, num_clip, start_from_ref) or Animate (src_root_path,
    replace_flag, refert_num) take, as the script's flags; latents is then a list, of those of each clip.
    """
    overrides = dict(
        size=size, frames=frames, steps=steps, shift=shift, guidance=guidance, solver=solver, negative=negative
    )
    conditioning = models.settings.conditioning
    if conditioning.by_clips:
        s = models.settings.with_overrides(**overrides)
        return clips.generate(models, s, prompt, image, seed, progress, inputs)
    if inputs:
        raise BadInput(f"{next(iter(inputs))}: {models.dir} takes no such input")
    latents = sample_latents(models, [prompt], [seed], image, progress, **overrides)
    return decode(models, latents)[0], latents[0]


# ---- the script --------------------------------------------------------------------------------------------------
def read_prompts(file, flag="--prompts"):
    """The lines of a text file that are not empty."""
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{flag} {file}: {e}") from None
    if not prompts:
        raise BadInput(f"{flag} {file}: holds no prompts")
    return prompts


def parse_guidance(text):
    try:
        values = tuple(float(v) for v in text.split(","))
        assert len(values) in (1, 2)
        return values
    except (ValueError, AssertionError):
        raise BadInput(f"--guidance {text}: give one number, or LOW,HIGH") from None


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", default="nano", help="checkpoint folder (default: nano, the one in the repository)")
    add("--prompt", help="what to show (default, without --prompts: the checkpoint's)")
    add("--prompts", help="a text file, one prompt per line")
    add("--image", help="start from this image")
    add("--size", help="WxH px; with --image the area (default: the checkpoint's)")
    add("--frames", type=int, help="of the clip, 4k+1 (default: the checkpoint's)")
    add(
        "--steps",
        type=int,
        help="of the sigma grid; heun evaluates the model twice in each (default: the checkpoint's)",
    )
    add("--shift", type=float, help="of the sigma grid, above 1 towards noise (default: the checkpoint's)")
    add("--guidance", help="G or LOW,HIGH, by noise; 1 is without (default: the checkpoint's)")
    add("--solver", choices=list(flow.SOLVERS), help="of the sampling ODE (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="of the noise; -1: at random (default: 0)")
    add("--negative", help='negative prompt (default: the checkpoint\'s; "" is an empty one)')
    add("--lora", action="append", default=[], help="FILE[:weight][:high|low|both]; may be repeated")
    add("--text_encoder", help="an updated text encoder's file (default: the checkpoint's own)")
    add("--dtype", choices=list(DTYPES), help="of weights and products (default: bf16 on cuda, fp32 on cpu)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    for conditioning in CONDITIONING.values():
        if conditioning.flags:
            group = p.add_argument_group(conditioning.title)
            for name, how in conditioning.flags.items():
                group.add_argument(f"--{name}", **how)
    add = p.add_argument_group("speed and memory").add_argument
    add("--base_dtype", choices=("fp8",), help="hold the linears of the DiT's blocks in 8 bits (default: --dtype)")
    add(
        "--stream_blocks",
        type=int,
        default=0,
        help="keep N of the DiT's blocks in host memory, on the device only while they run (default: 0)",
    )
    add("--compile", action="store_true", help="torch.compile the DiT's blocks")
    add("--cuda_graphs", action="store_true", help="torch.compile the whole DiT and replay it as CUDA graphs")
    add(
        "--reuse",
        type=float,
        default=0.0,
        help="skip steps whose velocity is expected to change by less than this share, such as 0.1 (inexact; see "
        "diag.py reuse; default: 0, none)",
    )
    add(
        "--vae_tile",
        type=int,
        default=0,
        help="decode in windows of N latent pixels a side, for less memory; exact from about 13 (default: 0, whole)",
    )
    add = p.add_argument_group(
        "several GPUs, under torchrun (parallel/); ranks beyond those that share a clip take other prompts"
    ).add_argument
    add("--ulysses_size", type=int, default=1, help="ranks that share the tokens of a clip (default: 1)")
    add("--guidance_parallel", action="store_true", help="the two halves of guidance on different ranks")
    add = p.add_argument_group("results").add_argument
    add("--out", default="out/sample.mp4", help="the video; of several prompts NAME_000.mp4 ... (default: %(default)s)")
    add("--save_latents", help="also write the final latents to this .safetensors file")
    add("--grid", help="also write a contact sheet of all results to this .png file")
    add("--resume", action="store_true", help="go on with a video of several clips that was stopped")
    add(
        "--preview_every",
        type=int,
        default=0,
        help="every N steps write what the clip will be, roughly, to OUT's name with _preview.png (default: 0, never)",
    )
    return p.parse_args(argv)


def check_flags(args):
    """Refuse flags that are out of range or exclude each other."""
    if not -1 <= args.seed < 2**63:
        raise BadInput(f"--seed {args.seed}: from 0 to 2^63-1, or -1 for one at random")
    if not 0 <= args.reuse < 1:
        raise BadInput(f"--reuse {args.reuse}: from 0 to below 1")
    for flag in ("preview_every", "vae_tile", "stream_blocks"):
        if getattr(args, flag) < 0:
            raise BadInput(f"--{flag} {getattr(args, flag)}: 0 or more")
    for flag, suffix in (("out", ".mp4"), ("save_latents", ".safetensors"), ("grid", ".png")):
        if getattr(args, flag) is not None:
            check_output(f"--{flag}", Path(getattr(args, flag)), suffix)


def check_compilation(args, device):
    if args.cuda_graphs and (args.compile or not device.startswith("cuda")):
        raise BadInput("--cuda_graphs: needs --device cuda, and does what --compile does as well; give one of them")
    if (args.compile or args.cuda_graphs) and (args.stream_blocks or args.ulysses_size > 1):
        raise BadInput(
            f"--stream_blocks {args.stream_blocks}, --ulysses_size {args.ulysses_size}: not with --compile or "
            "--cuda_graphs"
        )


def check_output(flag, path, suffix):
    """Refuse a path that cannot be written, before anything is computed for it."""
    parent = next((d for d in path.absolute().parents if d.exists()), Path("/"))
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{flag} {path}: a file is to be written there, and it is a folder or may not be written")
    if path.suffix != suffix:
        raise BadInput(f"{flag} {path}: should end in {suffix}")


def numbered(path, i, count):
    """PATH for one result, PATH_000 and so on for several."""
    path = Path(path)
    return path if count == 1 else path.with_stem(f"{path.stem}_{i:03d}")


def clip_inputs(args, conditioning):
    """{flag: value} of the flags that only some variants take. Raises BadInput for one that this one does not."""
    names = [name for c in CONDITIONING.values() for name in c.flags]
    inputs = {name: getattr(args, name) for name in names if getattr(args, name)}
    strange = [name for name in inputs if name not in conditioning.flags]
    if strange:
        raise BadInput(f"--{strange[0]} {inputs[strange[0]]}: {args.ckpt} takes no such input")
    return inputs


def sampling_overrides(args):
    """The flags that override a checkpoint's settings, as `resolve` takes them."""
    return dict(
        size=None if args.size is None else parse_size(args.size),
        frames=args.frames,
        steps=args.steps,
        shift=args.shift,
        guidance=None if args.guidance is None else parse_guidance(args.guidance),
        solver=args.solver,
        negative=args.negative,
    )


def main():
    args = arguments()
    check_flags(args)
    prompts = [args.prompt] if args.prompt is not None else []
    prompts += read_prompts(args.prompts) if args.prompts else []
    device = pick_device(args.device)
    check_compilation(args, device)
    with World(device, ulysses_size=args.ulysses_size, cfg_parallel=args.guidance_parallel) as world:
        run(args, prompts, world)


def run(args, prompts, world):
    # the models
    seed = args.seed if args.seed >= 0 else world.broadcast_from_rank0(lambda: random.randrange(2**31))
    dtype = pick_dtype(args.dtype, world.device)
    compile = "blocks" if args.compile else "graphs" if args.cuda_graphs else None
    runtime = Runtime(world.device, DTYPES[dtype], args.base_dtype == "fp8", args.stream_blocks, compile, world)
    models = Models(args.ckpt, runtime, args.lora, args.text_encoder)
    prompts = prompts or [models.settings.prompt]
    if len(prompts) < world.dp_size:
        raise BadInput(
            f"{len(prompts)} prompts for {world.dp_size} groups of ranks: fewer processes, or --ulysses_size and "
            "--guidance_parallel, which share a prompt"
        )

    # what is asked of them, and what that will need
    overrides = sampling_overrides(args)
    inputs = clip_inputs(args, models.settings.conditioning)
    if models.settings.conditioning.by_clips:
        s = models.settings.with_overrides(**overrides)
        clips.run(args, prompts, models, s, seed, inputs)
        return
    request = resolve(models.settings, models.dir, args.image, **overrides)
    s = request.settings
    used = {k: getattr(s, k) for k in ("variant", "size", "frames", "fps", "steps", "shift", "guidance", "solver")}
    used |= {"pixels": request.pixels, "negative": s.negative, "ckpt": str(args.ckpt), "seed": seed, "dtype": dtype}
    used |= {k: getattr(args, k) for k in ("image", "lora", "text_encoder")}
    inexact = {"base_dtype": "fp8" if models.fp8 else None, "reuse": args.reuse, "vae_tile": args.vae_tile}
    used |= {k: v for k, v in inexact.items() if v}
    print(json.dumps(used, ensure_ascii=False), ops.chosen(world.device), sep="\n")
    layout = plan.ParallelLayout.of(args, world.size, models.fp8)
    mode = models.guidance_mode(request.tokens) if s.guided else "none"
    need = plan.sampling(
        request,
        plan.builders(models),
        world.device,
        DTYPES[dtype],
        mode,
        layout=layout,
        tile=args.vae_tile,
        preview=args.preview_every > 0,
    )
    print(need)

    # latents of all prompts, so that the DiT comes and goes once
    mine = list(enumerate(prompts))[world.dp_rank :: world.dp_size]
    models.encode_prompts([*(p for _, p in mine), *([s.negative] if s.guided else [])])
    models.drop("text")
    colors = preview_colors(models) if args.preview_every and world.is_writer else None
    latents = []
    for i, prompt in mine:
        out, cache, callback = numbered(args.out, i, len(prompts)), EasyCache(args.reuse), None
        if colors is not None:
            callback = preview_writer(colors, out.with_name(f"{out.stem}_preview.png"), args.preview_every, prompt)
        z = sample_latents(
            models, [prompt], [seed], args.image, step_cache=cache, callback_on_step_end=callback, **overrides
        )
        latents.append(z)
        if args.reuse:
            print(f"{cache.computed} of {len(flow.solver(s.solver, s.steps, s.shift).timesteps)} steps computed")
        if args.save_latents and world.is_writer:
            save(numbered(args.save_latents, i, len(prompts)), {"latents": z[0]}, {"prompt": prompt})

    # pixels
    for stream in models.streams():
        print(stream.report())
    models.drop(*s.expert_names)
    shown = []
    for (i, prompt), z in zip(mine, latents):
        video = decode(models, z, args.vae_tile)[0].cpu()
        if args.vae_tile and not i and world.clip_group_size == 1:
            print(tile_report(models, z, video, args.vae_tile))
        if world.is_writer:
            out = numbered(args.out, i, len(prompts))
            write_mp4(out, video, s.fps, json.dumps({"prompt": prompt, **used}, ensure_ascii=False))
            print(out)
            shown.append(video[:, [0, video.shape[1] // 2, -1]])
    if args.grid and world.is_writer:
        sheet = numbered(args.grid, world.dp_rank, world.dp_size)
        write_grid(sheet, shown, [p for _, p in mine])
        print(sheet)
    print(need.compare(world.device))


def tile_report(models, latents, video, tile):
    """How a decode in tiles differs from a whole one: not at all, or by how much in the first frame."""
    overlap, exact = models.acquire("vae").tile_overlap(tile)
    off = "exact"
    if not exact:
        whole = decode(models, latents[:, :, :1])[0].cpu()
        off = f"blended; the first frame differs by at most {(whole - video[:, :1]).abs().max():.3f} of 2"
    return f"tiles of {tile} latent pixels overlap by {overlap} on each side: {off}"


if __name__ == "__main__":
    cli(main)
