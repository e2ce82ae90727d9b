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
from test_parallel import difference, run_jobs
from test_train_variants import check_noising, dataset_of, first_batch, flags_of, train, uncached_dataset

import flow
import sample
from benchmarks import tiny, tiny_animate, tiny_animate2, tiny_s2v
from benchmarks.tiny_animate2 import CLIP_SIZES, animate2, diffusers_animate2, official_names
from diagnostics.delta import delta, pair_up
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


@pytest.fixture
def plain_masks(monkeypatch):
    """diffusers', not compiled, which takes a minute."""
    from diffusers.models.transformers import transformer_wan_animate_2 as peer

    real = peer.create_block_mask
    monkeypatch.setattr(peer, "create_block_mask", lambda *args, _compile=None, **how: real(*args, **how))


@pytest.fixture
def dense_masks(plain_masks, monkeypatch):
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
def test_equals_diffusers(plain_masks, size, report):
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
        (dict(_class_name="WanAnimate2Transformer3DModel"), "Animate-2 is read in the official layout"),
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
    kinds = [part["kind"] for part in inspect(tmp_path / "b")]
    assert kinds == ["dit", "text_encoder", "vae"]
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
def test_equals_the_modular_pipeline(plain_masks, ckpt, given, distilled, monkeypatch, report):
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


def test_a_video_is_made_with_its_sound(ckpt, given, tmp_path, monkeypatch):
    run(monkeypatch, *flags(ckpt, given, tmp_path, "--preview_every 1"))
    latents = load(tmp_path / "v.safetensors")[0]
    assert sorted(latents) == ["latents_0", "latents_1"] and latents["latents_0"].shape == (16, 4, 4, 4)
    frames = list(read_frames(tmp_path / "v.mp4"))
    assert len(frames) == N and abs(frames[-1].seconds - (N - 1) / 24) < 1e-3 and frames[0].size == (32, 24)
    start, sound = read_sound(tmp_path / "v.mp4")
    source = read_sound(given / "sound.wav")[1][4000:20000]
    heard = sound[round(48000 * (0.1 - start)) + 4000 - 100 :][: len(source) + 200]  # to two milliseconds
    assert np.correlate(heard, source, "valid").max() > 0.95 * np.linalg.norm(source) * np.linalg.norm(heard)
    assert Image.open(tmp_path / "v_preview.png").width > 32


def test_a_video_that_was_killed_is_continued(ckpt, given, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_estimate, "sampling", lambda *args, **kwargs: NoPlan())

    def flags_of(name):
        return flags(ckpt, given, tmp_path, name=name)

    check_resume(monkeypatch, tmp_path, flags_of, (["--prompt_ref x"], ["--base_dtype fp8"]), 2)


def test_the_driving_videos_prompt_is_felt(ckpt, given):
    how = dict(image=str(given / "picture.png"), video=str(given / "video.mp4"), size=(W, H), frames=C, steps=1)
    pipe = sample.load(ckpt)
    a, b = (sample.generate(pipe, "a", progress=False, **how, **more)[1][0] for more in ({}, {"prompt_ref": "x y"}))
    assert not torch.equal(a, b)


def test_a_driving_video_at_another_rate(tmp_path):
    """The nearest frames in time, and behind the last one those before it, that one twice."""
    frames = np.stack([np.full((16, 16, 3), 8 * k, np.uint8) for k in range(30)])
    write_frames(tmp_path / "v.mp4", [frames], 30, lossless=True)
    video = DrivingVideo(tmp_path / "v.mp4", 24)
    shown = (video.read(20, 29, (16, 16))[0, 0, :, 0, 0] * 127.5 + 127.5).div(8).round().int().tolist()
    want = np.round(np.arange(24) / 24 * 30).astype(int).tolist()
    assert video.n == 24 and shown == [*want[20:], *want[:18:-1]]


@pytest.mark.parametrize("size", [(832, 480), (837, 487), (48, 32), (17, 120), (720, 1280)])
def test_size_of_the_video_and_its_letterbox(size):
    """As diffusers' image step has them."""
    from diffusers.modular_pipelines.wan_animate_2.encoders import WanAnimate2ProcessImagesInputStep
    from diffusers.modular_pipelines.wan_animate_2.video_processor import WanAnimate2VideoProcessor

    picture, step = Image.fromarray(tiny_animate.frames(1, *size[::-1], 5)[0]), WanAnimate2ProcessImagesInputStep()
    state = SimpleNamespace(image=picture, height=200, width=160)
    step.get_block_state, step.set_block_state = lambda _: state, lambda *_: None
    processor = WanAnimate2VideoProcessor(resample="bicubic")
    step(SimpleNamespace(_execution_device="cpu", image_processor=processor, vae_scale_factor_spatial=8), None)
    assert frame_size(*size, 200 * 160) == (state.width, state.height)
    ours = np.asarray(letterbox(picture, (state.width, state.height), Image.BICUBIC)) / 127.5 - 1
    assert np.abs(ours - state.image_pixels[0].permute(1, 2, 0).numpy()).max() < 1e-6


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change, message",
    [
        (("--video", None), "a character that moves as a video does, --image and --video are needed"),
        (("--image", None), "--image and --video are needed"),
        (("--last_image", "picture.png"), "--last_image .*takes none"),
        (("--src_root_path", "."), "--src_root_path .*: .* takes no such input"),
        (("--video", "two.mp4"), "two.mp4: 2 frames at 24 per second; at least 5 are needed"),
        (("--video", "none.mp4"), "--video .*none.mp4: does not exist"),
        (("--video", "sound.wav"), "--video .*sound.wav: has no video stream"),
        (("--size", "8x8"), "--size of 64 px for a picture of 80x64: a side would be under 16"),
        (("--frames", "12"), r"--frames 12: of a segment; should be 4k\+1, and at least 5"),
        (("--frames", "1"), "--frames 1: of a segment"),
    ],
)
def test_what_it_cannot_do_is_refused(ckpt, given, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(given)
    write_frames(given / "two.mp4", [np.zeros((2, 32, 32, 3), np.uint8)], 24)
    given_flags = {"--image": "picture.png", "--video": "video.mp4", "--size": f"{W}x{H}", "--frames": str(C)}
    given_flags = {k: v for k, v in (given_flags | dict([change])).items() if v}
    with pytest.raises(BadInput, match=message) as e:
        run(monkeypatch, f"--ckpt {ckpt} --device cpu", " ".join(f"{k} {v}" for k, v in given_flags.items()))
    assert "\n" not in str(e.value)


def test_the_first_animate_takes_no_video(tmp_path, given):
    pipe = sample.load(tiny_animate_checkpoint(tmp_path))
    with pytest.raises(BadInput, match="--video .*takes no such input"):
        sample.generate(pipe, "a", video=str(given / "video.mp4"))


def tiny_animate_checkpoint(folder):
    tiny_animate.write_dit(folder, tiny_animate.animate(layers=5))
    return folder


# ---- training --------------------------------------------------------------------------------------------------------
def write_pair(folder, name="a", n=20, seed=0, driving=True):
    """A clip and its driving video."""
    folder.mkdir(exist_ok=True)
    tiny_animate.write_video(folder / f"{name}.mp4", tiny_animate.frames(n, H, W, 3 * seed + 1), 24)
    if driving:
        tiny_animate.write_video(folder / f"{name}.driving.mp4", tiny_animate.frames(n, H, W, 3 * seed + 2), 24)
    (folder / f"{name}.txt").write_text("a person acts")
    return folder


def train_flags(*more):
    return f"--resolution {W}x{H} --frames {C}", *more


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair") / "clips")


@torch.no_grad()
def test_a_sample_is_what_sampling_is_given(ckpt, pair, tmp_path):
    """With and without a known frame; without its caption as guidance's second half."""
    _, pipe, dataset = dataset_of(ckpt, pair, tmp_path / "out", *train_flags())
    frames, cached = tiny_animate.frames(20, H, W, 1)[:C], load(dataset.files[0])[0]
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float()[None] / 127.5 - 1
    stills = [pipe.acquire("vae").encode(video[:, :, i : i + 1])[0] for i in range(C)]
    at = [i for i, z in enumerate(stills) if torch.equal(z, cached["latents"][:, :1])]
    assert len(at) == 1  # the reference is a frame of the clip
    s = pipe.settings.with_overrides(frames=C, size=(W, H))
    picture = Image.fromarray(frames[at[0]])
    sequence = s.conditioning.video(pipe, s, image=picture, video=pair / "a.driving.mp4")
    for known in (0, 1):
        sequence.known = video[:, :, :known] if known else None
        want = sequence.conditions(0)
        dataset.samples.draw = lambda item, share, rng, known=known: known
        batch = first_batch(dataset)
        assert torch.equal(batch.x[:, 16:], want.channels)
        assert batch.inputs.keys() - want.inputs.keys() == {"unconditional"} and not batch.inputs["unconditional"].any()
        assert all(torch.equal(batch.inputs[k], v) for k, v in want.inputs.items())
        check_noising(batch, torch.cat([stills[at[0]][None], pipe.acquire("vae").encode(video)], 2))
        assert batch.loss_mask.flatten().tolist() == pytest.approx([0, *[5 / 4] * 4])
    *_, dataset = dataset_of(ckpt, pair, tmp_path / "out", *train_flags("--caption_dropout 1"))
    batch = first_batch(dataset)
    assert batch.captions == [""] and torch.equal(batch.inputs["unconditional"], want.uncond_inputs["unconditional"])


def test_a_clip_that_would_be_copied_is_left_out(ckpt, tmp_path, capsys):
    """Its own driving video as a file, or by its pictures; and one that has none."""
    folder = write_pair(tmp_path / "clips", "good")
    for name in ("alone", "same", "encoded"):
        write_pair(folder, name, seed=4, driving=False)
    shutil.copy(folder / "same.mp4", folder / "same.driving.mp4")
    images = np.stack(tiny_animate.frames(20, H, W, 13)).clip(2, 250) + 1  # as another encoding has it
    write_frames(folder / "encoded.driving.mp4", [images], 24, lossless=True)
    *_, dataset = dataset_of(ckpt, folder, tmp_path / "out", *train_flags())
    assert [i.path.name for i in dataset.items] == ["good.mp4"]
    said = capsys.readouterr().out
    for reason in (
        "alone.mp4: has no alone.driving.mp4 beside it",
        "same.mp4: is its own same.driving.mp4: the loss would fall to zero by copying",
        "encoded.mp4: its encoded.driving.mp4 shows the clip itself: the loss would fall to zero by copying",
    ):
        assert reason in said, said


def test_only_what_changed_is_encoded_again(ckpt, tmp_path):
    folder = write_pair(tmp_path / "clips")

    def name():
        return uncached_dataset(ckpt, folder, tmp_path / "out", *train_flags())[-1].files[0]

    names = [name(), name()]
    assert names[0] == names[1]
    tiny_animate.write_video(folder / "a.driving.mp4", tiny_animate.frames(20, H, W, 9), 24)
    assert name() != names[0]


TARGETS = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img", "self_attn.k")


def test_gradients_of_a_lora_equal_diffusers(ckpt, pair, tmp_path, dense_masks, report):
    """From the gradients G of diffusers' weights W + s B A by the chain rule: s B'G for A, s GA' for B; through both of
    the passes that a weight serves.
    """
    *_, dataset = dataset_of(ckpt, pair, tmp_path / "out", *train_flags())
    batch, model, merged = first_batch(dataset), animate2(layers=3), animate2(layers=3)
    text, lens = torch.randn(1, 9, tiny.TEXT_DIM), torch.tensor([9])
    inject(model, TARGETS, rank=3, alpha=6)
    layers = lora_layers(model)
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        merged.get_submodule(name).weight.data += 2 * (layer.lora_B @ layer.lora_A).detach()
    model.checkpointing = True
    batch.loss(model, text, lens).backward()
    peer = diffusers_animate2(merged).requires_grad_(True)
    v = peer_run(peer, batch.x, 1000 * batch.t, text, **batch.inputs)
    (v - batch.target)[:, :, 1:].square().mean().backward()
    names = {"k": "to_k", "v": "to_v", "k_img": "add_k_proj", "v_img": "add_v_proj"}
    for name, layer in layers.items():
        _, block, kind, leaf = name.split(".")
        g = peer.get_submodule(f"blocks.{block}.{kind}.{names[leaf]}").weight.grad
        report(name, tiny.error(layer.lora_A.grad, 2 * layer.lora_B.detach().t() @ g), 1e-4)
        report(name, tiny.error(layer.lora_B.grad, 2 * g @ layer.lora_A.detach().t()), 1e-4)


def test_training_lowers_the_loss_and_resumes_bit_for_bit(ckpt, given, tmp_path, monkeypatch):
    """On two clips, one of them held out, with previews; stopped after two of four steps, with what was cached."""
    folder = write_pair(write_pair(tmp_path / "clips"), "b", seed=1)
    (tmp_path / "p.txt").write_text("a person sings\n")
    more = "--held_out 0.5 --eval_every 4 --save_every 2 --schedule constant --warmup 0 --t_distribution uniform"
    previews = f"--previews {tmp_path}/p.txt --preview_steps 1 --preview_every 4"
    more = train_flags(more, f"--targets {','.join(TARGETS[:4])} --lr 0.02")
    whole = train(monkeypatch, "train_lora", ckpt, folder, tmp_path / "whole", *more, "--steps 4", previews)
    assert whole[-1]["val_loss"] < whole[0]["val_loss"]
    assert len(list(read_frames(tmp_path / "whole" / "previews" / "step_000004_00.mp4"))) == C
    train(monkeypatch, "train_lora", ckpt, folder, tmp_path / "cut", *more, "--steps 2")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_items", None)  # all is cached
        train(patch, "train_lora", ckpt, folder, tmp_path / "cut", *more, "--steps 4 --resume")
    a, b = (load(tmp_path / name / "adapter_model.safetensors")[0] for name in ("whole", "cut"))
    assert len(a) == 2 * 4 * 11 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # the result is a LoRA that sampling takes, and that diag.py measures
    lora = tmp_path / "whole" / "adapter_model.safetensors"
    for name, more in (("plain", []), ("lora", ["--lora", lora])):
        run(monkeypatch, *flags(ckpt, given, tmp_path, *more, name=name))
    plain, changed = (load(tmp_path / f"{name}.safetensors")[0]["latents_0"] for name in ("plain", "lora"))
    assert not torch.equal(plain, changed)
    (pair,) = pair_up(str(lora), str(ckpt))
    rows = delta(pair.path, pair.base)
    assert len(rows) == 4 * 11 and all(r["ratio"] > 0 for r in rows)


def test_ranks_learn_what_one_process_does(ckpt, pair, tmp_path, report):
    """With the weights sharded, and with the tokens of both passes shared; blocks run twice in a step."""

    def job(name, *more):
        words = flags_of(ckpt, pair, tmp_path / name, *train_flags(*more, "--steps 2 --lr 0.1 --checkpointing"))
        return {"script": "train_lora", "argv": words, "sgd": True}

    run_jobs(1, tmp_path, [job("one"), job("streamed", "--stream_blocks 4")])
    run_jobs(2, tmp_path, [job("fsdp", "--fsdp"), job("ulysses", "--ulysses_size 2")])
    for name in ("streamed", "fsdp", "ulysses"):
        losses, weights = difference(tmp_path / "one", tmp_path / name, "train_lora")
        report(f"{name}, losses", losses, 1e-5)
        report(f"{name}, adapter", weights, 1e-4)


def test_previews_share_the_driving_video(ckpt, pair, tmp_path):
    """Guidance's halves differ in nothing but the block that is left out."""
    *_, dataset = dataset_of(ckpt, pair, tmp_path / "out", *train_flags())
    conditions = HeldOutVideo(dataset, 0).conditions(0)
    assert set(conditions.uncond_inputs) == {"unconditional"} and conditions.uncond_inputs["unconditional"].item() == 1


def test_the_driving_video_is_read_once_for_both_halves(ckpt, given, monkeypatch):
    read, calls = WanAnimate2.read_driving, []
    monkeypatch.setattr(WanAnimate2, "read_driving", lambda self, *a: calls.append(1) or read(self, *a))
    how = dict(image=str(given / "picture.png"), video=str(given / "video.mp4"), size=(W, H), frames=C, steps=2)
    sample.generate(sample.load(ckpt), "a", progress=False, **how)
    assert len(calls) == 2  # one for each segment


def test_the_text_encoder_learns_through_it(ckpt, pair, tmp_path, monkeypatch):
    log = train(monkeypatch, "train_te", ckpt, pair, tmp_path / "out", "--keywords person --lr 0.01", *train_flags())
    assert log[-1]["grad_norm"] > 0


# ---- diagnostics and plans -------------------------------------------------------------------------------------------
def test_logits_are_of_all_that_is_attended_to(report):
    """Of the clip's tokens and those of the driving video's own frame: under this bias dense attention is the same."""
    n, q, k, v = 5, *torch.randn(3, 2, 20, 2, 8)
    driven = DrivenAttention(*torch.randn(2, 2, 15, 2, 8), -1.3)
    keys, bias = driven.as_dense(k)
    values = torch.cat([v, driven.values], 1)
    want = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, keys, values)), attn_mask=bias)
    report("error", tiny.error(want.transpose(1, 2).flatten(2), driven(q, k, v)), 2e-6)
    model, (args, extra) = animate2(layers=1), inputs(2, 4, 4, B=1)
    with torch.no_grad(), record_attention(model) as stats:
        model(*args, **extra)
    assert len(stats[0, "self_attn"]) == 2  # of the driving video's own pass, and of the clip's
    assert not (driven.as_dense(k)[1][0, 0, :n, 20:] > -math.inf).any()  # the reference has no such frame


def test_logits_before_and_after_a_lora(ckpt, pair, tmp_path):
    model = animate2()
    inject(model, ("cross_attn.k",), rank=2)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    from helpers.adapters import save_lora

    save_lora(tmp_path / "lora.safetensors", model)
    where = dict(data=pair, cache=tmp_path / "cache", resolution=f"{W}x{H}", frames=C)
    rows = logits(ckpt, [str(tmp_path / "lora.safetensors")], n=1, **where)["dit"]
    assert {r["kind"] for r in rows} == {"self_attn", "cross_attn", "image_attn"}
    first = [r["drift"] for r in rows if r["block"] == 0 and r["kind"] == "self_attn"]
    assert max(first) < 1e-4 and max(r["drift"] for r in rows if r["kind"] == "cross_attn") > 0.01


def test_a_plan_counts_the_driving_videos_keys_and_values():
    """Once for both halves: of 832x480 and 13 frames 40 blocks' of 4 latent frames of 1560 tokens, in bf16."""
    flags_ = "--ckpt animate2-14B --size 832x480 --frames 13 --device cuda".split()
    guided, free = (planned("sample", [*flags_, "--guidance", g]).phases["denoise"] for g in ("3", "1"))
    kept = 40 * 2 * 4 * 1560 * 5120 * 2
    two, one = (next(v for k, v in p.items() if k.startswith("activations")) for p in (guided, free))
    assert kept < one < 1.5 * kept and two - one < 0.1 * kept
    assert 32.7e9 < free["DiT"] < 33.5e9


def test_training_is_planned():
    flags_ = "--ckpt animate2-14B --resolution 128x128 --frames 13 --batch 1 --checkpointing --blocks 38-39".split()
    need = planned("train_lora", flags_)
    assert need.phases["training"]["trained"] == 4 * 16 * 2 * 5120 * 4
