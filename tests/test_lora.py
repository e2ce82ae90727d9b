"""LoRA against diffusers and peft; injecting, merging, file layouts, and what training keeps in memory."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import save_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_wan import inputs, padded

import diag
from benchmarks import tiny, tiny_animate, tiny_s2v
from kernels.fp8 import convert
from lora import TARGETS, adapter, clamp_weight_norm, inject, lora_layers, weight_norms
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, new_dit
from nanowan.formats.lora import (
    AdapterInfo,
    choose_experts,
    describe,
    expert_in_name,
    merge_file,
    official_name,
    parse_lora_spec,
    read_lora,
    start_from,
    write_changes,
    write_lora,
)
from nanowan.training.flags import parse_blocks
from nanowan.variants.registry import VARIANTS, parts_of
from nanowan.variants.s2v.model import WanS2V


def trained(targets=("cross_attn.k", "cross_attn.v"), rank=4, alpha=8, blocks=None, kind="ti2v"):
    """A tiny DiT with an adapter whose B is no longer zero."""
    model = tiny.dit(kind)
    torch.manual_seed(5)
    for p in inject(model, targets, rank, alpha, blocks=blocks)[1::2]:
        p.data.normal_(0, 0.3)
    return model


def run(model, kind="ti2v"):
    torch.manual_seed(9)
    x, t, context = inputs(kind)
    with torch.no_grad():
        return model(x, t, context)


@pytest.mark.parametrize("targets", [("cross_attn.k", "cross_attn.v"), TARGETS])
def test_loads_in_diffusers_and_changes_its_output_as_ours(tmp_path, targets, report):
    from diffusers import WanPipeline

    model = trained(targets)
    save_lora(tmp_path / "adapter.safetensors", model, variant="ti2v-5B")
    peer = tiny.diffusers_dit(tiny.dit("ti2v"))
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=peer)
    pipe.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    torch.manual_seed(9)
    x, t, context = inputs("ti2v")
    with torch.no_grad():
        want = pipe.transformer(x, t, padded(context, (40, 40)), return_dict=False)[0]
    base, ours = run(tiny.dit("ti2v")), run(model)
    assert tiny.error(ours, base) > 0.02, "the adapter does next to nothing: the comparison would be empty"
    report("relative error", tiny.error(ours, want), 1e-4)


def test_merging_gives_the_same_output(tmp_path, report):
    model = trained(TARGETS)
    save_lora(tmp_path / "a.safetensors", model)
    base = tiny.dit("ti2v")
    merge_file(base, tmp_path / "a.safetensors")
    report("relative error", tiny.error(run(base), run(model)), 2e-6)
    back = tiny.dit("ti2v")
    merge_file(back, tmp_path / "a.safetensors", 0.75)
    merge_file(back, tmp_path / "a.safetensors", -0.75)
    report("merged and taken out again", tiny.error(run(back), run(tiny.dit("ti2v"))), 2e-6)


def test_a_new_adapter_changes_nothing():
    model = tiny.dit("ti2v")
    before = run(model)
    params = inject(model, rank=4)
    assert torch.equal(run(model), before)
    assert len(params) == 2 * 2 * 3 and {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in params
    }


# ---- the layouts that people have: each file is written by hand, and the sum done by hand ---------------------------
def file_of(path, tensors, metadata=None):
    save_file({k: torch.as_tensor(v).contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def changes_of(path, kind="t2v", weight=1.0, expert=None, model=None):
    """{parameter: what merging this file added to it} of a tiny model, in fp32; unchanged ones are left out."""
    model = model or tiny.dit(kind)
    before = {n: p.clone() for n, p in model.named_parameters()}
    merge_file(model, path, weight, expert)
    return {n: p - before[n] for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def check_changes(got, want):
    """The same parameters, and each within fp32's rounding of a weight of size 1."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name, d in want.items():
        assert (got[name] - d).abs().max() < 1e-6, f"{name}: {(got[name] - d).abs().max():.1e}"


def random(*shape):
    return torch.randn(shape) / 8


# a spelling of blocks.1.cross_attn.k, blocks.2.self_attn.o and blocks.0.ffn.2: (A's keys, B's keys, alpha's or None)
SPELLINGS = {
    "ComfyUI": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None),
    "ComfyUI, whole path": ("model.diffusion_model.{}.lora_A.weight", "model.diffusion_model.{}.lora_B.weight", None),
    "Lightning": (
        "diffusion_model.{}.lora_down.weight",
        "diffusion_model.{}.lora_up.weight",
        "diffusion_model.{}.alpha",
    ),
    "DiffSynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
    "DiffSynth, full pipeline": ("pipe.dit.{}.lora_A.default.weight", "pipe.dit.{}.lora_B.default.weight", None),
    "PEFT's name": ("diffusion_model.{}.lora_A.my_style.weight", "diffusion_model.{}.lora_B.my_style.weight", None),
    "without prefix": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"),
    "SimpleTuner's older names": (
        "transformer.base_model.model.{}.lora.down.weight",
        "transformer.base_model.model.{}.lora.up.weight",
        None,
    ),
}
PLACES = ("blocks.1.cross_attn.k", "blocks.2.self_attn.o", "blocks.0.ffn.2")
KOHYA = ("blocks_1_cross_attn_k", "blocks_2_self_attn_o", "blocks_0_ffn_2")
DIFFUSERS = ("blocks.1.attn2.to_k", "blocks.2.attn1.to_out.0", "blocks.0.ffn.net.2")
LYCORIS = ("blocks_1_attn2_to_k", "blocks_2_attn1_to_out_0", "blocks_0_ffn_net_2")
LAYOUTS = [(PLACES, *keys) for keys in SPELLINGS.values()]
LAYOUTS += [
    (KOHYA, f"{prefix}{{}}.lora_down.weight", f"{prefix}{{}}.lora_up.weight", f"{prefix}{{}}.alpha")
    for prefix in ("lora_unet_", "lora_unet__", "lycoris_")
]
LAYOUTS += [
    (DIFFUSERS, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    (DIFFUSERS, "transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", None),
    (LYCORIS, "lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", "lycoris_{}.alpha"),
]


@pytest.mark.parametrize("names, key_a, key_b, key_alpha", LAYOUTS, ids=[row[1].format(row[0][0]) for row in LAYOUTS])
def test_low_rank_layouts(tmp_path, names, key_a, key_b, key_alpha):
    tensors, want = {}, {}
    for name, place, (n, m) in zip(names, PLACES, ((48, 48), (48, 48), (48, 104))):
        a, b = random(4, m), random(n, 4)
        tensors |= {key_a.format(name): a, key_b.format(name): b}
        if key_alpha:
            tensors[key_alpha.format(name)] = torch.tensor(3.0)
        want[f"{place}.weight"] = 0.5 * b @ a * (3 / 4 if key_alpha else 1)
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", tensors), weight=0.5), want)


def test_a_pickle_with_a_nested_state_dict(tmp_path):
    """Animate's relighting LoRA as it is distributed."""
    a, b = random(4, 48), random(48, 4)
    state = {"blocks.0.self_attn.q.lora_A.default.weight": a, "blocks.0.self_attn.q.lora_B.default.weight": b}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "relighting_lora.ckpt")
    check_changes(changes_of(tmp_path / "relighting_lora.ckpt"), {"blocks.0.self_attn.q.weight": b @ a})


def step_distilled():
    """What lightx2v's files have: (tensors, what they change)."""
    tensors, want = {}, {}

    def low_rank(name, n, m):
        a, b = random(2, m), random(n, 2)
        tensors[f"diffusion_model.{name}.lora_down.weight"], tensors[f"diffusion_model.{name}.lora_up.weight"] = a, b
        tensors[f"diffusion_model.{name}.diff_b"] = want[f"{name}.bias"] = random(n)
        want[f"{name}.weight"] = b @ a

    def difference(key, parameter, *shape):
        tensors[f"diffusion_model.{key}"] = want[parameter] = random(*shape)

    for block in range(3):
        low_rank(f"blocks.{block}.self_attn.q", 48, 48)
        low_rank(f"blocks.{block}.ffn.0", 104, 48)
        difference(f"blocks.{block}.self_attn.norm_q.diff", f"blocks.{block}.self_attn.norm_q.weight", 48)
        difference(f"blocks.{block}.cross_attn.norm_k.diff", f"blocks.{block}.cross_attn.norm_k.weight", 48)
        difference(f"blocks.{block}.norm3.diff", f"blocks.{block}.norm3.weight", 48)
        difference(f"blocks.{block}.norm3.diff_b", f"blocks.{block}.norm3.bias", 48)
        difference(f"blocks.{block}.diff_m", f"blocks.{block}.modulation", 1, 6, 48)
    for name, n, m in (
        ("text_embedding.0", 48, 32),
        ("text_embedding.2", 48, 48),
        ("time_embedding.0", 48, 256),
        ("time_embedding.2", 48, 48),
        ("time_projection.1", 288, 48),
    ):
        low_rank(name, n, m)
    difference("head.diff_m", "head.modulation", 1, 2, 48)
    difference("head.head.diff", "head.head.weight", 64, 48)
    difference("head.head.diff_b", "head.head.bias", 64)
    difference("patch_embedding.diff", "patch_embedding.weight", 48, 16, 1, 2, 2)
    difference("patch_embedding.diff_b", "patch_embedding.bias", 48)
    return tensors, want


def test_step_distilled(tmp_path):
    tensors, want = step_distilled()
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", tensors)), want)


@pytest.mark.parametrize(
    "key, parameter, shape",
    [
        ("lora_unet_{}.diff", "blocks.1.ffn.0.weight", (104, 48)),
        ("{}.diff_b", "blocks.0.cross_attn.o.bias", (48,)),
        ("diffusion_model.blocks.2.modulation.diff", "blocks.2.modulation", (1, 6, 48)),
        ("transformer.blocks.1.norm2.diff", "blocks.1.norm3.weight", (48,)),
        ("transformer.proj_out.diff", "head.head.weight", (64, 48)),
        ("transformer.condition_embedder.time_embedder.linear_1.diff", "time_embedding.0.weight", (48, 256)),
        ("transformer.condition_embedder.time_proj.diff_b", "time_projection.1.bias", (288,)),
        ("transformer.condition_embedder.text_embedder.linear_2.diff", "text_embedding.2.weight", (48, 48)),
        ("transformer.scale_shift_table.diff", "head.modulation", (1, 2, 48)),
        ("lora_unet_text_embedding_0.diff", "text_embedding.0.weight", (48, 32)),
    ],
)
def test_full_differences(tmp_path, key, parameter, shape):
    module = parameter.rpartition(".")[0]
    d = random(*shape)
    key = key.format(module.replace(".", "_") if key.startswith("lora_unet_{") else module)
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", {key: d})), {parameter: d})


def test_names_are_those_of_diffusers_converter():
    """Every parameter of a DiT with an image branch, under the names that diffusers gives it, with dots and without."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [
        *tiny.dit("t2v").state_dict(),
        *(f"img_emb.proj.{i}.{p}" for i in (0, 1, 3, 4) for p in ("weight", "bias")),
    ]
    names += [f"blocks.2.cross_attn.{p}" for p in ("k_img.weight", "k_img.bias", "v_img.weight", "norm_k_img.weight")]
    numbered = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    for key, i in convert_wan_transformer_to_diffusers(numbered).items():
        official = names[int(i)]
        module, leaf = key, ""
        if key.endswith((".weight", ".bias")):
            module, _, leaf = key.rpartition(".")
        end = ".diff_b" if leaf == "bias" else ".diff"
        assert official_name(f"transformer.{module}{end}") == ("transformer", official, "diff")
        assert official_name(f"lycoris_{module.replace('.', '_')}{end}") == (None, official, "diff")
        ours = official.removesuffix(".weight").removesuffix(".bias")
        assert official_name(f"lora_unet_{ours.replace('.', '_')}{end}") == (None, official, "diff")
        assert official_name(f"_orig_mod.{ours}{end}") == (None, official, "diff")


def test_a_convolution_of_low_rank(tmp_path):
    """With the kernel's shape in A (PEFT, kohya), and flat, in A, in B or in both."""
    a, b = random(2, 16, 1, 2, 2), random(48, 2, 1, 1, 1)
    want = {"patch_embedding.weight": (b.flatten(1) @ a.flatten(1)).view(48, 16, 1, 2, 2)}
    for i, shape in enumerate(((2, 16, 1, 2, 2), (2, 64))):
        tensors = {"diffusion_model.patch_embedding.lora_A.weight": a.view(shape)}
        tensors["diffusion_model.patch_embedding.lora_B.weight"] = b.view(48, 2, *[1] * (len(shape) - 2))
        check_changes(changes_of(file_of(tmp_path / f"{i}.safetensors", tensors)), want)
        tensors["diffusion_model.patch_embedding.lora_B.weight"] = b.view(48, 2, *[1] * (5 - len(shape)))
        check_changes(changes_of(file_of(tmp_path / f"{i}.safetensors", tensors)), want)


@pytest.mark.parametrize("shape", [(48, 16, 1, 2, 2), (48, 64), (48, 16, 2, 2)])
def test_differences_without_sides_of_one(tmp_path, shape):
    d, m = random(48, 16, 1, 2, 2), random(6, 48)
    tensors = {"lora_unet_patch_embedding.diff": d.view(shape), "diffusion_model.blocks.1.diff_m": m}
    want = {"patch_embedding.weight": d, "blocks.1.modulation": m[None]}
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", tensors)), want)
    tensors["lora_unet_patch_embedding.diff"] = d.view(48, 64).t()
    with pytest.raises(BadInput, match="does not fit this model: 1 of 2 changes, patch_embedding.weight"):
        merge_file(tiny.dit("t2v"), file_of(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefixes_ranks_and_dtypes_mixed_in_one_file(tmp_path, dtype):
    """Without metadata; alpha in the type of the rest, a number or one in brackets, or none."""
    q, k, v = (
        "transformer.blocks.2.attn1.to_q",
        "diffusion_model.blocks.0.cross_attn.k",
        "lora_unet_blocks_1_self_attn_v",
    )
    tensors = {f"{q}.lora_A.weight": random(3, 48), f"{q}.lora_B.weight": random(48, 3)}
    tensors |= {
        f"{k}.lora_down.weight": random(5, 48),
        f"{k}.lora_up.weight": random(48, 5),
        f"{k}.alpha": torch.ones(1),
    }
    tensors |= {f"{v}.lora_down.weight": random(7, 48), f"{v}.lora_up.weight": random(48, 7)}
    tensors[f"{v}.alpha"] = torch.tensor(14.0)
    tensors = {key: t.to(dtype) for key, t in tensors.items()}
    exact = {key: t.float() for key, t in tensors.items()}
    want = {
        "blocks.2.self_attn.q.weight": exact[f"{q}.lora_B.weight"] @ exact[f"{q}.lora_A.weight"],
        "blocks.0.cross_attn.k.weight": exact[f"{k}.lora_up.weight"] @ exact[f"{k}.lora_down.weight"] / 5,
        "blocks.1.self_attn.v.weight": exact[f"{v}.lora_up.weight"] @ exact[f"{v}.lora_down.weight"] * 2,
    }
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", tensors)), want)


def kron(w1, w2):
    """By its definition, entry by entry."""
    (n1, m1), (n2, m2) = w1.shape, w2.shape
    return torch.stack(
        [torch.stack([w1[i // n2, j // m2] * w2[i % n2, j % m2] for j in range(m1 * m2)]) for i in range(n1 * n2)]
    )


@pytest.mark.parametrize("names", ["diffusion_model.blocks.1.cross_attn.k", "lora_unet_blocks_1_cross_attn_k"])
@pytest.mark.parametrize("factored", ["", "1", "2", "12"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lokr(tmp_path, names, factored, alpha):
    """dW = kron(w1, w2) alpha/dim, dim that of a factored part; without one the scale is 1, whatever alpha says."""
    tensors, whole = {}, {}
    for part, n, m in (("1", 4, 3), ("2", 12, 16)):
        if part in factored:
            a, b = random(n, 2) * 4, random(2, m) * 4
            tensors |= {f"{names}.lokr_w{part}_a": a, f"{names}.lokr_w{part}_b": b}
            whole[part] = a @ b
        else:
            tensors[f"{names}.lokr_w{part}"] = whole[part] = random(n, m) * 4
    if alpha:
        tensors[f"{names}.alpha"] = torch.tensor(alpha)
    scale = alpha / 2 if alpha and factored else 1
    path = file_of(tmp_path / "x.safetensors", tensors)
    want = scale * kron(whole["1"], whole["2"])
    check_changes(changes_of(path, weight=-0.7), {"blocks.1.cross_attn.k.weight": -0.7 * want})
    (change,) = read_lora(path)[0].values()
    assert change.norm() == pytest.approx(want.norm().item(), rel=1e-5)
    if pair := change.factors():
        assert (pair[1] @ pair[0] - want).abs().max() < 1e-6
    assert (pair is not None) == ("2" in factored)


def test_lokr_of_diffusers_names_and_of_a_convolution(tmp_path):
    w1, w2, c1, c2 = random(6, 6), random(8, 8), random(2, 4), random(24, 4, 1, 2, 2)
    tensors = {"lycoris_blocks_0_attn1_to_out_0.lokr_w1": w1, "lycoris_blocks_0_attn1_to_out_0.lokr_w2": w2}
    tensors |= {"lycoris_patch_embedding.lokr_w1": c1, "lycoris_patch_embedding.lokr_w2": c2}
    kernels = [kron(c1, c2[:, :, 0, y, x]) for y in range(2) for x in range(2)]
    want = {
        "blocks.0.self_attn.o.weight": kron(w1, w2),
        "patch_embedding.weight": torch.stack(kernels, -1).view(48, 16, 1, 2, 2),
    }
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", tensors)), want)


def weight_of(place, kind="t2v"):
    return tiny.dit(kind).get_submodule(place).weight.detach().double()


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_loha(tmp_path, alpha):
    """dW = (a1 b1) * (a2 b2) alpha/rank; of a convolution flat, or with a core tensor for each half."""
    k, patch = "lora_unet_blocks_1_cross_attn_k", "diffusion_model.patch_embedding"
    flat, tucker = (
        {f"hada_w{i}_{p}": random(*shape) * 8 for i in (1, 2) for p, shape in zip("ab", shapes)}
        for shapes in (((48, 3), (3, 48)), ((3, 48), (3, 16)))
    )
    tucker |= {f"hada_t{i}": random(3, 3, 1, 2, 2) for i in (1, 2)}
    tensors = {f"{k}.{p}": t for p, t in flat.items()} | {f"{patch}.{p}": t for p, t in tucker.items()}
    if alpha:
        tensors |= {f"{k}.alpha": torch.tensor(alpha), f"{patch}.alpha": torch.tensor(alpha)}
    scale = alpha / 3 if alpha else 1
    one, two = (
        sum(
            tucker[f"hada_t{i}"][p, q]
            * tucker[f"hada_w{i}_a"][p].view(48, 1, 1, 1, 1)
            * tucker[f"hada_w{i}_b"][q].view(1, 16, 1, 1, 1)
            for p in range(3)
            for q in range(3)
        )
        for i in (1, 2)
    )
    want = {
        "blocks.1.cross_attn.k.weight": scale
        * (flat["hada_w1_a"] @ flat["hada_w1_b"])
        * (flat["hada_w2_a"] @ flat["hada_w2_b"]),
        "patch_embedding.weight": scale * one * two,
    }
    got = changes_of(file_of(tmp_path / "x.safetensors", tensors), weight=-0.7)
    for name, d in want.items():
        assert tiny.error(got[name], -0.7 * d) < 2e-6
    assert got.keys() == want.keys()


@pytest.mark.parametrize("inner", ["low rank", "kron", "hadamard"])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora(tmp_path, inner, axis):
    """LyCORIS': W + dW gets the norms of dora_scale, (out,1) of its rows or (1,in) of its columns."""
    key, place = "lycoris_blocks_0_ffn_0", "blocks.0.ffn.0"
    if inner == "low rank":
        parts = {"lora_down.weight": random(4, 48), "lora_up.weight": random(104, 4), "alpha": torch.tensor(2.0)}
        d = parts["lora_up.weight"] @ parts["lora_down.weight"] / 2
    elif inner == "kron":
        parts = {"lokr_w1": random(8, 6), "lokr_w2": random(13, 8)}
        d = kron(parts["lokr_w1"], parts["lokr_w2"])
    else:
        parts = {f"hada_w{i}_{p}": random(*s) for i in (1, 2) for p, s in zip("ab", ((104, 2), (2, 48)))}
        d = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    parts["dora_scale"] = torch.rand(104, 1) + 0.5 if axis == 0 else torch.rand(1, 48) + 0.5
    base = weight_of(place)
    merged = base + d
    want = merged / merged.norm(dim=1 - axis, keepdim=True) * parts["dora_scale"] - base
    path = file_of(tmp_path / "x.safetensors", {f"{key}.{p}": t for p, t in parts.items()})
    check_changes(changes_of(path), {f"{place}.weight": want})
    check_changes(changes_of(path, weight=-0.3), {f"{place}.weight": -0.3 * want})


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [None, 0.0, 1e-3])
def test_oft(tmp_path, rescaled, constraint):
    """LyCORIS': each block of rows is turned by R^T, R = (1+Q)(1-Q)^-1, Q held to a norm of alpha times the rows."""
    key, place = "diffusion_model.blocks.2.ffn.0", "blocks.2.ffn.0"
    blocks, rescale = random(8, 13, 13), torch.rand(104, 1) + 0.5
    q = (blocks - blocks.mT).double()
    if constraint:
        assert q.norm() > 104 * constraint
        q = q * (104 * constraint / q.norm())
    turned = torch.cat(
        [
            ((torch.eye(13) + q[i]) @ torch.inverse(torch.eye(13) - q[i])).mT @ weight_of(place)[13 * i : 13 * i + 13]
            for i in range(8)
        ]
    )
    tensors = {f"{key}.oft_blocks": blocks} | ({f"{key}.rescale": rescale} if rescaled else {})
    tensors |= {f"{key}.alpha": torch.tensor(constraint)} if constraint is not None else {}
    path = file_of(tmp_path / "x.safetensors", tensors)
    want = (rescale if rescaled else 1) * turned - weight_of(place)
    check_changes(changes_of(path), {f"{place}.weight": want})
    check_changes(changes_of(path, weight=0.5), {f"{place}.weight": 0.5 * want})


def test_glora(tmp_path):
    key, place = "lora_unet_blocks_0_ffn_0", "blocks.0.ffn.0"
    a1, a2, b1, b2 = random(48, 4), random(4, 48), random(104, 4), random(4, 48)
    tensors = {f"{key}.{p}.weight": t for p, t in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2))}
    tensors[f"{key}.alpha"] = torch.tensor(2.0)
    want = (weight_of(place) @ a1.double() @ a2.double() + b1 @ b2) / 2
    path = file_of(tmp_path / "x.safetensors", tensors)
    check_changes(changes_of(path, weight=0.8), {f"{place}.weight": 0.8 * want})


def pair_for(key, alpha=None, rank=4):
    tensors = {f"{key}.lora_A.weight": random(rank, 48), f"{key}.lora_B.weight": random(48, rank)}
    return tensors | ({f"{key}.alpha": torch.tensor(alpha)} if alpha else {})


def product(tensors, key):
    return tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("where", ["metadata", "beside"])
def test_alpha_of_peft(tmp_path, where, rslora):
    """alpha/rank, and alpha/sqrt(rank) of rank-stabilised ones."""
    config = {"lora_alpha": 10, "r": 4, "use_rslora": rslora, "alpha_pattern": {}}
    if where == "metadata":
        key = "transformer.blocks.1.attn2.to_v"
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    else:
        key, metadata = "base_model.model.blocks.1.cross_attn.v", None
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = pair_for(key)
    path = file_of(tmp_path / "adapter_model.safetensors", tensors, metadata)
    want = product(tensors, key) * (5 if rslora else 2.5)
    check_changes(changes_of(path), {"blocks.1.cross_attn.v.weight": want})


@pytest.mark.parametrize("key", ["transformer.blocks.1.attn2.to_v", "diffusion_model.blocks.1.cross_attn.v"])
def test_peft_configuration_beside_other_prefixes(tmp_path, key):
    """adapter_config.json belongs to the adapter_model.safetensors beside it, unless that says that alpha is folded in;
    to no other file.
    """
    tensors = pair_for(key)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 10, "r": 4, "use_rslora": True}))
    for name, metadata, scale in (
        ("adapter_model", {}, 5),
        ("adapter_model", {"alpha_folded": "True"}, 1),
        ("style", {}, 1),
    ):
        path = file_of(tmp_path / f"{name}.safetensors", tensors, metadata)
        check_changes(changes_of(path), {"blocks.1.cross_attn.v.weight": scale * product(tensors, key)})


def test_peft_without_its_configuration_is_refused(tmp_path):
    """Unless the alphas stand in the file itself."""
    key = "base_model.model.blocks.1.cross_attn.v"
    path = file_of(tmp_path / "adapter_model.safetensors", pair_for(key))
    with pytest.raises(BadInput, match="its alpha should stand in adapter_config.json"):
        read_lora(path)
    tensors = pair_for(key, alpha=2.0)
    want = {"blocks.1.cross_attn.v.weight": 0.5 * product(tensors, key)}
    check_changes(changes_of(file_of(tmp_path / "adapter_model.safetensors", tensors)), want)


class Linears(torch.nn.Module):
    """The two linears of a cross-attention, under their names in the DiT."""

    def __init__(self):
        super().__init__()
        self.cross_attn = torch.nn.ModuleDict({p: torch.nn.Linear(48, 48) for p in "kv"})


def peft_file(folder, config):
    """What peft saves of adapters with random values on blocks.1's keys and values, and what they change, by the
    forward pass.
    """
    import peft

    base = torch.nn.Module()
    base.blocks = torch.nn.ModuleList([torch.nn.Module(), Linears()])
    base.forward = None
    weights = tiny.dit("t2v").blocks[1].cross_attn
    for p, linear in base.blocks[1].cross_attn.items():
        linear.weight.data, linear.bias.data = weights.get_submodule(p).weight.data, weights.get_submodule(p).bias.data
    model = peft.get_peft_model(base, config)
    g = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=g) / (30 if "oft_R" in name else 8)
    model.save_pretrained(folder)
    want = {}
    with torch.no_grad():
        for p, layer in model.base_model.model.blocks[1].cross_attn.eval().items():
            outputs = layer(torch.eye(48)) - layer(torch.zeros(1, 48))
            want[f"blocks.1.cross_attn.{p}.weight"] = outputs.t() - weights.get_submodule(p).weight
    return Path(folder) / "adapter_model.safetensors", want


@pytest.mark.parametrize("form", ["factored", "both factored", "whole"])
def test_the_scale_of_pefts_lokr(tmp_path, form):
    """alpha/r, whatever is factored; it stands in adapter_config.json only."""
    from peft import LoKrConfig

    both = form == "both factored"
    config = LoKrConfig(r=40 if form == "whole" else 2, alpha=3, target_modules=["k", "v"], decompose_both=both)
    if both:
        config.decompose_factor = 6
    path, want = peft_file(tmp_path, config)
    parts = {key.rsplit(".", 1)[1] for key in load_file(path)}
    assert {"whole": {"lokr_w1", "lokr_w2"}, "both factored": {"lokr_w1_a", "lokr_w2_b"}}.get(
        form, {"lokr_w2_a"}
    ) <= parts
    check_changes(changes_of(path), want)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"alpha": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="its alpha is None; expected a number"):
        read_lora(path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match="its alpha should stand in adapter_config.json"):
        read_lora(path)


PEFT_FORMS = {
    "LoHa": lambda p: p.LoHaConfig(r=3, alpha=5, target_modules=["k", "v"]),
    "DoRA": lambda p: p.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["k", "v"]),
    "DoRA, rank-stabilised": lambda p: p.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=["k", "v"]
    ),
    "OFT": lambda p: p.OFTConfig(oft_block_size=12, target_modules=["k", "v"]),
    "OFT, 2 terms": lambda p: p.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=2, target_modules=["k", "v"]),
    "OFT, 4 terms": lambda p: p.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=4, target_modules=["k", "v"]),
    "OFT, exact": lambda p: p.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["k", "v"]),
    "OFT, shared": lambda p: p.OFTConfig(oft_block_size=16, block_share=True, target_modules=["k", "v"]),
    "OFT, constrained": lambda p: p.OFTConfig(oft_block_size=16, coft=True, eps=0.1, target_modules=["k", "v"]),
}


@pytest.mark.parametrize("form", PEFT_FORMS)
def test_what_peft_saves_is_what_it_computes(tmp_path, form):
    """Of each kind, against peft's own forward pass; at half the strength half of the change."""
    import peft

    path, want = peft_file(tmp_path, PEFT_FORMS[form](peft))
    assert all(d.abs().max() > 0.01 for d in want.values()), "next to nothing changes: the comparison would be empty"
    assert describe(path)["forms"] == {{"LoHa": "hadamard"}.get(form, form.split(",")[0]): 2}
    check_changes(changes_of(path), want)
    check_changes(changes_of(path, weight=0.5), {name: 0.5 * d for name, d in want.items()})


def test_a_shared_oft_has_one_rotation(tmp_path):
    config = {"block_share": True, "peft_type": "OFT"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter_model.safetensors"
    file_of(path, {f"base_model.model.{PLACES[0]}.oft_R.weight": torch.zeros(2, 66)}, None)
    with pytest.raises(BadInput, match=r"does not fit this model: .*24 for 48x48"):
        changes_of(path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("where", ["metadata", "beside"])
def test_a_lora_of_a_changed_base_is_refused(tmp_path, start, where):
    """Unless peft has converted it; then its configuration says True."""
    key = "base_model.model.blocks.1.cross_attn.v"
    for value in (start, True):
        config = {"lora_alpha": 4, "r": 4, "init_lora_weights": value}
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        tensors = pair_for(key)
        path = file_of(tmp_path / "adapter_model.safetensors", tensors, metadata if where == "metadata" else None)
        if value is True:
            check_changes(changes_of(path), {"blocks.1.cross_attn.v.weight": product(tensors, key)})
        else:
            with pytest.raises(BadInput, match=f"a base that init_lora_weights '{start}' changed"):
                read_lora(path)


@pytest.mark.parametrize(
    "first, second",
    [
        ("transformer", "transformer_2"),
        ("diffusion_model.transformer_1", "diffusion_model.transformer_2"),
        ("pipe.dit", "pipe.dit2"),
    ],
)
def test_both_experts_in_one_file(tmp_path, first, second):
    high, low = f"{first}.blocks.0.cross_attn.k", f"{second}.blocks.0.cross_attn.k"
    tensors = pair_for(high) | pair_for(low)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer_2.lora_alpha": 12})}
    path = file_of(tmp_path / "x.safetensors", tensors, metadata if first == "transformer" else None)
    name = "blocks.0.cross_attn.k.weight"
    check_changes(changes_of(path, expert="high"), {name: product(tensors, high)})
    scale = 3 if first == "transformer" else 1
    check_changes(changes_of(path, expert="low"), {name: product(tensors, low) * scale})
    with pytest.raises(BadInput, match=":high or :low"):
        merge_file(tiny.dit("t2v"), path)
    assert choose_experts(parse_lora_spec(str(path)), ("high", "low"))[0] == {"high", "low"}
    assert choose_experts(parse_lora_spec(f"{path}:low"), ("high", "low"))[0] == {"low"}
    with pytest.raises(BadInput, match="single model"):
        choose_experts(parse_lora_spec(str(path)), ("dit",))
    alone = file_of(tmp_path / "y.safetensors", {k: v for k, v in tensors.items() if k.startswith(second + ".")})
    assert choose_experts(parse_lora_spec(str(alone)), ("high", "low")) == ({"low"}, "its keys")


class OtherVariant(WanS2V):
    """What of Animate and S2V LoRAs can change."""

    def __init__(self, width=48, image=True, injectors=()):
        torch.nn.Module.__init__(self)
        self.config = SimpleNamespace(audio_inject_layers=injectors)
        self.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
        for block in self.blocks:
            block.cross_attn = torch.nn.Module()
            for p in ("k", "k_img", "v_img")[: 3 if image else 1]:
                setattr(block.cross_attn, p, torch.nn.Linear(width, width))
            if image:
                block.cross_attn.norm_k_img = torch.nn.RMSNorm(width)
        if image:
            self.img_emb = torch.nn.Module()
            self.img_emb.proj = torch.nn.Sequential(
                torch.nn.LayerNorm(20), torch.nn.Linear(20, 20), torch.nn.GELU(), torch.nn.Linear(20, width)
            )
        if injectors:
            self.audio_injector = torch.nn.Module()
            self.audio_injector.injector = torch.nn.ModuleList(torch.nn.Module() for _ in injectors)
            for injector in self.audio_injector.injector:
                for p in "qkvo":
                    setattr(injector, p, torch.nn.Linear(width, width))


def test_the_image_branch_is_applied_or_skipped(tmp_path, capsys):
    """Where the model has one, and where it has none; then it is said how much was skipped."""
    prefix = "diffusion_model.blocks.1.cross_attn"
    tensors = pair_for(f"{prefix}.k") | pair_for(f"{prefix}.k_img") | pair_for(f"{prefix}.v_img")
    tensors |= {f"{prefix}.norm_k_img.diff": random(48), "diffusion_model.img_emb.proj.3.diff_b": random(48)}
    tensors["diffusion_model.img_emb.proj.1.diff"] = random(20, 20)
    path = file_of(tmp_path / "x.safetensors", tensors)
    shared = {"blocks.1.cross_attn.k.weight": product(tensors, f"{prefix}.k")}
    own = {f"blocks.1.cross_attn.{p}.weight": product(tensors, f"{prefix}.{p}") for p in ("k_img", "v_img")}
    own["blocks.1.cross_attn.norm_k_img.weight"] = tensors[f"{prefix}.norm_k_img.diff"]
    own["img_emb.proj.3.bias"] = tensors["diffusion_model.img_emb.proj.3.diff_b"]
    own["img_emb.proj.1.weight"] = tensors["diffusion_model.img_emb.proj.1.diff"]
    check_changes(changes_of(path, model=OtherVariant()), shared | own)
    assert capsys.readouterr().out == ""
    check_changes(changes_of(path, model=OtherVariant(image=False)), shared)
    assert "skipped 5 changes of an image branch" in capsys.readouterr().out
    assert describe(path)["image_keys"] == 7
    del tensors[f"{prefix}.k.lora_A.weight"], tensors[f"{prefix}.k.lora_B.weight"]
    with pytest.raises(BadInput, match="only changes of an image branch"):
        merge_file(tiny.dit("t2v"), file_of(tmp_path / "y.safetensors", tensors))


@pytest.mark.parametrize("form", ["diff", "low rank", "flat"])
def test_a_patch_embedding_for_other_channels_is_skipped(tmp_path, capsys, form):
    """Of Wan 2.1's T2V, 16 channels, on I2V's 36; the rest is merged, its bias too."""
    k, patch = "diffusion_model.blocks.1.cross_attn.k", "diffusion_model.patch_embedding"
    tensors = pair_for(k) | {f"{patch}.diff_b": random(48)}
    want = {"blocks.1.cross_attn.k.weight": product(tensors, k), "patch_embedding.bias": tensors[f"{patch}.diff_b"]}
    shape = (48, 64) if form == "flat" else (48, 16, 1, 2, 2)
    if form == "low rank":
        tensors |= {f"{patch}.lora_A.weight": random(2, 16, 1, 2, 2), f"{patch}.lora_B.weight": random(48, 2, 1, 1, 1)}
    else:
        tensors[f"{patch}.diff"] = random(*shape)
    path = file_of(tmp_path / "x.safetensors", tensors)
    check_changes(changes_of(path, kind="i2v"), want)
    assert "skipped 1 change of a patch embedding for 16 channels, where this model has 36" in capsys.readouterr().out
    assert changes_of(path, kind="t2v").keys() == want.keys() | {"patch_embedding.weight"}
    assert capsys.readouterr().out == ""


def test_image_names_of_diffusers(tmp_path):
    key = "transformer.blocks.2.attn2.add_{}_proj"
    tensors = pair_for(key.format("k")) | pair_for(key.format("v"))
    tensors["transformer.condition_embedder.image_embedder.ff.net.0.proj.diff"] = random(20, 20)
    tensors["transformer.blocks.0.attn2.norm_added_k.diff"] = random(48)
    want = {f"blocks.2.cross_attn.{p}_img.weight": product(tensors, key.format(p)) for p in "kv"}
    want["img_emb.proj.1.weight"] = tensors["transformer.condition_embedder.image_embedder.ff.net.0.proj.diff"]
    want["blocks.0.cross_attn.norm_k_img.weight"] = tensors["transformer.blocks.0.attn2.norm_added_k.diff"]
    check_changes(changes_of(file_of(tmp_path / "x.safetensors", tensors), model=OtherVariant()), want)


def test_injectors(tmp_path):
    """S2V's: read under both spellings, and trained where they stand behind the given blocks."""
    dotted, flat = "diffusion_model.audio_injector.injector.1.q", "lora_unet_audio_injector_injector_0_o"
    tensors = pair_for(dotted) | pair_for(flat)
    want = {"audio_injector.injector.1.q.weight": product(tensors, dotted)}
    want["audio_injector.injector.0.o.weight"] = product(tensors, flat)
    path = file_of(tmp_path / "x.safetensors", tensors)
    check_changes(changes_of(path, model=OtherVariant(image=False, injectors=(0, 2))), want)
    model = OtherVariant(injectors=(0, 2))
    inject(model, ("cross_attn.k_img", "audio_injector.v"), rank=2, blocks=[1, 2])
    names = ["blocks.1.cross_attn.k_img", "blocks.2.cross_attn.k_img", "audio_injector.injector.1.v"]
    assert sorted(lora_layers(model)) == sorted(names)
    save_lora(tmp_path / "y.safetensors", model)
    assert set(read_lora(tmp_path / "y.safetensors")[0]) == {f"{n}.weight" for n in names}
    metadata = read_lora(tmp_path / "y.safetensors")[1]
    assert (metadata["targets"], metadata["blocks"]) == ("audio_injector.v,cross_attn.k_img", "1,2")
    for targets in (("audio_injector.q",), ("cross_attn.v_img",)):
        with pytest.raises(ValueError, match=f"{targets[0]}: this model has no"):
            inject(tiny.dit("t2v"), targets)
    with pytest.raises(ValueError, match="there are none in blocks 1"):
        inject(OtherVariant(injectors=(0, 2)), ("audio_injector.q",), blocks=[1])


def all_targets(model_type):
    return (*TARGETS, *parts_of(model_type).samples.extra_lora_targets)


@pytest.mark.parametrize("kind, modules", [("s2v", 4 * 10 + 3 * 4), ("animate", 10 * 12)])
def test_every_target_of_the_other_variants(tmp_path, kind, modules, report):
    """On all modules that the field's LoRAs of them have: trained, saved and merged, the model's output is the same."""
    import test_animate

    targets = all_targets(kind)
    make = tiny_s2v.dit if kind == "s2v" else tiny_animate.animate
    model, base = make(), make()
    if kind == "s2v":
        args, given = (), tiny_s2v.inputs()
    else:
        args, given = test_animate.inputs(base)
    torch.manual_seed(5)
    params = inject(model, targets, rank=2, alpha=3)
    for b in params[1::2]:
        b.data.normal_(0, 0.1)
    assert len(params) == 2 * modules
    save_lora(tmp_path / "a.safetensors", model)
    with torch.no_grad():
        before, want = base(*args, **given), model(*args, **given)
        merge_file(base, tmp_path / "a.safetensors")
        report("merged against injected", tiny.error(base(*args, **given), want), 5e-6)
    assert tiny.error(want, before) > 0.02, "the adapter does next to nothing: the comparison would be empty"


@pytest.mark.parametrize(
    "variant, targets, parameters",
    [
        ("animate-14B", all_targets("animate"), 718_274_560),  # of the released relighting LoRA
        ("s2v-14B", all_targets("s2v"), 128 * (4_792_320 + 491_520)),
        ("ti2v-5B", ("cross_attn.k", "cross_attn.v"), 8 * 5_898_240),  # 60 matrices of 3072 x 3072
    ],
)
def test_counts_at_full_size(variant, targets, parameters):
    with torch.device("meta"):
        model = new_dit(full_config(variant))
    assert sum(p.numel() for p in inject(model, targets, rank=128)) == parameters


K = "diffusion_model.blocks.0.cross_attn.k"


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({f"{K}.hada_{w}": (4, 4) for w in ("w1_a", "w1_b", "w2_a")}, None, "1 changes are not whole"),
        ({f"{K}.lora_A.weight": (4, 48), f"{K}.dora_scale": (1, 48)}, None, "1 changes are not whole"),
        ({f"{K}.oft_blocks": (2, 4, 12, 12)}, None, "is a BOFT"),
        ({f"{K}.oft_blocks": (4, 12, 11)}, None, "do not fit together"),
        ({f"base_model.model.{PLACES[0]}.boft_R": (1, 4, 12, 12)}, None, "is a BOFT"),
        ({f"base_model.model.{PLACES[0]}.oft_R.weight": (4, 66)}, None, "should stand in adapter_config.json"),
        ({f"{K}.{p}.weight": (4, 48) for p in ("a1", "a2", "b1", "b2")}, None, "do not fit together"),
        ({f"decoder.{K}.a1.weight": (4, 48)}, None, "not a LoRA"),
        (
            {f"{K}.lora_A.weight": (4, 48), f"{K}.lora_B.weight": (48, 4), f"{K}.lora_B.bias": (48,)},
            None,
            "biases of its own",
        ),
        ({f"{K}.lokr_w1": (4, 4), f"{K}.lokr_t2": (2, 2, 3, 3)}, None, "Tucker"),
        ({"blocks.0.cross_attn.k.weight": (48, 48), "patch_embedding.weight": (48, 16)}, None, "not a LoRA"),
        ({f"{K}.lora_A.weight": (4, 48)}, None, "1 changes are not whole"),
        ({f"{K}.lora_A.weight": (4, 48), f"{K}.lora_B.weight": (48, 3)}, None, "do not fit together"),
        ({f"{K}.lora_A.weight": (0, 48), f"{K}.lora_B.weight": (48, 0)}, None, "do not fit together"),
        ({f"{K}.alpha": ()}, None, "not whole"),
        ({f"{K}.lokr_w1": (4, 4), f"{K}.lokr_w2_a": (12, 2)}, None, "not whole"),
        ({f"{K}.lokr_w1": (4, 4), f"{K}.lokr_w2": (12, 12), f"{K}.lokr_w2_b": (2, 12)}, None, "not whole"),
        ({f"{K}.diff": (48, 48), f"{K}.lora_A.weight": (4, 48), f"{K}.lora_B.weight": (48, 4)}, None, "not whole"),
        ({f"{K}.lora_A.weight": (4, 48), f"{K}.lora_B.weight": (48, 4), "vace_blocks.0.k.diff": (2,)}, None, "1 keys"),
        ({"transformer.blocks.0.attn.to_q.lora_A.weight": (4, 48)}, None, "keys are unknown"),
        ({f"{K}.diff": (48, 48), "blocks.0.cross_attn.k.diff": (48, 48)}, None, "twice"),
        (
            {
                "transformer.blocks.0.attn2.to_k.lora_A.weight": (4, 48),
                "transformer.blocks.0.attn2.to_k.lora_B.weight": (48, 4),
            },
            {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"blocks.0.attn2.to_k": 8}},
            "uses PEFT's alpha_pattern",
        ),
        ({"decoder.snake.alpha": (4,), "decoder.conv.weight": (4, 4)}, None, "not a LoRA"),
        ({f"{K}.diff": (48, 48)}, {"transformer.rank_pattern": {"x": 8}}, "uses PEFT's rank_pattern"),
        ({f"{K}.diff": (48, 48)}, {"use_dora": True}, "use_dora"),
        ({f"{K}.diff": (48, 48)}, {"transformer.lora_alpha": "8"}, "lora_alpha is '8'"),
        ({f"{K}.diff": (48, 48)}, {"transformer.use_rslora": True}, "lora_alpha is None"),
        ({f"{K}.diff": (48, 48)}, [1], "cannot be read"),
    ],
)
def test_refusals_say_why(tmp_path, tensors, metadata, message):
    metadata = metadata and {"lora_adapter_metadata": json.dumps(metadata)}
    path = file_of(tmp_path / "x.safetensors", {k: torch.zeros(shape) for k, shape in tensors.items()}, metadata)
    with pytest.raises(BadInput, match=message) as refusal:
        read_lora(path)
    assert "\n" not in str(refusal.value)
    listing = describe(path)
    assert listing is None or listing["problem"] in str(refusal.value)


def test_integers_are_refused(tmp_path):
    tensors = {k: (v * 100).to(torch.int8) for k, v in pair_for(K).items()}
    with pytest.raises(BadInput, match="do not fit together"):
        read_lora(file_of(tmp_path / "x.safetensors", tensors))


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    path = file_of(tmp_path / "x.safetensors", pair_for("blocks.0.cross_attn.k", alpha=float("nan")))
    with pytest.raises(BadInput, match="alpha of blocks.0.cross_attn.k.weight is nan"):
        read_lora(path)


def test_description_from_the_header(tmp_path):
    tensors, want = step_distilled()
    tensors |= {"diffusion_model.blocks.2.cross_attn.v_img.diff": random(48, 48)}
    one = describe(file_of(tmp_path / "wan_high_noise_lora_rank2.safetensors", tensors))
    assert one["forms"] == {"low rank": 11, "difference": len(want) + 1 - 11} and one["ranks"] == {2: 11}
    assert one["targets"]["ffn.0"] == 3 and one["targets"]["modulation"] == 3 and one["targets"]["ffn.0.bias"] == 3
    assert one["blocks"] == [0, 1, 2] and "head.modulation" in one["elsewhere"] and len(one["elsewhere"]) == 15
    assert (one["image_keys"], one["alpha_keys"], one["problem"]) == (1, 0, None)
    assert (one["expert"], one["expert_from"]) == ("high", "its name")
    kron = {f"{K}.lokr_w1": random(4, 4), f"{K}.lokr_w2": random(12, 12), f"{K}.alpha": torch.tensor(1.0)}
    one = describe(file_of(tmp_path / "x.safetensors", kron, {"a": "b"}))
    assert (one["forms"], one["ranks"], one["alpha_keys"], one["metadata"]) == ({"kron": 1}, {}, 1, {"a": "b"})
    assert describe(file_of(tmp_path / "y.safetensors", {"patch_embedding.weight": random(2, 2)})) is None


# ---- which expert ------------------------------------------------------------------------------------------------
# Names as people give them
HIGH_NOISE = """
wan22_style_high_noise
high_noise_model
wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217
DR34ML4Y_I2V_14B_HighNoise
WAN22-highnoise
Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16
Style-22-H-e8
Wan22.High
adapter_model_high
adapter_model_high_000250
low_rank_high_noise
high_heels_HIGH
low_poly_high_noise_v1
Style_HN
Style_HN_v2
mystyle_hn_e40
W22_Posing_i2v_HN_v1
wan22_h_x
wan2.2_h_mystyle
Wan2.2-T2V-H-MyStyle
wan22h_style
Wan_2_2_I2V_HIGH_v1.1
bounce_wan22_high_bf16
mql_massage_wan22_i2v_v1_high_noise
BounceHighWan2_2
wan22-jump-i2v-102epoc-high-v3
zoom_highv2
style_high_e20
style-high-2000steps
style_HIGH_(1)
Style (high noise)
mystyle-h-noise
style_high_lora
style_高噪
twilight_high_fp8_e4m3fn
glow_HIGH_e4m3fn
"""
LOW_NOISE = """
wan22_style_low_noise
low_noise_model
wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022
Style-LowNoise-v2
Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_LOW_fp16
Style-22-L-e8
style_low
adapter_model_low_000250
wan22_high_heels_low_noise
low_poly_wan22_low
thigh_high_socks_LN
Style_LN
wan22_l_x
wan22-L-mystyle
WAN22_A14B_LN_style
BounceLowWan2_2
zoom_low2
style_low_epoch_10
style_noise_low
style_低噪声
"""
NO_EXPERT = """
style
SlowMotion_glow
low_rank_highres
high_quality
high_quality_v2
trained_on_H100
trained_on_h264
high_and_low_noise
high_heels
High_Heels_v2
HighHeels_wan22
wan22_high_heels
high_fantasy_style
low_poly
low_angle_shot_v1.0
lowrider_wan2.2
highway_drive_14B
thigh_high_v1
knee_high
high_school
high_kick_i2v_480p
high_speed_drone_shot
low_light_photo
low_key_portrait
high_contrast_bw
high_detail_skin_v3
l_lawliet_death_note
H_R_Giger_style
style_high_low
StyleHighLow_v1
low_3d_style
high_4k_upscale
highlow_mix
low_noise_high_noise
yellow_flow_v2
shallow
"""
NAMES = [
    (n, want) for text, want in ((HIGH_NOISE, "high"), (LOW_NOISE, "low"), (NO_EXPERT, None)) for n in text.split("\n")
]


@pytest.mark.parametrize("name, want", [(name, want) for name, want in NAMES if name])
def test_experts_by_name(name, want):
    """By the file's own name; a subject that is high or low is no expert."""
    assert expert_in_name(f"/models/low_noise/{name}.safetensors") == want


def test_which_expert(tmp_path):
    """The flag goes before the keys, these before the metadata, that before the name; an A14B needs one of them."""
    tensors = pair_for("diffusion_model.blocks.0.cross_attn.k")
    plain = file_of(tmp_path / "style.safetensors", tensors)
    named = file_of(tmp_path / "style_HIGH.safetensors", tensors)
    both = file_of(tmp_path / "style_HIGH_2.safetensors", tensors, {"expert": "low"})
    second = {k.replace("diffusion_model", "transformer_2"): v for k, v in tensors.items()}
    keyed = file_of(tmp_path / "style_HIGH_3.safetensors", second, {"expert": "high"})

    def chosen(text, experts=("high", "low")):
        return choose_experts(parse_lora_spec(text), experts)

    assert chosen(f"{named}") == ({"high"}, "its name") and chosen(f"{named}:low") == ({"low"}, None)
    assert chosen(f"{both}") == ({"low"}, "its metadata") and chosen(f"{both}:0.5:both") == ({"high", "low"}, None)
    assert chosen(f"{keyed}") == ({"low"}, "its keys") and chosen(f"{keyed}:high") == ({"high"}, None)
    with pytest.raises(BadInput, match="add :high, :low or :both"):
        chosen(f"{plain}")
    assert chosen(f"{plain}", ("low",)) == ({"low"}, None)
    with pytest.raises(BadInput, match="only low"):
        chosen(f"{named}", ("low",))
    assert chosen(f"{plain}", ("dit",)) == chosen(f"{named}", ("dit",)) == ({"dit"}, None)
    for text in (f"{both}", f"{named}:high", f"{named}:both", f"{keyed}"):
        with pytest.raises(BadInput, match="single model"):
            chosen(text, ("dit",))


@pytest.mark.parametrize(
    "text, want",
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5, None)),
        ("a.safetensors:-1:low", ("a.safetensors", -1.0, "low")),
        ("a.safetensors:both", ("a.safetensors", 1.0, "both")),
        ("d:/x/a.safetensors:high", ("d:/x/a.safetensors", 1.0, "high")),
        ("high", ("high", 1.0, None)),
    ],
)
def test_specs(text, want):
    assert parse_lora_spec(text) == want


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(BadInput, match="--lora a:inf: a weight of inf"):
        parse_lora_spec("a:inf")


# ---- merging, training -------------------------------------------------------------------------------------------
def test_a_merge_rounds_once(tmp_path):
    """bf16 weights become the fp32 sum, rounded."""
    tensors, want = step_distilled()
    model = tiny.dit("t2v").bfloat16()
    before = {n: p.float() for n, p in model.named_parameters()}
    merge_file(model, file_of(tmp_path / "x.safetensors", tensors), 0.3)
    for name, p in model.named_parameters():
        exact = before[name] + 0.3 * want.get(name, torch.zeros(()))
        step = torch.finfo(torch.bfloat16).eps * exact.abs() / 2 + 1e-6  # half of the distance of bf16 numbers
        assert ((p.float() - exact).abs() <= step).all(), name


def test_beside_8_bit_weights(tmp_path):
    """Of low rank: kept beside, LoKr too. A difference would be rounded away: refused before anything is changed."""
    model = tiny.dit("t2v")
    key = "diffusion_model.blocks.1.cross_attn"
    a, b, x = random(2, 48), random(48, 2), random(5, 48)
    tensors = pair_for(f"{key}.k") | {f"{key}.v.lokr_w1": random(2, 2), f"{key}.v.lokr_w2_a": random(24, 1)}
    tensors |= {f"{key}.v.lokr_w2_b": random(1, 24), f"{key}.k.diff_b": random(48)}
    want = {
        "k": product(tensors, f"{key}.k"),
        "v": torch.kron(tensors[f"{key}.v.lokr_w1"], tensors[f"{key}.v.lokr_w2_a"] @ tensors[f"{key}.v.lokr_w2_b"]),
    }
    convert(model, {})
    attn = model.blocks[1].cross_attn
    for p, layer in (("k", attn.k), ("v", attn.v)):
        layer.quantize(getattr(tiny.dit("t2v").blocks[1].cross_attn, p).weight)
    before = {p: getattr(attn, p)(x) for p in want}
    bias = attn.k.bias.clone()
    path = file_of(tmp_path / "x.safetensors", tensors)
    merge_file(model, path, 0.5)
    assert attn.k.base.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(attn.k.base.bias, bias + 0.5 * tensors[f"{key}.k.diff_b"])
    for p, d in want.items():
        extra = 0.5 * x @ d.t() + (0.5 * tensors[f"{key}.k.diff_b"] if p == "k" else 0)
        assert (getattr(attn, p)(x) - before[p] - extra).abs().max() < 2e-6
    bias = attn.k.base.bias.clone()
    for parts in (
        {"diff": random(48, 48)},
        {f"hada_w{i}_{p}": random(*s) for i in (1, 2) for p, s in zip("ab", ((48, 2), (2, 48)))},
        {"lora_A.weight": random(2, 48), "lora_B.weight": random(48, 2), "dora_scale": random(48, 1)},
        {"oft_blocks": random(4, 12, 12)},
    ):
        lost = {f"{key}.k.diff_b": random(48)} | {f"{key}.q.{part}": t for part, t in parts.items()}
        with pytest.raises(BadInput, match="1 weights that are in 8 bits"):
            merge_file(model, file_of(tmp_path / "y.safetensors", lost))
        assert torch.equal(attn.k.base.bias, bias)
    merge_file(
        model, file_of(tmp_path / "z.safetensors", {f"{key}.k.lora_A.weight": a, f"{key}.k.lora_B.weight": b}), -2
    )
    extra = x @ (0.5 * want["k"] - 2 * b @ a).t() + 0.5 * tensors[f"{key}.k.diff_b"]
    assert (attn.k(x) - before["k"] - extra).abs().max() < 4e-6
    model.blocks[1].cross_attn.k.scale = 3  # an adapter in training
    merge_file(model, tmp_path / "z.safetensors")
    extra = x @ (1.5 * want["k"] - 5 * b @ a).t() + 0.5 * tensors[f"{key}.k.diff_b"]
    assert (attn.k(x) - before["k"] - extra).abs().max() < 8e-6


def test_a_new_adapter_begins_as_pefts():
    """A uniform up to 1/sqrt(in_features) either way, B zero."""
    injected = tiny.dit("t2v")
    inject(injected, ("cross_attn.k", "ffn.2"), rank=64)
    for a, b in adapter(injected).values():
        bound = a.shape[1] ** -0.5
        assert 0.98 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.1 * bound and not b.any()
        assert abs(a.std() / bound - 3**-0.5) < 0.02


@torch.no_grad()
def test_dropout(report):
    """In training, part of the adapter's input is zero and the rest larger; otherwise it does nothing."""
    model = tiny.dit("t2v")
    for p in inject(model, ("cross_attn.k",), rank=4, alpha=8, dropout=0.5)[1::2]:
        p.data.normal_(0, 0.3)
    layer, x = model.blocks[0].cross_attn.k, torch.ones(4000, 48)
    base, delta = x @ layer.base.weight.t() + layer.base.bias, 2 * layer.lora_B @ layer.lora_A
    report("in evaluation", tiny.error(layer(x), base + x @ delta.t()), 2e-6)
    layer.train()
    out = layer(x) - base
    spread = (delta**2).sum(1).sqrt()  # of a sum of 48 terms, each zero or doubled
    report("spread", (out.std(0) / spread - 1).abs().max().item(), 0.1)
    report("mean, in standard errors", ((out.mean(0) - delta.sum(1)).abs() / spread * 4000**0.5).max().item(), 6)


@torch.no_grad()
@pytest.mark.parametrize("rank, alpha", [(4, 1), (4, 12)])
def test_the_norm_is_clamped(rank, alpha):
    """With alpha and rank apart: what is bounded is (alpha/rank) B A, and only where it is too large."""
    model = tiny.dit("t2v")
    inject(model, ("cross_attn.k",), rank, alpha)
    norms, pairs = weight_norms(model), adapter(model)
    for i, (_, b) in enumerate(pairs.values()):
        b.data.normal_(0, (0.3, 1e-4, 0.3)[i])
    before = {n: alpha / rank * (b @ a).detach() for n, (a, b) in pairs.items()}
    assert clamp_weight_norm(pairs, alpha / rank, norms, 0.05) == 2
    for name, (a, b) in pairs.items():
        now = alpha / rank * (b @ a)
        limit = 0.05 * model.get_submodule(name).base.weight.norm()
        if before[name].norm() > limit:
            assert now.norm() == pytest.approx(limit.item(), rel=1e-5)
            assert tiny.error(now / now.norm(), before[name] / before[name].norm()) < 1e-5
        else:
            assert torch.equal(now, before[name])


def test_starting_from_a_file(tmp_path):
    """The adapter's dW is then the file's, whatever the two scales are; only where modules and ranks are the same."""
    model = trained(rank=4, alpha=8)
    save_lora(tmp_path / "a.safetensors", model)
    fresh = tiny.dit("ti2v")
    inject(fresh, rank=4, alpha=2)
    start_from(adapter(fresh), tmp_path / "a.safetensors", 0.5)
    assert tiny.error(run(fresh), run(model)) < 2e-6
    for kwargs, message in (
        (dict(rank=2), "48, 48\\), 4\\), asked for are"),
        (dict(rank=4, blocks=[0]), "asked for are none"),
    ):
        other = tiny.dit("ti2v")
        inject(other, **kwargs)
        with pytest.raises(BadInput, match=message):
            start_from(adapter(other), tmp_path / "a.safetensors", 1)


# ---- our own files -----------------------------------------------------------------------------------------------
WRITE_TWICE = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from nanowan.formats.lora import AdapterInfo, write_lora
pairs = {f"blocks.{i}.cross_attn.k": (torch.ones(2, 4), torch.ones(4, 2)) for i in (1, 0)}
info = AdapterInfo("t2v-A14B", "2026-01-01", {"a b": 3, "c": 1}, (832, 480), 100, 1e-4, 2, 8)
write_lora(sys.argv[3], pairs, 0.5, info, expert="high", step=3)
"""


def test_equal_runs_write_equal_files(tmp_path):
    """From processes whose hashes differ."""
    root = Path(__file__).parent.parent
    for i in range(2):
        environment = {**os.environ, "PYTHONHASHSEED": str(i)}
        command = [sys.executable, "-c", WRITE_TWICE, str(root), str(root), str(tmp_path / str(i) / "x.safetensors")]
        subprocess.run(command, check=True, env=environment)
    first, second = ((tmp_path / str(i) / "x.safetensors").read_bytes() for i in range(2))
    assert first == second
    with safe_open(tmp_path / "0" / "x.safetensors", "pt") as f:
        metadata = f.metadata()
    raw = (tmp_path / "0" / "x.safetensors").read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert metadata == {
        "format": "pt",
        "variant": "t2v-A14B",
        "expert": "high",
        "step": "3",
        "rank": "2",
        "alpha": "1.0",
        "alpha_folded": "True",
        "targets": "cross_attn.k",
        "blocks": "0,1",
        "trained_words": "a b, c",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "x",
        "modelspec.date": "2026-01-01",
        "modelspec.architecture": "wan-2_1-text2video-14b/lora",
        "modelspec.resolution": "832x480",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "modelspec.trigger_phrase": "a b, c",
        "ss_tag_frequency": '{"captions": {"a b": 3, "c": 1}}',
        "ss_base_model_version": "Wan Video 2.2 T2V-A14B",
        "ss_output_name": "x",
        "ss_steps": "3",
        "ss_max_train_steps": "100",
        "ss_learning_rate": "0.0001",
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "8",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
    }


def test_changes_written_again(tmp_path):
    """All kinds, each times a factor of its own: the file then holds just that."""
    tensors, want = step_distilled()
    k = "diffusion_model.blocks.1.cross_attn.k"
    tensors |= {f"{k}.lokr_w1": random(6, 6), f"{k}.lokr_w2_a": random(8, 2), f"{k}.lokr_w2_b": random(2, 8)}
    tensors[f"{k}.alpha"] = torch.tensor(5.0)
    want["blocks.1.cross_attn.k.weight"] = kron(
        tensors[f"{k}.lokr_w1"], tensors[f"{k}.lokr_w2_a"] @ tensors[f"{k}.lokr_w2_b"]
    ) * (5 / 2)
    changes, _ = read_lora(file_of(tmp_path / "x.safetensors", tensors))
    factors = {"blocks.1.cross_attn.k.weight": 0.5, "blocks.0.modulation": 2.0, "time_embedding.0.weight": 0.25}
    write_changes(tmp_path / "y.safetensors", changes, {"a": 1}, factors)
    check_changes(changes_of(tmp_path / "y.safetensors"), {n: d * factors.get(n, 1) for n, d in want.items()})
    for name, change in changes.items():
        assert change.norm() == pytest.approx(want[name].norm().item(), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_managers_names(tmp_path, variant):
    """Every base has an id of SwarmUI and a label."""
    info = AdapterInfo(variant)
    write_lora(tmp_path / "x.safetensors", {"blocks.0.cross_attn.k": (torch.ones(2, 4), torch.ones(4, 2))}, info=info)
    metadata = read_lora(tmp_path / "x.safetensors")[1]
    id = "wan-2_2-ti2v-5b" if variant == "ti2v-5B" else "wan-2_1-text2video-14b"
    assert metadata["modelspec.architecture"] == f"{id}/lora" and metadata["variant"] == variant
    assert metadata["ss_base_model_version"].lower().endswith(variant.lower())


def test_a_changed_copy_has_its_own_hash(tmp_path):
    save_lora(tmp_path / "a.safetensors", trained())
    changes, metadata = read_lora(tmp_path / "a.safetensors")
    write_changes(
        tmp_path / "b.safetensors", changes, metadata | {"sshs_legacy_hash": "x"}, dict.fromkeys(changes, 0.5)
    )
    b = read_lora(tmp_path / "b.safetensors")[1]
    raw = (tmp_path / "b.safetensors").read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert b["sshs_model_hash"] == digest != metadata["sshs_model_hash"] and "sshs_legacy_hash" not in b


def run_convert(*args):
    diag.convert.run(diag.arguments(["convert", *map(str, args)]))


def test_musubi_tuners_names(tmp_path):
    """As its wan_generate_video looks for them: each weight's name with underscores, down, up and alpha; the same bits
    there and back.
    """
    ours, theirs, back = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "back"))
    model = trained(TARGETS)
    save_lora(ours, model, expert="high")
    run_convert(ours, theirs, "--to", "musubi")
    state, rank = load_file(theirs), 4
    assert len(state) == 3 * len(lora_layers(model))
    for name, layer in lora_layers(model).items():
        key = "lora_unet_" + name.replace(".", "_")
        assert state[f"{key}.alpha"] == rank
        assert torch.equal(state[f"{key}.lora_down.weight"], layer.lora_A)
        assert torch.equal(state[f"{key}.lora_up.weight"], layer.lora_B * layer.scale)
    assert read_lora(theirs)[1]["expert"] == "high"
    run_convert(theirs, back, "--to", "comfyui")
    got, want = load_file(back), load_file(ours)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_what_is_not_written_for_musubi_tuner(tmp_path):
    tensors = pair_for(K) | {f"{K}.diff_b": random(48)}
    mixed = file_of(tmp_path / "x.safetensors", tensors)
    rotation = file_of(tmp_path / "y.safetensors", {f"{K}.oft_blocks": random(4, 12, 12)})
    both = {
        k.replace("diffusion_model", p): v for p in ("transformer", "transformer_2") for k, v in pair_for(K).items()
    }
    both = file_of(tmp_path / "z.safetensors", both)
    for source, flags, message in (
        (mixed, ["--to", "musubi"], "reads files of one kind, LoRA, LoHa or LoKr; this has"),
        (rotation, ["--to", "musubi"], "reads files of one kind"),
        (mixed, ["--to", "official"], "of a LoRA, one of comfyui, musubi"),
        (f"{mixed}:0.5", ["--to", "musubi"], "a weight means nothing here"),
        (both, ["--to", "musubi"], "holds both experts"),
    ):
        with pytest.raises(BadInput, match=message):
            run_convert(source, tmp_path / "out.safetensors", *flags)
    assert not (tmp_path / "out.safetensors").exists()
    run_convert(f"{both}:low", tmp_path / "out.safetensors", "--to", "musubi")
    assert read_lora(tmp_path / "out.safetensors")[1]["expert"] == "low"


def test_other_forms_written_again(tmp_path):
    """A LoHa and a GLoRA scaled; a DoRA and an OFT as they are, or refused: they are no multiple of anything."""
    k, v, q, o = (f"diffusion_model.blocks.1.cross_attn.{p}" for p in "kvqo")
    tensors = {f"{k}.hada_w{i}_{p}": random(*s) for i in (1, 2) for p, s in zip("ab", ((48, 2), (2, 48)))}
    tensors |= {f"{v}.{p}.weight": random(*s) for p, s in zip(("a1", "a2", "b1", "b2"), ((48, 2), (2, 48)) * 2)}
    tensors |= {f"{k}.alpha": torch.tensor(3.0), f"{v}.alpha": torch.tensor(3.0)}
    fixed = pair_for(q, alpha=2.0) | {f"{q}.dora_scale": torch.rand(1, 48) + 0.5, f"{o}.oft_blocks": random(4, 12, 12)}
    fixed |= {f"{o}.rescale": torch.rand(48, 1) + 0.5, f"{o}.alpha": torch.tensor(1e-3)}
    path = file_of(tmp_path / "x.safetensors", tensors | fixed)
    changes, want = read_lora(path)[0], changes_of(path)
    factors = {f"blocks.1.cross_attn.{p}.weight": factor for p, factor in (("k", 0.5), ("v", 2.0))}
    write_changes(tmp_path / "y.safetensors", changes, {}, factors)
    check_changes(changes_of(tmp_path / "y.safetensors"), {n: d * factors.get(n, 1) for n, d in want.items()})
    for p, form in (("q", "a DoRA"), ("o", "an OFT")):
        factors = {f"blocks.1.cross_attn.{p}.weight": 0.5}
        with pytest.raises(BadInput, match=f"cross_attn.{p}.weight is not written: {form} cannot be scaled"):
            write_changes(tmp_path / "z.safetensors", changes, {}, factors)
    assert not (tmp_path / "z.safetensors").exists()


def test_the_written_file(tmp_path):
    save_lora(tmp_path / "a.safetensors", trained(blocks=[1, 2]), variant="ti2v-5B", step=7)
    state = load_file(tmp_path / "a.safetensors")
    assert sorted(state)[:2] == [
        "diffusion_model.blocks.1.cross_attn.k.lora_A.weight",
        "diffusion_model.blocks.1.cross_attn.k.lora_B.weight",
    ]
    meta = read_lora(tmp_path / "a.safetensors")[1]
    assert {k: meta[k] for k in ("rank", "alpha", "targets", "blocks", "step", "variant")} == {
        "rank": "4",
        "alpha": "8.0",
        "targets": "cross_attn.k,cross_attn.v",
        "blocks": "1,2",
        "step": "7",
        "variant": "ti2v-5B",
    }


def test_another_width_changes_nothing(tmp_path):
    save_lora(tmp_path / "a.safetensors", trained())
    other = tiny.dit("ti2v", dim=96)
    before = run(other)
    with pytest.raises(BadInput, match="48x48 for 96x96"):
        merge_file(other, tmp_path / "a.safetensors")
    assert torch.equal(run(other), before)


def test_blocks_below_the_first_adapted_one_keep_nothing():
    """Tensors saved for the backward pass: an adapter on the last block saves as much as that block and the head alone
    need.
    """

    def saved(blocks):
        model = trained(blocks=blocks)
        held = set()
        x, t, context = inputs("ti2v")
        with torch.autograd.graph.saved_tensors_hooks(lambda u: held.add((u.data_ptr(), u.numel())) or u, lambda u: u):
            calls = []
            for i, block in enumerate(model.blocks):
                block.register_forward_hook(lambda m, a, out, i=i: calls.append((i, out.requires_grad, len(held))))
            model(x, t, context).square().mean()
        return calls, len(held)

    calls, last_only = saved([2])
    assert [(i, grad) for i, grad, _ in calls] == [(0, False), (1, False), (2, True)]
    assert calls[1][2] == 0 and last_only > 0
    assert saved([0, 1, 2])[1] > 2 * last_only


def test_gradients_do_not_depend_on_other_blocks_being_adapted(report):
    grads = []
    for blocks in ([2], [0, 1, 2]):
        model = tiny.dit("ti2v")
        inject(model, rank=4, blocks=blocks)
        for name, layer in lora_layers(model).items():
            g = torch.Generator().manual_seed(sum(map(ord, name)))
            layer.lora_A.data = torch.randn(layer.lora_A.shape, generator=g)
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g) * 0.1 * name.startswith("blocks.2.")
        torch.manual_seed(1)
        x, t, context = inputs("ti2v")
        model(x, t, context).square().mean().backward()
        grads.append(
            [p.grad for n, m in lora_layers(model).items() if n.startswith("blocks.2.") for p in (m.lora_A, m.lora_B)]
        )
    report("relative error", max(tiny.error(a, b) for a, b in zip(*grads)), 1e-5)


@pytest.mark.parametrize("text, want", [(None, [0, 1, 2, 3]), ("2-3", [2, 3]), ("0,2-3", [0, 2, 3])])
def test_block_ranges(text, want):
    assert parse_blocks(text, 4) == want


@pytest.mark.parametrize("text", ["2-9", "x", "3-2", "1,,2"])
def test_bad_block_ranges(text):
    with pytest.raises(BadInput, match="--blocks"):
        parse_blocks(text, 4)


@pytest.mark.parametrize(
    "kwargs, message", [(dict(targets=["cross_attn.z"]), "target blocks.0.cross_attn.z"), (dict(rank=0), "rank 0: at")]
)
def test_bad_adapters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        inject(tiny.dit("t2v"), **kwargs)
