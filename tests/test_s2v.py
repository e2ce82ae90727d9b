"""WanS2V against figures of the official code, and its gradients against a plain, unfused version.

data/s2v.safetensors holds what Wan-Video/Wan2.2 at 42bf4cfa (wan/modules/s2v/model_s2v.py, with flash attention, which
needs a GPU, replaced by PyTorch's in fp32) computed on a CPU from tiny_s2v's weights and inputs, motion_frames=[73,19].
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import scripts
from safetensors.torch import load_file, save_file

from benchmarks import tiny, tiny_s2v
from benchmarks.tiny_s2v import AUDIO_DIM, LAYERS, inputs
from kernels.rope import angles
from nanowan.errors import BadInput
from nanowan.formats.dit import full_config, keep_fp32, load_wan, new_dit
from nanowan.variants.registry import VARIANTS
from nanowan.variants.s2v.model import INJECT_LAYERS, PUBLISHED, WanS2V, read_config, spread
from wan import WanConfig

FIGURES = load_file(Path(__file__).parent / "data" / "s2v.safetensors")
DIM, HEADS, INJECTED = tiny_s2v.CONFIG.dim, tiny_s2v.CONFIG.num_heads, tiny_s2v.CONFIG.audio_inject_layers


@pytest.fixture(scope="module")
def model():
    return tiny_s2v.dit()


def without(given, *names):
    return {k: v for k, v in given.items() if k not in names}


def cases():
    """{name: what the model is given}, named as the figures. The last three are of no use in sampling."""
    plain, short = without(inputs(), "pose"), without(inputs(motion_frames=7), "pose")
    no_latest, no_recent = without(inputs(), "pose"), without(inputs(), "pose")
    no_latest["motion"][:, :, -1:] = 0  # the official add_last_motion=1
    no_recent["motion"][:, :, -3:] = 0  # add_last_motion=0
    return {
        "full_b2": inputs(B=2),
        "full": plain,
        "drop": without(plain, "motion"),
        "drop_pose": without(inputs(), "motion"),
        "uncond": plain | {"audio": 0 * plain["audio"]},
        "odd": without(inputs(h=20, w=12), "pose"),
        "short_motion": short,
        "add_1": no_latest,
        "add_0": no_recent,
    }


# ---- the plain version -----------------------------------------------------------------------------------------
def plain(weights, x, t, context, context_lens, ref, audio, motion=None, pose=None):
    """The model written down step by step: nothing fused, cached or shared with the modules; weights {name: tensor}."""
    W, N = weights, HEADS

    def linear(name, x):
        return F.linear(x, W[f"{name}.weight"], W[f"{name}.bias"])

    def norm(x, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], eps=eps)

    def rms(name, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * W[f"{name}.weight"]

    def attend(q, k, v):  # (B,L,D)
        q, k, v = (u.unflatten(-1, (N, -1)).transpose(-2, -3) for u in (q, k, v))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (p @ v).transpose(-2, -3).flatten(-2)

    def conv(name, x):
        kernel = W[f"{name}.weight"].shape[2:]
        return F.conv3d(x, W[f"{name}.weight"], W[f"{name}.bias"], kernel).flatten(2).transpose(1, 2)

    def causal(name, x, stride):  # (B,C,T)
        x = torch.cat([x[..., :1], x[..., :1], x], -1)
        return F.conv1d(x, W[f"{name}.conv.weight"], W[f"{name}.conv.bias"], stride)

    def silu_norm(x):  # over the channels of (B,C,T)
        return F.silu(norm(x.transpose(1, 2))).transpose(1, 2)

    # sound
    e = "casual_audio_encoder"
    mix = F.silu(W[f"{e}.weights"])
    sound = (torch.cat([audio[..., :1].repeat(1, 1, 1, 73), audio], -1) * mix).sum(1) / mix.sum(1)
    heads = causal(f"{e}.encoder.conv1_local", sound, 1).chunk(4, 1)
    paths = []
    for y in (*heads, causal(f"{e}.encoder.conv1_global", sound, 1)):
        y = causal(f"{e}.encoder.conv2", silu_norm(y), 2)
        paths.append(silu_norm(causal(f"{e}.encoder.conv3", silu_norm(y), 2)).transpose(1, 2)[:, 19:])
    local = torch.stack([*paths[:4], W[f"{e}.encoder.padding_tokens"][0].expand_as(paths[0])], 2)  # (B,T',5,D)
    whole = linear(f"{e}.encoder.final_linear", paths[4])  # (B,T',D)

    # tokens, where they stand, which row of the mask
    (B, _, T, h, w), mask = x.shape, W["trainable_cond_mask.weight"]
    H, V = h // 2, w // 2
    tokens = conv("patch_embedding", x) + conv("cond_encoder", torch.zeros_like(x) if pose is None else pose) + mask[0]
    L0 = tokens.shape[1]
    at = [(a, b, c) for a in range(T) for b in range(H) for c in range(V)]
    parts = [tokens, conv("patch_embedding", ref) + mask[1]]
    at += [(30, b, c) for b in range(H) for c in range(V)]
    if motion is not None:
        motion = F.pad(motion, (0, 0, 0, 0, 19, 0))[:, :, -19:]
        parts += [conv("frame_packer.proj", motion[:, :, 18:]) + mask[2]]
        parts += [conv("frame_packer.proj_2x", motion[:, :, 16:18]) + mask[2]]
        parts += [conv("frame_packer.proj_4x", motion[:, :, :16]) + mask[2]]
        at += [(-1, b, c) for b in range(H) for c in range(V)]
        for times, n, m in (((-3,), h // 4, w // 4), ((-19, -14, -9, -4), h // 8, w // 8)):
            rows, columns = ([int(i * (size - 1) / max(k - 1, 1)) for i in range(k)] for k, size in ((n, H), (m, V)))
            at += [(a, b, c) for a in times for b in rows for c in columns]
    x = torch.cat(parts, 1)

    # rotation
    half = DIM // N // 2
    each = half - 2 * (half // 3), half // 3, half // 3
    angle = torch.cat(
        [
            torch.tensor([p[axis] for p in at]).double()[:, None] * 10000.0 ** (-torch.arange(n).double() / n)
            for axis, n in enumerate(each)
        ],
        1,
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(x):  # (B,L,D)
        pairs = torch.view_as_complex(x.double().unflatten(2, (N, half, 2)))
        return torch.view_as_real(pairs * turn).flatten(2).float()

    # time and text
    frequency = 10000.0 ** (-torch.arange(32).double() / 32)
    angle = torch.stack([t, torch.zeros_like(t)], 1).double()[..., None] * frequency
    time = torch.cat([angle.cos(), angle.sin()], -1).float()
    time = linear("time_embedding.2", F.silu(linear("time_embedding.0", time)))  # (B,2,D)
    rows = linear("time_projection.1", F.silu(time)).unflatten(2, (6, -1))
    noise = torch.arange(x.shape[1]) < L0
    context = torch.stack([F.pad(c[:n], (0, 0, 0, 512 - n)) for c, n in zip(context, context_lens.tolist())])
    context = linear("text_embedding.2", F.gelu(linear("text_embedding.0", context), approximate="tanh"))

    for i in range(LAYERS):
        b = f"blocks.{i}"
        m = rows + W[f"{b}.modulation"][:, None]
        m = torch.where(noise[:, None, None], m[:, :1], m[:, 1:])  # (B,L,6,D)
        y = norm(x) * (1 + m[:, :, 1]) + m[:, :, 0]
        a = f"{b}.self_attn"
        q, k = rotate(rms(f"{a}.norm_q", linear(f"{a}.q", y))), rotate(rms(f"{a}.norm_k", linear(f"{a}.k", y)))
        x = x + m[:, :, 2] * linear(f"{a}.o", attend(q, k, linear(f"{a}.v", y)))
        a, y = f"{b}.cross_attn", norm(x) * W[f"{b}.norm3.weight"] + W[f"{b}.norm3.bias"]
        q, k = rms(f"{a}.norm_q", linear(f"{a}.q", y)), rms(f"{a}.norm_k", linear(f"{a}.k", context))
        x = x + linear(f"{a}.o", attend(q, k, linear(f"{a}.v", context)))
        y = norm(x) * (1 + m[:, :, 4]) + m[:, :, 3]
        x = x + m[:, :, 5] * linear(f"{b}.ffn.2", F.gelu(linear(f"{b}.ffn.0", y), approximate="tanh"))
        if i in INJECTED:
            j = INJECTED.index(i)
            a = f"audio_injector.injector.{j}"
            shift, scale = linear(f"audio_injector.injector_adain_layers.{j}.linear", F.silu(whole)).chunk(2, -1)
            y = x[:, :L0].unflatten(1, (T, -1))  # (B,T',n,D)
            q = rms(f"{a}.norm_q", linear(f"{a}.q", norm(y, 1e-5) * (1 + scale[:, :, None]) + shift[:, :, None]))
            y = y + linear(f"{a}.o", attend(q, rms(f"{a}.norm_k", linear(f"{a}.k", local)), linear(f"{a}.v", local)))
            x = torch.cat([y.flatten(1, 2), x[:, L0:]], 1)

    shift, scale = (time[:, :1, None] + W["head.modulation"]).unbind(2)
    y = linear("head.head", norm(x[:, :L0]) * (1 + scale) + shift)
    y = y.view(B, T, H, V, 1, 2, 2, 16).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return y.reshape(B, 16, T, h, w)


# ---- against the official figures --------------------------------------------------------------------------------
@pytest.mark.parametrize("case", cases())
def test_equals_official(model, case, report):
    with torch.no_grad():
        got = model(**cases()[case])
    report("relative error", tiny.error(got, FIGURES[case]), 2e-5)


def test_the_plain_version_equals_official(model, report):
    with torch.no_grad():
        got = plain(dict(model.named_parameters()), **inputs(B=2))
    report("relative error", tiny.error(got, FIGURES["full_b2"]), 2e-5)


def test_audio_encoder_equals_official(model, report):
    """Alone on 7 frames, and on a clip behind its prefix."""
    encoder, audio = model.casual_audio_encoder, inputs()["audio"]
    with torch.no_grad():
        vectors, tokens = encoder(audio[..., :7])
        report("global, 7 frames", tiny.error(vectors, FIGURES["cae_7_global"][:, :, 0]), 2e-5)
        report("local, 7 frames", tiny.error(tokens, FIGURES["cae_7_local"]), 2e-5)
        vectors, tokens = encoder.encode_clip(audio)
        report("global, a clip", tiny.error(vectors, FIGURES["cae_global"][:, 19:, 0]), 2e-5)
        report("local, a clip", tiny.error(tokens, FIGURES["cae_local"][:, 19:]), 2e-5)


@pytest.mark.parametrize("case, h, w", [("rope", 16, 8), ("odd_rope", 20, 12)])
def test_positions_equal_official(model, case, h, w, report):
    """The whole sequence's angles: noise, reference, motion packed in three ways."""
    seen = {}
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.update(rope=args[2][:2]))
    with torch.no_grad():
        model(**without(inputs(h=h, w=w), "pose"))
    handle.remove()
    report("largest difference", (angles(*seen["rope"]) - FIGURES[case]).abs().max().item(), 1.2e-7)


def test_tokens_equal_official(model, report):
    """As the first block is given them, and behind it and its injector, which the second block is given."""
    seen = []
    handles = [b.register_forward_pre_hook(lambda block, args: seen.append(args[0])) for b in model.blocks[:2]]
    with torch.no_grad():
        model(**cases()["full"])
    for handle in handles:
        handle.remove()
    report("assembled", tiny.error(seen[0], FIGURES["tokens"]), 2e-5)
    report("after block 0", tiny.error(seen[1], FIGURES["after_block_0"]), 2e-5)


# ---- what follows from the design --------------------------------------------------------------------------------
def test_what_is_prepared_once_per_clip_gives_the_same(model):
    given = inputs(B=2)
    with torch.no_grad():
        want = model(**given)
        text = model.embed_text(given["context"], given["context_lens"], cache=True)
        audio, ref = model.embed_audio(given["audio"]), model.embed_reference(given["ref"], given["motion"])
        got = model(given["x"], given["t"], text, ref=ref, audio=audio, pose=given["pose"])
    assert torch.equal(got, want)


def test_a_latent_frame_hears_no_further_than_its_last_video_frame(model):
    """Latent frame k hears video frames up to 4k+3."""
    audio = inputs(T=4)["audio"]
    later = audio.clone()
    later[..., 8:] += 1
    with torch.no_grad():
        a, b = (model.casual_audio_encoder.encode_clip(x) for x in (audio, later))
    for before, after in zip(a, b):
        assert torch.equal(before[:, :2], after[:, :2])
        assert (before[:, 2] - after[:, 2]).abs().max() > 0.01


def test_motion_older_than_19_latent_frames_is_dropped(model):
    motion = inputs(motion_frames=23)["motion"]
    with torch.no_grad():
        a, b = (model.embed_reference(inputs()["ref"], m) for m in (motion, motion[:, :, 4:]))
    assert torch.equal(a.tokens, b.tokens)


def test_coarse_tokens_stand_evenly_apart_and_reach_both_ends():
    assert spread(5, 10) == [0, 2, 4, 6, 9] and spread(2, 10) == [0, 9] and spread(1, 5) == [0]
    for size in range(4, 252, 4):  # tokens along sides of 64 px and up: the integer formula
        for n in (size // 2, size // 4):
            assert spread(n, size) == [i * (size - 1) // max(n - 1, 1) for i in range(n)], (n, size)


def test_the_injectors_norm_has_its_own_eps(model, report):
    """1e-5, seen where the variance is no larger; the model's is 1e-6."""
    x, frame = 3e-3 * torch.randn(1, 6, DIM), torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    with torch.no_grad():
        injection = model.embed_audio(inputs()["audio"]).injections[0]
        got = model.audio_injector(0, x, injection, frame) - x
        y = F.layer_norm(x, (DIM,), eps=1e-5) * injection.weight[:, frame] + injection.shift[:, frame]
        per_frame = [u.unflatten(1, (3, 5))[0] for u in injection.keys_values]
        want = model.audio_injector.injector[0](y.view(3, 2, DIM), per_frame, None).view(1, 6, DIM)
    report("relative error", tiny.error(got, want), 2e-5)


def test_ranks_that_share_a_clip_give_one_ranks_result(tmp_path, report):
    """Three ranks, of which one has no noise tokens: outputs, and the gradients of injectors that alone are trained."""
    for name, ranks in (("one", 1), ("three", 3)):
        file = tmp_path / f"{name}.safetensors"
        scripts.run(Path(__file__).parent / "helpers" / "s2v_ranks.py", file, ranks=ranks, check=True)
    one, three = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "three"))
    assert one.keys() == three.keys()
    report("outputs", max(tiny.error(three[k], one[k]) for k in ("clip", "first")), 1e-5)
    report("gradients", max(tiny.error(three[k], one[k]) for k in one if k.startswith("grad")), 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_plain_versions(model, checkpointing, report):
    """By text, sound, and every weight that a LoRA can sit on."""
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = [f"{n}.weight" for n in linear if n.startswith(("blocks.", "audio_injector.injector."))]
    assert len(targets) == LAYERS * 10 + len(INJECTED) * 4
    weight = torch.sin(torch.arange(FIGURES["full_b2"].numel()).float()).view_as(FIGURES["full_b2"])
    trained = tiny_s2v.dit()
    trained.checkpointing = checkpointing
    for name in targets:
        trained.get_parameter(name).requires_grad_(True)
    params = dict(trained.named_parameters())
    grads = []
    for run in (trained, lambda **given: plain(params, **given)):
        given = inputs(B=2)
        leaves = [given["context"].requires_grad_(True), given["audio"].requires_grad_(True)]
        leaves += [params[name] for name in targets]
        grads.append(torch.autograd.grad((run(**given) * weight).sum(), leaves))
    for name, got, want in zip(["text", "audio", *targets], *grads):
        if name in ("text", "audio"):
            report(name, tiny.error(got, want), 1e-4)
    report("weights, the worst", max(tiny.error(g, w) for g, w in zip(*(g[2:] for g in grads))), 1e-4)


def test_bf16_follows_fp32(report):
    """Within what bf16 keeps of each number, over four blocks; the audio encoder, the time and the norms stay fp32."""
    low = tiny_s2v.dit()
    for name, p in low.named_parameters():
        p.data = p.data if keep_fp32(name) else p.data.bfloat16()
    with torch.no_grad():
        report("relative error", tiny.error(low(**cases()["full"]), FIGURES["full"]), 2e-2)


# ---- files and bad input -----------------------------------------------------------------------------------------
def full_size():
    with torch.device("meta"):
        return new_dit(full_config("s2v-14B"))


def test_full_size_counts_and_names():
    model = full_size()
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(state) == 1260 and sum(p.numel() for p in model.parameters()) == 16_295_755_609
    own = {k: v for k, v in state.items() if not k.startswith(("blocks.", "text_", "time_", "head.", "patch_"))}
    numel = {k: torch.Size(v).numel() for k, v in own.items()}
    assert len(own) == 165 and sum(numel.values()) == 2_007_264_025
    for prefix, n in {
        "cond_encoder": 332_800,
        "trainable_cond_mask": 15_360,
        "frame_packer": 23_936_000,
        "casual_audio_encoder": 95_051_545,
        "audio_injector.injector.": 1_258_659_840,
        "audio_injector.injector_adain_layers.": 629_268_480,
    }.items():
        assert sum(v for k, v in numel.items() if k.startswith(prefix)) == n, prefix
    for name, shape in {
        "casual_audio_encoder.weights": (1, 25, 1, 1),
        "casual_audio_encoder.encoder.conv1_local.conv.weight": (5120, 1024, 3),
        "casual_audio_encoder.encoder.conv3.conv.weight": (5120, 2560, 3),
        "casual_audio_encoder.encoder.padding_tokens": (1, 1, 1, 5120),
        "frame_packer.proj_4x.weight": (5120, 16, 4, 8, 8),
        "audio_injector.injector.11.norm_k.weight": (5120,),
        "audio_injector.injector_adain_layers.11.linear.weight": (10240, 5120),
    }.items():
        assert state[name] == shape, name
    assert model.config.audio_inject_layers == INJECT_LAYERS == (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)


def test_load_wan_knows_s2v(tmp_path, model):
    tiny_s2v.write_dit(tmp_path, model)
    loaded = load_wan(tmp_path, dtype=torch.float32)
    assert type(loaded) is WanS2V and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    half = dict(load_wan(tmp_path).named_parameters())
    assert half["casual_audio_encoder.encoder.conv2.conv.weight"].dtype == torch.float32
    assert half["audio_injector.injector.0.q.weight"].dtype == torch.bfloat16


def test_one_file_without_config_json_stands_for_the_released_layers(tmp_path):
    """The number of injectors is all that the weights tell: 12 are the released ones."""
    config = tiny_s2v.CONFIG

    def read(model):
        plain = WanConfig(**{f.name: getattr(model.config, f.name) for f in fields(WanConfig)})
        state = model.state_dict()
        return read_config(plain, lambda name: state[name].shape, state, {}, "file")

    full = full_size()
    assert read(full) == full.config and full.config.audio_inject_layers == INJECT_LAYERS
    with pytest.raises(BadInput, match="should name 3 of the 4 blocks"):
        read(tiny_s2v.dit())
    # under another name, with ComfyUI's prefix
    state = {f"model.diffusion_model.{k}": v for k, v in tiny_s2v.dit().state_dict().items()}
    save_file(state, tmp_path / "s2v.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"num_heads": config.num_heads, "audio_inject_layers": config.audio_inject_layers})
    )
    assert load_wan(tmp_path / "s2v.safetensors", dtype=torch.float32).config == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_no_released_weights_have_are_refused(tmp_path, model, name):
    value = {True: False, False: True}.get(PUBLISHED[name], "other")
    tiny_s2v.write_dit(tmp_path, model, **{name: value})
    with pytest.raises(BadInput, match=f"config.json: not the released S2V model: {name} is {value!r}"):
        load_wan(tmp_path)


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, 4], [3, 1, 0], [0, 1, 1]])
def test_layers_that_do_not_fit_are_refused(tmp_path, model, layers):
    tiny_s2v.write_dit(tmp_path, model, audio_inject_layers=layers)
    with pytest.raises(BadInput, match="should name 3 of the 4 blocks, ascending"):
        load_wan(tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(audio=torch.zeros(1, 25, AUDIO_DIM, 8)), "sound for 2 latent frames"),
        (dict(audio=torch.zeros(1, 25, AUDIO_DIM, 10)), "a multiple of 4"),
        (dict(audio=torch.zeros(1, 4, AUDIO_DIM, 12)), "should be .B,25,24,F"),
        (dict(t=torch.zeros(1, 3)), r"t \(1, 3\)"),
        (dict(motion=torch.zeros(1, 16, 19, 8, 8)), "as high and wide"),
        (dict(pose=torch.zeros(1, 16, 2, 16, 8)), r"pose \(1, 16, 2, 16, 8\)"),
        (dict(x=torch.zeros(1, 16, 3, 18, 8)), "ref 16x8"),
    ],
)
def test_bad_shapes_are_one_line(model, change, says):
    with pytest.raises(BadInput, match=says):
        model(**(inputs() | change))


def test_the_variants_row():
    row = VARIANTS["s2v-14B"]
    assert row["negative"].startswith("画面模糊，最差质量，画面模糊，") and row["negative"].endswith("倒着走")
    assert (row["steps"], row["shift"], row["guidance"], row["fps"]) == (40, 3.0, (4.5, 4.5), 16)
