"""A VAE's files: its version and widths are read from the headers, and names and shapes must match exactly."""

import torch

from nanowan.errors import BadInput
from nanowan.formats.layouts import check_latent_stats, read_weights, vae_files
from nanowan.formats.load import load_into
from vae import GEOMETRY, LATENT_STATS, VAE, channels_last

FULL_WIDTHS = {"2.1": (96, 96), "2.2": (160, 256)}  # dim and dec_dim of the released VAEs


def build_vae(entries, path):
    """Return a new VAE whose version and widths come from the shapes in these headers {official name: Entry}. Raises
    BadInput, naming `path`, if the headers do not belong to a Wan VAE.
    """

    def width(name, axis=0):
        if name not in entries:
            raise BadInput(f"{path}: not a Wan VAE, it has no {name}")
        return entries[name].shape[axis]

    version = "2.2" if width("encoder.conv1.weight", 1) == 12 else "2.1"
    dim, dec_dim, z_dim = width("encoder.conv1.weight"), width("decoder.head.2.weight", 1), width("conv2.weight")
    if z_dim != GEOMETRY[version].z_dim:
        raise BadInput(f"{path}: {z_dim} latent channels; a Wan {version} VAE has {GEOMETRY[version].z_dim}")
    stages = [f"{i}.downsamples.0" for i in range(4)] if version == "2.2" else [3 * i for i in range(4)]
    mult = [width(f"encoder.downsamples.{stage}.residual.2.weight") // dim for stage in stages]
    return VAE(version, dim, dec_dim, mult)


def load_vae(path, device="cpu", dtype=torch.float32):
    """Load Wan2.1_VAE or Wan2.2_VAE, in channels-last memory format, from a file or from the checkpoint folder that
    holds that file. Raises BadInput for files of another model.
    """
    check_latent_stats(path, LATENT_STATS)
    entries = read_weights(vae_files(path))
    with torch.device("meta"):
        model = build_vae(entries, path)
    return channels_last(load_into(model, entries, device, dtype))
