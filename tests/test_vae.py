"""Both VAEs against diffusers' AutoencoderKLWan on equal weights, fp32 on CPU."""

import functools

import pytest
import torch

from benchmarks import tiny
from nanowan.errors import BadInput
from nanowan.formats.vae import FULL_WIDTHS, load_vae
from nanowan.memory import tiled_vae
from nanowan.memory.tiled_vae import decode_tiled, receptive_radius, tile_overlap, tile_weights
from nanowan.memory_estimate import traced
from nanowan.variants.image import encode_still, image_channels
from vae import GEOMETRY, LATENT_STATS, VAE, fold_kernel, upsample_conv

# fmt: off
MEAN_22 = [  # of the 48 channels, as in the official wan/modules/vae2_2.py; diffusers knows those of 2.1
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
STD_22 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885,
    0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338,
    0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458,
    1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on


def normalised(peer, moments):
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (peer.config.latents_mean, peer.config.latents_std))
    return (moments - mean) / std


def test_latent_statistics_are_the_published_ones():
    from diffusers import AutoencoderKLWan

    peer = AutoencoderKLWan(base_dim=2).config
    assert LATENT_STATS == {16: (list(peer.latents_mean), list(peer.latents_std)), 48: (MEAN_22, STD_22)}


@pytest.mark.parametrize("version", GEOMETRY)
def test_geometry_is_that_of_the_encoder(version):
    model, (st, sh, sw) = VAE(version, 4, 4), GEOMETRY[version].stride
    for frames, height, width in ((1, 32, 64), (9, 64, 32)):
        latents = model.encode(torch.zeros(1, 3, frames, height, width))[0]
        assert tuple(latents.shape) == GEOMETRY[version].latent_shape(frames, height, width)
        assert tuple(latents.shape[1:]) == (1 + frames // st, height // sh, width // sw)
    assert (model.z_dim, model.stride) == GEOMETRY[version]


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


@pytest.mark.parametrize("version, params, tensors", [("2.1", 126_892_531, 194), ("2.2", 704_688_668, 196)])
def test_full_size_counts(version, params, tensors):
    with torch.device("meta"):
        state = VAE(version, *FULL_WIDTHS[version]).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (params, tensors)


def test_gradients_reach_the_first_layer_through_the_stream():
    model = tiny.vae(True).requires_grad_(True)
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    z = torch.cat([m[:, :48] for m in model.moment_chunks(video)], 2)
    torch.cat(list(model.frame_chunks(z)), 2)[:, :, -1].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.conv1.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 32), (1, 3, 5, 40, 32), (1, 3, 5, 32, 24)])
def test_sizes_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=rf"{shape[2]} frames, {shape[4]}x{shape[3]} px.*multiple"):
        tiny.vae(True).encode(torch.zeros(shape))


def test_decode_memory_does_not_grow_with_frames(report):
    """The most that tensors take at once, beyond the result and the latents in raw units: 81 frames against 17."""
    model, made = tiny.vae(True), []

    def peak(frames):
        z = torch.randn(1, 48, frames, 8, 8)
        return traced(lambda: made.append(model.decode(z))) - made[-1].nbytes - z.nbytes

    report("peak of 81 frames over 17", peak(21) / peak(5), 1.01)


@pytest.mark.parametrize("v22", [False, True])
def test_tiles_are_exact_where_they_overlap_enough(v22, report):
    """Tiles of 14 latent pixels, whose overlap is all that a result depends on."""
    model, z = tiny.vae(v22).double(), torch.randn(1, 48 if v22 else 16, 2, 3, 28) * 0.5  # fp64, into fp32 pixels
    assert tile_overlap(model.decoder, 14) == (receptive_radius(model.decoder), True)
    report("tile 14", tiny.error(decode_tiled(model, z, 14), model.decode(z)), 2e-7)


@pytest.mark.parametrize("v22", [False, True])
def test_a_decoder_sees_as_far_as_its_receptive_radius_and_no_farther(v22):
    """By the gradient of the pixels of one latent row."""
    model, middle = tiny.vae(v22).double(), 20
    z = torch.randn(1, model.conv2.in_channels, 1, 2 * middle + 1, 2, dtype=torch.float64)
    features = model.decoder.forward_mid(model.conv2(z, {}), {}).detach().requires_grad_()
    video = model.unpatchify(model.decoder.forward_up(features, {}))
    scale = video.shape[3] // z.shape[3]
    pixels = video[:, :, :, middle * scale : (middle + 1) * scale]
    (gradient,) = torch.autograd.grad(pixels.square().sum(), features)
    rows = gradient.abs().amax((0, 1, 2, 4)).nonzero().flatten().tolist()
    radius = receptive_radius(model.decoder)
    assert (rows[0], rows[-1]) == (middle - radius, middle + radius)


@pytest.mark.parametrize("v22", [False, True])
def test_smaller_tiles_are_blended_and_nearly_equal(v22, report):
    """Each tile sees half of itself more on each side; what lies beyond changes pixels by little, and less the larger
    the tiles are.
    """
    model, z = tiny.vae(v22), torch.randn(1, 48 if v22 else 16, 2, 3, 17) * 0.5
    whole, errors = model.decode(z), []
    for tile in (2, 4, 8):
        assert tile_overlap(model.decoder, tile) == (tile // 2, False)
        errors.append((decode_tiled(model, z, tile) - whole).square().mean().sqrt().item() / whole.std().item())
    report("tiles of 4, relative to the picture's contrast", errors[1], 0.15)
    report("tiles of 8", errors[2], 0.06)
    assert errors[0] > errors[1] > errors[2] > 1e-4


@pytest.mark.parametrize("side, tile", [(7, 3), (8, 2), (5, 1), (9, 4), (6, 6)])
@pytest.mark.parametrize("exact", [False, True])
def test_weights_of_tiles_add_up_to_one_and_cross_fade_around_their_edges(side, tile, exact):
    scale, overlap = 8, 5 if exact else max(1, tile // 2)
    total, starts = torch.zeros(side * scale), range(0, side, tile)
    for start in starts:
        end = min(start + tile, side)
        w = tile_weights(start, end, overlap, exact, side, scale)
        first, last = max(0, start - overlap), min(side, end + overlap)
        total[first * scale : last * scale] += w
        at = (torch.arange(first * scale, last * scale) + 0.5) / scale  # in latent pixels
        if exact:
            assert torch.equal(w, ((at > start) & (at < end)).float())
        elif 2 * overlap <= tile:  # its two slopes do not meet
            rise = ((at - start) / (2 * overlap) + 0.5).clamp(0, 1) if start else torch.ones_like(at)
            fall = ((end - at) / (2 * overlap) + 0.5).clamp(0, 1) if end < side else torch.ones_like(at)
            assert torch.allclose(w, torch.minimum(rise, fall), atol=1e-6)
        assert (w >= 0).all()
    assert torch.allclose(total, torch.ones(side * scale), atol=1e-6)


@pytest.mark.parametrize("v22", [False, True])
def test_tiles_of_a_constant_picture_show_no_seams(v22):
    """Where every tile decodes to one color, so does the frame, whatever the tiles; and ranks decode each tile once."""
    model, z = tiny.vae(v22), torch.randn(1, 48 if v22 else 16, 2, 3, 7)
    with torch.no_grad():
        model.decoder.head[2].weight.zero_()
        model.decoder.head[2].bias[:] = 0.3
    for tile in (1, 2, 6):
        assert torch.allclose(decode_tiled(model, z, tile), torch.tensor(0.3), atol=1e-6)
    parts = []
    for index in range(2):
        decode_tiled(model, z, 3, (index, 2, lambda video: parts.append(video.clone()) or video))
    assert torch.allclose(sum(parts), torch.tensor(0.3), atol=1e-6)
    assert all((p == 0).any() for p in parts)


def test_a_shorter_overlap_is_not_exact(monkeypatch):
    """The reach is needed: four pixels less leave a difference."""
    model, z = tiny.vae(False).double(), torch.randn(1, 16, 1, 3, 28) * 0.5
    monkeypatch.setattr(tiled_vae, "tile_overlap", lambda decoder, tile: (receptive_radius(decoder) - 4, True))
    assert tiny.error(decode_tiled(model, z, 14), model.decode(z)) > 4e-7


def test_doubling_and_convolving_on_the_small_map(report):
    """Four 2x2 convolutions equal nearest x2 and a 3x3 convolution."""
    x, w, b = (
        torch.randn(2, 5, 6, 7, dtype=torch.double),
        torch.randn(3, 5, 3, 3, dtype=torch.double),
        torch.randn(3, dtype=torch.double),
    )
    want = torch.nn.functional.conv2d(
        torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"), w, b, padding=1
    )
    report("fp64", tiny.error(upsample_conv(x, fold_kernel(w), b.repeat(4)), want), 1e-14)


def test_grey_frames_are_not_encoded_twice():
    """I2V's image and 80 grey frames: bit for bit the plain encoding. The layers at full size, where most of the work
    is, settle within a few of the 21 chunks; those behind them, which remember two of their own frames each, later.
    """
    model, video = tiny.vae(False), torch.zeros(1, 3, 81, 16, 24)
    video[:, :, 0] = torch.rand(3, 16, 24) * 2 - 1
    calls, plain = [0] * len(model.encoder.downsamples), model.encode(video)

    def counted(i, forward, *args):
        calls[i] += 1
        return forward(*args)

    for i, layer in enumerate(model.encoder.downsamples):
        layer.forward = functools.partial(counted, i, layer.forward)
    assert torch.equal(image_channels(model, video[:, :, :1], 81)[:, 4:], plain)
    assert max(calls[:3]) <= 6 and max(calls[:6]) <= 9 and sum(calls) < 0.75 * 21 * len(calls), calls
    moving = torch.rand(1, 3, 13, 16, 24) * 2 - 1
    assert torch.equal(encode_still(model, moving), model.encode(moving))
    assert torch.equal(model.encode(video), plain)  # nothing of it stays


def test_the_decoder_in_another_dtype():
    """decode_in: the decoder and what leads to it compute in bf16, the encoder as before; pixels stay fp32."""
    model, z = tiny.vae(True), torch.randn(1, 48, 2, 2, 2) * 0.5
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    encoded, decoded = model.encode(video), model.decode(z)
    model.decode_in(torch.bfloat16)
    assert {p.dtype for p in [*model.decoder.parameters(), *model.conv2.parameters()]} == {torch.bfloat16}
    assert torch.equal(model.encode(video), encoded) and model.decode(z).dtype == torch.float32
    assert 0 < tiny.error(model.decode(z), decoded) < 0.1


def test_the_mask_of_a_first_frame():
    """I2V-A14B: four channels, one for each frame of a latent frame, 1 where the video is given."""
    y = image_channels(tiny.vae(False), torch.zeros(2, 3, 1, 16, 24), 9)
    assert y.shape == (2, 20, 3, 2, 3)
    assert (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()


def test_what_is_no_wan_vae_is_refused(tmp_path):
    state = tiny.vae(False).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("decoder.head")}, tmp_path / "a_VAE.pth")
    with pytest.raises(BadInput, match=r"a_VAE.pth: not a Wan VAE, it has no decoder.head.2.weight"):
        load_vae(tmp_path / "a_VAE.pth")
    state["conv2.weight"] = state["conv2.weight"][:12]
    torch.save(state, tmp_path / "b_VAE.pth")
    with pytest.raises(BadInput, match=r"b_VAE.pth: 12 latent channels; a Wan 2.1 VAE has 16"):
        load_vae(tmp_path / "b_VAE.pth")
