"""Decode a video in tiles, to save memory or to split the work over ranks that share a clip."""

import math

import torch

from vae import CausalConv3d, Resample


def receptive_radius(decoder):
    """Return the largest distance, in latent pixels, at which an input pixel of decoder.forward_up can influence an
    output pixel. Each 3x3 convolution adds one pixel of the resolution at which it runs.
    """
    radius, scale = 0.0, 1
    for m in decoder.upsamples.modules():
        if isinstance(m, Resample):
            scale *= 2
        radius += (isinstance(m, Resample) or isinstance(m, CausalConv3d) and m.kernel_size[1] == 3) / scale
    return math.ceil(radius + 1 / scale)


def tile_overlap(decoder, tile):
    """Return (the number of latent pixels by which tiles overlap on each side, whether decoding in tiles is exact).
    tile: the side of a tile, in latent pixels.
    """
    radius = receptive_radius(decoder)
    return (radius, True) if tile >= radius else (max(1, tile // 2), False)


def tile_weights(start, end, overlap, exact, side, scale):
    """Return the weights (n,) fp32 of the pixels of a decoded tile along one axis. Along it, the frame has `side`
    latent pixels, each `scale` pixels wide. The tile covers the latent pixels [start, end), and on both sides up to
    `overlap` more, as far as the frame extends.

    If `exact`, the weights are 1 within [start, end) and 0 in the overlaps. Otherwise neighbouring tiles are
    cross-faded linearly across their common edge, over the width of the overlaps. The weights of all tiles add up to 1.
    """
    pixel = torch.arange(max(0, start - overlap) * scale, min(side, end + overlap) * scale) + 0.5

    def ramp(edge):
        """Return weights that rise from 0 before a tile's edge to 1 after it: in one step if `exact`, else linearly
        over the width of the overlaps. A tile's weights are ramp(start) - ramp(end). Tiles do not fade at the edges of
        the frame: ramp(0) is 1 for all pixels, and ramp(side) is 0.
        """
        if edge in (0, side):
            return torch.full_like(pixel, edge == 0)
        return ((pixel - edge * scale) / (1 if exact else 2 * overlap * scale) + 0.5).clamp(0, 1)

    return ramp(start) - ramp(end)


@torch.no_grad()
def decode_tiled(vae, z, tile, ranks=None):
    """Decode latents z (B,C,T',h,w) as VAE.decode does, but in tiles of `tile` x `tile` latent pixels, one after
    another. The decoder's largest layers then need memory for the activations of only one tile. Each tile is
    extended on all sides by the largest distance at which a latent pixel can influence the result, so the result is
    exact. If `tile` is smaller than that distance, each tile is extended on all sides by half of `tile`, neighbouring
    tiles are cross-faded, and the result is not exact.

    ranks: (this rank's number, the number of ranks, a function that sums a tensor over them) if several ranks hold z
    and each decodes some of the tiles.
    """
    B, _, T, h, w = z.shape
    st, sh, sw = vae.stride
    if tile >= h and tile >= w:
        return vae.decode(z)
    raw, past = vae.raw_latents(z), {}
    video = torch.zeros(B, 3, 1 + st * (T - 1), h * sh, w * sw, device=z.device)
    maps = [vae.decoder.forward_mid(vae.conv2(raw[:, :, i : i + 1], past), past) for i in range(T)]
    overlap, exact = tile_overlap(vae.decoder, tile)
    index, count, add_up = ranks or (0, 1, None)
    corners = [(y, x) for y in range(0, h, tile) for x in range(0, w, tile)]
    for y, x in corners[index::count]:
        y_end, x_end = min(y + tile, h), min(x + tile, w)
        top, bottom = max(0, y - overlap), min(h, y_end + overlap)
        left, right = max(0, x - overlap), min(w, x_end + overlap)
        weights = tile_weights(y, y_end, overlap, exact, h, sh)[:, None]
        weights = (weights * tile_weights(x, x_end, overlap, exact, w, sw)).to(video.device)
        target, past, frame = video[..., top * sh : bottom * sh, left * sw : right * sw], {}, 0
        for m in maps:
            pixels = vae.unpatchify(vae.decoder.forward_up(m[..., top:bottom, left:right], past))
            target[:, :, frame : frame + pixels.shape[2]] += pixels.float() * weights
            frame += pixels.shape[2]
    return (add_up(video) if add_up else video).clamp_(-1, 1)


def smallest_tile(size, least, ranks):
    """Return the smallest side, at least `least`, of square tiles that cover latents of `size` (h,w) with at most one
    tile for each of `ranks` ranks.
    """
    h, w = size
    side = least
    while math.ceil(h / side) * math.ceil(w / side) > ranks and side < max(h, w):
        side += 1
    return side


def tile_report(decoder, tile, frames, decode_first):
    """Return a line that says that decoding in tiles is exact or, if it is not, how much the first frame differs from
    one decoded without tiles. frames (3,T,H,W): frames decoded in tiles. decode_first() returns the first frame
    (B,3,1,H,W), decoded without tiles.
    """
    overlap, exact = tile_overlap(decoder, tile)
    error = "exact"
    if not exact:
        most = (decode_first()[0].cpu() - frames[:, :1]).abs().max()
        error = f"blended; the first frame differs by at most {most:.3f} of 2"
    return f"tiles of {tile} latent pixels overlap by {overlap} on each side: {error}"
