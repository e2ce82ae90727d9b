"""Check sample.py's flags, and make a Request for each video that the flags and the prompts ask for."""

import argparse
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.attention_backends import CHOICES
from nanowan import memory_estimate
from nanowan.cache import digest
from nanowan.errors import BadInput, check_at_least
from nanowan.files import check_output, numbered
from nanowan.flags import parallel_layout
from nanowan.prompts import Prompt, read_prompts
from nanowan.settings import Settings, parse_guidance, parse_size
from nanowan.variants.registry import PARTS, parts_of
from nanowan.video import latent_to_rgb, preview_writer, read_comment

# flags left out of Request.key: where videos go, how they are computed, and what the fields of a Request hold
RESUME_MAY_CHANGE = (
    "config out prompt prompts seed num_videos grid save_latents resume preview_every device attention compile "
    "cuda_graphs stream_blocks ulysses_size guidance_parallel"
).split()
SMALL = 1 << 30  # bytes: files up to this size are identified by their contents, larger files by name, size and time


@dataclass(frozen=True)
class Request:
    """One requested video: its prompt and seed, the Settings to use, the variant's inputs {flag: value}, the file to
    write the video to, and the file for its latents or None.
    """

    prompt: str
    seed: int
    settings: Settings
    inputs: dict
    out: Path
    latents: Path | None = None

    def record(self, args, pipe, video):
        """Return what is known about the requested video, {name: value}, for the comment in the mp4. video: the Video
        (variants/conditioning.py) made for this Request.
        """
        s = self.settings
        used = {k: getattr(s, k) for k in ("variant", "frames", "steps", "shift", "guidance", "solver", "negative")}
        used |= {"prompt": self.prompt, "size": video.size, "fps": video.fps, "seed": self.seed, "ckpt": str(pipe.dir)}
        used |= {"dtype": str(pipe.runtime.dtype).removeprefix("torch.")} | ({"base_dtype": "fp8"} if pipe.fp8 else {})
        used |= {k: v for k in ("lora", "text_encoder", "reuse", "vae_tile") if (v := getattr(args, k))}
        used |= {"attention": "sage"} if args.attention == "sage" else {}  # the only choice that is not exact
        return used | {k: str(v) if isinstance(v, Path) else v for k, v in self.inputs.items()}

    def key(self, args, pipe):
        """Return a hash of all that decides the video: settings, inputs, files, and flags not in RESUME_MAY_CHANGE."""
        flags = {k: v for k, v in vars(args).items() if k not in RESUME_MAY_CHANGE}
        flags["exact attention"] = args.attention != "sage"
        files = [f for name in ("vae", *pipe.settings.expert_names) for f in pipe.files(name)]
        files += pipe.encoder_source().files()
        files += [
            f for folder in {pipe.dir, *(pipe.folder(n) for n in pipe.settings.expert_names)} for f in _configs(folder)
        ]
        files += [file for file, _, _ in pipe.loras]
        files += [v for v in self.inputs.values() if isinstance(v, str) and Path(v).exists()]
        parts = {"flags": flags, "prompt": self.prompt, "seed": self.seed, "settings": asdict(self.settings)}
        parts |= {"inputs": self.inputs, "files": sorted(_identity(Path(f)) for f in files)}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()

    def previewer(self, colors, every):
        """Return a video.preview_writer that writes a preview image into the video's folder every `every` steps; None
        if colors is None. colors: the result of preview_colors.
        """
        file = self.out.with_name(f"{self.out.stem}_preview.png")
        return None if colors is None else preview_writer(colors, file, every, self.prompt)

    def is_done(self, key):
        """Return whether the video file exists and was made by a Request with this key."""
        try:
            return self.out.is_file() and json.loads(read_comment(self.out)).get("key") == key
        except (ValueError, AttributeError):
            return False


def _configs(folder):
    return [
        f for pattern in ("*.json", "google/**/*", "tokenizer/*") for f in Path(folder).glob(pattern) if f.is_file()
    ]


def _identity(path):
    if path.is_dir():
        return " ".join(sorted(_identity(f) for f in path.iterdir() if f.is_file()))
    stat = path.stat()
    return digest(path) if stat.st_size <= SMALL else f"{path.name} {stat.st_size} {stat.st_mtime_ns}"


def add_flags(p):
    """Add to the Parser p the flags of sample.py that say how videos are computed and where they are written. The flags
    that say what the videos show are not among them.
    """
    add = p.add_argument_group("speed and memory").add_argument
    add("--base_dtype", choices=("fp8",), help="dtype of linear layers in the DiT's blocks (default: that of --dtype)")
    add(
        "--stream_blocks",
        type=int,
        default=0,
        help="number of DiT blocks that are kept in host memory until they run (default: 0)",
    )
    add(
        "--attention",
        choices=CHOICES,
        default="auto",
        help="self-attention kernel on a GPU; sage, from the package sageattention, computes in 8 bits, so it is not "
        "exact (default: auto, the fastest exact kernel)",
    )
    add("--compile", action="store_true", help="compile the DiT's blocks with torch.compile")
    add("--cuda_graphs", action="store_true", help="compile the DiT with torch.compile and run it as CUDA graphs")
    add(
        "--reuse",
        type=float,
        default=0.0,
        help="threshold, such as 0.1: a step skips the DiT if the estimated relative change of the velocity since the "
        "DiT last ran is below the threshold; skipping changes the video, see diag.py reuse (default: 0, no skipping)",
    )
    add(
        "--vae_tile",
        type=int,
        default=0,
        help="side, in latent pixels, of the square tiles in which the VAE decodes; small tiles save memory, and sides "
        "of about 13 or more give the same result as full frames (default: 0, full frames)",
    )
    add = p.add_argument_group(
        "several GPUs, under torchrun; ranks that share a clip form a group, and the groups divide the videos"
    ).add_argument
    add("--ulysses_size", type=int, default=1, help="number of ranks over which a clip's tokens are split (default: 1)")
    add(
        "--guidance_parallel",
        action="store_true",
        help="compute the predictions for the prompt and for the negative prompt on two ranks, one on each",
    )
    add = p.add_argument_group("results").add_argument
    add("--out", default="out/sample.mp4", help="video file; several videos: NAME_000.mp4 ... (default: %(default)s)")
    add("--save_latents", help="also write the final latents to this .safetensors file")
    add("--grid", help="also write a contact sheet of all results to this .png file")
    add(
        "--resume",
        action="store_true",
        help="skip videos and segments that an earlier call with the same flags finished",
    )
    add(
        "--preview_every",
        type=int,
        default=0,
        help="number of steps between previews; each is a contact sheet of the unfinished video, NAME_preview.png next "
        "to --out (default: 0, none)",
    )


def seed_list(text):
    """Parse --seed: "1,2,3" -> [1, 2, 3]."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: whole numbers, one or a,b,c") from None


def check_flags(args, device):
    """Raise BadInput for flags that are out of range or exclude each other. device: a name, such as "cuda:0"."""
    if not all(-1 <= seed < 2**63 for seed in args.seed):
        raise BadInput(f"--seed {','.join(map(str, args.seed))}: from 0 to 2^63-1, or -1 for one at random")
    if not 0 <= args.reuse < 1:
        raise BadInput(f"--reuse {args.reuse}: from 0 to below 1")
    check_at_least(1, num_videos=args.num_videos)
    check_at_least(0, preview_every=args.preview_every, vae_tile=args.vae_tile, stream_blocks=args.stream_blocks)
    for flag, suffix in (("out", ".mp4"), ("save_latents", ".safetensors"), ("grid", ".png")):
        if getattr(args, flag) is not None:
            check_output(f"--{flag}", Path(getattr(args, flag)), suffix)
    if args.cuda_graphs and (args.compile or not device.startswith("cuda")):
        raise BadInput("--cuda_graphs: needs --device cuda, and does what --compile does as well; give one of them")
    if (args.compile or args.cuda_graphs) and (args.stream_blocks or args.ulysses_size > 1):
        raise BadInput(
            f"--stream_blocks {args.stream_blocks}, --ulysses_size {args.ulysses_size}: not with --compile or "
            "--cuda_graphs"
        )


def given_settings(args):
    """Return the flags that override a checkpoint's settings, as arguments of Settings.with_overrides."""
    return dict(
        size=None if args.size is None else parse_size(args.size),
        frames=args.frames,
        steps=args.steps,
        shift=args.shift,
        guidance=None if args.guidance is None else parse_guidance(args.guidance),
        solver=args.solver,
        negative=args.negative,
    )


def given_inputs(args):
    """Return {flag: value} of the inputs that the user gave: images, and the inputs of a variant, such as --audio."""
    names = ["image", "last_image", *(name for kind in PARTS for name in parts_of(kind).conditioning.flags)]
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def given_prompts(args):
    """Return the Prompts of --prompt and --prompts, as one list. The list is empty if neither flag is given."""
    prompts = [Prompt(args.prompt)] if args.prompt is not None else []
    return prompts + (read_prompts(args.prompts) if args.prompts else [])


def requests_of(args, prompts, settings, seeds):
    """Return a Request for each pair of a prompt and a seed, ordered by prompt and then by seed. A prompt's own
    settings, inputs and seed replace those of the flags.
    """
    flags, inputs = given_settings(args), given_inputs(args)
    pairs = [(p, seed) for p in prompts for seed in ([p.seed] if p.seed is not None else seeds)]
    return [
        Request(
            p.text,
            seed,
            settings.with_overrides(**flags | p.settings),
            inputs | p.inputs,
            numbered(args.out, i, len(pairs)),
            args.save_latents and numbered(args.save_latents, i, len(pairs)),
        )
        for i, (p, seed) in enumerate(pairs)
    ]


def plan_largest(args, pipe, requests, videos):
    """Print and return the memory_estimate.Plan of the largest video. videos: a Video for each Request. Raises BadInput
    if the host has too little memory.
    """
    video, s = max(zip(videos, (r.settings for r in requests)), key=lambda pair: math.prod(pair[0].shape))
    spec = memory_estimate.SamplingSpec(
        settings=s,
        shape=video.shape,
        size=video.size,
        image=bool(video.images),
        mode=pipe.guidance_mode(math.prod(video.shape[1:]) // 4) if s.guided else "none",
        layout=parallel_layout(args, pipe.world.size, pipe.fp8),
        tile=args.vae_tile,
        preview=args.preview_every > 0,
    )
    need = memory_estimate.sampling(spec, memory_estimate.builders(pipe), pipe.world.device, pipe.runtime.dtype)
    print(need)
    need.check_host()
    return need


def share_of(requests, world):
    """Return the Requests for this rank's group, that is, for the ranks that compute each video together. Raises
    BadInput if there are fewer Requests than groups.
    """
    if len(requests) < world.dp_size:
        raise BadInput(
            f"{len(requests)} videos for {world.dp_size} groups of ranks: start fewer processes, or let them share a "
            "video by --ulysses_size and --guidance_parallel"
        )
    return requests[world.dp_rank :: world.dp_size]


def preview_colors(pipe):
    """Return the result of video.latent_to_rgb for the VAE of a Pipeline. If the VAE is on a GPU, it is evicted
    afterwards.
    """
    colors = latent_to_rgb(pipe.acquire("vae"))
    if pipe.runtime.cuda:
        pipe.evict("vae")
    return colors
