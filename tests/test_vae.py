"""Both VAEs against diffusers' AutoencoderKLWan on equal weights, fp32 on CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from checkpoint import BadInput
from vae import VAE


def normalised(peer, moments):
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (peer.config.latents_mean, peer.config.latents_std))
    return (moments - mean) / std


@pytest.mark.parametrize("v22", [False, True])
@pytest.mark.parametrize("T", [1, 5, 9, 17])
def test_equals_diffusers(v22, T, report):
    model = tiny.vae(v22)
    peer = tiny.diffusers_vae(model)
    video = torch.rand(2, 3, T, 32, 64) * 2 - 1
    want = normalised(peer, torch.cat([peer.encode(v[None]).latent_dist.mode() for v in video]))
    got = model.encode(video)
    report("encode", tiny.error(got, want), 2e-5)
    z = torch.randn(want.shape) * 0.5
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (peer.config.latents_mean, peer.config.latents_std))
    want = torch.cat([peer.decode(u[None] * std + mean).sample for u in z]).clamp(-1, 1)
    assert (want.abs() < 1).float().mean() > 0.5, "nearly everything is clamped: the comparison would be empty"
    report("decode", tiny.error(model.decode(z), want), 2e-5)


@pytest.mark.parametrize(
    "args, params, tensors", [((False, 96, 96, 16), 126_892_531, 194), ((True, 160, 256, 48), 704_688_668, 196)]
)
def test_full_size_counts(args, params, tensors):
    with torch.device("meta"):
        state = VAE(*args).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (params, tensors)


def test_gradients_reach_the_first_layer_through_the_stream():
    model = tiny.vae(True).requires_grad_(True)
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    z = torch.cat([m[:, :48] for m in model.moment_chunks(video)], 2)
    torch.cat(list(model.frame_chunks(z)), 2)[:, :, -1].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.conv1.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 32), (1, 3, 5, 40, 32), (1, 3, 5, 32, 24)])
def test_sizes_that_do_not_fit_are_named(shape):
    with pytest.raises(BadInput, match=rf"{shape[2]} frames, {shape[4]}x{shape[3]} px.*multiple"):
        tiny.vae(True).encode(torch.zeros(shape))


MEMORY = r"""
import re, sys, torch; sys.path[:0] = {paths!r}
import tiny
held = lambda what: int(re.search(what + r":\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
torch.set_num_threads(1)
model = tiny.vae(True)
z = torch.randn(1, 48, {frames}, 16, 16)
before = held("VmRSS")
video = model.decode(z)
print(held("VmHWM") - before - video.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_decode_memory_does_not_grow_with_frames(report):
    """Peak memory beyond the result: 81 frames against 17, each in its own process."""
    here = Path(__file__).parent
    peaks = {}
    for frames in (5, 21):
        code = MEMORY.format(paths=[str(here), str(here.parent)], frames=frames)
        # glibc would otherwise keep freed blocks in its heap, which is not the decoder's doing
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        peaks[frames] = int(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        )
    report("peak of 81 frames over 17", peaks[21] / peaks[5], 1.1)


@pytest.mark.parametrize("v22", [False, True])
def test_tiles_are_exact_where_they_overlap_enough(v22, report):
    """Windows of 14 latent pixels, whose overlap is all that a result depends on; a window of 3 is blended, and not
    equal.
    """
    model, z = tiny.vae(v22).double(), torch.randn(1, 48 if v22 else 16, 2, 3, 28) * 0.5  # fp64, into fp32 pixels
    whole = model.decode(z)
    assert model.overlap(14) == (model.decoder.reach(), True) and not model.overlap(3)[1]
    report("tile 14", tiny.error(model.decode(z, tile=14), whole), 2e-7)
    narrow = z[:, :, :1, :, :7]
    assert tiny.error(model.decode(narrow, tile=3), model.decode(narrow)) > 1e-3


def test_a_shorter_overlap_is_not_exact(monkeypatch):
    """The reach is needed: four pixels less leave a difference."""
    model, z = tiny.vae(False).double(), torch.randn(1, 16, 1, 3, 28) * 0.5
    monkeypatch.setattr(model, "overlap", lambda tile: (model.decoder.reach() - 4, True))
    assert tiny.error(model.decode(z, tile=14), model.decode(z)) > 4e-7


def test_doubling_and_convolving_on_the_small_map(report):
    """Four 2x2 convolutions equal nearest x2 and a 3x3 convolution."""
    from vae import double_and_convolve, folded

    x, w, b = (
        torch.randn(2, 5, 6, 7, dtype=torch.double),
        torch.randn(3, 5, 3, 3, dtype=torch.double),
        torch.randn(3, dtype=torch.double),
    )
    want = torch.nn.functional.conv2d(
        torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"), w, b, padding=1
    )
    report("fp64", tiny.error(double_and_convolve(x, folded(w), b.repeat(4)), want), 1e-14)


def test_grey_frames_are_not_encoded_twice():
    """I2V's image and 80 grey frames: bit for bit the plain encoding. The layers at full size, where most of the work
    is, settle within a few of the 21 chunks; those behind them, which remember two of their own frames each, later.
    """
    model, video = tiny.vae(False), torch.zeros(1, 3, 81, 16, 24)
    video[:, :, 0] = torch.rand(3, 16, 24) * 2 - 1
    calls, plain = [0] * len(model.encoder.downsamples), model.encode(video)
    for i, m in enumerate(model.encoder.downsamples):
        m.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    assert torch.equal(model.condition(video[:, :, :1], 81)[:, 4:], plain)
    assert max(calls[:3]) <= 6 and max(calls[:6]) <= 9 and sum(calls) < 0.75 * 21 * len(calls), calls
    moving = torch.rand(1, 3, 13, 16, 24) * 2 - 1
    assert torch.equal(model.encode(moving, still=True), model.encode(moving))
