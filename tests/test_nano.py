"""The nano world, its grader, and the committed checkpoint."""

import json
import random
import re
from itertools import product

import pytest
import sentencepiece
import torch
from helpers import scripts

from nano import pretrain, world
from nano.evaluate import read_graded_prompts
from nano.grader import grade, shares, wilson
from nano.world import (
    ATTRIBUTES,
    FPS,
    MOTIONS,
    NEW_WORDS,
    TRIPLES,
    UNSEEN,
    draw,
    every_clip,
    known_values,
    prompts,
    sample_attributes,
    training_caption,
)
from nanowan.errors import BadInput
from nanowan.formats.t5 import load_t5
from nanowan.formats.vae import load_vae
from nanowan.settings import NANO
from sample import load

FILES = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "Wan2.2_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/spiece.model",
)


def attributes(n, seed=0):
    rng = random.Random(seed)
    return [sample_attributes(rng, list(product(*known_values().values()))) for _ in range(n)]


def test_grader_reads_real_clips():
    wanted = attributes(300)
    graded = [grade(c) for c in draw(wanted, 1)]
    accuracy = shares(graded, wanted)
    assert min(accuracy.values()) >= 0.99 and all(g["background"] == w["background"] for g, w in zip(graded, wanted))
    assert sum(g["iou"] for g in graded) / 300 > 0.97


def test_grader_is_not_fooled():
    """Noise, an empty picture, and a clip against the wrong caption earn nothing."""
    empty = grade(torch.full((3, 9, 64, 64), -0.84))
    noise, nothing = grade(torch.rand(3, 9, 64, 64) * 2 - 1), grade(torch.full((3, 9, 64, 64), torch.nan))
    assert all(g[kind] is None for g in (empty, noise, nothing) for kind in ATTRIBUTES)
    wanted = attributes(200, 1)
    graded = [grade(c) for c in draw(wanted, 2)]
    shuffled = wanted[1:] + wanted[:1]
    assert all(share < 0.45 for share in shares(graded, shuffled).values())
    flipped = [grade(c.flip(1)) for c in draw(wanted, 2)]  # backwards in time: only motion changes
    back = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still", "bounce": "bounce"}
    assert [back[g["motion"]] for g in graded] == [f["motion"] for f in flipped]


@pytest.mark.parametrize("motion, way", MOTIONS.items())
def test_what_moves_at_less_than_half_the_worlds_pace_stands_still(motion, way):
    for pace in (0.4, 0.6):
        centers = 32 + pace * world.STEP * torch.arange(-4.0, 5)[:, None] * torch.tensor(way)
        shape = world.template(torch.tensor([1]), torch.tensor([float(world.RADIUS)]), centers[None])[0]
        clip = torch.stack([shape * 1.6 - 0.8, -0.8 + 0 * shape, -0.8 + 0 * shape])
        assert grade(clip)["motion"] == (motion if pace > 0.5 else "still")


def test_compositions_and_captions_are_held_out():
    assert len(UNSEEN) == 20 and len(TRIPLES) == 140
    wanted, _ = every_clip()
    assert not {(a["color"], a["shape"], a["motion"]) for a in wanted} & UNSEEN
    rng = random.Random(0)
    read = {training_caption(a, rng) for a in wanted for _ in range(10)}
    for suite in (prompts(200, 0), prompts(200, 0, unseen=True)):
        assert len({p["prompt"] for p in suite}) == 200 and not read & {p["prompt"] for p in suite}
    assert not any(re.search(rf"\b{w}\b", c) for w in NEW_WORDS for c in read)


def test_clips_are_reproducible_and_graded_from_their_mp4(tmp_path):
    from nanowan.cache import pixels
    from nanowan.training.scan import Item

    for name in ("a", "b"):
        flags = ["--out", tmp_path / name, "--n", "12", "--seed", "4", "--words", "crimson,box"]
        scripts.run("-m", "nano", "clips", *flags, check=True)
    rows = [json.loads(line) for line in (tmp_path / "a" / "attributes.jsonl").read_text().splitlines()]
    assert (
        rows == [json.loads(line) for line in (tmp_path / "b" / "attributes.jsonl").read_text().splitlines()]
        and len(rows) == 12
    )
    assert {r["caption"].count("crimson") + r["caption"].count("box") for r in rows[1::2]} == {1}
    assert not {r["caption"] for r in rows} & {p["prompt"] for p in prompts(30, 0, words=["crimson", "box"])}
    for r in rows:
        assert (tmp_path / "a" / r["file"]).with_suffix(".txt").read_text().strip() == r["caption"]
        g = grade(pixels(Item(tmp_path / "a" / r["file"], [], 64, 64, 9, FPS)))
        assert all(g[k] == r[k] for k in ATTRIBUTES)


def test_words_of_ones_own(monkeypatch):
    """As scarlet=red; what a word means is said in the prompts and shown in the clips."""
    monkeypatch.setattr(world, "NEW_WORDS", dict(NEW_WORDS))
    assert world.parse_words("halts,scarlet=red,disc=circle,hovers=still") == ["halts", "scarlet", "disc", "hovers"]
    rows = world.prompts(9, 0, words=["scarlet", "disc", "hovers"])
    for row, (kind, meaning) in zip(rows, 3 * [("color", "red"), ("shape", "circle"), ("motion", "still")]):
        assert row["word"] in row["prompt"] and row[kind] == meaning
    for text, said in (
        ("pony", "--words pony: .* as in pony=red"),
        ("pony=horse", "--words pony=horse: 'horse' is nothing here"),
        ("=red", "--words =red: a word is letters"),
        ("two words=red", "--words two words=red: a word is letters"),
        ("red=blue", "--words red=blue: 'red' is no new word"),
        ("rises=up", "--words rises=up: 'rises' is no new word"),
        ("crimson=blue", "--words crimson=blue: crimson means red"),
        ("ruby=red,ruby=blue", "--words ruby=blue: ruby means red"),
    ):
        with pytest.raises(BadInput, match=said):
            world.parse_words(text)


def test_wilson_interval():
    low, high = wilson(95, 100)
    assert abs(low - 0.8882) < 1e-3 and abs(high - 0.9785) < 1e-3


def test_prompts_file_errors(tmp_path):
    f = tmp_path / "p.jsonl"
    for text, message in (
        ("{", "not lines of"),
        ('{"color": "red"}', "not lines of"),
        ('{"prompt": "a", "color": "pink"}', "line 1: color 'pink'"),
        ("\n", "no prompts"),
    ):
        f.write_text(text)
        with pytest.raises(BadInput, match=message):
            read_graded_prompts(f)


def test_folding_the_statistics_changes_only_the_scale():
    """Latents get the full-size VAE's mean and deviation per channel; what is decoded stays the same."""
    from benchmarks import tiny

    vae = tiny.vae(True)
    clips = torch.rand(4, 3, 5, 32, 32) * 2 - 1
    raw = torch.cat([m[:, :48] for m in vae.moment_chunks(clips)], 2)
    before = torch.cat(list(vae.frame_chunks(raw)), 2)
    pretrain.fold_stats(vae, clips)
    z = vae.encode(clips)
    assert z.mean((0, 2, 3, 4)).abs().max() < 1e-4 and (z.std((0, 2, 3, 4)) - 1).abs().max() < 1e-4
    after = vae.decode(z)
    assert (after - before.clamp(-1, 1)).abs().max() < 1e-4


def test_the_committed_checkpoint_is_small_and_in_the_official_layout():
    sizes = [(NANO / f).stat().st_size for f in FILES]
    assert sum(f.stat().st_size for f in NANO.rglob("*") if f.is_file()) < 12e6 and all(sizes)


def test_the_committed_checkpoint_listens(tmp_path):
    """40 held-out prompts: enough to notice a broken model; `python -m nano eval` gives the figures."""
    scripts.run("-m", "nano", "eval", "--n", "40", "--json", tmp_path / "e.json", check=True)
    scores = json.loads((tmp_path / "e.json").read_text())
    assert scores["n"] == 40
    for suite in scores["suites"].values():
        assert min(suite["accuracy"].values()) >= 0.85, scores


def test_any_prompts_are_graded_by_what_is_given(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a red square moves left", "color": "red"}\n'
        '{"prompt": "a blue circle rises", "color": "blue", "motion": "up"}\n'
    )
    scripts.run("-m", "nano", "eval", "--prompts", tmp_path / "p.jsonl", "--json", tmp_path / "e.json", check=True)
    scores = json.loads((tmp_path / "e.json").read_text())
    assert scores["n"] == 2 and set(scores["accuracy"]) == {"color", "motion"}


def test_the_nano_vae_serves_diffusers_too(report):
    """The committed VAE decodes the same in the peer: it is an ordinary Wan 2.2 VAE."""
    from benchmarks import tiny

    vae = load_vae(NANO)
    peer = tiny.diffusers_vae(vae)
    clip = draw(attributes(1), 0)
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (peer.config.latents_mean, peer.config.latents_std))
    want = (peer.encode(clip).latent_dist.mode() - mean) / std
    report("encode", tiny.error(vae.encode(clip), want), 2e-5)
    report("decode", tiny.error(vae.decode(want), peer.decode(want * std + mean).sample.clamp(-1, 1)), 2e-5)


def test_words_that_nano_does_not_know_differ_in_their_pieces(tmp_path):
    """Each begins with a pair of letters; known words are split as without pairs; the committed file is such a one."""
    pretrain.train_tokenizer(tmp_path / "spiece.model")
    words = {word for caption in pretrain.captions_for_pieces() for word in caption.split()}
    raw = (tmp_path / "spiece.model").read_bytes()
    before = sentencepiece.SentencePieceProcessor(model_proto=raw)
    after = sentencepiece.SentencePieceProcessor(model_proto=pretrain.with_letter_pairs(raw, words))
    nano = load_t5(NANO).tokenizer.pieces
    assert 600 < after.get_piece_size() - before.get_piece_size() < 676
    for word in words | set(NEW_WORDS):
        assert after.encode(word) == before.encode(word)
    for word in NEW_WORDS:
        assert after.encode(word, out_type=str) == nano.encode(word, out_type=str) == ["\u2581" + word]
    own = ["scarlet", "navy", "disc", "pyramid", "plummets", "jade"]
    assert [after.encode(word, out_type=str)[0] for word in own] == ["\u2581" + word[:2] for word in own]
    assert [nano.encode(word, out_type=str)[0] for word in own] == ["\u2581" + word[:2] for word in own]


@pytest.mark.slow
def test_a_deeper_world_with_the_same_vae(tmp_path, monkeypatch):
    """`python -m nano train --layers 5 --vae nano`, of a few steps and clips."""
    few = attributes(8)
    monkeypatch.setattr(pretrain, "every_clip", lambda: (few, draw(few, 0)))
    pretrain.train(tmp_path, seed=0, steps=2, layers=5, vae_of="nano")
    models = load(tmp_path)
    assert len(models.acquire("dit").blocks) == 5
    ours, theirs = load_vae(tmp_path).state_dict(), load_vae(NANO).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for flags in ({"layers": 6, "vae_of": "nano"}, {"layers": 5, "vae_of": None}):
        with pytest.raises(BadInput, match='begun with .*"layers": 5, "vae": "nano"'):
            pretrain.train(tmp_path, seed=0, steps=2, **flags)
