"""Checkpoints as others write them: diffusers' folders, and GGUF files. Those in 8 bits are in test_fp8.py."""

import json
import shutil
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diag
from benchmarks import tiny, tiny_animate
from diagnostics.convert import convert_dit
from diagnostics.delta import pair_up
from diagnostics.inspect import inspect
from diagnostics.plan import planned
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.formats.gguf import decode
from nanowan.formats.header import read_header
from nanowan.formats.layouts import official_vae_name, read_weights
from nanowan.formats.load import cast
from nanowan.formats.t5 import load_t5, load_tokenizer
from nanowan.formats.vae import load_vae
from sample import generate, load
from t5 import Tokenizer


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def latents(folder, kind):
    """Those of a clip of 5 frames, in one step of each expert."""
    image = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)) if kind != "t2v" else None
    size = (64, 64) if kind == "ti2v" else (64, 48)
    settings = dict(size=size, frames=5, steps=2, shift=1.0)
    return generate(load(folder), "a cat", image, seed=3, progress=False, **settings)[1]


# ---- folders of diffusers ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def diffusers_folders(tmp_path_factory):
    """{"ti2v", "t2v", "i2v"}: the tiny checkpoints as diffusers' own pipelines save them."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
    from transformers import T5Tokenizer

    root = tmp_path_factory.mktemp("diffusers")
    (root / "spiece.model").write_bytes(tiny.spiece())
    for kind in ("ti2v", "t2v", "i2v"):
        dits = [tiny.dit(kind)] if kind == "ti2v" else [tiny.dit(kind, 10), tiny.dit(kind, 11)]
        dits = [tiny.diffusers_dit(dit) for dit in dits]
        pipeline = (WanImageToVideoPipeline if kind == "i2v" else WanPipeline)(
            tokenizer=T5Tokenizer.from_pretrained(root),
            text_encoder=tiny.transformers_t5(tiny.text_encoder()),
            vae=tiny.diffusers_vae(tiny.vae(kind == "ti2v")),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            transformer=dits[0],
            **({} if kind == "ti2v" else {"transformer_2": dits[1], "boundary_ratio": 0.6}),
            expand_timesteps=kind == "ti2v",
        )
        # the transformers of A14B in several files
        pipeline.save_pretrained(root / kind, max_shard_size="300KB" if kind == "t2v" else "10GB")
    return {kind: root / kind for kind in ("ti2v", "t2v", "i2v")}


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
def test_a_folder_of_diffusers_samples_as_the_official_one(diffusers_folders, checkpoints, kind):
    """The same bits: the same weights, and the boundary that its model_index.json says."""
    folder = diffusers_folders[kind]
    s, official = load(folder).settings, load(checkpoints[kind]).settings
    assert s.boundary == (None if kind == "ti2v" else 0.6) and s.is_moe == (kind != "ti2v")
    assert (s.variant, s.z_dim, s.stride, s.size) == (official.variant, official.z_dim, official.stride, official.size)
    moe = {} if kind == "ti2v" else {"sample": {"boundary": 0.6}}
    copy = folder.parent / f"official_{kind}"
    shutil.copytree(checkpoints[kind], copy)
    config = copy / "config.json" if kind == "ti2v" else copy / "high_noise_model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | moe))
    assert torch.equal(latents(folder, kind), latents(copy, kind))


@pytest.mark.parametrize("v22", [False, True])
def test_the_vae_of_diffusers(diffusers_folders, v22):
    assert same(load_vae(diffusers_folders["ti2v" if v22 else "t2v"]), tiny.vae(v22))


def test_the_encoder_and_the_tokenizer_of_diffusers(diffusers_folders):
    """Newer transformers save no spiece.model, but a tokenizer.json, of which one is made."""
    encoder = load_t5(diffusers_folders["t2v"], dtype=torch.float32)
    assert same(encoder, tiny.text_encoder())
    assert not (diffusers_folders["t2v"] / "tokenizer" / "spiece.model").exists()
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(diffusers_folders["t2v"] / "tokenizer")
    plain = Tokenizer(tiny.spiece())
    for text in ("a red square moves left", "一只猫 </s> cat", "", "naïve café, 50% & more! ﬁ Ａ ½ ☃☃ x", "zzz\nqq"):
        assert encoder.tokenizer([text])[0][0].tolist() == theirs(Tokenizer.clean(text)).input_ids
        assert encoder.tokenizer.ids(text) == plain.ids(text)
    assert encoder.tokenizer.ids("<extra_id_3>") == theirs("<extra_id_3>").input_ids[:-1]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for model in ({"type": "BPE", "vocab": {}}, {"type": "Unigram", "vocab": [["a"]]}, []):
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(BadInput, match="tokenizer.json: not a tokenizer of T5's kind"):
            load_tokenizer(tmp_path)


def test_experts_of_diffusers_alone(diffusers_folders):
    """load_wan takes a transformer's folder, and a checkpoint's where that has one DiT."""
    folder = diffusers_folders["t2v"]
    assert same(load_wan(folder / "transformer", dtype=torch.float32), tiny.dit("t2v", 10))
    assert same(load_wan(folder / "transformer_2", dtype=torch.float32), tiny.dit("t2v", 11))
    assert same(load_wan(diffusers_folders["ti2v"], dtype=torch.float32), tiny.dit("ti2v"))
    with pytest.raises(BadInput, match="holds two experts; give .*transformer or .*transformer_2"):
        load_wan(folder)
    assert [p.base.name for p in pair_up(str(folder), str(folder))] == ["transformer", "transformer_2"]


def test_inspect_and_plan_a_folder_of_diffusers(diffusers_folders, checkpoints):
    for kind in ("ti2v", "t2v"):
        found, want = inspect(diffusers_folders[kind]), inspect(checkpoints[kind])
        by_kind = [[(m["kind"], m["parameters"], m.get("model_type")) for m in models] for models in (found, want)]
        assert sorted(by_kind[0], key=str) == sorted(by_kind[1], key=str)
    assert found[0]["experts"] == ["transformer", "transformer_2"]
    flags = ["--size", "32x32", "--frames", "1", "--device", "cpu", "--dtype", "fp32"]
    plans = [planned("sample", ["--ckpt", str(f["t2v"]), *flags]).phases for f in (diffusers_folders, checkpoints)]
    assert plans[0] == plans[1]


def index(**changes):
    def change(folder):
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def config(part, **changes):
    def change(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def cut(part):
    def change(folder):
        file = sorted((folder / part).glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-10])

    return change


def rename_tensor(folder):
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["blocks.0.norm9.weight"] = state.pop("blocks.0.norm2.weight")
    save_file(state, file)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: shutil.rmtree(folder / "transformer_2"),
            "transformer_2 is missing, which model_index.json names",
        ),
        (index(boundary_ratio=None), "boundary_ratio is None; with a transformer_2 it is a number"),
        (index(boundary_ratio="high"), "boundary_ratio is 'high'"),
        (index(expand_timesteps=True), "expand_timesteps is true"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json: not a model configuration"),
        (
            config("transformer", _class_name="WanVACETransformer3DModel"),
            "a WanVACETransformer3DModel; only diffusers' WanTransformer3DModel",
        ),
        (config("transformer", image_dim=1280), "image_dim is 1280, and None in every"),
        (config("transformer", num_attention_heads="two"), "'two' heads of width 24"),
        (config("transformer_2", num_layers=9), "num_layers is 9, the weights have 3"),
        (config("vae", latents_mean=[0.0] * 16), "latents_mean and latents_std are not those of Wan's VAEs"),
        (cut("transformer"), "truncated"),
        (cut("vae"), "truncated"),
        (cut("text_encoder"), "truncated"),
        (rename_tensor, r"1 missing \(blocks.0.norm3.weight\); 1 unexpected \(blocks.0.norm9.weight\)"),
    ],
)
def test_a_broken_folder_of_diffusers_is_one_line(diffusers_folders, tmp_path, change, message):
    shutil.copytree(diffusers_folders["i2v"], tmp_path / "c")
    change(tmp_path / "c")
    with pytest.raises(BadInput, match=message) as e:
        latents(tmp_path / "c", "i2v")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_names_of_vaes_that_no_tiny_one_has():
    """By diffusers' own table, of the released 2.1 and of the tests' of 2.2."""
    assert (
        official_vae_name("encoder.down_blocks.10.conv_shortcut.weight", False)
        == "encoder.downsamples.10.shortcut.weight"
    )
    assert (
        official_vae_name("decoder.up_blocks.1.upsamplers.0.time_conv.bias", False)
        == "decoder.upsamples.7.time_conv.bias"
    )


def test_wan_21_is_said(checkpoints, tmp_path, capsys):
    """Of one DiT where A14B has two; not of A14B."""
    shutil.copytree(checkpoints["t2v"], tmp_path / "c")
    load(tmp_path / "c")
    assert "Wan 2.1" not in capsys.readouterr().out
    for file in (tmp_path / "c" / "low_noise_model").iterdir():
        shutil.move(file, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "high_noise_model")
    assert load(tmp_path / "c").settings.shift == 12
    assert "a Wan 2.1 model, for which use --shift 5 --guidance 5" in capsys.readouterr().out


IMAGE_BRANCH = ("img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight")


@pytest.mark.parametrize(
    "added, name",
    [
        (IMAGE_BRANCH, "Wan 2.1's I2V"),
        ((*IMAGE_BRANCH, "img_emb.emb_pos"), "Wan 2.1's FLF2V"),
        (("vace_patch_embedding.weight",), "a VACE"),
    ],
)
def test_other_models_of_the_family_are_named(tmp_path, added, name):
    """In ComfyUI's layout."""
    state = tiny.dit("i2v").state_dict() | {key: torch.zeros(2, 2) for key in added}
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match=f"m.safetensors: this is {name}, another model; loaded are ti2v-5B"):
        load_wan(tmp_path / "m.safetensors")


# ---- conversion --------------------------------------------------------------------------------------------------
def test_conversion_there_and_back_is_the_same_bits(checkpoints, tmp_path, monkeypatch):
    from diffusers import WanTransformer3DModel

    source = checkpoints["t2v"] / "low_noise_model"
    convert_dit(source, tmp_path / "theirs", "diffusers", file_bytes=150_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    peer, info = WanTransformer3DModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()), info
    want = tiny.diffusers_dit(tiny.dit("t2v", 11))
    public = {k: v for k, v in want.config.items() if not k.startswith("_")}
    assert same(peer, want) and public == {k: peer.config[k] for k in public} | {"patch_size": (1, 2, 2)}
    args = ["diag.py", "convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "official"]
    monkeypatch.setattr(sys, "argv", args)
    diag.main()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "t2v"
    got = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    want = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_what_is_not_converted(checkpoints, tmp_path):
    with pytest.raises(BadInput, match="holds two experts"):
        convert_dit(checkpoints["t2v"], tmp_path / "x", "diffusers")
    for flags, message in (
        (["--to", "comfyui", "--part", "dit"], "of a DiT, one of official, diffusers"),
        (["--to", "official"], "should end in .safetensors"),
    ):
        with pytest.raises(BadInput, match=message):
            diag.convert.run(diag.arguments(["convert", str(checkpoints["ti2v"]), str(tmp_path / "x"), *flags]))
    tiny_animate.write_dit(tmp_path / "animate", tiny_animate.animate())
    with pytest.raises(BadInput, match="animate: of the kind animate; DiTs of ti2v, t2v and i2v are converted"):
        convert_dit(tmp_path / "animate", tmp_path / "x", "diffusers")
    with pytest.raises(BadInput, match="not a Wan DiT"):
        convert_dit(checkpoints["t2v"] / "Wan2.1_VAE.pth", tmp_path / "x", "diffusers")
    assert not (tmp_path / "x").exists()


# ---- GGUF --------------------------------------------------------------------------------------------------------
def kind_for(name, tensor, kind):
    """As ComfyUI-GGUF's converter: matrices in blocks where they fit, the rest in F32 or F16."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    if tensor.dim() == 1 or "modulation" in name:
        return "F32"
    return kind if tensor.shape[-1] % block == 0 and tensor.dim() == 2 else "F16"


def k_blocks(shape, seed):
    """Blocks of Q4_K with random bits and sizes that fit weights: what gguf's writer cannot make of numbers."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // 256, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([2e-4, 1e-3], dtype=np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(path, state, kind, reshaped=(), arch="wan", alignment=None):
    """A GGUF file, and the weights that gguf itself decodes from it."""
    writer, decoded = gguf.GGUFWriter(path, arch), {}
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    if alignment:
        writer.add_custom_alignment(alignment)
    for i, (name, tensor) in enumerate(state.items()):
        of_kind = gguf.GGMLQuantizationType[kind_for(name, tensor, kind)]
        values = tensor.contiguous().numpy()
        if name in reshaped:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1, 32)
        data = k_blocks(values.shape, i) if of_kind.name == "Q4_K" else gguf.quants.quantize(values, of_kind)
        writer.add_tensor(name, data, raw_dtype=of_kind)
        decoded[name] = torch.from_numpy(gguf.quants.dequantize(data, of_kind).reshape(tensor.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


@pytest.fixture(scope="module")
def wide():
    return tiny.dit("t2v", 10, dim=256, layers=2)


@pytest.mark.parametrize("kind, limit", [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 0.02), ("Q5_0", 0.1), ("Q4_K", None)])
def test_gguf_weights_are_those_that_gguf_decodes(wide, tmp_path, kind, limit, report):
    """To the bit; the output's distance from that of the weights before is the kind's own error."""
    want = write_gguf(tmp_path / "m.gguf", wide.state_dict(), kind, ["patch_embedding.weight"])
    got = load_wan(tmp_path / "m.gguf", dtype=torch.float32)
    assert got.state_dict().keys() == want.keys() and all(torch.equal(got.state_dict()[k], want[k]) for k in want)
    x, t, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, tiny.TEXT_DIM)
    with torch.no_grad():
        if limit:
            report(
                "output", ((got(x, t, context) - wide(x, t, context)).norm() / wide(x, t, context).norm()).item(), limit
            )
        halves = load_wan(tmp_path / "m.gguf", dtype=torch.bfloat16)
        assert torch.equal(halves.blocks[1].ffn[0].weight, want["blocks.1.ffn.0.weight"].bfloat16())
        if kind in ("Q8_0", "Q4_K"):
            eight = load_wan(tmp_path / "m.gguf", dtype=torch.float32, fp8=True)
            m, w = eight.blocks[1].self_attn.q, want["blocks.1.self_attn.q.weight"]
            assert (
                m.weight.dtype == torch.float8_e4m3fn and ((m.weight.float() * m.scales - w).norm() / w.norm()) < 0.04
            )


@pytest.mark.parametrize("alignment", [64, 4096])
def test_gguf_tensors_begin_where_their_files_alignment_says(tmp_path, alignment):
    """32 bytes where a file does not say."""
    want = write_gguf(tmp_path / "m.gguf", tiny.dit("t2v", 10, 128, 1, 1).state_dict(), "F16", alignment=alignment)
    got = load_wan(tmp_path / "m.gguf", dtype=torch.float32).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_gguf_checkpoint_samples_as_its_weights(wide, checkpoints, tmp_path):
    """Both experts in the place of the official shards; five dimensions as they are; the encoder with llama.cpp's
    names.
    """
    from diagnostics.inspect import inspect

    for folder in ("gguf", "dense"):
        (tmp_path / folder).mkdir()
        for name in ("Wan2.1_VAE.pth", "google"):
            (tmp_path / folder / name).symlink_to(checkpoints["t2v"] / name)
    for i, name in enumerate(("high_noise_model", "low_noise_model")):
        model = tiny.dit("t2v", 10 + i, dim=64)
        tiny.write_dit(tmp_path / "gguf" / name, model)
        for file in (tmp_path / "gguf" / name).glob("*.safetensors*"):
            file.unlink()
        decoded = write_gguf(tmp_path / "gguf" / name / f"Wan2.2-T2V-{name}-Q8_0.gguf", model.state_dict(), "Q8_0")
        model.load_state_dict(decoded)
        tiny.write_dit(tmp_path / "dense" / name, model)
    encoder = tiny.text_encoder()
    state = llama_names(encoder.state_dict())
    decoded = write_gguf(tmp_path / "gguf" / "umt5-xxl-encoder-Q8_0.gguf", state, "Q8_0", arch="t5encoder")
    encoder.load_state_dict(dict(zip(encoder.state_dict(), (decoded[k] for k in state))))
    torch.save(encoder.state_dict(), tmp_path / "dense" / "models_t5_umt5-xxl-enc-bf16.pth")
    assert same(load_t5(tmp_path / "gguf", dtype=torch.float32), encoder)
    assert torch.equal(latents(tmp_path / "gguf", "t2v"), latents(tmp_path / "dense", "t2v"))
    found = inspect(tmp_path / "gguf")
    assert [m["kind"] for m in found] == ["dit", "dit", "text_encoder", "vae"] and found[0]["dtype"] == "Q8_0"
    assert found[0]["parameters"] == inspect(tmp_path / "dense")[0]["parameters"]


def llama_names(state):
    """An encoder's tensors under llama.cpp's names, by gguf's own table where that knows them."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    ours = {
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
        **{f"attn.{p}": f"layer.0.SelfAttention.{p}" for p in "qkvo"},
    }
    outer = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    named = {}
    for name, tensor in state.items():
        block, _, module = name.removeprefix("blocks.").removesuffix(".weight").partition(".")
        theirs = outer.get(name) or f"encoder.block.{block}.{ours[module]}.weight"
        named[table.get_name(theirs, (".weight",))] = tensor
    return named


def test_a_gguf_becomes_an_official_folder(wide, tmp_path):
    want = write_gguf(tmp_path / "m.gguf", wide.state_dict(), "Q8_0")
    convert_dit(tmp_path / "m.gguf", tmp_path / "out", "official")
    got = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(got["blocks.0.ffn.0.weight"], want["blocks.0.ffn.0.weight"].bfloat16())
    assert got["blocks.0.modulation"].dtype == torch.float32 and got["patch_embedding.weight"].dtype == torch.float16


def test_gguf_needs_its_package(wide, tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", wide.state_dict(), "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match="m.gguf: .*pip install gguf"):
        load_wan(tmp_path / "m.gguf")


def patched(at, data):
    return lambda raw: raw[:at] + data + raw[at + len(data) :]


def replaced(old, new):
    def change(raw):
        assert raw.count(old) == 1
        return raw.replace(old, new)

    return change


# of a file with one tensor "w" (2,32) in Q8_0; a tensor's place in the header: its name, 2, 32, 2, type, offset
NAME = struct.pack("<Q", 1) + b"w"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw[:-29], "truncated, w ends at byte"),
        (lambda raw: raw[:40], "truncated in its header"),
        (lambda raw: raw[:9], "truncated in its header"),
        (patched(4, struct.pack("<I", 9)), "GGUF of a version that is not read"),
        (patched(8, struct.pack("<Q", 1 << 60)), "truncated|dimensions"),
        (patched(16, struct.pack("<Q", 1 << 60)), "truncated|unknown type|one value"),
        (patched(24, struct.pack("<Q", 1 << 60)), "truncated in its header"),
        (replaced(NAME + struct.pack("<I", 2), NAME + struct.pack("<I", 1 << 30)), "w has 1073741824 dimensions"),
        (replaced(struct.pack("<QQI", 32, 2, 8), struct.pack("<QQI", 32, 2, 99)), "w is of the type 99"),
        (replaced(struct.pack("<QQI", 32, 2, 8), struct.pack("<QQI", 31, 2, 8)), "rows of 31 elements"),
        (replaced(struct.pack("<QQI", 32, 2, 8), struct.pack("<QQI", 32, 1 << 60, 8)), "truncated, w ends at byte"),
        (replaced(struct.pack("<QQI", 32, 2, 8), struct.pack("<QQI", 32, 2, 9)), "truncated|does not decode"),
        (replaced(struct.pack("<Qii", 2, 2, 32), struct.pack("<Qii", 2, 3, 32)), r"orig_shape.w is \(3, 32\)"),
        (replaced(struct.pack("<IQ", 8, 2), struct.pack("<IQ", 8, 1 << 62)), "truncated|one value"),
    ],
)
def test_a_hostile_gguf_is_one_line(tmp_path, change, message):
    write_gguf(tmp_path / "a.gguf", {"w": torch.randn(2, 32)}, "Q8_0", ["w"])
    assert read_header(tmp_path / "a.gguf")[0]["w"].read().shape == (2, 32)
    (tmp_path / "a.gguf").write_bytes(change((tmp_path / "a.gguf").read_bytes()))
    with pytest.raises(BadInput, match=f"a.gguf: .*({message})") as e:
        {n: entry.read() for n, entry in read_header(tmp_path / "a.gguf")[0].items()}
    assert "\n" not in str(e.value)


def test_decoding_goes_block_by_block(monkeypatch):
    """A tensor above the size of a step is decoded in several."""
    values = np.random.default_rng(0).standard_normal((3, 1 << 20), dtype=np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    out, calls = np.empty(values.size, dtype=np.float32), []
    real = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda d, kind: calls.append(d.shape) or real(d, kind))
    decode(data, "Q8_0", out)
    assert len(calls) == 3 and np.array_equal(out.reshape(values.shape), real(data, gguf.GGMLQuantizationType.Q8_0))


def test_weights_of_a_gguf_are_listed_without_being_read(wide, tmp_path):
    write_gguf(tmp_path / "m.gguf", wide.state_dict(), "Q5_0")
    entries = read_weights([tmp_path / "m.gguf"])
    entry = entries["blocks.0.self_attn.q.weight"]
    assert (entry.format, entry.shape, entry.nbytes) == ("Q5_0", (256, 256), 256 * 256 // 32 * 22)
    assert sum(e.nbytes for e in entries.values()) < (tmp_path / "m.gguf").stat().st_size


@pytest.mark.parametrize("size", [1, 5000])
def test_gguf_weights_are_cast_in_slices(tmp_path, monkeypatch, size):
    """Of some rows each, or of one: the same as the whole."""
    want = write_gguf(tmp_path / "m.gguf", {"blocks.0.ffn.0.weight": torch.randn(37, 64)}, "Q4_0")
    entries, _ = read_header(tmp_path / "m.gguf")
    monkeypatch.setattr("nanowan.formats.load.SLICE", size)
    for dtype in (torch.float32, torch.bfloat16):
        for name, entry in cast(entries, dtype).items():
            assert torch.equal(entry.read(), want[name].to(dtype))
