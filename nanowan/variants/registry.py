"""The six Wan 2.2 models. VARIANTS has a row of settings for each, and PARTS a function that returns its classes.

To add a model, add a folder here, a row in VARIANTS and a function in PARTS.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from nanowan.formats.layouts import is_animate2
from nanowan.variants.conditioning import Conditioning
from nanowan.variants.examples import Examples
from nanowan.variants.image import FirstFrame, ImageChannels
from nanowan.variants.samples import FirstFrameSamples, ImageChannelsSamples, Samples
from wan import VARIANTS as TEXT_AND_IMAGE
from wan import Wan

# fmt: off
# A row may also have: signature, the name of a tensor that only this model's files have, or a function that recognises
# this model's files; negative and prompt, the default negative prompt and the default prompt.
_14B = TEXT_AND_IMAGE["t2v-A14B"] | dict(boundary=None)
VARIANTS = TEXT_AND_IMAGE | {
    "s2v-14B": dict(_14B, model_type="s2v", signature="casual_audio_encoder.encoder.final_linear.weight", frames=80,
                    size=(1024, 704), shift=3.0, guidance=(4.5, 4.5), negative=(
                        "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
                        "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")),
    "animate-14B": dict(_14B, model_type="animate", signature="pose_patch_embedding.weight", in_dim=36, fps=30,
                        frames=77, steps=20, shift=5.0, guidance=(1.0, 1.0), prompt="视频中的人在做动作"),
    "animate2-14B": dict(_14B, model_type="animate2", signature=is_animate2, in_dim=36, fps=24, size=(720, 1280),
                         shift=5.0, solver="dpm++", guidance=(3.0, 3.0), prompt="视频中的人在做动作， 背景静止",
                         negative=(
                             "过曝，静态，细节模糊不清，字幕，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
                             "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，三条腿")),
}
# fmt: on


class Parts(NamedTuple):
    """The code for one model_type. model: the DiT's class. conditioning: the Conditioning, for sampling. samples: the
    subclass of Samples, for training. examples: the Examples, for the memory estimate. read_config: the function that
    makes the variant's configuration from a WanConfig and the files (see read_config in s2v/model.py), or None if
    WanConfig is enough. recommend: a function that takes a configuration and returns {field of Settings: value}, where
    the values replace those in VARIANTS; or None.
    """

    model: type
    conditioning: Conditioning
    samples: type
    examples: Examples
    read_config: Callable | None = None
    recommend: Callable | None = None


def _s2v():
    from nanowan.variants.s2v.conditioning import Speech, SpeechExamples
    from nanowan.variants.s2v.model import WanS2V, read_config
    from nanowan.variants.s2v.samples import SpeechSamples

    return Parts(WanS2V, Speech(), SpeechSamples, SpeechExamples(), read_config)


def _animate():
    from nanowan.variants.animate.conditioning import Character, CharacterExamples
    from nanowan.variants.animate.model import WanAnimate, read_config
    from nanowan.variants.animate.samples import CharacterSamples

    return Parts(WanAnimate, Character(), CharacterSamples, CharacterExamples(), read_config)


def _animate2():
    from nanowan.variants.animate2.conditioning import Driven, DrivenExamples
    from nanowan.variants.animate2.model import WanAnimate2, read_config, recommend
    from nanowan.variants.animate2.samples import DrivenSamples

    return Parts(WanAnimate2, Driven(), DrivenSamples, DrivenExamples(), read_config, recommend)


PARTS = {
    "t2v": lambda: Parts(Wan, Conditioning(), Samples, Examples()),
    "ti2v": lambda: Parts(Wan, FirstFrame(), FirstFrameSamples, Examples()),
    "i2v": lambda: Parts(Wan, ImageChannels(), ImageChannelsSamples, Examples()),
    "s2v": _s2v,
    "animate": _animate,
    "animate2": _animate2,
}


@functools.cache
def parts_of(model_type):
    """Return the Parts for a model_type, which is the name that config.json gives."""
    return PARTS[model_type]()
