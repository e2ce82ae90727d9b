"""What Wan 2.2's released models are, in numbers: a DiT's configuration, and a row of differences for each."""

from dataclasses import dataclass


@dataclass
class WanConfig:
    """The fields of the official config.json, and what it leaves out (text_dim, patch_size)."""

    model_type: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6


_A14B = dict(
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    out_dim=16,
    vae="2.1",
    fps=16,
    frames=81,
    steps=40,
    size=(1280, 720),
)
# model: the class, where it is not wan.Wan; signature: a tensor that only this model has; boundary: the high-noise
# expert serves t/1000 >= boundary; guidance: (low noise, high noise)
VARIANTS = {
    "ti2v-5B": dict(
        model_type="ti2v",
        dim=3072,
        ffn_dim=14336,
        num_heads=24,
        num_layers=30,
        in_dim=48,
        out_dim=48,
        vae="2.2",
        fps=24,
        frames=121,
        steps=50,
        size=(1280, 704),
        shift=5.0,
        boundary=None,
        guidance=(5.0, 5.0),
    ),
    "t2v-A14B": dict(_A14B, model_type="t2v", in_dim=16, shift=12.0, boundary=0.875, guidance=(3.0, 4.0)),
    "i2v-A14B": dict(_A14B, model_type="i2v", in_dim=36, shift=5.0, boundary=0.900, guidance=(3.5, 3.5)),
    "s2v-14B": dict(
        _A14B,
        model_type="s2v",
        model="s2v.WanS2V",
        signature="casual_audio_encoder.encoder.final_linear.weight",
        in_dim=16,
        frames=80,  # of one clip; of these, 4 to a latent frame
        size=(1024, 704),
        shift=3.0,
        boundary=None,
        guidance=(4.5, 4.5),
        negative="画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
        "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走",
    ),
    "animate-14B": dict(
        _A14B,
        model_type="animate",
        model="animate.WanAnimate",
        signature="pose_patch_embedding.weight",
        in_dim=36,
        fps=30,
        frames=77,
        steps=20,
        shift=5.0,
        boundary=None,
        guidance=(1.0, 1.0),
        prompt="视频中的人在做动作",
    ),
}
