"""The segments of a video while it is made: in memory, or in files, so that a video that was stopped can be continued."""

import math
import shutil
from pathlib import Path

import torch

from nanowan.errors import BadInput
from nanowan.formats.header import load, save
from nanowan.video import to_uint8, write_frames


class SegmentFiles:
    """The finished segments of one video, each in a file of a folder beside it: OUT.clips/clip_000.safetensors holds
    its latents and its frames (n,H,W,3) uint8; after_000.safetensors, of the last one, the Video's state.
    """

    on_every_rank = False  # one rank keeps them, in files that all read

    def __init__(self, out, key, resume):
        """key: a hash of all that decides the video. Raises BadInput if the folder is another video's."""
        self.out, self.folder, self.key = Path(out), Path(out).with_suffix(".clips"), key
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.file(0).exists() and load(self.file(0))[1].get("key") != self.key:
            raise BadInput(f"--resume: {self.folder} holds clips of a video with other settings; leave --resume out")

    @classmethod
    def open(cls, out, key, resume, world):
        """The same on every rank: the first one clears the folder before the others look at it."""
        if world.is_main:
            segments = cls(out, key, resume)
        world.barrier()
        return segments if world.is_main else cls(out, key, resume=True)

    def file(self, r):
        return self.folder / f"clip_{r:03d}.safetensors"

    def state_file(self, r):
        return self.folder / f"after_{r:03d}.safetensors"

    def count(self):
        r = 0
        while self.file(r).exists():
            r += 1
        return r

    def save(self, r, latents, frames, state):
        save(self.state_file(r), state)  # before the segment, which counts as done once it is there
        save(self.file(r), {"latents": latents, "frames": torch.from_numpy(to_uint8(frames))}, {"key": self.key})
        if r:
            self.state_file(r - 1).unlink(missing_ok=True)

    def state(self, r):
        return load(self.state_file(r))[0]

    def write_video(self, video, comment, save_latents=None):
        """The mp4 of all segments, with the Video's sound; save_latents: a file for their latents_0, latents_1, ..."""
        frames = (load(self.file(r))[0]["frames"].numpy() for r in range(self.count()))
        write_frames(self.out, frames, video.fps, comment, sound=video.sound, sound_offset=video.sound_offset)
        if save_latents:
            tensors = {f"latents_{r}": load(self.file(r))[0]["latents"] for r in range(video.count)}
            save(save_latents, tensors, {"settings": comment})
        shutil.rmtree(self.folder, ignore_errors=True)


class SegmentsInMemory:
    """The finished segments of one video: latents (C,T',h,w) and frames (3,n,H,W) of each."""

    on_every_rank = True

    def __init__(self):
        self.latents, self.frames = [], []

    def count(self):
        return len(self.latents)

    def save(self, r, latents, frames, state):
        self.latents.append(latents)
        self.frames.append(frames)


def check_disk(out, video, done=0):
    """Raise BadInput if the disk of `out` has no room for the segments of a Video that are not done, which all wait
    there for the last one, and for the mp4.
    """
    (_, frames, _, _), (width, height) = video.shape, video.size
    pixels = 3 * 4 * frames * width * height  # of a segment, one byte each
    waiting, mp4 = pixels + 4 * math.prod(video.shape), pixels // 20  # the latter at most, about
    states = 2 * sum(t.nbytes for t in video.state().values() if t is not None)
    need = (video.count - done) * waiting + video.count * mp4 + states
    parent = next(d for d in Path(out).absolute().parents if d.exists())
    if need > (free := shutil.disk_usage(parent).free):
        raise BadInput(
            f"--out {out}: {video.count} clips of {width}x{height} need {need / 1e9:.3g} GB until they are one video, "
            f"and {parent} has {free / 1e9:.3g} GB free; make it shorter or smaller (--size)"
        )
