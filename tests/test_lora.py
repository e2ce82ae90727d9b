"""LoRA against diffusers and peft; injecting, merging, file layouts, and what training keeps in memory."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_wan import inputs, padded

from checkpoint import BadInput
from lora import TARGETS, inject, layers, merge, parse_blocks, read_lora, save_lora


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
    merge(base, tmp_path / "a.safetensors")
    report("relative error", tiny.error(run(base), run(model)), 2e-6)
    back = tiny.dit("ti2v")
    merge(back, tmp_path / "a.safetensors", 0.75)
    merge(back, tmp_path / "a.safetensors", -0.75)
    report("merged and taken out again", tiny.error(run(back), run(tiny.dit("ti2v"))), 2e-6)


def test_a_new_adapter_changes_nothing():
    model = tiny.dit("ti2v")
    before = run(model)
    params = inject(model, rank=4)
    assert torch.equal(run(model), before)
    assert len(params) == 2 * 2 * 3 and {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in params
    }


def as_kohya(state):
    out = {}
    for k, v in state.items():
        name, _, part = k.removeprefix("diffusion_model.").rpartition(".lora_")
        base = "lora_unet_" + name.replace(".", "_")
        out[f"{base}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = v
        if part[0] == "A":
            out[f"{base}.alpha"] = torch.tensor(float(len(v)) / 2)  # scale 1/2: B must be twice as large
        else:
            out[f"{base}.lora_up.weight"] = v * 2
    return out


PEFT = [
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    (".q.lora", ".to_q.lora"),
    (".k.lora", ".to_k.lora"),
    (".v.lora", ".to_v.lora"),
    (".o.lora", ".to_out.0.lora"),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
]


def as_peft(state):
    out = {}
    for k, v in state.items():
        k = k.replace("diffusion_model.", "transformer.")
        for a, b in PEFT:
            k = k.replace(a, b)
        out[k] = v
    return out


@pytest.mark.parametrize("convert", [as_kohya, as_peft])
def test_other_layouts_read_alike(tmp_path, convert):
    save_lora(tmp_path / "a.safetensors", trained(TARGETS))
    save_file(
        {k: v.contiguous() for k, v in convert(load_file(tmp_path / "a.safetensors")).items()},
        tmp_path / "b.safetensors",
    )
    ours, theirs = read_lora(tmp_path / "a.safetensors")[0], read_lora(tmp_path / "b.safetensors")[0]
    assert ours.keys() == theirs.keys() and len(ours) == 30
    for name, (a, b) in ours.items():
        assert torch.equal(a, theirs[name][0]) and torch.allclose(b, theirs[name][1], rtol=1e-6)


def test_peft_keeps_alpha_in_a_file_beside(tmp_path):
    import json

    save_lora(tmp_path / "a.safetensors", trained())
    state = load_file(tmp_path / "a.safetensors")
    (tmp_path / "p").mkdir()
    save_file(
        {k.replace("diffusion_model.", "base_model.model."): v for k, v in state.items()},
        tmp_path / "p" / "adapter_model.safetensors",
    )
    with pytest.raises(BadInput, match="adapter_config.json"):
        read_lora(tmp_path / "p" / "adapter_model.safetensors")
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "r": 4}))
    ours, theirs = read_lora(tmp_path / "a.safetensors")[0], read_lora(tmp_path / "p" / "adapter_model.safetensors")[0]
    assert all(torch.equal(theirs[n][1], 8 * ours[n][1]) for n in ours)


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


def test_unknown_keys_and_wrong_shapes_load_nothing(tmp_path):
    save_lora(tmp_path / "a.safetensors", trained())
    state = load_file(tmp_path / "a.safetensors")
    save_file({**state, "blocks.0.cross_attn.k.diff": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(BadInput, match="1 unknown keys"):
        read_lora(tmp_path / "b.safetensors")
    other = tiny.dit("ti2v", dim=96)
    before = run(other)
    with pytest.raises(BadInput, match="48x48 for 96x96"):
        merge(other, tmp_path / "a.safetensors")
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
        for name, layer in layers(model).items():
            g = torch.Generator().manual_seed(hash(name) % 1000)
            layer.lora_A.data = torch.randn(layer.lora_A.shape, generator=g)
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g) * 0.1 * name.startswith("blocks.2.")
        torch.manual_seed(1)
        x, t, context = inputs("ti2v")
        model(x, t, context).square().mean().backward()
        grads.append(
            [p.grad for n, m in layers(model).items() if n.startswith("blocks.2.") for p in (m.lora_A, m.lora_B)]
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
    "kwargs, message", [(dict(targets=["cross_attn.z"]), "--targets cross_attn.z"), (dict(rank=0), "--rank 0")]
)
def test_bad_adapters(kwargs, message):
    with pytest.raises(BadInput, match=message):
        inject(tiny.dit("t2v"), **kwargs)
