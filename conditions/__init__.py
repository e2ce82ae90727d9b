"""What each variant's DiT is given beside noise, time and text, and how it is encoded: one class per kind of input.

A class says which inputs its model takes, which size of video follows from them, how they are encoded, and what of a
training clip is cached. The sampler, the trainers and the plans ask only these; a model with an input of its own adds a
class, in a file of this folder, and its name to CONDITIONING.
"""

from conditions.base import Conditions, Encoder, Samples, Sequence, TextOnly
from conditions.character import Character
from conditions.image import FirstFrame, ImageChannels, best_size
from conditions.speech import Speech

__all__ = [
    "CONDITIONING",
    "Character",
    "Conditions",
    "Encoder",
    "FirstFrame",
    "ImageChannels",
    "Samples",
    "Sequence",
    "Speech",
    "TextOnly",
    "best_size",
]

# by a variant's model_type
CONDITIONING = {
    "t2v": TextOnly(),
    "ti2v": FirstFrame(),
    "i2v": ImageChannels(),
    "s2v": Speech(),
    "animate": Character(),
}
