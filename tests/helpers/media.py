"""Media files: made, and read back with PyAV alone."""

import av
import numpy as np


def read_sound(path):
    """(the first sample's time in seconds, samples (N,) of a file's sound, mono at 48 kHz)."""
    resampler, pieces, start = av.AudioResampler("fltp", "mono", 48000), [], None
    with av.open(str(path)) as file:
        for frame in (*file.decode(audio=0), None):
            start = frame.time if start is None else start
            pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    return start, np.concatenate(pieces)
