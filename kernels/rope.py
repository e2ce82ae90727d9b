"""Rotary position embedding (RoPE): a table of angles, and the positions of tokens in time, height and width.

`table` (P,d/2,2) holds, for each of P positions, the cosine and sine for each of a head's d/2 complex pairs.
`positions` (L,3) are signed integers, |position| < P <= 1024. In each head of a token, the first d/2 - 2*(d/2//3) pairs
turn by the token's time, the next d/2//3 by its height, and the last by its width. A negative position turns in the
opposite direction. Source: official wan/modules/model.py, rope_params and rope_apply; S2V uses negative times.
"""

import torch

MAX_POSITIONS = 1024  # per axis, as in the official tables


def rope_table(n, d, device):
    """Return the table (n,d/2,2) fp32 of positions 0..n-1 for heads of width d, computed in fp64 with base 10000.
    Raises ValueError if n is above 1024.
    """
    if n > MAX_POSITIONS:
        raise ValueError(f"{n} token positions along one axis: Wan's end at {MAX_POSITIONS}")
    frequency = torch.cat(
        [torch.pow(10000, -torch.arange(w, dtype=torch.float64, device=device) / w) for w in widths(d)]
    )
    angle = torch.arange(n, device=device).double()[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], -1).float()


def widths(d):
    """Return how many of a head's d/2 pairs are rotated by the time, by the height and by the width."""
    third = d // 2 // 3
    return d // 2 - 2 * third, third, third


def grid_positions(grid, device):
    """Return the positions (T'H'W',3) int32 of the tokens of a grid (T',H',W'), the width varying fastest."""
    axes = [torch.arange(n, dtype=torch.int32, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


# ---- reference ---------------------------------------------------------------------------------------------------
def angles(table, positions):
    """Return the cosines and sines (L,d/2,2) of every token's rotation, from the table (P,d/2,2). positions (L,3).
    Raises IndexError for a position outside of the table.
    """
    parts = []
    for axis, part in enumerate(table.split(widths(2 * table.shape[1]), 1)):
        at = positions[:, axis]
        cos, sin = part[at.abs()].unbind(-1)
        parts.append(torch.stack([cos, torch.where(at[:, None] < 0, -sin, sin)], -1))
    return torch.cat(parts, 1)


def rotate(x, table, positions):
    """Rotate the pairs (2j,2j+1) of x (B,L,N,d) by the tokens' positions (L,3). table: from rope_table."""
    cos, sin = angles(table, positions)[:, None].unbind(-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
