"""Animate's DiT and its parts against diffusers' WanAnimateTransformer3DModel, through its own converter's names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import tiny
from benchmarks.tiny_animate import CLIP_SIZES, animate, diffusers_animate, write_dit
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, load_wan, new_dit
from nanowan.variants.animate.model import WanAnimate
from nanowan.variants.registry import parts_of


def inputs(model, frames=3, h=6, w=10, S=40, B=2, n=5):
    """x, t, context, and pose, face and clip; `frames` latent frames with the reference's."""
    side = model.motion_encoder.side
    x = torch.randn(B, 36, frames, h, w)
    t, context = torch.rand(B) * 1000, torch.randn(B, S, tiny.TEXT_DIM)
    return (x, t, context), dict(
        pose=torch.randn(B, 16, frames - 1, h, w),
        face=torch.rand(B, 3, 4 * frames - 7, side, side) * 2 - 1,
        clip=torch.randn(B, n, CLIP_SIZES["dim"]),
    )


def peer_run(peer, x, t, context, pose, face, clip):
    padded = torch.nn.functional.pad(context, (0, 0, 0, 512 - context.shape[1]))
    return peer(
        x,
        t,
        padded,
        encoder_hidden_states_image=clip,
        pose_hidden_states=pose,
        face_pixel_values=face,
        return_dict=False,
    )[0]


def test_motion_encoder_equals_diffusers(report):
    model = animate()
    peer = diffusers_animate(model)
    face = torch.rand(9, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        report("relative error", tiny.error(model.motion_encoder(face), peer.motion_encoder(face)), 2e-5)


def test_image_embedding_equals_diffusers(report):
    model = animate()
    peer = diffusers_animate(model).condition_embedder.image_embedder
    clip = torch.randn(2, 5, CLIP_SIZES["dim"])
    with torch.no_grad():
        report("relative error", tiny.error(model.img_emb(clip), peer(clip)), 2e-6)


@pytest.mark.parametrize("frames", [1, 5, 9, 77])
def test_face_encoder_equals_diffusers(frames, report):
    model = animate()
    peer = diffusers_animate(model)
    motion = torch.randn(2, frames, 26)
    with torch.no_grad():
        got, want = model.face_encoder(motion), peer.face_encoder(motion)
    assert got.shape == (2, (frames + 3) // 4, 5, 48)
    report("relative error", tiny.error(got, want), 2e-5)


@pytest.mark.parametrize("frames, tokens", [(1, 3), (2, 15), (5, 1)])
def test_adapter_equals_diffusers(frames, tokens, report):
    model = animate()
    peer = diffusers_animate(model)
    x, face = torch.randn(2, frames * tokens, 48), torch.randn(2, frames, 5, 48)
    frame = torch.arange(frames).repeat_interleave(tokens)
    for ours, theirs in zip(model.face_adapter.fuser_blocks, peer.face_adapter):
        with torch.no_grad():
            report("relative error", tiny.error(ours(x, ours.keys_values(face), frame), theirs(x, face)), 2e-5)


def test_any_part_of_the_tokens_gets_what_all_of_them_would(report):
    """An adapter needs no token but the one that it computes, wherever ranks cut a clip's tokens."""
    adapter = animate().face_adapter.fuser_blocks[0]
    x, frame = torch.randn(2, 4 * 15, 48), torch.arange(4).repeat_interleave(15)
    kv = adapter.keys_values(torch.randn(2, 4, 5, 48))
    whole = adapter(x, kv, frame)
    for a, b in ((0, 60), (0, 7), (7, 38), (38, 60), (44, 46)):
        report("relative error", tiny.error(adapter(x[:, a:b], kv, frame[a:b]), whole[:, a:b]), 2e-6)
    mixed = torch.randperm(60)
    report("relative error", tiny.error(adapter(x[:, mixed], kv, frame[mixed]), whole[:, mixed]), 2e-6)


@pytest.mark.parametrize("size", [(3, 6, 10), (2, 2, 14), (4, 10, 4)])
@pytest.mark.parametrize("blank", [False, True])
def test_equals_diffusers(size, blank, report):
    """blank: with the face that guidance's second half has."""
    model = animate()
    peer = diffusers_animate(model)
    args, extra = inputs(model, *size)
    if blank:
        extra["face"].fill_(-1)
    with torch.no_grad():
        want, got = peer_run(peer, *args, **extra), model(*args, **extra)
    report("relative error", tiny.error(got, want), 2e-5)


def test_gradients_equal_diffusers(report):
    model = animate()
    peer = diffusers_animate(model)
    (x, t, context), extra = inputs(model)
    names, grads = ["x", "context", *extra], []
    for run in (lambda x, c, **e: peer_run(peer, x, t, c, **e), lambda x, c, **e: model(x, t, c, **e)):
        leaves = [v.clone().requires_grad_() for v in (x, context, *extra.values())]
        out = run(*leaves[:2], **dict(zip(extra, leaves[2:])))
        weight = torch.sin(torch.arange(out.numel()).view(out.shape))
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for name, theirs, ours in zip(names, *grads):
        report(f"{name} gradient", tiny.error(ours, theirs), 1e-4)


# ---- properties -----------------------------------------------------------------------------------------------------
def test_prepared_once_is_the_same():
    """Keys and values that were kept, of the text, the image and the faces, equal those made in every step."""
    model = animate()
    (x, t, context), extra = inputs(model)
    with torch.no_grad():
        plain = model(x, t, context, **extra)
        for cache in (False, True):
            text = model.embed_text(context, cache=cache)
            face, image = (
                model.embed_motion(model.encode_motion(extra["face"]), cache),
                model.embed_image(extra["clip"], cache),
            )
            kept = [*text.keys_values, *face.keys_values, *image.keys_values]
            assert len(kept) == 22 and all((kv is not None) == cache for kv in kept)
            assert torch.equal(model(x, t, text, pose=extra["pose"], face=face, clip=image), plain)
            assert torch.equal(model(x, t, text, **extra), plain)


def test_reference_tokens_get_a_constant_from_the_adapters():
    """Whatever x and the faces are, an adapter adds the same vector to every token of frame 0, and it is not zero."""
    model = animate()
    added = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (x, t, context), extra = inputs(model, frames=4)
        face, frame = model.embed_motion(model.encode_motion(extra["face"])), torch.arange(4).repeat_interleave(15)
        for adapter in model.face_adapter.fuser_blocks:
            y = adapter(torch.randn(2, 4 * 15, 48), adapter.keys_values(face.tokens), frame).unflatten(1, (4, 15))
            added.append(y[:, 0])
            assert (y[:, 1:] - y[:, 1:2, :1]).abs().max() > 1e-2
    bias = model.face_adapter.fuser_blocks[1].linear1_kv.bias[48:]
    assert (added[1] - model.face_adapter.fuser_blocks[1].linear2(bias)).abs().max() < 1e-5 and added[
        1
    ].abs().mean() > 1e-2
    assert (added[0] - added[2]).abs().max() < 1e-5 and (added[1] - added[3]).abs().max() < 1e-5


@pytest.mark.parametrize("j", [0, 1, 4, 5, 8])
def test_a_face_frame_is_felt_from_its_latent_frame_on(j):
    model = animate()
    face = torch.rand(1, 3, 13, 16, 16) * 2 - 1
    before = model.embed_motion(model.encode_motion(face)).tokens
    face[:, :, j] = 0
    changed = (
        (model.embed_motion(model.encode_motion(face)).tokens != before).flatten(2).any(2)[0]
    )  # the reference frame's first
    first = (j + 3) // 4
    assert not changed[: 1 + first].any() and changed[1 + first : 3 + first].all()


def test_faces_are_encoded_each_alone(report):
    model = animate()
    face = torch.rand(11, 3, 16, 16) * 2 - 1
    apart = torch.cat([model.motion_encoder(f[None]) for f in face])
    report("relative error", tiny.error(model.motion_encoder(face), apart), 2e-6)


def test_checkpointing_changes_no_gradient():
    model = animate()
    (x, t, context), extra = inputs(model)
    grads = []
    for on in (False, True):
        model.checkpointing = on
        leaves = [v.clone().requires_grad_() for v in (context, extra["face"], extra["clip"])]
        out = model(x, t, leaves[0], pose=extra["pose"], face=leaves[1], clip=leaves[2])
        grads.append(torch.autograd.grad(out.square().mean(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- files ----------------------------------------------------------------------------------------------------------
def test_released_size():
    with torch.device("meta"):
        state = new_dit(full_config("animate-14B")).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (17_274_816_884, 1427)


def test_loads_by_its_tensors(tmp_path):
    """From a folder as released, the blur kernels in it too, in bf16 but for what stays fp32."""
    model = animate()
    kernels = {
        f"motion_encoder.enc.net_app.convs.{i}.{part}.0.kernel": torch.zeros(4, 4)
        for i in (1, 2)
        for part in ("conv2", "skip")
    }
    write_dit(tmp_path, model)
    shard = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file(load_file(shard) | kernels, shard)
    loaded = load_wan(tmp_path, dtype=torch.float32)
    assert type(loaded) is WanAnimate and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    rounded = load_wan(tmp_path).state_dict()
    wide = {k for k, v in rounded.items() if v.dtype == torch.float32}
    assert {k.split(".")[0] for k in wide} >= {"motion_encoder", "img_emb", "head", "time_embedding"}
    assert not any(k.startswith(("face_encoder", "pose_", "img_emb.proj.1")) or "linear" in k for k in wide)


def test_the_motion_encoders_bytes_are_those_that_it_takes(tmp_path):
    """fp32, though the checkpoint is bf16, and nothing of the DiT in the same files."""
    write_dit(tmp_path, animate().bfloat16())
    encoder = parts_of("animate").conditioning.encoders["motion"]
    assert encoder.bytes(tmp_path) == sum(p.nbytes for p in encoder.load(tmp_path).parameters())


def test_loads_from_one_file(tmp_path):
    """ComfyUI's: no config.json beside it, a prefix before every name."""
    model = animate(layers=5, dim=128, heads=1)
    file = tmp_path / "wan2.2_animate_14B_bf16.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}, file)
    loaded = load_wan(file, dtype=torch.float32)
    assert type(loaded) is WanAnimate and loaded.config == model.config


def test_what_does_not_fit_is_refused(tmp_path):
    model = animate(layers=5)
    state = model.state_dict()
    del state["face_encoder.conv2.conv.weight"]
    save_file(state, tmp_path / "animate.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(num_heads=2)))
    with pytest.raises(BadInput, match="it has no face_encoder.conv2.conv.weight"):
        load_wan(tmp_path / "animate.safetensors")


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("face", (2, 3, 5, 16, 12), "crops .2, 3, 5, 16, 12.: this model takes .* S = 16"),
        ("face", (2, 3, 4, 16, 16), "4k.1"),
        ("face", (2, 3, 9, 16, 16), r"face crops for 4 latent frames: pose should be \(B,16,T'-1,h,w\)"),
        ("pose", (2, 15, 2, 6, 10), r"pose should be \(B,16,T'-1,h,w\)"),
        ("pose", (2, 16, 2, 6, 8), r"pose \(2, 16, 2, 6, 8\): should be \(2, 16, 2, 6, 10\) for this x"),
        ("pose", (1, 16, 2, 6, 10), r"should be \(2, 16, 2, 6, 10\) for this x"),
    ],
)
def test_conditions_of_another_shape_are_refused(name, shape, message):
    model = animate(layers=5)
    args, extra = inputs(model)
    with pytest.raises(BadInput, match=message):
        model(*args, **extra | {name: torch.zeros(shape)})
