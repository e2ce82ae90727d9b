"""Read, write and convert every file layout in use for Wan's models. This file has the functions for notebooks."""

import torch


def load_wan(path, device="cpu", dtype=torch.bfloat16):
    """Load a DiT, frozen and in eval mode, from a model folder or file. See load_wan in dit.py."""
    from nanowan.formats.dit import load_wan

    return load_wan(path, device, dtype)


def load_vae(path, device="cpu", dtype=torch.float32):
    """Load a VAE from a checkpoint folder or from the VAE's own file. See load_vae in vae.py."""
    from nanowan.formats.vae import load_vae

    return load_vae(path, device, dtype)


def load_t5(ckpt_dir, device="cpu", dtype=torch.bfloat16):
    """Load the TextEncoder of a checkpoint folder, with its tokenizer. See load_t5 in t5.py."""
    from nanowan.formats.t5 import load_t5

    return load_t5(ckpt_dir, device, dtype)


def read_lora(path, expert=None):
    """Return the changes that a LoRA file in any layout makes, as the {parameter name: Change} that lora.merge takes.
    If the file holds changes for both experts, those for `expert`, "high" or "low", are returned.
    """
    from nanowan.formats.lora import read_lora

    return read_lora(path, expert)[0]
