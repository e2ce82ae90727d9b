"""8-bit weights with separate scales, as in fp8_scaled files of ComfyUI and other programs."""

import json
from dataclasses import dataclass, replace

import torch

from kernels.quantize import E4M3
from nanowan.errors import BadInput
from nanowan.formats.header import Entry

FP8 = (E4M3, torch.float8_e5m2)
# Endings of the names of tensors that accompany an 8-bit weight. SCALES: its scale in ComfyUI's older and newer files
# (lightx2v writes both names too). IGNORED: not needed here. NVFP4_SCALES: the second scale of 4-bit weights.
SCALES, IGNORED = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
NVFP4_SCALES = (".weight_scale_2", ".weight_global_scale")
READ = "only fp8 and plain int8, with one scale or one for each row, are read"
REFUSED = ("nvfp4", "mxfp8", "mxfp4")  # ComfyUI's names of formats that are not read


@dataclass(frozen=True)
class ScaledEntry(Entry):
    """A weight that a file stores as two tensors: `stored`, in 8 bits, and `scale`, a single number or one number for
    each row. `read` returns their product in fp32.
    """

    stored: Entry | None = None
    scale: Entry | None = None

    @property
    def nbytes(self):
        return self.stored.nbytes + self.scale.nbytes

    @property
    def scratch_bytes(self):
        return 4 * self.numel + self.stored.nbytes

    @property
    def format(self):
        return self.stored.format

    def part(self, begin, end):
        stored, scale = self.stored.part(begin, end), self.scale
        scale = scale if scale.numel == 1 else scale.part(begin, end)
        return replace(self, shape=stored.shape, offset=stored.offset, stored=stored, scale=scale)

    def read(self, scratch=None):
        out = torch.empty(self.numel) if scratch is None else scratch[: 4 * self.numel].view(torch.float32)
        out = out.view(self.shape).copy_(self.stored.read(None if scratch is None else scratch[4 * self.numel :]))
        return out.mul_(self.scale.read().float().reshape(-1, *[1] * (len(self.shape) - 1)))


def check_quantization(file, text):
    """Raise BadInput if ComfyUI's JSON description of quantized weights names an unsupported format. text: the
    description of one layer or of all layers, as str or bytes, or None if there is none. file: named in the message.
    """
    try:
        layers = [json.loads(text or "{}")]
    except ValueError:
        raise BadInput(f"{file}: its description of 8-bit weights is not JSON") from None
    while layers:
        layer = layers.pop()
        if not isinstance(layer, dict):
            continue
        name = str(layer.get("format"))
        if layer.get("convrot") or name.startswith("convrot"):
            name = "ConvRot, which rotates them"
        if name.startswith("ConvRot") or name in REFUSED:
            raise BadInput(f"{file}: weights in {name}; {READ}")
        layers += layer.values()


def apply_scales(entries):
    """Replace every weight that has a scale with a ScaledEntry, and remove the tensors whose names end in one of
    SCALES or IGNORED. entries: a model's headers {name: Entry}, changed in place. Raises BadInput for unsupported
    quantized formats.
    """
    scales = {}
    for name in [n for n in entries if n.endswith(SCALES + IGNORED + NVFP4_SCALES)]:
        entry = entries.pop(name)
        if name.endswith(NVFP4_SCALES):
            raise BadInput(f"{entry.file}: weights in nvfp4; only fp8 and plain int8 with scales are read")
        if name.endswith(".comfy_quant"):
            check_quantization(entry.file, entry.read().numpy().tobytes())
        if name.endswith(SCALES):
            scales[name.rpartition(".")[0]] = entry
    for name, scale in scales.items():
        weight = entries.get(f"{name}.weight")
        if weight is None or scale.numel not in (1, weight.shape[0]) or not scale.dtype.is_floating_point:
            what = "no such weight" if weight is None else f"a weight {weight.shape} in {weight.format}"
            raise BadInput(f"{scale.file}: {name} has scales {scale.shape} in {scale.format} and {what}; {READ}")
        entries[f"{name}.weight"] = ScaledEntry(
            weight.file, torch.float32, weight.shape, weight.offset, stored=weight, scale=scale
        )
    for name, entry in entries.items():
        if name.endswith(".weight") and entry.dtype in (torch.int8, torch.uint8):
            raise BadInput(f"{entry.file}: {name} is in {entry.format} and has no scale")


def linears_in_fp8(entries):
    """Return {module name: fp8 dtype} of those linear layers in a DiT's blocks for which a file stores fp8 weights with
    scales. The loaded model keeps these weights in 8 bits.
    """
    return {
        name.removesuffix(".weight"): entry.stored.dtype
        for name, entry in entries.items()
        if name.startswith("blocks.") and isinstance(entry, ScaledEntry) and entry.stored.dtype in FP8
    }
