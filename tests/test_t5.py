"""The text encoder against transformers' UMT5EncoderModel, the tokenizer against transformers' T5 tokenizer."""

import json
import random
import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config

import diag
from benchmarks import tiny
from diagnostics.inspect import inspect
from nanowan.errors import BadInput
from nanowan.formats.header import read_header
from nanowan.formats.load import CastEntry
from nanowan.formats.lora import describe, kind_of_lora, read_lora
from nanowan.formats.t5 import (
    EncoderSpec,
    convert_t5,
    encoder_source,
    encoder_specs,
    load_t5,
    load_tokenizer,
    read_encoder_change,
    write_encoder_lora,
)
from nanowan.pipeline import Pipeline
from t5 import Norm, Tokenizer


@pytest.mark.parametrize("lens", [(1, 2), (40, 7), (130, 300), (512, 511)])
def test_equals_transformers(lens, report):
    model = tiny.text_encoder()
    peer = tiny.transformers_t5(model)
    lens = torch.tensor(lens)
    ids = torch.randint(3, 180, (2, int(lens.max())))
    mask = torch.arange(ids.shape[1]) < lens[:, None]
    ids = ids * mask
    with torch.no_grad():
        want = peer(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        got = model(ids, lens)
    report("relative error", tiny.error(got, want), 2e-5)


def test_norm_of_small_numbers(report):
    """Where epsilon is felt."""
    from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

    ours, peer = Norm(32), UMT5LayerNorm(32, eps=UMT5Config().layer_norm_epsilon)
    x = torch.randn(3, 5, 32) * 1e-3
    with torch.no_grad():
        ours.weight.normal_()
        peer.weight.copy_(ours.weight)
        report("relative error", tiny.error(ours(x), peer(x)), 1e-6)


def test_longest_prompt_length_is_enough(report):
    """Padding to 512, as the official code does, gives the same embeddings."""
    model = tiny.text_encoder()
    ids, lens = torch.randint(3, 180, (2, 9)), torch.tensor([9, 4])
    ids[1, 4:] = 0
    with torch.no_grad():
        short, full = model(ids, lens), model(torch.nn.functional.pad(ids, (0, 503)), lens)
    report("relative error", tiny.error(short, full[:, :9]), 2e-6)
    assert full[:, 9:].abs().max() == 0 and full[1, 4:].abs().max() == 0


def test_gradients_equal_transformers(report):
    model = tiny.text_encoder().requires_grad_(True)
    peer = tiny.transformers_t5(model).requires_grad_(True)
    ids, lens = torch.randint(3, 180, (2, 9)), torch.tensor([9, 9])
    weight = torch.sin(torch.arange(2 * 9 * tiny.TEXT_DIM)).view(2, 9, -1)
    (model(ids, lens) * weight).sum().backward()
    (peer(ids, attention_mask=torch.ones_like(ids)).last_hidden_state * weight).sum().backward()
    report("embedding gradient", tiny.error(model.token_embedding.weight.grad, peer.shared.weight.grad), 1e-4)
    theirs = peer.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
    report("position gradient", tiny.error(model.blocks[0].pos_embedding.embedding.weight.grad, theirs), 1e-4)


def test_gradient_through_the_dit_reaches_the_encoder():
    encoder, dit = tiny.text_encoder().requires_grad_(True), tiny.dit("t2v")
    emb = encoder(torch.randint(3, 180, (2, 6)), torch.tensor([6, 3]))
    dit(torch.randn(2, 16, 1, 4, 4), torch.tensor([500.0, 20.0]), emb, torch.tensor([6, 3])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.blocks.parameters())
    assert all(p.grad is None for p in dit.parameters())


def test_full_size_counts():
    from t5 import TextEncoder

    with torch.device("meta"):
        state = TextEncoder(256384, 4096, 4096, 10240, 64, 24).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (5_680_910_336, 242)


def strings():
    rng = random.Random(0)
    words = [
        "cat",
        "Square",
        "moves",
        "naïve",
        "café",
        "一只猫",
        "在草地上",
        "奔跑",
        "色调艳丽，",
        "🐱",
        "👩‍🚀",
        "&amp;",
        "&lt;b&gt;",
        "&amp;amp;",
        "\t",
        "\n\n",
        "\u00a0",
        "\u3000",
        "ﬁne",
        "ﾊﾛｰ",
        "½",
        "é",
        "Ω",
        "don't",
        "—",
        "“quoted”",
        "100%",
        "_",
        "<",
        ">",
        "#",
        "...",
        "</s>",
        "<pad>",
        "a" * 40,
        "Привет",
        "مرحبا",
        "x²",
    ]
    made = [
        "",
        " ",
        "a",
        "🐱",
        "a red square moves left",
        "word " * 600,
        "一" * 600,
        " leading and trailing  ",
        "schÃ¶n",
        "&nbsp;",
        "a </s> cat",
        "<pad>",
        "x<unk>y </s></s>",
        "&lt;/s&gt; end",
        "<extra_id_0>",
    ]
    return made + [
        rng.choice(["", " "]).join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(rng.randint(1, 30)))
        for _ in range(520)
    ]


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_tokens_equal_transformers(tmp_path, byte_fallback):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(tiny.spiece(byte_fallback))
    ours = Tokenizer(tiny.spiece(byte_fallback))
    peer = T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    texts = strings()
    assert len(texts) >= 500
    wrong = []
    for text in texts:
        ids, lens = ours([text])
        want = peer(Tokenizer.clean(text), truncation=True, max_length=512)["input_ids"]
        if ids[0].tolist() != want:
            wrong.append((text, ids[0].tolist()[:20], want[:20]))
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]}"


def test_a_long_prompt_keeps_its_end_token():
    ids, lens = Tokenizer(tiny.spiece())(["word " * 600, "cat"])
    assert (
        ids.shape[1] == 512 == lens[0] and ids[0, -1] == 1 and ids[1, lens[1] - 1] == 1 and ids[1, lens[1] :].sum() == 0
    )


def test_missing_tokenizer_is_named(checkpoints, tmp_path):
    import shutil

    shutil.copytree(checkpoints["ti2v"], tmp_path / "c")
    (tmp_path / "c" / "google" / "umt5-xxl" / "spiece.model").unlink()
    with pytest.raises(BadInput, match="spiece.model: no such file"):
        load_t5(tmp_path / "c")


def test_what_a_tokenizer_json_adds(tmp_path):
    """More special tokens, and bytes for what no piece spells; only to the tokenizer that is a file beside it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(tiny.spiece(byte_fallback=True))
    plain = load_tokenizer(tmp_path)
    text = "<extra_id_0>🐱"
    assert plain.ids("🐱")[-1] == 2 and 150 not in plain.ids(text)
    added = {"added_tokens": [{"content": "<extra_id_0>", "id": 150}], "model": {"byte_fallback": True}}
    (folder / "tokenizer.json").write_text(json.dumps(added))
    beside = load_tokenizer(tmp_path)
    pieces = [beside.pieces.id_to_piece(i) for i in beside.ids(text)[1:]]
    assert beside.ids(text)[0] == 150 and pieces[-4:] == ["<0xF0>", "<0x9F>", "<0x90>", "<0xB1>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    spiece = torch.frombuffer(bytearray(tiny.spiece(byte_fallback=True)), dtype=torch.uint8)
    save_file({"spiece_model": spiece}, tmp_path / "x.safetensors")
    inside = load_tokenizer(tmp_path / "elsewhere", read_header(tmp_path / "x.safetensors")[0]["spiece_model"])
    assert inside.ids(text) == plain.ids(text)


def test_entities_are_unescaped_twice():
    """As the official cleaning does; ftfy does it once more, but only in a text without "<"."""
    assert Tokenizer.clean("a < b &amp;amp;amp; c &amp;lt;") == "a < b &amp; c <"


# ---- files of others ---------------------------------------------------------------------------------------------
PROMPTS = ["a red square moves left", "一只猫 </s> cat", ""]


def transformers_state(dtype=torch.float32):
    """The tiny encoder with transformers' names, by transformers."""
    state = tiny.transformers_t5(tiny.text_encoder()).state_dict()
    return {k: v.to(dtype).contiguous() for k, v in state.items() if k != "encoder.embed_tokens.weight"}


def spiece_tensor():
    return torch.frombuffer(bytearray(tiny.spiece()), dtype=torch.uint8)


def comfyui(path, dtype=torch.float16):
    save_file(transformers_state(dtype) | {"spiece_model": spiece_tensor()}, path)
    return path


def scaled(path, end=".scale_weight", rows=False):
    """fp8_e4m3fn_scaled: the linears of blocks in 8 bits, each with a scale, or one per row; the rest in fp16."""
    state = transformers_state()
    for key in [k for k in state if "layer.0.SelfAttention." in k or "DenseReluDense" in k]:
        if "relative_attention_bias" in key:
            continue
        w = state[key]
        scale = (w.abs().amax(1, keepdim=True) if rows else w.abs().amax()) / 448
        state[key], state[key.removesuffix(".weight") + end] = (w / scale).to(torch.float8_e4m3fn), scale
        state[key.removesuffix(".weight") + ".scale_input"] = torch.ones(())
    other = {k: v.half() if v.dtype == torch.float32 and "scale" not in k else v for k, v in state.items()}
    mark = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "spiece_model": spiece_tensor()}
    save_file(other | mark, path)
    return path


def embedded(encoder):
    with torch.no_grad():
        return encoder.encode(PROMPTS)[0]


@pytest.fixture(scope="module")
def official():
    model = tiny.text_encoder()
    model.tokenizer = Tokenizer(tiny.spiece())
    return embedded(model)


@pytest.mark.parametrize("name", ["umt5_xxl_fp16.safetensors", "UMT5_XXL_fp16.safetensors"])
def test_comfyui_in_a_folder(tmp_path, official, name, report):
    """Found by its name; without a spiece.model in the folder, the tokenizer inside is used."""
    comfyui(tmp_path / name, torch.float32)
    got = load_t5(tmp_path, dtype=torch.float32)
    assert torch.equal(embedded(got), official)
    comfyui(tmp_path / name)
    report("fp16 weights", tiny.error(embedded(load_t5(tmp_path, dtype=torch.float32)), official), 5e-3)


def test_comfyui_as_text_encoder(checkpoints, tmp_path, official):
    """Known by its content, whatever it is called."""
    file = comfyui(tmp_path / "clip.safetensors", torch.float32)
    assert encoder_source(checkpoints["ti2v"], file) == ([file], [])
    assert torch.equal(embedded(load_t5(checkpoints["ti2v"], dtype=torch.float32, weights=file)), official)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(tiny.spiece())
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"added_tokens": [{"content": "<x>", "id": 7}]}')
    assert load_t5(tmp_path, weights=file).tokenizer.ids("<x>") == [7], "the folder's own tokenizer goes first"


def test_what_comfyuis_clipsave_adds_is_ignored(tmp_path, official):
    save_file(transformers_state() | {"logit_scale": torch.tensor(4.6)}, tmp_path / "umt5_xxl_saved.safetensors")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(tiny.spiece())
    assert torch.equal(embedded(load_t5(tmp_path, dtype=torch.float32)), official)


@pytest.mark.parametrize("end, rows", [(".scale_weight", False), (".weight_scale", True)])
def test_8_bits_with_scales(tmp_path, official, end, rows, report):
    """Exactly the products; e4m3's own error, up to 1/16 of each weight, remains."""
    file = scaled(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", end, rows)
    got, raw = load_t5(tmp_path, dtype=torch.float32), load_file(file)
    for ours, theirs in (
        ("attn.o", "layer.0.SelfAttention.o"),
        ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
        ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
        ("ffn.fc2", "layer.1.DenseReluDense.wo"),
    ):
        key = f"encoder.block.1.{theirs}"
        want = raw[f"{key}.weight"].float() * raw[f"{key}{end}"]
        assert torch.equal(got.get_submodule(f"blocks.1.{ours}").weight, want)
    report("8 bits", tiny.error(embedded(got), official), 0.15)
    assert tiny.error(embedded(got), official) > 1e-3, "the weights are not in 8 bits: the comparison would be empty"


def test_kijais_file_names(tmp_path, official):
    for dtype, name in ((torch.float32, "bf16"), (torch.float8_e4m3fn, "fp8_e4m3fn")):
        folder = tmp_path / name
        folder.mkdir()
        state = {k: v.to(dtype) if ".attn." in k else v for k, v in tiny.text_encoder().state_dict().items()}
        save_file(state, folder / f"umt5-xxl-enc-{name}.safetensors")
        (folder / "google" / "umt5-xxl").mkdir(parents=True)
        (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(tiny.spiece())
        model = load_t5(folder, dtype=torch.float32)
        if name == "bf16":
            assert torch.equal(embedded(model), official)
        assert torch.equal(model.blocks[1].attn.v.weight, state["blocks.1.attn.v.weight"].float())


def test_a_folder_of_diffusers(tmp_path, official):
    """Shards with their index in text_encoder/, the tokenizer in tokenizer/; transformers may save the table twice."""
    state, folder = transformers_state(), tmp_path / "text_encoder"
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    folder.mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(tiny.spiece())
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    for name, part in zip(names, parts):
        save_file(part, folder / name)
    index = {key: name for name, part in zip(names, parts) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(embedded(load_t5(tmp_path, dtype=torch.float32)), official)


def test_a_delta_to_an_encoder_of_comfyui(tmp_path):
    comfyui(tmp_path / "umt5_xxl_fp16.safetensors", torch.float32)
    delta = {"blocks.1.ffn.fc1.weight": torch.zeros(40, 32), "token_embedding.rows": torch.full((2, 32), 3.0)}
    delta["token_embedding.ids"] = torch.tensor([5, 9])
    save_file(delta, tmp_path / "delta.safetensors", {"delta": "True"})
    old, new = (load_t5(tmp_path, dtype=torch.float32, weights=w) for w in (None, tmp_path / "delta.safetensors"))
    changed = [n for n, p in new.named_parameters() if not torch.equal(p, old.get_parameter(n))]
    assert changed == ["token_embedding.weight", "blocks.1.ffn.fc1.weight"]
    rows = (new.token_embedding.weight != old.token_embedding.weight).any(1).nonzero().flatten()
    assert rows.tolist() == [5, 9] and (new.token_embedding.weight[[5, 9]] == 3).all()


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_there_and_back_the_same_bits(tmp_path, layout):
    state = {k: v.bfloat16() for k, v in tiny.text_encoder().state_dict().items()}
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "spiece.model").write_bytes(tiny.spiece())
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert_t5(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", there, layout, tmp_path / "spiece.model")
    expected = set(transformers_state()) | ({"spiece_model"} if layout == "comfyui" else set())
    assert set(load_file(there)) == expected
    if layout == "comfyui":
        assert bytes(load_file(there)["spiece_model"].numpy()) == tiny.spiece()
        convert_t5(there, tmp_path / "again.safetensors", "comfyui")  # the tokenizer stays inside
        assert (tmp_path / "again.safetensors").read_bytes() == there.read_bytes()
    convert_t5(there, back, "official")
    got = load_file(back)
    assert got.keys() == state.keys()
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, state[k]) for k, v in got.items())


def test_transformers_loads_what_is_converted(tmp_path, official, report):
    """A folder with its own config.json, by strict loading; and it is read here, by itself or in diffusers' folder."""
    from transformers import UMT5EncoderModel

    source, folder = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "text_encoder"
    torch.save(tiny.text_encoder().state_dict(), source)
    convert_t5(source, folder, "diffusers")
    peer, info = UMT5EncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    config = tiny.transformers_t5(tiny.text_encoder()).config
    for name in json.loads((folder / "config.json").read_text()).keys() - {"architectures", "tie_word_embeddings"}:
        assert getattr(peer.config, name) == getattr(config, name), name
    ids, lens = Tokenizer(tiny.spiece())(PROMPTS)
    mask = torch.arange(ids.shape[1]) < lens[:, None]
    with torch.no_grad():
        want = peer.eval()(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    report("relative error", tiny.error(official, want), 2e-5)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(tiny.spiece())
    for given in (dict(), dict(weights=folder)):
        assert torch.equal(embedded(load_t5(tmp_path, dtype=torch.float32, **given)), official)
    with pytest.raises(BadInput, match="elsewhere: should end in .safetensors"):
        convert_t5(source, tmp_path / "elsewhere", "official")


@pytest.fixture
def reads(monkeypatch):
    """The tensors that are read from files, as weak references; at each read, how many earlier ones are still alive."""
    from nanowan.formats.header import Entry

    real, tensors, alive = Entry.read, [], []

    def read(self, *args):
        alive.append(sum(t() is not None and t().numel() > 64 for t in tensors))
        tensor = real(self, *args)
        tensors.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Entry, "read", read)
    return tensors, alive


def test_one_tensor_at_a_time_is_converted(tmp_path, reads):
    comfyui(tmp_path / "x.safetensors")
    convert_t5(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "official")
    tensors, alive = reads
    assert len(tensors) == len(tiny.text_encoder().state_dict()) and max(alive) <= 1


@pytest.mark.parametrize("make", [comfyui, scaled, partial(scaled, rows=True)])
def test_weights_are_cast_slice_by_slice(tmp_path, monkeypatch, reads, make):
    """The loader holds no second copy of any of them, and the slices make the same whole."""
    make(tmp_path / "x.safetensors")
    want = load_t5(tmp_path, dtype=torch.float32, weights=tmp_path / "x.safetensors").state_dict()
    monkeypatch.setattr("nanowan.formats.load.SLICE", 300)
    whole = []
    monkeypatch.setattr(
        CastEntry, "read", lambda self, scratch=None, real=CastEntry.read: whole.append(1) or real(self)
    )
    got = load_t5(tmp_path, dtype=torch.float32, weights=tmp_path / "x.safetensors").state_dict()
    assert len(whole) == len(want) and all(torch.equal(got[n], want[n]) for n in want)
    table = got["token_embedding.weight"]
    assert len(reads[0]) > len(want) + table.numel() * 2 // 300


def test_8_bits_with_scales_become_bf16(tmp_path):
    """And nothing else changes its kind."""
    file = scaled(tmp_path / "x.safetensors")
    convert_t5(file, tmp_path / "y.safetensors", "official")
    got, raw = load_file(tmp_path / "y.safetensors"), load_file(file)
    key = "encoder.block.1.layer.0.SelfAttention.q"
    want = (raw[f"{key}.weight"].float() * raw[f"{key}.scale_weight"]).bfloat16()
    assert torch.equal(got["blocks.1.attn.q.weight"], want)
    assert (
        torch.equal(got["token_embedding.weight"], raw["shared.weight"]) and got["norm.weight"].dtype == torch.float16
    )


def test_refused_files_say_why(tmp_path):
    state = {k: v.clone() for k, v in tiny.text_encoder().state_dict().items()}
    part = {k: v for k, v in state.items() if k != "blocks.1.norm2.weight"}
    theirs = transformers_state()
    q = "encoder.block.0.layer.0.SelfAttention.q"
    for tensors, metadata, message in (
        (part, None, "1 missing \\(blocks.1.norm2.weight"),
        ({**state, "x.weight": torch.zeros(2)}, None, "1 unexpected \\(x.weight"),
        ({**theirs, "encoder.block.0.layer.2.x.weight": torch.zeros(2)}, None, "1 unexpected"),
        ({**theirs, f"{q}.scale_weight": torch.ones(3)}, None, "SelfAttention.q has scales \\(3,\\)"),
        ({**theirs, "nothing.scale_weight": torch.ones(1)}, None, "nothing has scales .* no such weight"),
        ({**theirs, "spiece_model": torch.zeros(9)}, None, "spiece_model is torch.float32"),
        ({"blocks.0.norm1.weight": state["blocks.0.norm1.weight"]}, {"delta": "True"}, "a delta, not a whole encoder"),
        ({"patch_embedding.weight": torch.zeros(2, 2)}, None, "not a UMT5 encoder"),
        (state, None, "needs one: give its spiece.model"),
    ):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors", metadata)
        with pytest.raises(BadInput, match=message):
            convert_t5(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "comfyui")
    assert not (tmp_path / "y.safetensors").exists()
    save_file(theirs | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "umt5_xxl_fp16.safetensors")
    with pytest.raises(BadInput, match="not a sentencepiece model"):
        load_t5(tmp_path)
    with pytest.raises(BadInput, match="found none"):
        load_t5(tmp_path.parent)
    (tmp_path / "models_t5_a.pth").touch()
    (tmp_path / "models_t5_b.pth").touch()
    with pytest.raises(BadInput, match="found 2"):
        encoder_source(tmp_path)


# ---- changes to an encoder ---------------------------------------------------------------------------------------
BLOCKS = ("blocks.0.attn.q", "blocks.1.attn.o", "blocks.0.ffn.gate.0", "blocks.1.ffn.fc1", "blocks.1.ffn.fc2")
THEIRS = (
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.1.layer.0.SelfAttention.o",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "encoder.block.1.layer.1.DenseReluDense.wi_1",
    "encoder.block.1.layer.1.DenseReluDense.wo",
)
PREFIX = "text_encoders.umt5xxl.transformer."
IDS = torch.tensor([9, 5, 101])


def trained_encoder(seed=3):
    """(an encoder that was tuned, {module: (A, B)}, the rows' differences): what write_encoder_lora is given."""
    g = torch.Generator().manual_seed(seed)
    model, blocks = tiny.text_encoder(), {}
    for name in BLOCKS:
        weight = model.get_submodule(name).weight
        a, b = torch.randn(2, weight.shape[1], generator=g) / 8, torch.randn(len(weight), 2, generator=g) / 8
        weight.add_(b @ a)
        blocks[name] = a, b
    rows = torch.randn(3, tiny.TEXT_DIM, generator=g)
    model.token_embedding.weight[IDS] += rows
    return model, blocks, rows


@pytest.fixture
def ckpt(tmp_path):
    torch.save(tiny.text_encoder().state_dict(), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(tiny.spiece())
    return tmp_path


def encoder_lora(path, seed=3, **more):
    _, blocks, rows = trained_encoder(seed)
    write_encoder_lora(path, blocks, rows, IDS, {"step": 7}, vocab=200, **more)
    return path


def weights_of(ckpt, weights):
    return load_t5(ckpt, dtype=torch.float32, weights=weights).state_dict()


def largest_difference(got, want):
    assert got.keys() == want.keys()
    return max((got[name] - want[name]).abs().max().item() for name in want)


@pytest.mark.parametrize("compact", [False, True])
def test_an_encoder_with_its_lora_is_the_trained_one(ckpt, compact, report):
    file = encoder_lora(ckpt / "words.safetensors", compact=compact)
    want = trained_encoder()[0]
    got = load_t5(ckpt, dtype=torch.float32, weights=file)
    report("weights", largest_difference(got.state_dict(), want.state_dict()), 1e-6)
    want.tokenizer = got.tokenizer
    report("embeddings", tiny.error(embedded(got), embedded(want)), 2e-6)
    base = load_t5(ckpt, dtype=torch.float32)
    assert tiny.error(embedded(base), embedded(want)) > 0.05, "next to nothing changes: the comparison would be empty"
    others = torch.ones(200, dtype=torch.bool).index_fill(0, IDS, False)
    assert torch.equal(got.token_embedding.weight[others], base.token_embedding.weight[others])


def test_the_names_that_comfyui_reads(ckpt):
    """transformers' behind its own prefix, scaled, without alpha; the rows as a LoRA of the table with a one-hot B."""
    _, blocks, rows = trained_encoder()
    state = load_file(encoder_lora(ckpt / "words.safetensors"))
    want = {
        f"{PREFIX}{theirs}.lora_{p}.weight": t
        for ours, theirs in zip(BLOCKS, THEIRS)
        for p, t in zip("AB", blocks[ours])
    }
    assert state.keys() == want.keys() | {f"{PREFIX}shared.lora_{p}.weight" for p in "AB"}
    assert all(torch.equal(state[key], want[key]) for key in want)
    assert torch.equal(state[f"{PREFIX}shared.lora_A.weight"], rows)
    one_hot = state[f"{PREFIX}shared.lora_B.weight"]
    assert one_hot.shape == (200, 3) and one_hot.sum() == 3 and all(one_hot[i, j] == 1 for j, i in enumerate(IDS))
    compact = encoder_lora(ckpt / "small.safetensors", compact=True)
    assert load_file(compact).keys() == state.keys() - {f"{PREFIX}shared.lora_B.weight"} | {f"{PREFIX}shared.ids"}


def whole(path, seed):
    save_file(tiny.text_encoder(seed).state_dict(), path)
    return path


def delta(path):
    tensors = {"blocks.1.ffn.fc1.weight": torch.full((40, 32), 0.5), "token_embedding.rows": torch.full((3, 32), 3.0)}
    save_file(tensors | {"token_embedding.ids": IDS}, path, {"delta": "True"})
    return path


def test_strengths_and_order(ckpt):
    """Of whole encoders and deltas W + s (W_file - W), of a LoRA W + s B A, one after the other."""
    full, words, tuned = (
        whole(ckpt / "f.safetensors", 77),
        encoder_lora(ckpt / "w.safetensors"),
        delta(ckpt / "d.safetensors"),
    )
    base, other = tiny.text_encoder().state_dict(), tiny.text_encoder(77).state_dict()
    change = {name: t - base[name] for name, t in trained_encoder()[0].state_dict().items()}
    fc1, table = "blocks.1.ffn.fc1.weight", "token_embedding.weight"

    def check(weights, want):
        assert largest_difference(weights_of(ckpt, weights), want) < 2e-6

    check(None, base)
    check(f"{full}", other)
    check(f"{full}:0.3", {n: w + 0.3 * (other[n] - w) for n, w in base.items()})
    check([f"{words}:-0.5"], {n: w - 0.5 * change[n] for n, w in base.items()})
    check([full, (words, 2.0)], {n: w + 2 * change[n] for n, w in other.items()})
    assert torch.equal(weights_of(ckpt, [words, full])[table], other[table]), "a whole encoder replaces what was before"
    blended = {n: w + change[n] for n, w in base.items()}
    blended = {n: w + 0.25 * (other[n] - w) for n, w in blended.items()}
    for half in (1.0, 0.5):
        want = {n: w.clone() for n, w in blended.items()}
        want[fc1] += half * (0.5 - want[fc1])
        want[table][IDS] += half * (3 - want[table][IDS])
        check([str(words), f"{full}:0.25", f"{tuned}:{half}"], want)


@pytest.mark.parametrize("make", [comfyui, scaled, partial(scaled, rows=True)])
def test_changes_over_encoders_of_other_layouts(ckpt, monkeypatch, make):
    """Slice by slice too."""
    make(ckpt / "x.safetensors")
    words = encoder_lora(ckpt / "w.safetensors")
    base, other = weights_of(ckpt, ckpt / "x.safetensors"), tiny.text_encoder().state_dict()
    change = {name: t - other[name] for name, t in trained_encoder()[0].state_dict().items()}
    want = {n: w + change[n] for n, w in base.items()}
    assert largest_difference(weights_of(ckpt, [ckpt / "x.safetensors", words]), want) < 1e-6
    monkeypatch.setattr("nanowan.formats.changes.SLICE", 300)
    want = {n: w + 0.5 * (base[n] - w) for n, w in other.items()}
    assert largest_difference(weights_of(ckpt, f"{ckpt / 'x.safetensors'}:0.5"), want) < 1e-6


def test_a_text_encoder_folder_as_a_change(ckpt, tmp_path):
    convert_t5(whole(ckpt / "f.safetensors", 77), ckpt / "folder", "diffusers")
    assert torch.equal(weights_of(ckpt, ckpt / "folder")["norm.weight"], tiny.text_encoder(77).norm.weight)
    want = (tiny.text_encoder().norm.weight + tiny.text_encoder(77).norm.weight) / 2
    assert (weights_of(ckpt, f"{ckpt / 'folder'}:0.5")["norm.weight"] - want).abs().max() < 1e-6


def test_digests_of_an_encoder(ckpt):
    """One for each file, as ever; a strength other than 1 stands behind its file's, and the order counts."""
    own = ckpt / "models_t5_umt5-xxl-enc-bf16.pth"
    full, words, tuned = (
        whole(ckpt / "f.safetensors", 77),
        encoder_lora(ckpt / "w.safetensors"),
        delta(ckpt / "d.safetensors"),
    )

    def digests(weights):
        return encoder_source(ckpt, weights).digests(lambda file: file.name)

    assert digests(None) == [own.name] and digests(full) == digests([words, full]) == ["f.safetensors"]
    assert digests(str(tuned)) == [own.name, "d.safetensors"]
    assert digests([f"{words}:0.5", f"{full}:0.5", tuned]) == [
        own.name,
        "w.safetensors:0.5",
        "f.safetensors:0.5",
        "d.safetensors",
    ]
    assert digests([tuned, words]) != digests([words, tuned])


def test_words_with_rows_of_their_own(ckpt):
    """Of train_te.py's placeholders: the tokenizer knows them wherever they are used, also once converted."""
    _, blocks, rows = trained_encoder()
    metadata = {"placeholders": json.dumps({"crimson": [9, 101]})}
    write_encoder_lora(ckpt / "w.safetensors", blocks, rows, IDS, metadata, vocab=200)
    save_file(tiny.text_encoder().state_dict(), ckpt / "f.safetensors", metadata)
    convert_t5(ckpt / "f.safetensors", ckpt / "c.safetensors", "comfyui", ckpt / "google" / "umt5-xxl" / "spiece.model")
    plain = load_t5(ckpt).tokenizer.ids("a crimson square")
    for name in "wfc":
        ids = load_t5(ckpt, weights=ckpt / f"{name}.safetensors").tokenizer.ids("a crimson square")
        assert ids != plain and [i for i in ids if i in (9, 101)] == [9, 101]


def test_a_word_with_rows_is_read_as_a_word_and_the_longest_first():
    """Not within a longer word; of a phrase and its last word, both with rows, the phrase where it stands."""
    plain, taught = Tokenizer(tiny.spiece()), Tokenizer(tiny.spiece())
    taught.add_words({"fox": [101], "red fox": [102, 103], "red": [104]})
    for text in ("foxes", "firefox", "a redder dog"):
        assert taught.ids(text) == plain.ids(text), text
    special = [i for i in taught.ids("a red fox, a fox, a red dog") if i > 100]
    assert [i for i in special if i in (101, 102, 103, 104)] == [102, 103, 101, 104]


def test_specs_of_an_encoder(tmp_path):
    (tmp_path / "x:2").touch()
    for text, want in (
        ("a.safetensors", ("a.safetensors", 1)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("d:/a.safetensors", ("d:/a.safetensors", 1)),
        ("d:/a.safetensors:-1", ("d:/a.safetensors", -1)),
        (f"{tmp_path}/x:2", (f"{tmp_path}/x:2", 1)),
    ):
        assert [(str(s.file), s.strength) for s in encoder_specs(text)] == [want]
    assert encoder_specs(None) == [] and encoder_specs([("a", 2.0)]) == encoder_specs(["a:2"])
    with pytest.raises(BadInput, match="--text_encoder a:nan: a strength of nan; give a number"):
        encoder_specs(["a:nan"])


def test_loras_of_both_models(checkpoints, tmp_path, ckpt):
    """--lora takes them: each goes to its model; a text encoder's is none for an expert, nor a DiT's one for it."""
    words = encoder_lora(tmp_path / "words.safetensors")
    a, b = torch.randn(2, 48), torch.randn(48, 2)
    key = "diffusion_model.blocks.0.cross_attn.k"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    style = tmp_path / "style.safetensors"
    save_file(tensors, style)
    save_file(tensors | load_file(words), tmp_path / "both.safetensors")
    assert (kind_of_lora(words), kind_of_lora(style)) == ("text", "dit")
    pipe = Pipeline(checkpoints["ti2v"], loras=[f"{style}:0.5", f"{words}:0.5"], text_encoder=[str(words)])
    assert pipe.loras == [(str(style), 0.5, {"dit"})]
    assert pipe.text_encoder == [EncoderSpec(words, 1.0), EncoderSpec(words, 0.5)]
    base, change = tiny.text_encoder().state_dict(), trained_encoder()[0].state_dict()
    want = {n: w + 1.5 * (change[n] - w) for n, w in base.items()}
    assert largest_difference(pipe.acquire("text").state_dict(), want) < 2e-6
    assert not torch.equal(
        pipe.acquire("dit").blocks[0].cross_attn.k.weight, tiny.dit("ti2v").blocks[0].cross_attn.k.weight
    )
    with pytest.raises(BadInput, match="a LoRA of the text encoder, which has no experts"):
        Pipeline(checkpoints["t2v"], loras=[f"{words}:high"])
    with pytest.raises(BadInput, match="both.safetensors: changes a DiT and the text encoder; give them as two files"):
        Pipeline(checkpoints["ti2v"], loras=[str(tmp_path / "both.safetensors")])
    with pytest.raises(BadInput, match="a LoRA of the text encoder, where one of a DiT is wanted"):
        read_lora(words)
    with pytest.raises(BadInput, match="a LoRA of a DiT, where one of the text encoder is wanted"):
        load_t5(ckpt, weights=style)


def test_a_change_of_another_encoder_is_refused(checkpoints, tmp_path, ckpt):
    _, blocks, rows = trained_encoder()
    for change, what in (
        ({"blocks": {"blocks.7.attn.q": blocks["blocks.0.attn.q"]}}, "blocks.7.attn.q.weight is not there"),
        ({"blocks": {"blocks.0.attn.k": blocks["blocks.1.ffn.fc2"]}}, r"blocks.0.attn.k.weight is \(24, 32\) there"),
        ({"blocks": {}, "rows": rows, "ids": IDS + 150}, r"token_embedding.weight is \(200, 32\) there"),
        ({"blocks": {}, "rows": rows, "ids": IDS - max(IDS) + 200}, r"token_embedding.weight is \(200, 32\) there"),
        ({"blocks": {}, "rows": rows[:, :8], "ids": IDS}, r"token_embedding.weight is \(200, 32\) there"),
    ):
        write_encoder_lora(tmp_path / "x.safetensors", **change, vocab=400, compact=True)
        with pytest.raises(BadInput, match=f"x.safetensors: not a change of .*models_t5.*: {what}"):
            load_t5(ckpt, weights=tmp_path / "x.safetensors")
        with pytest.raises(BadInput, match="not a change of"):
            Pipeline(checkpoints["ti2v"], loras=[str(tmp_path / "x.safetensors")])


def test_other_changes_under_comfyuis_names(ckpt):
    """alpha, differences of norms and position tables, and names without umt5xxl."""
    key, a, b = "text_encoders.transformer.encoder.block.0.layer.0", torch.randn(2, 32), torch.randn(24, 2)
    d, e = torch.randn(32) / 8, torch.randn(32, 3)
    tensors = {f"{key}.SelfAttention.k.lora_down.weight": a, f"{key}.SelfAttention.k.lora_up.weight": b}
    tensors |= {f"{key}.SelfAttention.k.alpha": torch.tensor(6.0), f"{key}.layer_norm.diff": d}
    tensors[f"{key}.SelfAttention.relative_attention_bias.diff"] = e
    save_file(tensors, ckpt / "x.safetensors")
    want = tiny.text_encoder().state_dict()
    for name, change in (("attn.k", 3 * b @ a), ("norm1", d), ("pos_embedding.embedding", e)):
        want[f"blocks.0.{name}.weight"] += change
    assert largest_difference(weights_of(ckpt, ckpt / "x.safetensors"), want) < 2e-6


def test_a_lora_of_the_encoder_is_described_measured_and_converted(ckpt, tmp_path, report):
    words, small = encoder_lora(tmp_path / "w.safetensors"), encoder_lora(tmp_path / "c.safetensors", compact=True)
    for file in (words, small):
        (model,) = inspect(file)
        assert (model["kind"], model["model"], model["blocks"]) == ("text_encoder_lora", "text", [0, 1])
        assert model["ranks"] == {2: 5}
        assert "a LoRA of the text encoder" in model["summary"] and "3 embedding rows" in model["summary"]
        trained, base = trained_encoder()[0].state_dict(), tiny.text_encoder().state_dict()
        rows = {r["name"]: r for r in diag.delta.delta(file, ckpt)}
        assert rows.keys() == {*BLOCKS, "token_embedding"}
        for name, row in rows.items():
            moved, weight = trained[f"{name}.weight"] - base[f"{name}.weight"], base[f"{name}.weight"]
            report(name, abs(row["ratio"] / (moved.norm() / weight.norm()).item() - 1), 1e-5)
    for file in (words, small):
        diag.convert.run(diag.arguments(["convert", str(file), str(tmp_path / "out.safetensors"), "--to", "comfyui"]))
        got, want = load_file(tmp_path / "out.safetensors"), load_file(words)
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(BadInput, match="--to musubi: of a LoRA of the text encoder, comfyui"):
        diag.convert.run(diag.arguments(["convert", str(words), str(tmp_path / "o.safetensors"), "--to", "musubi"]))
    with pytest.raises(BadInput, match="only a LoRA file of a DiT can be held to a cap"):
        diag.delta.run(
            diag.arguments(["delta", str(words), "--ckpt", str(ckpt), "--cap", "1", "--out", "o.safetensors"])
        )
    assert describe(words)["metadata"]["step"] == "7" and set(read_encoder_change(small)) == set(
        read_encoder_change(words)
    )
