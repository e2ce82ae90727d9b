"""Pipeline and Settings: what a checkpoint folder is, which expert serves when, and where parts lie."""

import hashlib
import json

import pytest
import torch

import flow
from benchmarks import tiny, tiny_animate, tiny_s2v
from lora import adapter, base_name
from nanowan import pipeline
from nanowan.devices import activation_bytes
from nanowan.errors import BadInput
from nanowan.formats.dit import load_wan
from nanowan.memory.placement import Placement
from nanowan.memory_estimate import SINGLE_DEVICE, ParallelLayout, build, denoising_bytes, full_builders, pretending
from nanowan.pipeline import Pipeline, Runtime
from nanowan.settings import NANO, NEGATIVE, read_settings, released
from nanowan.variants.registry import VARIANTS


# ---- settings --------------------------------------------------------------------------------------------------------
def test_settings_of_nano():
    """What its config.json recommends stands over its variant's row."""
    s, row = Pipeline("nano").settings, VARIANTS["ti2v-5B"]
    told = json.loads((NANO / "config.json").read_text())
    assert s.variant == "ti2v-5B" and s.train == told["train"] and not s.is_moe and s.expert_names == ("dit",)
    for name, value in told["sample"].items():
        have = getattr(s, name)
        assert have in (value, (value, value), tuple(value) if isinstance(value, list) else None), name
    assert s.fps == told["sample"].get("fps", row["fps"]) and (s.z_dim, s.stride) == (48, (4, 16, 16))


@pytest.mark.parametrize(
    "kind, variant, z_dim, stride, names",
    [
        ("ti2v", "ti2v-5B", 48, (4, 16, 16), ("dit",)),
        ("t2v", "t2v-A14B", 16, (4, 8, 8), ("high", "low")),
        ("i2v", "i2v-A14B", 16, (4, 8, 8), ("high", "low")),
        ("s2v", "s2v-14B", 16, (4, 8, 8), ("dit",)),
        ("animate", "animate-14B", 16, (4, 8, 8), ("dit",)),  # whose config.json names no model type
    ],
)
def test_settings_of_a_folder(checkpoints, tmp_path, kind, variant, z_dim, stride, names):
    if kind == "s2v":
        tiny_s2v.write_dit(tmp_path, tiny_s2v.dit())
    elif kind == "animate":
        tiny_animate.write_dit(tmp_path, tiny_animate.animate(layers=5))
        assert "model_type" not in json.loads((tmp_path / "config.json").read_text())
    s = read_settings(checkpoints.get(kind, tmp_path))
    assert (s.variant, s.z_dim, s.stride, s.expert_names) == (variant, z_dim, stride, names)
    assert s == released(variant)


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "not a Wan checkpoint folder, .*config.json is missing"),
        ("{", "config.json: not a model configuration"),
        ('{"model_type": "t3v"}', "model_type 't3v' should be one of ti2v"),
        ('{"model_type": "ti2v", "sample": {"colour": 1}}', '"sample" should hold settings of sampling'),
    ],
)
def test_folders_that_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=message) as e:
        read_settings(tmp_path)
    assert "\n" not in str(e.value)


# ---- experts and guidance --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, boundary", [("t2v-A14B", 875), ("i2v-A14B", 900)])
def test_the_high_noise_expert_serves_the_boundary_itself(variant, boundary):
    s = released(variant).with_overrides(guidance=(3.0, 4.0))
    assert s.expert_at(boundary) == ("high", 4.0) and s.expert_at(1000) == ("high", 4.0)
    assert s.expert_at(boundary - 1e-3) == ("low", 3.0) and s.expert_at(0) == ("low", 3.0)


@pytest.mark.parametrize("steps", [27, 46, 54])
def test_a_step_at_the_boundary_exactly(steps):
    """The official grid meets 875 at these numbers of steps."""
    s, timesteps = released("t2v-A14B"), flow.solver("unipc", steps, 12.0).timesteps.tolist()
    assert 875 in timesteps
    assert [s.expert_at(t)[0] for t in timesteps] == ["high" if t >= 875 else "low" for t in timesteps]


def test_one_model_serves_all_times():
    s = released("ti2v-5B").with_overrides(guidance=(2.0, 7.0))
    assert {s.expert_at(t) for t in (0, 500, 875, 1000)} == {("dit", 2.0)}


def test_guidance_is_a_pair():
    """One number is for both; steps at 1 are not guided."""
    s = released("t2v-A14B")
    assert s.guidance == (3.0, 4.0) and s.guided
    assert s.with_overrides(guidance=5.0).guidance == (5.0, 5.0) == s.with_overrides(guidance=(5.0,)).guidance
    assert s.with_overrides(guidance=None).guidance == (3.0, 4.0)
    assert not s.with_overrides(guidance=1.0).guided and s.with_overrides(guidance=(1.0, 2.0)).guided
    for bad in (float("nan"), (1.0, float("inf"))):
        with pytest.raises(BadInput, match="--guidance"):
            s.with_overrides(guidance=bad)


@pytest.mark.parametrize(
    "wrong, message", [(dict(solver="ddim"), "--solver ddim: .*one of unipc"), (dict(steps=0), "--steps 0.*at least 1")]
)
def test_settings_that_no_solver_has_are_refused(wrong, message):
    with pytest.raises(BadInput, match=message):
        released("ti2v-5B").with_overrides(**wrong)


# ---- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, size", [("ti2v-5B", (640, 352)), ("t2v-A14B", (416, 240))])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_estimate_of_activations_is_near_the_plans_trace(variant, size, batch, report):
    """What decides how guidance runs, with the model's own width: within 25 % of what a traced step takes on a GPU
    beyond the text's keys and values.
    """
    s, layout = released(variant), ParallelLayout(stream_blocks=1)  # keeps no keys and values
    with pretending(cuda=True):
        dit = build(full_builders(s), s.expert_names[0], torch.bfloat16)
        shape = s.latent_shape(size, 33)
        traced = denoising_bytes(dit, s, shape, batch, 64, "none", layout)
    tokens = shape[1] * shape[2] * shape[3] // 4
    assert dit.config.dim == {"ti2v-5B": 3072, "t2v-A14B": 5120}[variant]
    report("estimate", abs(activation_bytes(dit.config.dim, tokens, batch) / traced - 1), 0.25)
    assert SINGLE_DEVICE.caches_text_kv and not layout.caches_text_kv


def test_guidance_takes_two_passes_where_one_batch_does_not_fit(checkpoints, monkeypatch):
    """By this model's width, and by the tokens that a rank has of a clip."""
    pipe = Pipeline(checkpoints["ti2v"])
    pipe.acquire("dit")
    need = 2 * activation_bytes(48, 1000, 3)
    for free, mode in ((need + 1, "batched"), (need, "sequential"), (0, "sequential")):
        monkeypatch.setattr(pipeline, "free_memory", lambda device, free=free: free)
        assert pipe.guidance_mode(1000, 3) == mode
    monkeypatch.setattr(pipeline, "free_memory", lambda device: need)
    pipe.world.sp_size = 2
    assert pipe.guidance_mode(1000, 3) == "batched" and pipe.guidance_mode(2000, 3) == "sequential"
    pipe.world.cfg_size = 2
    assert pipe.guidance_mode(1 << 30) == "parallel"


# ---- placements ------------------------------------------------------------------------------------------------------
def test_parts_come_stay_and_go(checkpoints, monkeypatch):
    pipe = Pipeline(checkpoints["t2v"])
    assert not pipe.loaded() and pipe.placements == {}
    high = pipe.acquire("high")
    assert pipe.acquire("high") is high and pipe.acquire("low") is not high
    assert list(pipe.placements) == ["high", "low"] and type(pipe.placements["high"]) is Placement
    pipe.evict("high")  # from the host there is nowhere to go
    assert list(pipe.placements) == ["low"]
    again = pipe.acquire("high")
    assert again is not high and all(torch.equal(a, b) for a, b in zip(again.parameters(), high.parameters()))
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 0)
    pipe.acquire("vae")
    assert list(pipe.placements) == ["vae"]
    pipe.drop()
    assert not pipe.placements


def test_a_streamed_part_runs_as_another(checkpoints, report):
    found, x = [], torch.randn(1, 48, 2, 4, 4)
    for count in (0, 2):
        pipe = Pipeline(checkpoints["ti2v"], Runtime(stream_blocks=count))
        model = pipe.acquire("dit")
        assert len(pipe.placements["dit"].streamed) == count
        assert len(pipe.streams()) == (count > 0)
        with torch.no_grad():
            found.append(model(x, torch.tensor([500.0]), torch.ones(1, 5, tiny.TEXT_DIM)))
        pipe.drop()
    report("relative error", tiny.error(*found), 1e-6)


def test_an_adapter_goes_in_before_the_weights_are_read_and_stays_when_they_go(checkpoints, monkeypatch):
    """Into an empty model, from the seed alone, the other expert's from another; it is the one that an optimizer has,
    also after its DiT was dropped and loaded again. The weights are those of the checkpoint.
    """
    devices, real = [], pipeline.parallelize

    def parallelize(dit, world):
        devices.append(next(dit.parameters()).device.type)
        real(dit, world)

    monkeypatch.setattr(pipeline, "parallelize", parallelize)

    def loaded(seed):
        pipe = Pipeline(checkpoints["t2v"])
        pipe.adapter = pipeline.Adapter(("high", "low"), ("cross_attn.k",), 2, 2.0, 0.0, (0, 2), seed)
        return pipe, pipe.acquire("low"), pipe.acquire("high")

    state = torch.get_rng_state()
    pipe, low, high = loaded(3)
    assert devices == ["meta"] * 2 and torch.equal(torch.get_rng_state(), state)
    names = ["blocks.0.cross_attn.k", "blocks.2.cross_attn.k"]
    assert list(adapter(low)) == list(adapter(high)) == names
    for name in names:
        (a, b), (other, _) = adapter(low)[name], adapter(high)[name]
        assert a.abs().sum() > 0 and not b.any() and not torch.equal(a, other)
        assert torch.equal(a, adapter(loaded(3)[1])[name][0]) and not torch.equal(a, adapter(loaded(4)[1])[name][0])
    plain = load_wan(checkpoints["t2v"] / "low_noise_model", dtype=torch.float32).state_dict()
    frozen = {base_name(name): p for name, p in low.named_parameters() if not p.requires_grad}
    assert plain.keys() == frozen.keys() and all(torch.equal(p, plain[name]) for name, p in frozen.items())
    trained = [p for p in low.parameters() if p.requires_grad]
    with torch.no_grad():
        trained[1].fill_(0.5)
    pipe.drop("low")
    again = [p for p in pipe.acquire("low").parameters() if p.requires_grad]
    assert pipe.acquire("low") is not low and all(p is q for p, q in zip(trained, again, strict=True))


def test_the_negative_prompt_is_the_official_one():
    """To the last character: latents are compared with those that it gives (generate.py's sample_neg_prompt)."""
    assert len(NEGATIVE) == 137
    digest = hashlib.sha256(NEGATIVE.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_the_vaes_room_goes_by_the_area_of_a_frame(checkpoints, monkeypatch):
    pipe, asked = Pipeline(checkpoints["ti2v"]), []
    monkeypatch.setattr(pipe, "acquire", lambda name, activations: asked.append(activations))
    for size in ((64, 32), (32, 64), (128, 64)):
        pipe.acquire_vae(size)
    assert asked[0] == asked[1] == asked[2] / 4
