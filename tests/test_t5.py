"""The text encoder against transformers' UMT5EncoderModel, the tokenizer against transformers' T5 tokenizer."""

import random

import pytest
import tiny
import torch

from checkpoint import BadInput
from t5 import Tokenizer, load_t5


@pytest.mark.parametrize("lens", [(1, 2), (40, 7), (130, 300), (512, 511)])
def test_equals_transformers(lens, report):
    model = tiny.text_encoder()
    peer = tiny.transformers_t5(model)
    lens = torch.tensor(lens)
    ids = torch.randint(3, 180, (2, int(lens.max())))
    mask = torch.arange(ids.shape[1]) < lens[:, None]
    ids = ids * mask
    with torch.no_grad():
        want = peer(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        got = model(ids, lens)
    report("relative error", tiny.error(got, want), 2e-5)


def test_longest_prompt_length_is_enough(report):
    """Padding to 512, as the official code does, gives the same embeddings."""
    model = tiny.text_encoder()
    ids, lens = torch.randint(3, 180, (2, 9)), torch.tensor([9, 4])
    ids[1, 4:] = 0
    with torch.no_grad():
        short, full = model(ids, lens), model(torch.nn.functional.pad(ids, (0, 503)), lens)
    report("relative error", tiny.error(short, full[:, :9]), 2e-6)
    assert full[:, 9:].abs().max() == 0 and full[1, 4:].abs().max() == 0


def test_gradients_equal_transformers(report):
    model = tiny.text_encoder().requires_grad_(True)
    peer = tiny.transformers_t5(model).requires_grad_(True)
    ids, lens = torch.randint(3, 180, (2, 9)), torch.tensor([9, 9])
    weight = torch.sin(torch.arange(2 * 9 * tiny.TEXT_DIM)).view(2, 9, -1)
    (model(ids, lens) * weight).sum().backward()
    (peer(ids, attention_mask=torch.ones_like(ids)).last_hidden_state * weight).sum().backward()
    report("embedding gradient", tiny.error(model.token_embedding.weight.grad, peer.shared.weight.grad), 1e-4)
    theirs = peer.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
    report("position gradient", tiny.error(model.blocks[0].pos_embedding.embedding.weight.grad, theirs), 1e-4)


def test_gradient_through_the_dit_reaches_the_encoder():
    encoder, dit = tiny.text_encoder().requires_grad_(True), tiny.dit("t2v")
    emb = encoder(torch.randint(3, 180, (2, 6)), torch.tensor([6, 3]))
    dit(torch.randn(2, 16, 1, 4, 4), torch.tensor([500.0, 20.0]), emb, torch.tensor([6, 3])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.blocks.parameters())
    assert all(p.grad is None for p in dit.parameters())


def test_full_size_counts():
    from t5 import TextEncoder

    with torch.device("meta"):
        state = TextEncoder(256384, 4096, 4096, 10240, 64, 24).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (5_680_910_336, 242)


def strings():
    rng = random.Random(0)
    words = [
        "cat",
        "Square",
        "moves",
        "naïve",
        "café",
        "一只猫",
        "在草地上",
        "奔跑",
        "色调艳丽，",
        "🐱",
        "👩‍🚀",
        "&amp;",
        "&lt;b&gt;",
        "&amp;amp;",
        "\t",
        "\n\n",
        "\u00a0",
        "\u3000",
        "ﬁne",
        "ﾊﾛｰ",
        "½",
        "é",
        "Ω",
        "don't",
        "—",
        "“quoted”",
        "100%",
        "_",
        "<",
        ">",
        "#",
        "...",
        "</s>",
        "<pad>",
        "a" * 40,
        "Привет",
        "مرحبا",
        "x²",
    ]
    made = [
        "",
        " ",
        "a",
        "🐱",
        "a red square moves left",
        "word " * 600,
        "一" * 600,
        " leading and trailing  ",
        "schÃ¶n",
        "&nbsp;",
        "a </s> cat",
        "<pad>",
        "x<unk>y </s></s>",
        "&lt;/s&gt; end",
        "<extra_id_0>",
    ]
    return made + [
        rng.choice(["", " "]).join(rng.choice(words) + rng.choice(["", " ", "  "]) for _ in range(rng.randint(1, 30)))
        for _ in range(520)
    ]


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_tokens_equal_transformers(tmp_path, byte_fallback):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(tiny.spiece(byte_fallback))
    ours = Tokenizer(tmp_path / "spiece.model")
    peer = T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    texts = strings()
    assert len(texts) >= 500
    wrong = []
    for text in texts:
        ids, lens = ours([text])
        want = peer(Tokenizer.clean(text), truncation=True, max_length=512)["input_ids"]
        if ids[0].tolist() != want:
            wrong.append((text, ids[0].tolist()[:20], want[:20]))
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]}"


def test_a_long_prompt_keeps_its_end_token(tmp_path):
    (tmp_path / "spiece.model").write_bytes(tiny.spiece())
    ids, lens = Tokenizer(tmp_path / "spiece.model")(["word " * 600, "cat"])
    assert (
        ids.shape[1] == 512 == lens[0] and ids[0, -1] == 1 and ids[1, lens[1] - 1] == 1 and ids[1, lens[1] :].sum() == 0
    )


def test_missing_tokenizer_is_named(checkpoints, tmp_path):
    import shutil

    shutil.copytree(checkpoints["ti2v"], tmp_path / "c")
    (tmp_path / "c" / "google" / "umt5-xxl" / "spiece.model").unlink()
    with pytest.raises(BadInput, match="spiece.model: no such file"):
        load_t5(tmp_path / "c")
