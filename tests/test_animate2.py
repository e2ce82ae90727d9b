"""Animate-2: its DiT against diffusers' WanAnimate2Transformer3DModel, whole videos against the modular pipeline."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.media import read_sound
from helpers.scripts import NoPlan
from PIL import Image
from safetensors.torch import save_file
from test_clip import transformers_clip
from test_long_video import check_resume, run
from test_train_variants import check_noising, dataset_of, first_batch, flags_of, train, uncached_dataset

import flow
import sample
import train_lora
from benchmarks import tiny, tiny_animate, tiny_animate2, tiny_s2v
from benchmarks.tiny_animate2 import CLIP_SIZES, animate2, diffusers_animate2, official_names
from diagnostics.inspect import inspect
from diagnostics.logits import logits, record_attention
from diagnostics.plan import planned
from lora import inject, lora_layers
from nanowan import cache, memory_estimate
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, load_wan, new_dit
from nanowan.formats.header import load
from nanowan.formats.lora import read_lora
from nanowan.formats.t5 import load_tokenizer
from nanowan.settings import read_settings, released
from nanowan.training.previews import HeldOutVideo
from nanowan.variants.animate2.conditioning import DrivingVideo, frame_size, letterbox
from nanowan.variants.animate2.model import DrivenAttention, WanAnimate2
from nanowan.video import read_frames, write_frames

av = pytest.importorskip("av")  # a machine for `make gpu` may lack it


@pytest.fixture(autouse=True)
def masks_are_not_compiled(monkeypatch):
    """diffusers', which takes a minute."""
    from diffusers.models.transformers import transformer_wan_animate_2 as peer

    real = peer.create_block_mask
    monkeypatch.setattr(peer, "create_block_mask", lambda *args, _compile=None, **how: real(*args, **how))


@pytest.fixture
def dense_masks(monkeypatch):
    """diffusers' mask in PyTorch's attention: its own has no gradients on a CPU."""
    from diffusers.models.transformers import transformer_wan_animate_2 as peer

    real = peer.dispatch_attention_fn

    def dispatch(q, k, v, attn_mask=None, **how):
        if attn_mask is None:
            return real(q, k, v, attn_mask=None, **how)
        rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
        mask = attn_mask.mask_mod(None, None, rows, columns)
        mask = mask | ~mask.any(1, keepdim=True)  # what fills up the last tile attends to anything
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    monkeypatch.setattr(peer, "dispatch_attention_fn", dispatch)


def inputs(frames=3, h=6, w=10, B=2):
    """x, t, context and further inputs; `frames` latent frames with the reference's."""
    args = torch.randn(B, 36, frames, h, w), torch.rand(B) * 1000, torch.randn(B, 19, tiny.TEXT_DIM)
    clip, driving_clip = torch.randn(2, B, 5, CLIP_SIZES["dim"])
    text = torch.randn(B, 4, tiny.TEXT_DIM)
    driving = torch.randn(B, 16, frames - 1, h, w)
    return args, dict(driving=driving, clip=clip, driving_clip=driving_clip, driving_text=text)


def peer_run(peer, x, t, context, driving, clip, driving_clip, driving_text, unconditional=None):
    """What diffusers' model makes of the same, one sample after the other, since it takes no more."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    found = []
    for i in range(len(x)):
        kept, (frames, h, w), n = WanAnimate2KVCache(len(peer.blocks)), driving.shape[2:], x.shape[3] * x.shape[4] // 4
        grid = torch.tensor([[frames, h // 2, w // 2]])
        peer(
            [driving[i]],
            timestep=t[i : i + 1],
            encoder_hidden_states=[driving_text[i]],
            condition_latents=[torch.cat([torch.ones(4, frames, h, w), driving[i]])],
            kv_cache=kept,
            kv_cache_mode="extract",
            seq_len=frames * n,
            encoder_hidden_states_image=driving_clip[i : i + 1],
            offset_grid_sizes=grid,
        )
        v = peer(
            [x[i, :16]],
            timestep=t[i : i + 1],
            encoder_hidden_states=[context[i]],
            condition_latents=[x[i, 16:]],
            kv_cache=kept,
            kv_cache_mode="cached",
            seq_len=(frames + 1) * n,
            encoder_hidden_states_image=clip[i : i + 1],
            reference_grid_sizes=grid,
            origin_len=4 * frames - 3,
            origin_area=[8 * h, 8 * w],
            is_uncondtion=unconditional is not None and bool(unconditional[i]),
        )
        found.append(v.sample[0])
    return torch.stack(found)


# ---- the DiT ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(3, 6, 10), (2, 2, 14), (5, 10, 4)])
def test_equals_diffusers(size, report):
    """A sample of each of guidance's halves; the keys and values of the driving video made in the step, and kept."""
    model = animate2()
    args, extra = inputs(*size)
    extra["unconditional"] = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        want = peer_run(diffusers_animate2(model), *args, **extra)
        report("relative error", tiny.error(model(*args, **extra), want), 2e-5)
        text, kept = model.embed_text(args[2], cache=True), model.prepare_inputs(**extra)
        assert len(kept["driving"].keys_values) == len(model.blocks)
        report("kept", tiny.error(model(*args[:2], text, **kept), want), 2e-5)
        assert model.prepare_inputs(**kept)["driving"] is kept["driving"]  # not computed again


@pytest.mark.parametrize("half", [0.0, 1.0])
def test_a_half_of_its_own_is_the_same(half):
    """What leaves a block out for all samples does not compute it."""
    model = animate2()
    args, extra = inputs()
    extra["unconditional"] = torch.full((2,), half)
    with torch.no_grad():
        kept = model.prepare_inputs(**extra)
        assert kept["unconditional"] is (half == 1)
        assert torch.equal(model(*args, **kept), model(*args, **extra))


def test_gradients_equal_diffusers(dense_masks, report):
    """Through the driving video's keys and values too."""
    model = animate2(layers=3)
    peer = diffusers_animate2(model)
    (x, t, context), extra = inputs(B=1)
    grads = []
    for run_ in (lambda x, c, **e: peer_run(peer, x, t, c, **e), lambda x, c, **e: model(x, t, c, **e)):
        leaves = [v.clone().requires_grad_() for v in (x, context, *extra.values())]
        out = run_(*leaves[:2], **dict(zip(extra, leaves[2:])))
        weight = torch.sin(torch.arange(out.numel()).view(out.shape))
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for name, theirs, ours in zip(["x", "context", *extra], *grads):
        report(f"{name} gradient", tiny.error(ours, theirs), 1e-4)


@pytest.mark.parametrize("log_scale", [0.0, -1.3])
def test_attention_is_that_of_a_mask(log_scale, report):
    """Every token sees the whole clip and its own frame of the driving video; log_scale stands on latent frame 1."""
    n, frames = 5, 4
    q, k, v = torch.randn(3, 2, frames * n, 2, 8)
    more_k, more_v = torch.randn(2, 2, (frames - 1) * n, 2, 8)
    of_key = torch.cat([torch.full((frames * n,), -1), torch.arange(1, frames).repeat_interleave(n)])
    of_query = torch.arange(frames).repeat_interleave(n)
    bias = torch.zeros(frames * n, len(of_key)).masked_fill((of_key >= 0) & (of_query[:, None] != of_key), -math.inf)
    bias[:, n : 2 * n] += log_scale
    keys, values = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
    want = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, keys, values)), attn_mask=bias)
    want = want.transpose(1, 2).flatten(2)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            report("error", tiny.error(DrivenAttention(more_k, more_v, log_scale)(q, k, v), want), 2e-6)


def test_checkpointing_changes_no_gradient():
    model = animate2(layers=3)
    (x, t, context), extra = inputs(B=1)
    grads = []
    for on in (False, True):
        model.checkpointing = on
        leaves = [v.clone().requires_grad_() for v in (context, extra["driving"], extra["driving_text"])]
        more = extra | {"driving": leaves[1], "driving_text": leaves[2]}
        grads.append(torch.autograd.grad(model(x, t, leaves[0], **more).square().mean(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("shape", [(2, 16, 1, 6, 10), (2, 16, 2, 6, 8)])
def test_a_driving_video_of_another_size_is_refused(shape):
    args, extra = inputs()
    with pytest.raises(BadInput, match="driving video of .* tokens, clip of 3x3x5: should have one latent frame less"):
        animate2(layers=2)(*args, **extra | {"driving": torch.randn(shape)})


# ---- files -----------------------------------------------------------------------------------------------------------
def test_released_size():
    """32,789,895,544 bytes of bf16 in the released files, whose headers are part of that; diffusers builds the same."""
    from diffusers import WanAnimate2Transformer3DModel

    with torch.device("meta"):
        state = new_dit(full_config("animate2-14B")).state_dict()
        theirs = WanAnimate2Transformer3DModel().state_dict()
    count = sum(t.numel() for t in state.values())
    assert (count, len(state)) == (sum(t.numel() for t in theirs.values()), len(theirs)) and len(state) == 1303
    assert 0 < 32_789_895_544 - 2 * count < 1e6


def comfyui_file(path, model, kind="animate2"):
    state = {f"model.diffusion_model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, path, {"config": json.dumps({"transformer": {"model_type": kind}})} if kind else None)


@pytest.mark.parametrize("layout", ["official", "distilled", "comfyui", "sharded"])
def test_loads_by_what_its_files_say(tmp_path, layout):
    model, name = animate2(layers=2, dim=128, heads=1), "wan_animate_2_bf16.safetensors"
    if layout == "comfyui":
        comfyui_file(tmp_path / name, model)
    elif layout == "sharded":  # as this project writes it
        tiny.write_dit(tmp_path, model)
        name = ""
    else:
        name = name.replace(".", "_distillation.") if layout == "distilled" else name
        save_file(official_names(model), tmp_path / name)
    loaded = load_wan(tmp_path / name, dtype=torch.float32)
    assert type(loaded) is WanAnimate2 and loaded.config.log_scale == (-1.3 if layout == "distilled" else 0)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    info = inspect(tmp_path / name)[0]
    assert info["model_type"] == "animate2" and info["layers"] == 2


def test_other_models_with_its_tensors_are_refused(tmp_path):
    comfyui_file(tmp_path / "i2v.safetensors", animate2(layers=2, dim=128, heads=1), kind=None)
    with pytest.raises(BadInput, match="this is Wan 2.1's I2V, another model"):
        load_wan(tmp_path / "i2v.safetensors")
    save_file(official_names(animate2(layers=2)), tmp_path / "model.safetensors")
    for settings, message in (
        (dict(num_heads=2, refer_stride=2), "refer_stride is 2, should be 1"),
        (dict(_class_name="WanAnimate2Transformer3DModel"), "of Animate-2 the official layout is read"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(BadInput, match=message):
            load_wan(tmp_path / "model.safetensors")


def test_a_folder_says_which_of_the_two_it_is(tmp_path):
    """With both files, the base; with the distilled alone, few steps without guidance. The rest lies elsewhere."""
    folder = tiny_animate2.checkpoint(tmp_path / "a", model=animate2(layers=2))
    shutil.copytree(folder, tmp_path / "b")
    file = tmp_path / "b" / "wan_animate_2" / "wan_animate_2_bf16.safetensors"
    shutil.copy(file, file.with_stem("wan_animate_2_bf16_distillation"))
    assert read_settings(tmp_path / "a") == read_settings(tmp_path / "b") == released("animate2-14B")
    file.unlink()
    s = read_settings(tmp_path / "b")
    assert (s.steps, s.guidance, s.guided) == (10, (1.0, 1.0), False) and s.shift == 5 and s.solver == "dpm++"
    # flat, as with one of ComfyUI's files
    (tmp_path / "c").mkdir()
    for f in (folder / "videomodel" / "Wan-AI").iterdir():
        (tmp_path / "c" / f.name).symlink_to(f)
    comfyui_file(tmp_path / "c" / "wan_animate2.safetensors", animate2(layers=2, dim=128, heads=1))
    pipe = sample.load(tmp_path / "c")
    assert pipe.settings == released("animate2-14B") and all(pipe.files(k) for k in ("text", "vae", "dit"))


@pytest.mark.parametrize(
    "key",
    [
        "blocks.1.block.cross_attn.k",
        "blocks.1.cross_attn.to_k",
        "blocks.1.cross_attn.k",
        "lora_unet_blocks_1_cross_attn_k",
    ],
)
def test_loras_of_other_trainers_are_read(tmp_path, key):
    """DiffSynth keeps the official names, diffusers' model its own."""
    ends = ("lora_down", "lora_up") if key.startswith("lora_unet") else ("lora_A", "lora_B")
    tensors = {f"{key}.{ends[0]}.weight": torch.ones(2, 48), f"{key}.{ends[1]}.weight": torch.ones(48, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert [*read_lora(tmp_path / "lora.safetensors")[0]] == ["blocks.1.cross_attn.k.weight"]


# ---- videos ----------------------------------------------------------------------------------------------------------
W, H, C, N = 48, 32, 13, 20  # a frame's size, frames of a segment, and of the driving video


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    pytest.importorskip("ftfy")
    return tiny_animate2.checkpoint(tmp_path_factory.mktemp("animate2") / "ckpt")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A picture, and a video of another aspect whose sound begins after a tenth of a second."""
    folder = tmp_path_factory.mktemp("given")
    Image.fromarray(tiny_animate.frames(1, 64, 80, 5)[0]).save(folder / "picture.png")
    tiny_s2v.write_wav(folder / "sound.wav", tiny_s2v.sound(1.0)[None])
    frames = np.stack(tiny_animate.frames(N, 40, 40, 1))
    write_frames(folder / "video.mp4", [frames], 24, sound=folder / "sound.wav", sound_offset=0.1, lossless=True)
    return folder


def flags(ckpt, given, folder, *more, name="v"):
    words = f"--ckpt {ckpt} --image {given}/picture.png --video {given}/video.mp4 --size {W}x{H} --frames {C} --seed 7"
    words += (
        f" --steps 2 --device cpu --dtype fp32 --out {folder}/{name}.mp4 --save_latents {folder}/{name}.safetensors"
    )
    return [words, *more]


class Tokenizer:
    """As transformers' is called."""

    def __init__(self, ckpt):
        self.tokenizer = load_tokenizer(ckpt)

    def __call__(self, prompts, max_length, **how):
        ids, lens = self.tokenizer(prompts)
        ids = F.pad(ids, (0, max_length - ids.shape[1]))
        return SimpleNamespace(input_ids=ids, attention_mask=(torch.arange(max_length) < lens[:, None]).long())


class Recorded:
    """Latents that diffusers' pipeline decodes, one after the other."""

    def __init__(self, monkeypatch):
        from diffusers.modular_pipelines.wan_animate_2 import denoise

        real, self.latents = denoise.decode_vae, []
        monkeypatch.setattr(denoise, "decode_vae", lambda vae, z: self.latents.append(z) or real(vae, z))


def peer_pipeline(ckpt, distilled):
    """diffusers' blocks with the same weights, and the schedulers of its repositories."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    from diffusers.modular_pipelines import WanAnimate2Blocks
    from diffusers.modular_pipelines.wan_animate_2.modular_blocks_wan_animate_2_distilled import (
        WanAnimate2DistilledBlocks,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    if not distilled:
        how = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        scheduler = DPMSolverMultistepScheduler(**how)
    pipe = (WanAnimate2DistilledBlocks if distilled else WanAnimate2Blocks)().init_pipeline()
    pipe.update_components(
        text_encoder=tiny.transformers_t5(tiny.text_encoder()),
        tokenizer=Tokenizer(ckpt),
        image_encoder=transformers_clip(tiny_animate.clip_state(sizes=CLIP_SIZES), 32, 52, 3, 112, 224),
        vae=tiny.diffusers_vae(tiny.vae(False)),
        transformer=diffusers_animate2(animate2()),
        scheduler=scheduler,
    )
    return pipe


class FlowSigmasDPM(flow.DPMpp):
    """The grid of diffusers' DPMSolverMultistepScheduler; the official code's begins at 1."""

    start = 0.999


class FlowMatchEuler(flow.Euler):
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler, which shifts the smallest of its 1000 times twice."""

    def __init__(self, steps, shift):
        super().__init__(steps, shift)
        least = flow.shift_t(0.001, shift)
        sigmas = flow.shift_t(torch.linspace(1, least, steps, dtype=torch.float64), shift)
        self.sigmas, self.timesteps = F.pad(sigmas, (0, 1)).float(), sigmas * 1000


@pytest.mark.parametrize("distilled", [False, True])
def test_equals_the_modular_pipeline(ckpt, given, distilled, monkeypatch, report):
    """Two segments, of which the second is filled up with mirrored frames, of a picture and a video that are resized,
    with and without guidance; on the grids of the schedulers that diffusers has for them.
    """
    solver = FlowMatchEuler if distilled else FlowSigmasDPM
    monkeypatch.setitem(flow.SOLVERS, "euler", solver)
    how = dict(size=(W, H), steps=3, seed=7, frames=C, solver="euler", progress=False)
    how |= dict(guidance=1.0) if distilled else {}
    files = dict(image=str(given / "picture.png"), video=str(given / "video.mp4"))
    video, latents = sample.generate(sample.load(ckpt), "a prompt", **files, **how)
    found, peer = Recorded(monkeypatch), peer_pipeline(ckpt, distilled)
    state = peer(
        prompt="a prompt",
        negative_prompt=released("animate2-14B").negative,
        image=Image.open(given / "picture.png"),
        driving_video=[Image.fromarray(f) for f in tiny_animate.frames(N, 40, 40, 1)],
        driving_video_fps=24,
        height=H,
        width=W,
        segment_frame_length=C,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    )
    assert len(latents) == len(found.latents) == 2
    for r, (ours, theirs) in enumerate(zip(latents, found.latents)):
        report(f"latents of segment {r}", tiny.error(ours, theirs), 1e-4)
    theirs = state.get("videos")[0].transpose(0, 1) * 2 - 1
    assert video.shape[1] == N and abs(video.shape[2] - theirs.shape[2]) <= 1
    report("video", tiny.error(video, theirs[:, :, : video.shape[2], : video.shape[3]]), 1e-3)
