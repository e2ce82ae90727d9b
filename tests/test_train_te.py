"""train_te.py: what it trains, what it shows, what it saves, and that a stopped run goes on exactly."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import scripts

from benchmarks import tiny
from nano import __main__ as nano
from nano import world
from nanowan.errors import BadInput
from nanowan.formats.header import load
from nanowan.formats.t5 import load_t5, load_tokenizer
from nanowan.settings import NANO, read_settings, released
from nanowan.training import keywords
from nanowan.training.captions import augment_caption, has_keyword, replace_keyword
from nanowan.training.keywords import (
    add_placeholders,
    check_keywords,
    initialize_rows,
    keyword_norms,
    keyword_token_ids,
    parse_keyword,
    shared_token_ids,
)
from nanowan.training.scan import Item
from nanowan.training.text_encoder import RowEmbedding, encoder_tensors, optimizer_groups, relative_changes, unfreeze
from t5 import TextEncoder
from train_te import arguments, check

ROOT = Path(__file__).parent.parent


def train(ckpt, media, out, *flags, check=True, code=None):
    where = "--ckpt", ckpt, "--data", media, "--out", out, "--cache", out.parent / "cache"
    how = "--resolution 64x64 --frames 9 --steps 6 --batch 2 --keywords dog --device cpu --dtype fp32".split()
    return scripts.run(ROOT / "train_te.py", *where, *how, *flags, code=code, check=check)


def changed(ckpt, file):
    """Names of the tensors that differ from the folder's encoder, and the embedding rows that do."""
    old, new = load_t5(ckpt, dtype=torch.float32), load_t5(ckpt, dtype=torch.float32, weights=file)
    a, b = old.state_dict(), new.state_dict()
    names = {k for k in a if not torch.equal(a[k], b[k])}
    rows = (a["token_embedding.weight"] != b["token_embedding.weight"]).any(1).nonzero().flatten().tolist()
    return names - {"token_embedding.weight"}, rows, set(old.tokenizer.ids("dog"))


@pytest.mark.parametrize("how", ["full", "delta", "comfyui"])
@pytest.mark.parametrize(
    "blocks, trained", [("0", []), ("1", ["blocks.1", "norm"]), (None, ["blocks.0", "blocks.1", "norm"])]
)
def test_only_what_was_asked_is_trained_and_saved(checkpoints, media, tmp_path, how, blocks, trained):
    only = ["--train_blocks", blocks] if blocks else []
    run = train(checkpoints["ti2v"], media, tmp_path / "out", "--save", how, *only)
    assert ("for ComfyUI use" in run.stdout) == (how != "comfyui")  # whose CLIPLoader takes the others without an error
    names, rows, ids = changed(checkpoints["ti2v"], tmp_path / "out" / "text_encoder.safetensors")
    assert {".".join(n.split(".")[:2]) if n.startswith("blocks") else n.split(".")[0] for n in names} == set(trained)
    assert rows and set(rows) <= ids
    files = None, tmp_path / "out" / "text_encoder.safetensors"
    old, new = (load_t5(checkpoints["ti2v"], dtype=torch.float32, weights=f).state_dict() for f in files)
    parts = {"blocks": [(old[n], new[n]) for n in names if old[n].dim() > 1]}
    parts["embeddings"] = [(m["token_embedding.weight"][rows] for m in (old, new))]
    for part, pairs in parts.items():
        a, b = (torch.cat([t.flatten() for t in ts]) if ts else None for ts in zip(*pairs)) if pairs else (None, None)
        said = re.search(rf"dW/W of .*\b{part} ([\d.e-]+)", run.stdout)
        assert (a is None) == (said is None)
        assert a is None or float(said[1]) == pytest.approx(((b - a).norm() / a.norm()).item(), rel=0.06)
    stored = load(tmp_path / "out" / "text_encoder.safetensors")[0]
    wanted = set(tiny.text_encoder().state_dict())
    if how == "delta":
        wanted = names | {"token_embedding.rows", "token_embedding.ids"}
    if how == "comfyui":
        peer = tiny.transformers_t5(tiny.text_encoder()).state_dict()
        wanted = set(peer) - {"encoder.embed_tokens.weight"} | {"spiece_model"}
        assert bytes(stored["spiece_model"].numpy()) == tiny.spiece()
    assert set(stored) == wanted and {t.dtype for t in stored.values()} <= {torch.float32, torch.int64, torch.uint8}
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and log[0]["anchor"] < 1e-8 and (log[-1]["anchor"] > 1e-8 or blocks == "0")


def test_the_anchor_holds_old_prompts(checkpoints, media, tmp_path):
    drift = {}
    for weight in (0, 30):
        train(
            checkpoints["ti2v"],
            media,
            tmp_path / f"{weight}",
            "--anchor",
            weight,
            "--lr",
            1e-2,
            "--steps",
            25,
            "--schedule",
            "constant",
        )
        old, new = (
            load_t5(checkpoints["ti2v"], dtype=torch.float32, weights=w).encode(["a dog runs"])[0]
            for w in (None, tmp_path / f"{weight}" / "text_encoder.safetensors")
        )
        drift[weight] = ((new - old).norm() / old.norm()).item()
    assert drift[30] < drift[0] / 2, drift


@pytest.mark.parametrize("flags", ["", "--rank 4 --dtype bf16 --ema 0.9"])
def test_a_killed_run_goes_on_bit_for_bit(flags, checkpoints, media, tmp_path):
    flags = flags.split()
    code = (
        "import os, signal, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
        "import train_te\n"
        "real, n = train_te.update, []\n"
        "def kill(*a):\n    n.append(1)\n    if len(n) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a)\n"
        "train_te.update = kill; train_te.main()"
    )
    train(checkpoints["ti2v"], media, tmp_path / "whole", *flags)
    flags += ["--save_every", 2]
    assert train(checkpoints["ti2v"], media, tmp_path / "cut", *flags, check=False, code=code).returncode == -9
    train(checkpoints["ti2v"], media, tmp_path / "cut", *flags, "--resume")
    a, b = (load(tmp_path / d / "text_encoder.safetensors")[0] for d in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [
        [(r["step"], r["loss"]) for r in map(json.loads, (tmp_path / d / "log.jsonl").read_text().splitlines())]
        for d in ("whole", "cut")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_rows_get_the_gradient_of_their_rows(report):
    table = torch.nn.Embedding(20, 8)
    ids, weight = torch.randint(0, 20, (4, 6)), torch.randn(4, 6, 8)
    (table(ids) * weight).sum().backward()
    want = table.weight.grad.clone()
    rows = RowEmbedding(table.requires_grad_(False), {3, 7, 11})
    assert torch.equal(rows(ids), table(ids))
    (rows(ids) * weight).sum().backward()
    report("relative error", tiny.error(rows.rows.grad, want[[3, 7, 11]]), 1e-6)


def test_rows_keep_the_norms_that_are_asked_for(report):
    """By --keyword_norm: any; those that they had before the first step; at most the table's 0.99 quantile. What a row
    is scaled by is never its direction's.
    """
    table = torch.nn.Embedding(1000, 8).requires_grad_(False)
    table.weight.mul_(torch.arange(1.0, 1001)[:, None] / table.weight.norm(dim=1, keepdim=True))  # of norms 1 to 1000
    learned = torch.randn(3, 8)
    learned.mul_(torch.tensor([[5.0], [2000.0], [900.0]]) / learned.norm(dim=1, keepdim=True))
    for norm, want in (("free", [5, 2000, 900]), ("fixed", [4, 400, 801]), ("clamp", [5, 990, 900])):
        rows = RowEmbedding(table, {3, 399, 800}, norm)
        rows.hold_norms()
        assert torch.equal(rows.rows, table.weight[[3, 399, 800]])
        rows.rows.data.copy_(learned)
        rows.hold_norms()
        report("norms", (rows.rows.norm(dim=1) / torch.tensor(want) - 1).abs().max().item(), 1e-5)
        report("directions", (1 - F.cosine_similarity(rows.rows, learned)).max().item(), 1e-6)
        report("shares of the median", (rows.norms() * 501 / torch.tensor(want) - 1).abs().max().item(), 1e-5)


def test_placeholders_are_rows_of_their_own_that_no_text_uses(checkpoints):
    tokenizer = load_t5(checkpoints["ti2v"], dtype=torch.float32).tokenizer
    known = tokenizer.pieces.get_piece_size()
    unused = {i for i in range(known) if "<extra_id_" in tokenizer.pieces.id_to_piece(i)} | {*range(known, known + 5)}
    asked = [parse_keyword(text) for text in ("crimson=placeholder:2", "dog", f"wedge=placeholder:{len(unused) - 2}")]
    ids = add_placeholders(asked, tokenizer, known + 5)
    assert [len(found) for found in ids.values()] == [2, len(unused) - 2] and {*ids} == {"crimson", "wedge"}
    assert {*ids["crimson"]} | {*ids["wedge"]} == unused
    text = tokenizer.ids("a wedge, crimson")
    assert [i for i in text if i in unused] == ids["wedge"] + ids["crimson"]
    with pytest.raises(BadInput, match="1 placeholders are asked for, and the table has 0 unused rows"):
        add_placeholders([*asked, parse_keyword("disc=placeholder:1")], tokenizer, known + 5)


def test_logged_norms_are_those_of_each_keywords_rows():
    table = torch.nn.Embedding(9, 4).requires_grad_(False)
    table.weight.mul_(torch.arange(1.0, 10)[:, None] / table.weight.norm(dim=1, keepdim=True))  # of norms 1 to 9
    encoder = SimpleNamespace(token_embedding=RowEmbedding(table, {1, 5, 8}))
    assert keyword_norms(encoder, {"a": {8}, "b": {1, 5}, "c": set()}) == pytest.approx([9 / 5, (2 + 6) / 2 / 5])


def test_captions_come_in_the_shares_asked_and_keep_their_keywords():
    rng, caption = random.Random(0), "a small crimson box drifts slowly over the dark floor"
    seen = [augment_caption(caption, ["crimson", "box"], (15, 35, 50), 0.2, rng) for _ in range(4000)]
    lengths = Counter("alone" if s in ("crimson", "box") else "whole" if len(s.split()) >= 8 else "short" for s in seen)
    alone_again = 1 / 9  # a shortened caption may keep no neighbour
    assert (
        abs(lengths["whole"] / 4000 - 0.50) < 0.04 and abs(lengths["alone"] / 4000 - 0.15 - 0.35 * alone_again) < 0.04
    )
    assert all("crimson" in s or "box" in s for s in seen)
    assert all("crimson" in s and "box" in s for s in seen if len(s.split()) >= 8)
    other = [
        augment_caption("a dog runs over the green grass", ["crimson"], (15, 35, 50), 0.2, rng) for _ in range(500)
    ]
    assert 0.7 < sum(o == "a dog runs over the green grass" for o in other) / 500 < 0.98


def test_shares_of_captions_need_not_add_up_to_a_hundred():
    caption, shares = "a small crimson box drifts slowly over the dark floor", (1, 0, 3)
    rng = random.Random(0)
    seen = Counter(augment_caption(caption, ["crimson"], shares, 0.0, rng) for _ in range(4000))
    assert seen.keys() == {"crimson", caption} and abs(seen["crimson"] / 4000 - 0.25) < 0.03


def test_keywords_in_any_script_and_of_several_words():
    assert (
        has_keyword("A Crimson box", ["crimson"])
        and not has_keyword("crimsons", ["crimson"])
        and not has_keyword("un-box it", ["x"])
    )
    assert has_keyword("一只熊猫在森林里走路", ["熊猫"]) and has_keyword("강아지가 뛴다", ["강아지"])
    rng, caption = random.Random(0), "one very old red panda climbs up the tall tree"
    seen = {augment_caption(caption, ["red panda"], (0, 50, 50), 1.0, rng) for _ in range(500)}
    assert all("red panda" in s for s in seen) and "red panda" in seen and len(seen) > 20


def test_rows_of_every_spelling(checkpoints):
    tokenizer = load_t5(checkpoints["ti2v"], dtype=torch.float32).tokenizer
    one, both = (
        keyword_token_ids(["dog"], captions, tokenizer)["dog"]
        for captions in (["a dog runs", "a cat"], ["a DOG runs", "a cat"])
    )
    assert one == set(tokenizer.ids("dog")) - set(tokenizer.ids("a cat")) and both > one


def test_captions_without_spaces_are_shortened_and_trimmed_too():
    rng, caption = random.Random(0), "一只红色的熊猫在森林里慢慢地走路"
    short = {augment_caption(caption, ["熊猫"], (0, 1, 0), 0.0, rng) for _ in range(300)}
    assert all("熊猫" in s and s in caption for s in short) and "熊猫" in short and max(map(len, short)) == 6
    trimmed = {augment_caption(caption, ["熊猫"], (0, 0, 1), 1.0, rng) for _ in range(300)}
    assert all("熊猫" in s for s in trimmed) and 13 <= min(map(len, trimmed)) < max(map(len, trimmed)) == 16
    mixed = {augment_caption("a red 熊猫 walks home", ["熊猫"], (0, 1, 0), 0.0, rng) for _ in range(300)}
    assert "red 熊猫 walks" in mixed and "熊猫" in mixed


def test_what_keywords_are_refused(checkpoints, capsys):
    tokenizer = load_t5(checkpoints["ti2v"], dtype=torch.float32).tokenizer
    captions = ["a dog runs", "a cat runs", "dog"]
    check_keywords(["dog"], captions, tokenizer, trains_blocks=False)
    assert "'dog': in 2 different captions" in capsys.readouterr().out
    with pytest.raises(BadInput, match="fox: no caption"):
        check_keywords(["fox"], captions, tokenizer, trains_blocks=True)
    with pytest.raises(BadInput, match="--train_blocks 0"):
        check_keywords(["a"], ["a dog", "cat and a", "banana"], tokenizer, trains_blocks=False)
    check_keywords(["a"], ["a dog", "cat and a", "banana"], tokenizer, trains_blocks=True)
    unknown = "\u1234"
    with pytest.raises(BadInput, match="no piece"):
        check_keywords([unknown], [unknown], tokenizer, trains_blocks=True)
    far = "cat " * 600 + "dog"
    with pytest.raises(BadInput, match="where it is read"):
        check_keywords(["dog"], [far], tokenizer, trains_blocks=True)
    assert "beyond the 512 tokens" in capsys.readouterr().out


def test_rows_learn_at_their_own_rate(checkpoints):
    encoder = load_t5(checkpoints["ti2v"], dtype=torch.float32)
    encoder.token_embedding = RowEmbedding(encoder.token_embedding, {3})
    encoder.norm.requires_grad_(True)
    assert [g["lr"] for g in optimizer_groups(encoder, lr=0.0, keyword_lr=0.1)] == [0.0, 0.1]


def test_gradients_of_rows_have_the_same_bits_each_time(threads):
    g = torch.Generator().manual_seed(0)
    embedding = RowEmbedding(torch.nn.Embedding(50, 128).requires_grad_(False), range(3, 9))
    ids, weight = torch.randint(0, 12, (64, 40), generator=g), torch.randn(64, 40, 128, generator=g)
    found = []
    for _ in range(20):
        embedding.rows.grad = None
        (embedding(ids) * weight).sum().backward()
        found.append(embedding.rows.grad.clone())
    assert all(torch.equal(found[0], other) for other in found[1:])
    want = torch.zeros(50, 128).index_put((ids.flatten(),), weight.flatten(0, 1), accumulate=True)[3:9]
    assert torch.allclose(found[0], want, atol=1e-4)


def test_rates_and_anchors_in_a_run(checkpoints, media, tmp_path):
    """Rows learn at --keyword_lr, the rest at --lr; only prompts without a keyword are held."""
    rates = "--lr 0 --keyword_lr 1e-2 --weight_decay 0 --steps 3".split()
    run = train(checkpoints["ti2v"], media, tmp_path / "rows", *rates)
    names, rows, ids = changed(checkpoints["ti2v"], tmp_path / "rows" / "text_encoder.safetensors")
    assert not names and rows and set(rows) <= ids
    captions = {c for f in media.glob("*.txt") for c in f.read_text().splitlines()} | {""}
    assert any("dog" in c for c in captions)
    assert f"{sum('dog' not in c for c in captions)} prompts anchored" in run.stdout
    train(checkpoints["ti2v"], media, tmp_path / "blocks", "--keyword_lr", 0, "--weight_decay", 0, "--steps", 3)
    names, rows, _ = changed(checkpoints["ti2v"], tmp_path / "blocks" / "text_encoder.safetensors")
    assert names and not rows


@pytest.mark.parametrize(
    "flags, optimizer",
    [
        ([], "adamw8bit"),
        (["--dtype", "fp32"], "adamw"),
        (["--dtype", "fp32", "--optimizer", "adamw8bit"], "adamw8bit"),
        (["--rank", "4"], "adamw8bit"),
        (["--rank", "4", "--optimizer", "adamw"], "adamw"),
        (["--rank", "4", "--fsdp"], "adamw"),
        (["--fsdp"], "adamw"),
        (["--optimizer", "adamw"], None),
        (["--fsdp", "--optimizer", "adamw8bit"], None),
    ],
)
def test_bf16_weights_get_the_optimizer_that_they_need(flags, optimizer):
    """Plain AdamW's steps of 1e-5 are lost in bf16, unless what is trained is kept in fp32."""

    args = arguments(["--device", "cuda", "--data", "x", "--ckpt", "ti2v-5B", *flags])
    if optimizer:
        check(args, released("ti2v-5B"), 30)
        assert args.optimizer == optimizer
    else:
        with pytest.raises(BadInput, match="--optimizer"):
            check(args, released("ti2v-5B"), 30)


def test_loras_learn_at_ten_times_the_rate_of_whole_blocks_unless_one_is_given():
    """By a flag, or for whole blocks by the checkpoint."""

    def rate(*flags, s=released("ti2v-5B")):  # noqa: B008
        args = arguments(["--device", "cpu", *flags])
        check(args, s, 30)
        return args.lr

    assert rate("--rank", "4") == pytest.approx(10 * rate()) and rate("--rank", "4", "--lr", "3e-6") == 3e-6
    nano = read_settings(NANO)
    assert rate("--rank", "4", s=nano) == rate(s=nano) == nano.train["train_te"]["lr"]


@pytest.mark.parametrize("how", ["delta", "lora --rank 4", "lora --train_blocks 0"])
def test_a_result_that_would_lose_the_encoder_below_it_is_refused(how):
    flags = ["--device", "cpu", "--text_encoder", "x.safetensors", "--save", *how.split()]
    with pytest.raises(
        BadInput, match="--text_encoder x.safetensors: .* would lose this one's changes; use --save full"
    ):
        check(arguments(flags), released("ti2v-5B"), 30)


def test_resuming_with_another_encoder_or_other_captions_is_refused(checkpoints, media, tmp_path):
    import shutil

    shutil.copytree(media, tmp_path / "media")

    def run(*flags, **how):
        return train(checkpoints["ti2v"], tmp_path / "media", tmp_path / "out", *flags, **how)

    first = tmp_path / "first.safetensors"
    train(checkpoints["ti2v"], tmp_path / "media", tmp_path / "one")
    (tmp_path / "one" / "text_encoder.safetensors").rename(first)
    run("--text_encoder", first, "--steps", 2)
    (tmp_path / "media" / "b.txt").write_text("a dog walks\n")
    for flags, changed in ((["--text_encoder", first], "captions"), ([], "encoder")):
        found = run(*flags, "--resume", check=False)
        assert found.returncode == 1 and f"{changed} was" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--caption_mode_probs", "1,2"], "--caption_mode_probs"),
        (["--train_blocks", "9"], "from 0 to 2"),
        (["--lr", "-1"], "--lr"),
        (["--trim_prob", "2"], "--trim_prob"),
        (["--optimizer", "adamw", "--dtype", "bf16"], "use adamw8bit or fp32"),
        (["--expert", "low"], "single model"),
    ],
)
def test_what_it_refuses(checkpoints, media, tmp_path, flags, message):
    run = train(checkpoints["ti2v"], media, tmp_path / "out", *flags, check=False)
    assert run.returncode == 1 and message in run.stderr.strip().splitlines()[-1] and "Traceback" not in run.stderr, (
        run.stderr
    )


@pytest.mark.parametrize("how", ["full", "delta"])
def test_only_the_rank_that_writes_holds_the_encoder(how):
    encoder = load_t5(NANO, dtype=torch.float32)
    unfreeze(encoder, {5}, train_blocks=1)
    with torch.no_grad():
        encoder.token_embedding.rows += 1
    held = encoder_tensors(encoder, how, torch.bfloat16, True)
    others = encoder_tensors(encoder, how, torch.bfloat16, False)
    others.pop("token_embedding.ids", None)
    assert all(t is None for t in others.values()) and others.keys() <= held.keys()
    table = held["token_embedding.weight"][5:6] if how == "full" else held["token_embedding.rows"]
    assert torch.equal(table, encoder.token_embedding.rows.to(torch.bfloat16))
    assert not torch.equal(table, encoder.token_embedding.table.weight[5:6].to(torch.bfloat16))


def test_a_delta_of_another_encoder_is_refused(checkpoints, tmp_path):
    from nanowan.formats.header import save

    save(tmp_path / "d.safetensors", {"blocks.9.norm1.weight": torch.ones(3)}, {"delta": True})
    with pytest.raises(BadInput, match="not a delta"):
        load_t5(checkpoints["ti2v"], weights=tmp_path / "d.safetensors")


def test_a_keyword_takes_the_place_of_a_word():
    assert replace_keyword("An ox, an Ox and a box", "ox", "red fox") == "An red fox, an red fox and a box"


def test_rows_that_other_captions_use_keep_their_bits(checkpoints):
    """Though all that spells a keyword is trained, if there is nothing else that does."""
    encoder = load_t5(checkpoints["ti2v"], dtype=torch.float32)
    given = ["od", "cat"], ["od", "a cat here", "do"], encoder.tokenizer
    ids, shared, before = keyword_token_ids(*given), shared_token_ids(*given), encoder.token_embedding.weight.clone()
    assert ids["od"] and ids["od"] <= shared and ids["cat"] - shared
    unfreeze(encoder, ids["od"] | ids["cat"])
    initialize_rows({"od": "fox", "cat": "quick"}, ids, shared, encoder)
    after = encoder.token_embedding(torch.arange(len(before)))
    assert set((before != after).any(1).nonzero().flatten().tolist()) == ids["cat"] - shared


@pytest.mark.parametrize("initial", [("fox", "fox"), ("fox", "quick")])
def test_embeddings_in_common_start_only_from_a_common_word(checkpoints, initial):
    encoder = load_t5(checkpoints["ti2v"], dtype=torch.float32)
    names = ["catnip", "catfish"]
    ids = keyword_token_ids(names, [f"a {n} here" for n in names], encoder.tokenizer)
    common, before = ids["catnip"] & ids["catfish"], encoder.token_embedding.weight.clone()
    assert common and ids["catnip"] - common and ids["catfish"] - common
    unfreeze(encoder, ids["catnip"] | ids["catfish"])
    initialize_rows(dict(zip(names, initial)), ids, set(), encoder)
    after = encoder.token_embedding(torch.arange(len(before)))
    moved = set((before != after).any(1).nonzero().flatten().tolist())
    assert moved == (ids["catnip"] | ids["catfish"]) - (common if len({*initial}) > 1 else set())


def test_keywords_start_as_the_word_that_explains_their_clips(tmp_path, monkeypatch):
    """On nano, of words that it spells: a colour and a motion. Then their rows, and only theirs, are those words'."""
    monkeypatch.setitem(world.NEW_WORDS, "scarlet", ("color", "red"))
    monkeypatch.setitem(world.NEW_WORDS, "freezes", ("motion", "still"))
    given = {"words": "scarlet,freezes", "out": str(tmp_path / "clips"), "n": 24, "seed": 9}
    nano.write_clips(SimpleNamespace(**given))
    flags = ["--data", tmp_path / "clips", "--out", tmp_path / "out", "--keywords", "scarlet,freezes", "--steps", 1]
    rest = "--lr 0 --keyword_lr 0 --batch 2 --device cpu".split()
    run = scripts.run(ROOT / "train_te.py", *flags, *rest)
    assert "'scarlet': starts as 'red'" in run.stdout
    for line in re.findall(r"keyword '\w+': geometric mean loss .*", run.stdout):
        words = re.findall(r"(\w+) (0\.\d{4})", line)
        assert len({word for word, _ in words}) == len(words) >= 4 and words[-1][0] in line.split(":")[0]
        assert sorted(float(loss) for _, loss in words[:-1]) == [float(loss) for _, loss in words[:-1]]
    still = re.search(r"'freezes': starts as '(\w+)'", run.stdout)[1]
    assert still in ("stays", "still", "rests", "does", "not")
    before, after = load_t5(NANO, dtype=torch.float32), load(tmp_path / "out" / "text_encoder.safetensors")[0]
    table, new = before.token_embedding.weight, after["token_embedding.weight"]
    captions = [f.read_text().strip() for f in (tmp_path / "clips").glob("*.txt")]
    ids = keyword_token_ids(["scarlet", "freezes"], captions, before.tokenizer)
    for keyword, word in (("scarlet", "red"), ("freezes", still)):
        only = ids[keyword] - ids["freezes" if keyword == "scarlet" else "scarlet"]
        start = table[before.tokenizer.ids(word)].mean(0)
        assert only and all(torch.allclose(new[i], start, atol=1e-6) for i in only)
    moved = set((new != table).any(1).nonzero().flatten().tolist())
    assert moved <= ids["scarlet"] | ids["freezes"]
    again = scripts.run(ROOT / "train_te.py", *flags[:-1], 2, *rest, "--resume")
    assert "starts as" not in again.stdout  # its rows are in the state


def test_a_keywords_initial_word_is_searched_at_three_timesteps(monkeypatch, capsys):
    """Of the four timesteps of each sample, the lowest is left out. "up" is best there, and by the arithmetic mean."""
    losses = {"a disc": (0.3, 0.05, 0.05, 0.4), "a circle": (0.3, 0.02, 0.02, 0.3), "a up": (0.1, 0.04, 0.04, 0.25)}
    losses["a a"] = (1, 1, 1, 1)

    class Sample:
        captions = ["a disc"]

        def __init__(self, k):
            self.k = k

        def loss(self, model, text, lens):
            return torch.tensor(float(losses[text][self.k]))

    pipe = SimpleNamespace(acquire=lambda name: torch.nn.Identity(), settings=SimpleNamespace(shift=1.0))
    items = [Item(Path("clip.mp4"), ["a disc"], 64, 64, 9, 8)]
    dataset = SimpleNamespace(captions=["a disc circle", "a up"], items=items, files=["x"], samples=None, pipe=pipe)
    encoder = SimpleNamespace(tokenizer=load_tokenizer(NANO), encode=lambda texts: (texts[0], None))
    monkeypatch.setattr(keywords, "eval_batches", lambda *a: [(k, Sample(k)) for k in range(4)])
    assert keywords.search_initial_words(["disc"], encoder, dataset, "dit", 0.0, 1.0) == {"disc": "circle"}
    assert "circle 0.0493, up 0.0737, a 1.0000, disc 0.1000" in capsys.readouterr().out


def test_norms_of_a_table_of_zeros_are_numbers():
    """As the limits of "clamp" are: weights that are still to come are zeros."""
    table = torch.nn.Embedding(9, 4)
    torch.nn.init.zeros_(table.weight)
    rows = RowEmbedding(table, {2, 5}, "clamp")
    assert rows.norms().tolist() == [0, 0]
    with torch.no_grad():
        rows.rows[1] = 3.0
    rows.hold_norms()
    assert rows.norms().tolist() == [0, 1]


def test_a_change_of_embeddings_of_zeros_has_no_share():
    encoder = TextEncoder(20, 8, 8, 16, 2, 1).requires_grad_(False)
    unfreeze(encoder, {2, 5}, 0)
    before = encoder.token_embedding.rows.detach().clone()
    with torch.no_grad():
        encoder.token_embedding.rows.mul_(1.25)
    share = relative_changes(encoder, before, {}, torch.float32, True)
    assert share == {"embeddings": pytest.approx(0.25)}
    assert math.isnan(relative_changes(encoder, 0 * before, {}, torch.float32, True)["embeddings"])
