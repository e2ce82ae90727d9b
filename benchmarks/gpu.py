"""`python -m benchmarks --gpu`: full-size blocks and kernels on a GPU, bf16, random weights."""

import functools
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

import lora
from benchmarks import tiny
from benchmarks.common import add_peer_adapter, add_reference, interleaved, keep_results, trainable
from benchmarks.kernels import KERNELS, bandwidth, milliseconds
from kernels import attention_backends
from nanowan.formats.dit import full_config, keep_fp32
from nanowan.formats.vae import FULL_WIDTHS
from nanowan.memory.host import Copier
from nanowan.memory.placement import Placement
from vae import VAE, channels_last
from wan import Wan

DEVICE = "cuda"
# bf16 FLOP/s that an H100 reaches in practice: in large products, and in flash attention
LINEAR_RATE, ATTENTION_RATE = 750e12, 650e12
GPU_SIZES = [
    ("ti2v-5B", (31, 44, 80), "1280x704, 121 frames"),
    ("t2v-A14B", (21, 60, 104), "832x480, 81 frames"),
    ("ti2v-5B", (1, 44, 80), "1280x704, one image"),
]


def measure_on_gpu(contenders, rounds):
    """Measure contenders {name: function}, and return {name: {"ms", "gb", "all_ms"}}: the median milliseconds of
    interleaved rounds, the peak memory in addition to the weights, and the milliseconds of every round.
    """
    results, weights = {}, torch.cuda.memory_allocated()
    for name, run in contenders.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        results[name] = {"gb": (torch.cuda.max_memory_allocated() - weights) / 1e9}
    for name, seconds in interleaved(contenders, rounds, torch.cuda.synchronize).items():
        results[name] |= {"ms": 1000 * median(seconds), "all_ms": [1000 * s for s in seconds]}
    print("  " + ", ".join(f"{k} {v['ms']:.1f} ms ({v['gb']:.2f} GB)" for k, v in results.items()), flush=True)
    return results


def random_dit(variant, layers, with_peer=True):
    """Return (DiT, peer): a DiT in bf16 with the width of the variant and `layers` blocks, and diffusers' DiT with the
    same weights. The peer is None if it is not wanted or diffusers is not installed.
    """
    c = full_config(variant)
    c.num_layers = layers
    with torch.device(DEVICE):
        model = Wan(c)
        for name, p in model.named_parameters():
            torch.nn.init.ones_(p) if "norm" in name and name.endswith("weight") else torch.nn.init.normal_(p, std=0.02)
    with_peer = with_peer and importlib.util.find_spec("diffusers")
    peer = tiny.diffusers_dit(model).bfloat16().to(DEVICE) if with_peer else None
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if keep_fp32(name) else torch.bfloat16)
    return model.eval().requires_grad_(False), peer


def random_inputs(model, grid, batch):
    """Return (x, t, embeddings of a 40-token prompt) for our DiT, and the same three for diffusers' DiT. grid: the
    shape (T',h,w) of the latents.
    """
    c = model.config
    x, context = (torch.randn(batch, *size, device=DEVICE) for size in ((c.in_dim, *grid), (40, c.text_dim)))
    t = torch.full((batch,), 500.0, device=DEVICE)
    return (x, t, context), (x.bfloat16(), t, F.pad(context, (0, 0, 0, 472)).bfloat16())


def peers(peer, run):
    """Return the contenders {name: function} that run diffusers' model `peer`: with the defaults, and with cuDNN as
    PyTorch's first choice for attention, as in nanoWan on Hopper and data-centre Blackwell GPUs.
    If `peer` is None, return {}.
    """

    def by_cudnn():
        with sdpa_kernel(attention_backends.CUDNN_FIRST, set_priority=True):
            run()

    return {} if peer is None else {"diffusers": run, "diffusers, cuDNN": by_cudnn}


def gpu_guided_step(variant="ti2v-5B", grid=GPU_SIZES[0][1], rounds=2):
    """Measure a guided step of sample.py: all blocks of a DiT on a batch of two, a prompt and its negative prompt."""
    model, peer = random_dit(variant, full_config(variant).num_layers)
    (x, t, context), theirs = random_inputs(model, grid, 2)
    text = model.embed_text(context, cache=True)
    contenders = add_reference({"ours": torch.no_grad()(lambda: model(x, t, text))})
    contenders |= peers(peer, torch.no_grad()(lambda: peer(*theirs, return_dict=False)[0]))
    print(f"{variant}: a guided step, {math.prod(grid) // 4} tokens, all {len(model.blocks)} blocks")
    return measure_on_gpu(contenders, rounds)


def gpu_dit(variant, grid, label, layers=4, rounds=3):
    """Measure a forward pass of `layers` blocks, and a LoRA step with and without checkpointing. grid: the shape
    (T',h,w) of the latents. label: the size of the clip, in words.
    """
    total = full_config(variant).num_layers
    model, peer = random_dit(variant, layers)
    (x, t, context), theirs = random_inputs(model, grid, 1)
    c, tokens, text = model.config, math.prod(grid) // 4, model.embed_text(context, cache=True)
    contenders = add_reference({"ours": torch.no_grad()(lambda: model(x, t, text))})
    contenders |= peers(peer, torch.no_grad()(lambda: peer(*theirs, return_dict=False)[0]))
    print(f"{variant}, {label}: {tokens} tokens, {layers} of {total} blocks, forward")
    results = {"forward": measure_on_gpu(contenders, rounds)}
    linear = 2 * layers * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    attention_flops = 4 * layers * tokens * (tokens + 42) * c.dim
    bound = linear / LINEAR_RATE + attention_flops / ATTENTION_RATE
    ms = results["forward"]["ours"]["ms"]
    results |= {"tokens": tokens, "layers": layers, "of": total}
    results |= {"bound_ms": 1000 * bound, "over_bound": ms / (1000 * bound)}
    print(f"  practical bound {1000 * bound:.1f} ms: {results['over_bound']:.2f} of it")
    contenders = None
    lora.inject(model, rank=16)
    if peer is not None and importlib.util.find_spec("peft"):
        add_peer_adapter(peer)
        peer.train()
    else:
        peer = None

    def step(run, model):
        def go():
            run().square().mean().backward()
            for p in trainable(model):
                p.grad = None

        return go

    for checkpointing in (True, False):
        model.checkpointing = checkpointing
        contenders = add_reference({"ours": step(lambda: model(x, t, context), model)})
        if peer is not None:
            peer.enable_gradient_checkpointing() if checkpointing else peer.disable_gradient_checkpointing()
            contenders |= peers(peer, step(lambda: peer(*theirs, return_dict=False)[0], peer))
        print(f"  LoRA step {'with' if checkpointing else 'without'} checkpointing")
        results[f"lora_step{'_checkpointing' * checkpointing}"] = measure_on_gpu(contenders, rounds)
    return results


def gpu_vae(rounds=1):
    """Measure VAE 2.2 at its released size: decode and encode 121 frames of 1280x704 in bf16, and encode 49 frames of
    832x480 in fp32.
    """
    with torch.device(DEVICE):
        model = VAE("2.2", *FULL_WIDTHS["2.2"]).eval().requires_grad_(False)
        z, video = torch.randn(1, 48, 31, 44, 80), torch.rand(1, 3, 121, 704, 1280) * 2 - 1
    peer = tiny.diffusers_vae(model).bfloat16().to(DEVICE) if importlib.util.find_spec("diffusers") else None
    model = channels_last(model).bfloat16()
    contenders = add_reference({"ours": lambda: model.decode(z)})
    if peer is not None:
        contenders["diffusers"] = torch.no_grad()(lambda: peer.decode(z.bfloat16()).sample)
    print("VAE 2.2 decode, 1280x704, 121 frames")
    results = {"decode": measure_on_gpu(contenders, rounds)}
    contenders = add_reference({"ours": lambda: model.encode(video)})
    if peer is not None:
        contenders["diffusers"] = torch.no_grad()(lambda: peer.encode(video.bfloat16()).latent_dist.mode())
    print("VAE 2.2 encode, 1280x704, 121 frames")
    results |= {"encode": measure_on_gpu(contenders, rounds)}
    print("VAE 2.2 encode in fp32, as for the cache, 832x480, 49 frames")
    model, small = model.float(), video[:, :, :49, :480, :832].contiguous()
    return results | {"encode_fp32": measure_on_gpu(add_reference({"ours": lambda: model.encode(small)}), rounds)}


def gpu_expert_swap(variant="t2v-A14B", layers=10, rounds=3):
    """Measure how fast one expert of `layers` blocks replaces another on the GPU. The first swap copies one expert to
    the host and the other to the GPU; later swaps only copy to the GPU. Returns an expert's GB divided by the seconds
    of the first swap, its GB divided by the seconds of a later one, and the predicted seconds of a later swap if the
    experts have all their blocks.
    """
    experts = []
    for _ in range(2):
        model, _ = random_dit(variant, layers, with_peer=False)
        experts.append(Placement(model, Copier(DEVICE)).start())
    weights = sum(p.nbytes for p in experts[0].model.parameters())
    seconds = {"down and up": [], "up": []}
    experts[0].to("cpu")
    for i in range(rounds + 1):
        there, here = experts[:: -1 if i % 2 else 1]
        torch.cuda.synchronize()
        began = time.perf_counter()
        here.to("cpu")
        there.to(DEVICE)
        torch.cuda.synchronize()
        seconds["up" if i else "down and up"].append(time.perf_counter() - began)
    results = {f"{name}_GB_s": weights / median(taken) / 1e9 for name, taken in seconds.items()}
    blocks = sum(p.nbytes for p in experts[0].model.blocks.parameters())
    whole = weights + blocks * (full_config(variant).num_layers / layers - 1)
    results["swap_s"] = whole / results["up_GB_s"] / 1e9
    print(f"{variant}: " + ", ".join(f"{name} {value:.1f}" for name, value in results.items()), flush=True)
    return results


def ceilings():
    """Measure the bytes/s of a copy within this GPU's memory and the FLOP/s of a bf16 matrix product, as a scale for
    the other figures.
    """
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    results = {"bandwidth": bandwidth(), "flops": 2 * 8192**3 / milliseconds(lambda: a @ b) * 1000}
    print(f"copy {results['bandwidth'] / 1e9:.0f} GB/s, bf16 product {results['flops'] / 1e12:.0f} TFLOP/s", flush=True)
    return results


JOBS = {"ceilings": ceilings, "guided step": gpu_guided_step, **KERNELS}
JOBS |= {f"{v} {label}": functools.partial(gpu_dit, v, grid, label) for v, grid, label in GPU_SIZES}
JOBS |= {"vae": gpu_vae, "expert swap": gpu_expert_swap}


def on_gpu(about, path, seconds=450, jobs=tuple(JOBS)):
    """Run `jobs`, which are keys of JOBS, and add their results to the dict `about`, which is written to the JSON file
    `path`. Each job runs in its own process, so that a crash loses only its own result. seconds: time for all jobs
    together; a job that runs longer than this allows is ended.
    """
    return keep_results(jobs, run_apart, about, path, seconds)


def run_apart(name, seconds):
    """Run the job `name` in a process of its own for at most `seconds`. Returns what the job measured, or a sentence
    that says why it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        try:
            command = [sys.executable, "-m", "benchmarks", "--gpu", "--job", name, "--json", file]
            done = subprocess.run(command, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"failed: not done after {seconds:.0f} s"
        if done.returncode:
            return f"failed: exit status {done.returncode}"
        return json.loads(file.read_text())
