"""Speed and memory beside diffusers, transformers and peft, in one run.

    python bench.py                     on this CPU, fp32 (about ten minutes)
    python bench.py dit vae_decode      only these works
    python bench.py --gpu               full-size blocks and kernels on a GPU, random weights
    python bench.py --json FILE         also write everything that was measured, with machine and versions; FILE.png
    shows cost against size

Contenders of a work get equal weights and inputs and take turns; what is printed are medians, and ours / peer. "ref" is
nanoWan with every op as its plain PyTorch definition. Peak memory is that of a fresh process, above what it holds
before the work.
"""

import argparse
import ctypes
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import lora
import ops
import plan
from kernels import attention, bandwidth, causal_conv3d, modulate, qk_norm_rope
from sample import generate, load
from t5 import TextEncoder
from vae import FULL_WIDTHS, VAE, channels_last
from wan import Wan, WanConfig, full_config, keep_fp32, load_wan

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tests"))

import tiny  # noqa: E402  fills the peers with our weights

GRID = (3, 20, 32)  # latent frames, height, width of the DiT works: 480 tokens
PEER_TARGETS = ["attn2.to_k", "attn2.to_v"]  # of the LoRA, in diffusers


def dit_flops(c, tokens, text, batch=1):
    """FLOPs of a forward pass of a DiT of WanConfig c, its text's keys and values known."""
    linear = tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    return 2 * batch * (c.num_layers * (linear + 2 * tokens * (tokens + text) * c.dim) + tokens * c.dim * 8 * c.in_dim)


@functools.cache
def dit():
    """A DiT of width 768, ours and diffusers', and inputs: a 40-token prompt."""
    model = tiny.randomize(Wan(WanConfig("ti2v", 768, 3072, 6, 6, 48, 48, text_dim=768)), 0)
    x, t, context = torch.randn(1, 48, *GRID), torch.tensor([500.0]), torch.randn(1, 40, 768)
    return model, tiny.diffusers_dit(model), x, t, context, F.pad(context, (0, 0, 0, 472))


def dit_forward():
    model, peer, x, t, context, padded = dit()
    flops = dit_flops(model.config, 480, 42)
    run = torch.no_grad()(lambda: model(x, t, context))
    return {"ours": run, "diffusers": torch.no_grad()(lambda: peer(x, t, padded, return_dict=False)[0])}, flops


def lora_step(blocks=range(6), checkpointing=False):
    """Forward and backward of a translator (k and v of cross-attention, rank 16); `blocks` limits ours, the peer has
    one everywhere.
    """
    from peft import LoraConfig

    model, peer, x, t, context, padded = dit.__wrapped__()
    lora.inject(model, rank=16, blocks=list(blocks))
    peer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=PEER_TARGETS))
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


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


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
    """Four prompts of 20 tokens; pipelines pad them to 512."""
    model = tiny.randomize(TextEncoder(1000, 512, 512, 1280, 8, 6), 2)
    peer, ids = tiny.transformers_t5(model), torch.randint(3, 1000, (4, 20))
    padded, mask = F.pad(ids, (0, 492)), F.pad(torch.ones_like(ids), (0, 492))
    lens = torch.full((4,), 20)
    return {
        "ours": torch.no_grad()(lambda: model(ids, lens)),
        "transformers": torch.no_grad()(lambda: peer(padded, attention_mask=mask).last_hidden_state),
    }, None


def sample_video():
    """Ten guided UniPC steps of a small TI2V, 9 frames of 128x128, from prompt to pixels, weights loaded before."""
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
        ours.prompt_embeds.clear()
        how = dict(size=(128, 128), frames=9, steps=10, shift=5.0, guidance=5.0, negative="")
        return generate(ours, prompt, progress=False, **how)

    def sample_peer():
        generator = torch.Generator().manual_seed(0)
        how = dict(output_type="pt", max_sequence_length=512, negative_prompt="")
        return pipe(prompt, generator=generator, **size, **how).frames

    return {"ours": sample_ours, "diffusers": sample_peer}, None


def loading():
    """A checkpoint of 1 GB into memory, in fp32."""
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


WORKS = {
    "dit": (dit_forward, "DiT forward, width 768, 480 tokens"),
    "lora": (lora_step, "LoRA step, the same model"),
    "lora_upper": (
        functools.partial(lora_step, blocks=(4, 5)),
        "LoRA step, upper third of our blocks (the peer: all of its)",
    ),
    "lora_ckpt": (functools.partial(lora_step, checkpointing=True), "LoRA step with checkpointing"),
    "vae_decode": (vae_decode, "VAE 2.2 decode, 9 frames of 128x128"),
    "vae_encode": (vae_encode, "VAE 2.2 encode, the same"),
    "text": (text_encoder, "text encoder, four short prompts"),
    "sample": (sample_video, "guided 10-step sample, end to end"),
    "load": (loading, "load a 1 GB DiT"),
}


def interleaved(contenders, rounds, synchronize=lambda: None):
    """{name: seconds of each round}; one round not counted comes first, and who begins alternates."""
    for run in contenders.values():
        run()
    seconds = {name: [] for name in contenders}
    for i in range(rounds):
        for name, run in list(contenders.items())[:: -1 if i % 2 else 1]:
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def seconds_of(run, rounds):
    """The median of several runs."""
    return median(interleaved({"run": run}, rounds)["run"])


def matmul_peak():
    """FLOP/s of the largest products, the median of seven."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    return 2 * 1024 * 2048 * 2048 / seconds_of(lambda: a @ b, 7)


def print_memory(make, name):
    """What peak_memory asks its process."""
    contenders, _ = make()
    contenders[name]()  # once for what is imported and set up on first use
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = plan.resident()
    contenders[name]()
    print(plan.resident("VmHWM") - before)


def peak_memory(work, name):
    """Bytes that one contender's work takes above what the process held before, in a process of its own, where glibc
    keeps no freed memory.
    """
    out = subprocess.run(
        [sys.executable, __file__, work, "--memory_of", name],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(out.stdout.splitlines()[-1])


def add_reference(contenders):
    """The contenders and, second, ours with every op as its plain definition."""

    def ref():
        with ops.using("ref"):
            return contenders["ours"]()

    return {"ours": contenders["ours"], "ref": ref, **{k: v for k, v in contenders.items() if k != "ours"}}


def machine():
    name = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "diffusers", "transformers", "peft")
        if importlib.util.find_spec(p)
    }
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def on_cpu(names, rounds):
    """Measure these works and print a row for each as it is done."""
    results, peak = {}, matmul_peak()
    columns = ("work", "ours, ms", "ref, ms", "peer, ms", "ours / peer", "spread", "memory, ours / peer")
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
    """Cost against tokens and frames beside what the FLOP count says: {"dit": [(tokens, seconds, flops)], "decode":
    [(frames, seconds)]}.
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


# ---- on a GPU ----------------------------------------------------------------------------------------------------
# bf16 FLOP/s that an H100 reaches in practice: on large products, in flash attention
LINEAR_RATE, ATTENTION_RATE = 750e12, 650e12
GPU_SIZES = [
    ("ti2v-5B", (31, 44, 80), "1280x704, 121 frames"),
    ("t2v-A14B", (21, 60, 104), "832x480, 81 frames"),
    ("ti2v-5B", (1, 44, 80), "1280x704, one image"),
]


def measure_on_gpu(contenders, rounds):
    """{name: {"ms", "gb"}}: medians of interleaved rounds, and the peak of memory above the weights."""
    results, weights = {}, torch.cuda.memory_allocated()
    for name, run in contenders.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        results[name] = {"gb": (torch.cuda.max_memory_allocated() - weights) / 1e9}
    for name, seconds in interleaved(contenders, rounds, torch.cuda.synchronize).items():
        results[name] |= {"ms": 1000 * median(seconds), "all_ms": [1000 * s for s in seconds]}
    print("  " + ", ".join(f"{k} {v['ms']:.1f} ms ({v['gb']:.2f} GB)" for k, v in results.items()), flush=True)
    return results


def gpu_dit(variant, grid, label, layers=4, rounds=3):
    """A forward pass and a LoRA step of a DiT of full width and `layers` blocks; seconds for all its blocks follow from
    their number.
    """
    c = full_config(variant)
    total, c.num_layers = c.num_layers, layers
    with torch.device("cuda"):
        model = Wan(c)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
        x, t, context = torch.randn(1, c.in_dim, *grid), torch.tensor([500.0]), torch.randn(1, 40, c.text_dim)
    peer = tiny.diffusers_dit(model).bfloat16().cuda() if importlib.util.find_spec("diffusers") else None
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if keep_fp32(name) else torch.bfloat16)
    model.eval().requires_grad_(False)
    tokens = math.prod(grid) // 4
    text = model.embed_text(context, cache=True)
    contenders = add_reference({"ours": torch.no_grad()(lambda: model(x, t, text))})
    if peer is not None:
        padded = F.pad(context, (0, 0, 0, 472)).bfloat16()
        contenders["diffusers"] = torch.no_grad()(lambda: peer(x.bfloat16(), t, padded, return_dict=False)[0])
    print(f"{variant}, {label}: {tokens} tokens, {layers} of {total} blocks, forward")
    results = {"forward": measure_on_gpu(contenders, rounds)}
    linear = 2 * layers * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    attention_flops = 4 * layers * tokens * (tokens + 42) * c.dim
    bound = linear / LINEAR_RATE + attention_flops / ATTENTION_RATE
    ms = results["forward"]["ours"]["ms"]
    results |= {"tokens": tokens, "layers": layers, "of": total}
    results |= {"bound_ms": 1000 * bound, "over_bound": ms / (1000 * bound)}
    print(
        f"  practical bound {1000 * bound:.1f} ms: {results['over_bound']:.2f} of it; a guided step of all {total} "
        f"blocks about {2 * total / layers * ms / 1000:.2f} s"
    )
    contenders = peer = None
    lora.inject(model, rank=16)
    model.checkpointing = True

    def step():
        model(x, t, context).square().mean().backward()
        for p in trainable(model):
            p.grad = None

    print("  LoRA step with checkpointing")
    results["lora_step"] = measure_on_gpu(add_reference({"ours": step}), rounds)
    return results


def gpu_vae(rounds=1):
    """VAE 2.2 of released size: decode 121 frames of 1280x704 in bf16, and encode 17."""
    with torch.device("cuda"):
        model = VAE("2.2", *FULL_WIDTHS["2.2"]).eval().requires_grad_(False)
        z, video = torch.randn(1, 48, 31, 44, 80), torch.rand(1, 3, 17, 704, 1280) * 2 - 1
    peer = tiny.diffusers_vae(model).bfloat16().cuda() if importlib.util.find_spec("diffusers") else None
    model = channels_last(model).bfloat16()
    contenders = add_reference({"ours": lambda: model.decode(z)})
    if peer is not None:
        contenders["diffusers"] = torch.no_grad()(lambda: peer.decode(z.bfloat16()).sample)
    print("VAE 2.2 decode, 1280x704, 121 frames")
    results = {"decode": measure_on_gpu(contenders, rounds)}
    print("VAE 2.2 encode, 1280x704, 17 frames")
    return results | {"encode": measure_on_gpu(add_reference({"ours": lambda: model.encode(video)}), rounds)}


def on_gpu(seconds=500):
    """Everything worth measuring on a GPU; what would begin after `seconds` is left out and named."""
    began, results = time.monotonic(), {"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth()}
    timed_kernels = [modulate, qk_norm_rope, attention] + [causal_conv3d] * torch.ops.nanowan_csrc.has_cuda()
    jobs = {module.__name__: module.main for module in timed_kernels}
    jobs |= {f"{v} {label}": functools.partial(gpu_dit, v, grid, label) for v, grid, label in GPU_SIZES}
    for name, job in (jobs | {"vae": gpu_vae}).items():
        if time.monotonic() - began > seconds:
            results[name] = "left out: no time"
            print(f"{name}: left out, no time")
            continue
        try:
            results[name] = job()
        except (RuntimeError, AssertionError) as e:  # one failure must not cost the other figures
            results[name] = f"failed: {type(e).__name__}: {str(e)[:500]}"
            print(f"{name}: {results[name]}")
        torch.cuda.empty_cache()
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)} (default: all)")
    p.add_argument("--rounds", type=int, default=7, help="of which the medians are taken (default: %(default)s)")
    p.add_argument("--gpu", action="store_true", help="full-size blocks and kernels on a GPU instead")
    p.add_argument("--json", help="also write everything that was measured to this file, and FILE.png beside it")
    p.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = p.parse_args()
    if wrong := [w for w in args.works if w not in WORKS]:
        p.error(f"{wrong[0]}: choose from {', '.join(WORKS)}")
    torch.manual_seed(0)
    if args.memory_of:
        print_memory(WORKS[args.works[0]][0], args.memory_of)
        return
    if args.gpu and not torch.cuda.is_available():
        p.error("--gpu: there is no CUDA device")
    about = machine()
    print(json.dumps(about))
    result = on_gpu() if args.gpu else on_cpu(args.works or WORKS, args.rounds)
    if args.json:
        if not args.gpu:
            result["growth"] = growth()
            plot(f"{args.json}.png", result["growth"])
        Path(args.json).write_text(json.dumps(about | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
