"""Read, write and convert every file layout in use for Wan's models. The functions that a notebook needs are here."""

import torch


def load_wan(path, device="cpu", dtype=torch.bfloat16):
    """Load a DiT, frozen and in eval mode, from a model folder or file (nanowan/formats/dit.py)."""
    from nanowan.formats.dit import load_wan

    return load_wan(path, device, dtype)


def load_vae(path, device="cpu", dtype=torch.float32):
    """Load a VAE from a checkpoint folder or from its own file (nanowan/formats/vae.py)."""
    from nanowan.formats.vae import load_vae

    return load_vae(path, device, dtype)


def load_t5(ckpt_dir, device="cpu", dtype=torch.bfloat16):
    """Load the TextEncoder of a checkpoint folder, with its tokenizer (nanowan/formats/t5.py)."""
    from nanowan.formats.t5 import load_t5

    return load_t5(ckpt_dir, device, dtype)


def read_lora(path, expert=None):
    """Return {parameter name: Change}, the argument of lora.merge, for a LoRA file in any layout. If the file holds
    changes for both experts, `expert`, "high" or "low", says for which one to read them.
    """
    from nanowan.formats.lora import read_lora

    return read_lora(path, expert)[0]
