"""CLIP's towers against transformers' CLIPVisionModel and XLMRobertaModel, through files with the official names."""

import io
import math
import re

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import tiny
from benchmarks.tiny_animate import clip_state
from nanowan.errors import BadInput
from nanowan.formats import header
from nanowan.variants.animate.clip import (
    CLIP,
    TOKENIZER,
    ImageTower,
    TextTower,
    VisionEncoder,
    XlmRobertaTokenizer,
    load_clip,
    load_vision,
)

DIM, FFN, LAYERS, PATCH, SIDE = 48, 72, 4, 6, 30


def released_layout():
    return clip_state(layers=LAYERS, sizes=dict(dim=DIM, ffn_dim=FFN, patch=PATCH, tokens=1 + (SIDE // PATCH) ** 2))


def write(folder, state):
    torch.save(state, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    return folder


def transformers_clip(state, dim=DIM, ffn_dim=FFN, layers=LAYERS, patch=PATCH, side=SIDE):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    peer = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=dim,
            intermediate_size=ffn_dim,
            num_hidden_layers=layers,
            num_attention_heads=16,
            image_size=side,
            patch_size=patch,
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
    model, peer = load_vision(write(tmp_path, state)), transformers_clip(state)
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
    model = load_vision(write(tmp_path, released_layout()))
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
    model = load_vision(write(tmp_path, state))
    assert len(read) == len(model.state_dict()) == 4 + 1 + 12 * (LAYERS - 1) and (41, 37) not in read
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_released_size():
    with torch.device("meta"):
        state = VisionEncoder(1280, 5120, 31, 14, 257).state_dict()
        both = CLIP(
            ImageTower(1280, 5120, 32, 14, 257, 1024), TextTower(250_002, 514, 1024, 4096, 24, 1024)
        ).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (611_086_080, 377)
    # of the official XLMRobertaCLIP; in fp32 the 4.77 GB of the released file
    assert (sum(t.numel() for t in both.values()), len(both)) == (1_193_014_785, 784)
    assert VisionEncoder(16, 16, 0, 14, 257).visual.side == 224


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
        load_vision(write(tmp_path, state))


def test_a_folder_without_clip_is_refused(tmp_path):
    with pytest.raises(BadInput, match="should hold CLIP .*found none"):
        load_vision(tmp_path)


# ---- both towers -------------------------------------------------------------------------------------------------
OUT, VOCAB, POSITIONS, TEXT_DIM, TEXT_FFN, TEXT_LAYERS = 24, 140, 40, 32, 56, 3


def pieces():
    """A sentencepiece model with XLM-RoBERTa's special ids, as bytes."""
    lines = [
        "a red square moves left",
        "the quick brown fox jumps over the lazy dog",
        "一只猫在草地上",
        "50% & more, (naïve)!",
    ]
    out = io.BytesIO()
    ids = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    sizes = dict(vocab_size=90, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(5 * lines), model_writer=out, **ids, **sizes)
    return out.getvalue()


def both_towers(folder):
    """A small file of CLIP with the released layout, and its tokenizer; returns its tensors."""
    tokens = 1 + (SIDE // PATCH) ** 2
    text = TextTower(VOCAB, POSITIONS, TEXT_DIM, TEXT_FFN, TEXT_LAYERS, OUT)
    state = tiny.randomize(CLIP(ImageTower(DIM, FFN, LAYERS, PATCH, tokens, OUT), text), 5).state_dict()
    state["log_scale"] = torch.tensor(0.7)
    (folder / TOKENIZER).parent.mkdir()
    (folder / TOKENIZER).write_bytes(pieces())
    write(folder, state)
    return state


def transformers_text(state):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    sizes = dict(vocab_size=VOCAB, hidden_size=TEXT_DIM, intermediate_size=TEXT_FFN, num_hidden_layers=TEXT_LAYERS)
    sizes |= dict(num_attention_heads=16, max_position_embeddings=POSITIONS, type_vocab_size=1, layer_norm_eps=1e-5)
    peer = XLMRobertaModel(XLMRobertaConfig(**sizes), add_pooling_layer=False)
    renames = [
        (r"^token_embedding", "embeddings.word_embeddings"),
        (r"^type_embedding", "embeddings.token_type_embeddings"),
        (r"^pos_embedding", "embeddings.position_embeddings"),
        (r"^norm", "embeddings.LayerNorm"),
        (r"^blocks\.(\d+)\.attn\.q", r"encoder.layer.\1.attention.self.query"),
        (r"^blocks\.(\d+)\.attn\.k", r"encoder.layer.\1.attention.self.key"),
        (r"^blocks\.(\d+)\.attn\.v", r"encoder.layer.\1.attention.self.value"),
        (r"^blocks\.(\d+)\.attn\.o", r"encoder.layer.\1.attention.output.dense"),
        (r"^blocks\.(\d+)\.norm1", r"encoder.layer.\1.attention.output.LayerNorm"),
        (r"^blocks\.(\d+)\.ffn\.0", r"encoder.layer.\1.intermediate.dense"),
        (r"^blocks\.(\d+)\.ffn\.2", r"encoder.layer.\1.output.dense"),
        (r"^blocks\.(\d+)\.norm2", r"encoder.layer.\1.output.LayerNorm"),
    ]
    theirs = {}
    for key, value in state.items():
        if key.startswith("textual.") and ".head." not in key:
            key = key.removeprefix("textual.")
            for a, b in renames:
                key = re.sub(a, b, key)
            theirs[key] = value
    peer.load_state_dict(theirs, strict=True)
    return peer.eval().requires_grad_(False)


def test_texts_equal_transformers(tmp_path, report):
    """Theirs in one padded batch under a mask, with the mean over real tokens and CLIP's projection behind it; ours one
    at a time. Padding's embeddings are not zero here, so a position or token that is off by one shows.
    """
    state = both_towers(tmp_path)
    model, peer = load_clip(tmp_path), transformers_text(state)
    texts = ["a red fox", "the lazy dog jumps over (a) brown square, more! left " * 9, "猫"]
    rows = [model.tokenizer(text) for text in texts]
    assert len(rows[1]) == POSITIONS - 2 and len({len(row) for row in rows}) == 3
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    real = (ids != 1).long()
    states = peer(ids, attention_mask=real).last_hidden_state * real[..., None]
    pooled = states.sum(1) / real.sum(1, keepdim=True)
    want = F.gelu(pooled @ state["textual.head.0.weight"].T) @ state["textual.head.2.weight"].T
    report("relative error", tiny.error(model.encode_texts(texts), F.normalize(want, dim=1)), 2e-5)


def test_images_equal_transformers(tmp_path, report):
    """The class token after all blocks, its norm, and the projection. Pictures are squeezed to the square as Pillow's
    bicubic filter, which antialiases, does it.
    """
    state = both_towers(tmp_path)
    model, peer = load_clip(tmp_path), transformers_clip(state)
    image = torch.rand(2, 3, 50, 90) * 2 - 1
    channels = [Image.fromarray(c.numpy()).resize((SIDE, SIDE), Image.BICUBIC) for c in image.flatten(0, 1)]
    small = torch.stack([torch.from_numpy(np.array(c)) for c in channels]).view(2, 3, SIDE, SIDE)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pooled = peer(((small + 1) / 2 - mean) / std).pooler_output  # post_layernorm of the class token
    want = F.normalize(pooled @ state["visual.head"], dim=1)
    report("relative error", tiny.error(model.encode_images(image), want), 2e-5)


def test_the_scale_is_that_of_the_logits(tmp_path):
    both_towers(tmp_path)
    model = load_clip(tmp_path)
    images, texts = torch.eye(OUT)[:2], torch.eye(OUT)[:3]
    e = math.exp(math.exp(0.7))  # the file holds the scale's logarithm
    want = torch.tensor([[e, 1, 1], [1, e, 1]]) / (e + 2)
    assert torch.allclose(model.probabilities(images, texts), want)


TEXTS = [
    "a red square moves left",
    "A crimson wedge, halts!",
    "  the   lazy\tdog ",
    "\u4e00\u53ea\u732b runs",
    "\ufb01ne \u2460",
]
TEXTS += ["na\u00efve caf\u00e9 50%", "\u20ac\u20ac zzz \u20ac", "", "x" * 700, "a\u200bb", "don't stop!?"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_equal_transformers(tmp_path, text):
    from transformers import XLMRobertaTokenizer

    (tmp_path / "sentencepiece.bpe.model").write_bytes(pieces())
    peer = XLMRobertaTokenizer.from_pretrained(tmp_path)
    want = peer(text, truncation=True, max_length=512)["input_ids"]
    assert XlmRobertaTokenizer(pieces())(text).tolist() == want


def test_the_tokenizer_may_lie_beside_the_weights(tmp_path):
    both_towers(tmp_path)
    want = load_clip(tmp_path).encode_texts(["a fox"])
    (tmp_path / TOKENIZER).rename(tmp_path / "sentencepiece.bpe.model")
    assert torch.equal(load_clip(next(tmp_path.glob("models_clip*"))).encode_texts(["a fox"]), want)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"no model")
    with pytest.raises(BadInput, match="sentencepiece.bpe.model: not a sentencepiece model"):
        load_clip(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").unlink()
    with pytest.raises(BadInput, match="xlm-roberta-large/sentencepiece.bpe.model: no such file"):
        load_clip(tmp_path)


@pytest.mark.parametrize("name", ["textual.pos_embedding.weight", "visual.head", "log_scale", "textual.head.2.weight"])
def test_both_towers_are_read_strictly(tmp_path, name):
    state = both_towers(tmp_path)
    del state[name]
    with pytest.raises(BadInput, match=name.partition(".")[2] or name):
        load_clip(write(tmp_path, state))
