"""CLIP's visual tower against transformers' CLIPVisionModel, through files with the official names."""

import re

import pytest
import torch

from benchmarks import tiny
from benchmarks.tiny_animate import clip_state
from nanowan.errors import BadInput
from nanowan.formats import header
from nanowan.variants.animate import clip_vision
from nanowan.variants.animate.clip_vision import load_clip

DIM, FFN, LAYERS, PATCH, SIDE = 48, 72, 4, 6, 30


def released_layout():
    return clip_state(layers=LAYERS, sizes=dict(dim=DIM, ffn_dim=FFN, patch=PATCH, tokens=1 + (SIDE // PATCH) ** 2))


def write(folder, state):
    torch.save(state, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    return folder


def transformers_clip(state):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    peer = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=DIM,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
    )
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in peer.state_dict()) else ""
    renames = [
        (r"^visual\.patch_embedding", "embeddings.patch_embedding"),
        (r"^visual\.cls_embedding", "embeddings.class_embedding"),
        (r"^visual\.pos_embedding", "embeddings.position_embedding.weight"),
        (r"^visual\.pre_norm", "pre_layrnorm"),
        (r"^visual\.post_norm", "post_layernorm"),
        (r"^visual\.transformer\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
        (r"^visual\.transformer\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.out_proj"),
        (r"^visual\.transformer\.(\d+)\.mlp\.0", r"encoder.layers.\1.mlp.fc1"),
        (r"^visual\.transformer\.(\d+)\.mlp\.2", r"encoder.layers.\1.mlp.fc2"),
    ]
    theirs = {}
    for key, value in state.items():
        for a, b in renames:
            key = re.sub(a, b, key)
        if "to_qkv" in key:
            for part, piece in zip("qkv", value.chunk(3)):
                name = re.sub(
                    r"^visual\.transformer\.(\d+)\.attn\.to_qkv", rf"encoder.layers.\1.self_attn.{part}_proj", key
                )
                theirs[prefix + name] = piece
        elif not key.startswith(("visual.", "textual.", "log_scale")):
            theirs[prefix + key] = value[0, 0] if "class_" in key else value[0] if "position" in key else value
    peer.load_state_dict(theirs, strict=True)
    return peer.eval().requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_transformers(tmp_path, batch, report):
    state = released_layout()
    model, peer = load_clip(write(tmp_path, state)), transformers_clip(state)
    image = torch.randn(batch, 3, SIDE, SIDE)
    with torch.no_grad():
        want = peer(image, output_hidden_states=True).hidden_states[-2]
        got = model.visual(image)
    assert got.shape == (batch, 26, DIM)
    report("relative error", tiny.error(got, want), 2e-6)


def resized(x, side):
    """Bicubic with half-pixel centres, a = -0.75 and repeated borders, one output pixel at a time, in fp64."""

    def weights(n):
        w = torch.zeros(side, n, dtype=torch.float64)
        for i in range(side):
            at = (i + 0.5) * n / side - 0.5
            for j in range(int(at // 1) - 1, int(at // 1) + 3):
                d, a = abs(at - j), -0.75
                near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
                w[i, min(max(j, 0), n - 1)] += near if d <= 1 else far
        return w

    return weights(x.shape[-2]) @ x.double() @ weights(x.shape[-1]).T


@pytest.mark.parametrize("size", [(30, 30), (17, 64), (90, 41)])
def test_image_preparation(tmp_path, size, report):
    """Squeezed to the square without antialiasing, [-1,1] to [0,1], then normalised by CLIP's mean and deviation."""
    model = load_clip(write(tmp_path, released_layout()))
    image = torch.rand(2, 3, *size) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    with torch.no_grad():
        want = model.visual((((resized(image, SIDE) + 1) / 2 - mean) / std).float())
    report("relative error", tiny.error(model.encode(image), want), 2e-5)


def test_only_what_is_used_is_read(tmp_path, monkeypatch):
    state, read, original = released_layout(), [], header.Entry.read
    monkeypatch.setattr(
        header.Entry, "read", lambda self, scratch=None: read.append(self.shape) or original(self, scratch)
    )
    model = load_clip(write(tmp_path, state))
    assert len(read) == len(model.state_dict()) == 4 + 1 + 12 * (LAYERS - 1) and (41, 37) not in read
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_released_size():
    with torch.device("meta"):
        state = clip_vision.CLIP(1280, 5120, 31, 14, 257).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (611_086_080, 377)
    assert clip_vision.CLIP(16, 16, 0, 14, 257).side == 224


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("visual.transformer.1.norm2.bias"), r"1 missing \(visual.transformer.1.norm2.bias\)"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), r"1 unexpected \(visual.extra\)"),
        (lambda s: s.update({"other.tower": torch.zeros(1)}), r"1 unexpected \(other.tower\)"),
        (lambda s: s.update({"visual.pre_norm.bias": torch.zeros(7)}), r"mis-shaped \(visual.pre_norm.bias is \(7,\)"),
        (lambda s: s.pop("visual.patch_embedding.weight"), "not CLIP's visual tower, it has no visual.patch_embedding"),
        (lambda s: s.update({"visual.pos_embedding": torch.zeros(1, 25, DIM)}), "25 positions"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    change(state := released_layout())
    with pytest.raises(BadInput, match=message):
        load_clip(write(tmp_path, state))


def test_a_folder_without_clip_is_refused(tmp_path):
    with pytest.raises(BadInput, match="should hold CLIP .*found none"):
        load_clip(tmp_path)
