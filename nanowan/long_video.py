"""Keep the finished segments of a long video: in memory, or in files from which an interrupted run can be resumed."""

import math
import shutil
from pathlib import Path

import torch

from nanowan.errors import BadInput
from nanowan.formats.header import load, save
from nanowan.video import to_uint8, write_frames


class SegmentFiles:
    """The finished segments of one video, kept in a folder next to the video: NAME.clips for NAME.mp4. In this folder,
    clip_NNN.safetensors holds the latents and the frames (n,H,W,3) uint8 of segment NNN, counted from 000.
    after_NNN.safetensors holds what the next segment needs from the finished ones (Video.state in
    variants/conditioning.py); it is kept for the last finished segment only.
    """

    on_every_rank = False  # one rank saves the segments, in files that all ranks read

    def __init__(self, out, key, resume):
        """out: the video's file. key: a hash of everything that decides the video. resume: whether to keep the segments
        that are in the folder; otherwise they are deleted. Raises BadInput if the kept segments belong to another
        video.
        """
        self.out, self.folder, self.key = Path(out), Path(out).with_suffix(".clips"), key
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.file(0).exists() and load(self.file(0))[1].get("key") != self.key:
            raise BadInput(f"--resume: {self.folder} holds clips of a video with other settings; leave --resume out")

    @classmethod
    def open(cls, out, key, resume, world):
        """Return the SegmentFiles. Called on every rank. Without `resume`, rank 0 deletes the folder, and the other
        ranks wait until it has done so. world: the run's World.
        """
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
        save(self.state_file(r), state)  # saved before the segment's file, which marks the segment as done
        save(self.file(r), {"latents": latents, "frames": torch.from_numpy(to_uint8(frames))}, {"key": self.key})
        if r:
            self.state_file(r - 1).unlink(missing_ok=True)

    def state(self, r):
        return load(self.state_file(r))[0]

    def write_video(self, video, comment, save_latents=None):
        """Write the mp4 of all segments, with the Video's sound, and then delete the segments' folder. save_latents: a
        file for the segments' latents, which are named latents_0, latents_1, and so on.
        """
        frames = (load(self.file(r))[0]["frames"].numpy() for r in range(self.count()))
        write_frames(self.out, frames, video.fps, comment, sound=video.sound, sound_offset=video.sound_offset)
        if save_latents:
            tensors = {f"latents_{r}": load(self.file(r))[0]["latents"] for r in range(video.count)}
            save(save_latents, tensors, {"settings": comment})
        shutil.rmtree(self.folder, ignore_errors=True)


class SegmentsInMemory:
    """The finished segments of one video, kept in memory: the latents (C,T',h,w) and frames (3,n,H,W) of each."""

    on_every_rank = True

    def __init__(self):
        self.latents, self.frames = [], []

    def count(self):
        return len(self.latents)

    def save(self, r, latents, frames, state):
        self.latents.append(latents)
        self.frames.append(frames)


def check_disk(out, video, done=0):
    """Raise BadInput if the disk has too little room for the mp4 `out` of a Video and for the Video's remaining
    segments, which stay on the disk until the mp4 is written. done: number of segments that are finished.
    """
    (_, frames, _, _), (width, height) = video.shape, video.size
    pixels = 3 * 4 * frames * width * height  # values in a segment's frames, one byte each
    waiting, mp4 = pixels + 4 * math.prod(video.shape), pixels // 20  # the mp4's bytes are a rough upper limit
    states = 2 * sum(t.nbytes for t in video.state().values() if t is not None)
    need = (video.count - done) * waiting + video.count * mp4 + states
    parent = next(d for d in Path(out).absolute().parents if d.exists())
    if need > (free := shutil.disk_usage(parent).free):
        raise BadInput(
            f"--out {out}: {video.count} clips of {width}x{height} need {need / 1e9:.3g} GB until they are one video, "
            f"and {parent} has {free / 1e9:.3g} GB free; make it shorter or smaller (--size)"
        )
