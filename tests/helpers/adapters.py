"""Adapter files for tests."""

from lora import adapter, lora_layers
from nanowan.formats.lora import write_lora


def save_lora(path, model, **metadata):
    """Write the LoRAs injected into a model to an adapter file. metadata: as in write_lora."""
    write_lora(path, adapter(model), next(iter(lora_layers(model).values())).scale, **metadata)
