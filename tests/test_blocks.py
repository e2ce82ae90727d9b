"""diag.py blocks: a word is hidden from one block exactly, and the blocks that read it are found."""

import itertools
import json
import shutil

import pytest
import torch

import data
from benchmarks import tiny, tiny_animate, tiny_s2v
from diag import arguments
from diagnostics import blocks
from diagnostics.blocks import hide_tokens, keyword_tokens, mean_change, sample_effects, shortest_run
from flow import make_noisy_batch
from nanowan.errors import BadInput
from nanowan.formats.t5 import load_t5


def diag(*argv):
    args = arguments([str(a) for a in argv])
    args.run(args)


def given_to(kind):
    """(a tiny model of a kind, what its forward takes; the text has 9 tokens)."""
    context = torch.randn(1, 9, tiny.TEXT_DIM)
    if kind == "s2v":
        args = tiny_s2v.inputs()
        return tiny_s2v.dit(), args | {"context": context, "context_lens": torch.tensor([9])}
    if kind == "animate":
        model = tiny_animate.animate()
        side = model.motion_encoder.side
        args = dict(pose=torch.randn(1, 16, 2, 6, 10), face=torch.rand(1, 3, 5, side, side) * 2 - 1)
        args |= dict(clip=torch.randn(1, 5, tiny_animate.CLIP_SIZES["dim"]), x=torch.randn(1, 36, 3, 6, 10))
        return model, args | {"t": torch.tensor([500.0]), "context": context}
    return tiny.dit(kind), dict(x=torch.randn(1, 48, 2, 4, 4), t=torch.tensor([500.0]), context=context)


@pytest.mark.parametrize("kind", ["ti2v", "s2v", "animate"])
def test_hiding_nothing_changes_nothing_to_the_bit(kind):
    model, args = given_to(kind)
    with torch.no_grad():
        want = model(**args)
        for block in model.blocks:
            with hide_tokens(block.cross_attn, torch.zeros(9, dtype=torch.bool)):
                assert torch.equal(model(**args), want)
            with hide_tokens(block.cross_attn, torch.arange(9) == 3):
                assert not torch.equal(model(**args), want)
            assert torch.equal(model(**args), want)  # and nothing is left behind


def test_a_hidden_token_is_as_if_it_were_not_there(report):
    """Against the same attention without that token's keys and values."""
    block, hidden = tiny.dit("ti2v").blocks[1].cross_attn, torch.tensor([0, 1, 1, 0, 0], dtype=torch.bool)
    x, context = torch.randn(2, 12, 48), torch.randn(2, 7, 48)  # 5 tokens, and the two keys of the padding
    bias = torch.tensor([0, 0, 0, 0, 0, 5.5, 2.25]).expand(2, 1, 1, 7)
    left = [0, 3, 4, 5, 6]
    with torch.no_grad():
        want = block(x, block.keys_values(context[:, left]), bias[..., left])
        with hide_tokens(block, hidden):
            got = block(x, block.keys_values(context), bias)
    report("relative error", tiny.error(got, want), 2e-6)


def test_effects_are_those_of_leaving_the_token_out(report):
    """sample_effects against a model whose block computes its cross-attention without the token's key and value."""
    model, hidden = tiny.dit("ti2v"), torch.tensor([0, 1, 0, 0], dtype=torch.bool)
    entry, noise = {"latents": torch.randn(48, 2, 4, 4)}, torch.randn(1, 48, 2, 4, 4)
    batches = [make_noisy_batch([entry], ["a"], torch.tensor([t]), noise) for t in (0.2, 0.7)]
    text = torch.randn(1, 4, tiny.TEXT_DIM), torch.tensor([4])
    found = sample_effects(model, batches, text, hidden)
    assert found.shape == (3, 2)
    left = [0, 2, 3, 4, 5]
    for i, block in enumerate(model.blocks):
        want, attend = torch.zeros(2), block.cross_attn.forward
        for batch in batches:
            v, loss = batch.velocity(model, *text), batch.loss(model, *text)
            block.cross_attn.forward = lambda x, kv, b, f=attend: f(x, [u[:, left] for u in kv], b[..., left])
            w, worse = batch.velocity(model, *text), batch.loss(model, *text)
            block.cross_attn.forward = attend
            want += torch.stack([(w - v).norm() / v.norm(), worse - loss]) / 2
        report(f"block {i}", tiny.error(found[i], want), 2e-3)  # differences of nearly equal numbers


CAPTIONS = [("a red square moves left", "red"), ("Red, red! a square", "red"), ("the quick (brown) fox", "brown")]
CAPTIONS += [
    ("the lazy dog", "lazy dog"),
    ("\u4e00\u53ea\u732b\u5728\u8349\u5730\u4e0a", "\u732b"),
    ("redder than red", "red"),
]


@pytest.mark.parametrize("caption, keyword", CAPTIONS)
def test_the_tokens_of_a_word_spell_it(caption, keyword, checkpoints):
    """What is found, without spaces, is the word as often as it stands there alone; the rest does not hold it."""
    tokenizer = load_t5(checkpoints["ti2v"], dtype=torch.float32).tokenizer
    ids, tokens = tokenizer([caption])[0][0].tolist(), keyword_tokens(caption, keyword, tokenizer)
    assert len(tokens) == len(ids) and not tokens[-1]
    parts = [
        "".join(tokenizer.pieces.id_to_piece(i) for i, _ in run)
        for on, run in itertools.groupby(zip(ids, tokens.tolist()), key=lambda pair: pair[1])
        if on
    ]
    count = 2 if "Red" in caption else 1
    assert len(parts) == count
    for part in parts:
        assert part.replace("\u2581", " ").strip().lower() == keyword


def test_a_word_with_rows_of_its_own_is_found(checkpoints):
    tokenizer = load_t5(checkpoints["ti2v"], dtype=torch.float32).tokenizer
    tokenizer.add_words({"zorp": [196, 197]})
    ids = tokenizer(["a zorp, red zorp"])[0][0]
    assert keyword_tokens("a zorp, red zorp", "zorp", tokenizer).tolist() == [int(i) in (196, 197) for i in ids]
    assert 0 < keyword_tokens("a zorp, red zorp", "red", tokenizer).sum() < len(ids) - 4


def test_a_word_that_is_cut_off_has_no_tokens(checkpoints):
    tokenizer = load_t5(checkpoints["ti2v"], dtype=torch.float32).tokenizer
    assert not keyword_tokens("the lazy dog " * 300 + "red", "red", tokenizer).any()


def test_blocks_are_proposed_for_both_experts_and_all_words():
    """By the mean of each block's changes."""
    changes = {"high": {"red": (1.0, 2.0), "fox": (3.0, 4.0)}, "low": {"red": (5.0, 6.0), "fox": (7.0, 12.0)}}
    effects = {
        expert: [
            {"keyword": word, "block": i, "change": change}
            for word, row in words.items()
            for i, change in enumerate(row)
        ]
        for expert, words in changes.items()
    }
    assert mean_change(effects) == [4.0, 6.0]


def test_the_shortest_run():
    assert shortest_run([0, 1, 5, 4, 0]) == (2, 3, 0.9)
    assert shortest_run([1, 0, 0, 1]) == (0, 3, 1.0)
    assert shortest_run([0.1, 9, 0.1]) == (1, 1, 9 / 9.2)
    assert shortest_run([4, 1, 4, 1], share=0.5) == (0, 1, 0.5)  # the first of equals
    assert shortest_run([3, 4, 2, 4.5, 3], share=0.3)[:2] == (3, 4)  # of runs of two that hold enough the largest
    assert shortest_run([0, 0]) is None and shortest_run([float("nan"), 1]) is None


@pytest.fixture(scope="module")
def two_of_five(tmp_path_factory, checkpoints):
    """A checkpoint in which only blocks 2 and 3 of five have cross-attention."""
    folder = tmp_path_factory.mktemp("blocks") / "ckpt"
    shutil.copytree(checkpoints["ti2v"], folder)
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    model = tiny.dit("ti2v", layers=5)
    for i in (0, 1, 4):
        for p in model.blocks[i].cross_attn.o.parameters():
            p.zero_()
    tiny.write_dit(folder, model)
    return folder


def test_the_blocks_that_read_a_word_are_found(two_of_five, media, tmp_path, capsys):
    where = "--ckpt", two_of_five, "--data", media, "--cache", tmp_path, "--resolution", "64x64", "--frames", "5"
    diag("blocks", *where, "--keywords", "red,dog", "--n", "2", "--device", "cpu", "--json", tmp_path / "b.json")
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["blocks"] == [2, 3] and "--blocks 2-3: the shortest range" in capsys.readouterr().out
    rows = found["effects"]["dit"]
    assert [(r["keyword"], r["block"], r["n"]) for r in rows] == [(k, b, 1) for k in ("red", "dog") for b in range(5)]
    for row in rows:
        assert (row["change"] > 1e-4) == (row["block"] in (2, 3)) and row["change_sd"] is None
        if row["block"] not in (2, 3):
            assert row["change"] == row["loss"] == 0  # to the bit
    with pytest.raises(BadInput, match="--keywords zebra: no caption"):
        diag("blocks", *where, "--keywords", "red,zebra", "--device", "cpu")
    with pytest.raises(BadInput, match="--n 0: at least 1"):
        diag("blocks", *where, "--keywords", "red", "--n", "0")
    with pytest.raises(BadInput, match="--keywords ,: give the words"):
        diag("blocks", *where, "--keywords", ",")


def test_both_experts_are_looked_at(checkpoints, media, tmp_path, monkeypatch):
    """In their own halves of the timesteps."""
    seen = []

    def eval_batches(*args):
        for i, batch in data.eval_batches(*args):
            seen.append(batch.t.item())
            yield i, batch

    monkeypatch.setattr(blocks, "eval_batches", eval_batches)
    where = "--ckpt", checkpoints["t2v"], "--data", media, "--cache", tmp_path, "--resolution", "64x64", "--frames", "5"
    diag("blocks", *where, "--keywords", "dog", "--device", "cpu", "--json", tmp_path / "b.json")
    effects = json.loads((tmp_path / "b.json").read_text())["effects"]
    assert list(effects) == ["high", "low"] and [r["block"] for r in effects["low"]] == [0, 1, 2]
    assert effects["high"] != effects["low"] and all(r["change"] > 0 for rows in effects.values() for r in rows)
    assert len(seen) == 8 and min(seen[:4]) >= 0.875 > max(seen[4:])
