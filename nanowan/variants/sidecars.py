"""Sidecars: files next to a training clip NAME.mp4 that belong to it, such as NAME.wav and NAME.pose.mp4."""

from nanowan.cache import cached_probe, digest
from nanowan.errors import Skip
from nanowan.variants.samples import Samples
from nanowan.video import CLIPS, IMAGES

MAX_DIFFERENCE = 0.1  # seconds that a sidecar may be longer or shorter than its clip
# largest quotient of the aspect ratios of clip and sidecar; preprocessing rounds the sides to multiples of 16
MAX_STRETCH = 1.02


class ClipSamples(Samples):
    """Samples of clips that may have sidecars. A sidecar is a video as long as its clip or, for S2V only, a sound.

    videos: the kinds of sidecar videos that a clip may have. squares: the kinds that are square, whatever the clip's
    aspect ratio.
    """

    videos = ()
    squares = ()

    def is_sidecar(self, path):
        name, dot, kind = path.stem.rpartition(".")
        if not dot or kind not in self.videos:
            return False
        if not any(path.with_name(name + suffix).exists() for suffix in either_case(CLIPS | IMAGES)):
            raise Skip(f"belongs to a clip {name}, which is not there")
        if (used := video_beside(path.with_name(f"{name}.mp4"), kind)) != path:
            raise Skip(f"is left out for {used.name}" if used else f"is no video, as the {kind} of {name} should be")
        return True

    def sidecars(self, path, shown, cache):
        if shown[2] is None:
            raise Skip(f"is an image; {self.pipe.settings.variant} is trained on clips")
        files = self.find(path)
        digests = {kind: (file, digest(file)) for kind, file in files.items()}
        for kind in digests.keys() & {*self.videos}:
            self._check(kind, *digests[kind], shown, cache)
        return digests

    def changed(self, path, shown, sidecars, cache):
        videos = {
            kind: cached_probe(*digest, cache).changed for kind, digest in sidecars.items() if kind in self.videos
        }
        return super().changed(path, shown, sidecars, cache) | videos

    def sidecar_sizes(self, item):
        return {kind: (item.width, item.height) for kind in item.sidecars if kind in self.videos}

    def find(self, path):
        """Return {kind: file} for the sidecars of the clip `path`. Subclasses raise Skip if a sidecar is missing."""
        files = {kind: video_beside(path, kind) for kind in self.videos}
        return {kind: file for kind, file in files.items() if file}

    def _check(self, kind, file, name, shown, cache):
        try:
            width, height, times, *_ = cached_probe(file, name, cache)
        except Skip as e:
            raise Skip(f"its {file.name} {e}") from None
        end, own_end = max(shown[2]), max(times)
        if abs(end - own_end) > MAX_DIFFERENCE:
            raise Skip(f"its {file.name} ends at {own_end:.2f} s, the clip at {end:.2f} s")
        aspect, own_aspect = (1 if kind in self.squares else shown[0] / shown[1]), width / height
        if max(aspect / own_aspect, own_aspect / aspect) > MAX_STRETCH:
            shape = "a square" if kind in self.squares else f"the clip's {shown[0]}x{shown[1]}"
            raise Skip(f"its {file.name} is {width}x{height} px, should have the shape of {shape}")

    def encoder_key(self, name):
        """Return the digests of the files of an encoder, for the cache key. name: a key of Conditioning.encoders."""
        encoder = self.pipe.settings.conditioning.encoders[name]
        files = encoder.files(self.pipe.dir)
        if encoder.folder:
            files += encoder.path(self.pipe.dir).glob("config.json")
        return [digest(file) for file in files]


def either_case(suffixes):
    """Return these file suffixes in lower and in upper case, because cameras write .MP4."""
    return [*sorted(suffixes), *sorted(suffix.upper() for suffix in suffixes)]


def video_beside(path, kind):
    """Return the file NAME.kind.mp4 next to the clip NAME.mp4, or such a file with another video suffix; None if there
    is none.
    """
    files = (path.with_suffix(f".{kind}{suffix}") for suffix in either_case(CLIPS))
    return next((f for f in files if f.is_file()), None)
