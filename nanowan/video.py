"""Read pictures, clips and sound as a player shows them, turn them into tensors, write mp4 files and contact sheets.

The file says how it is to be shown: the time, orientation, pixel aspect ratio, colours (color.py), interlacing and
transparency of each picture; which track is shown, if there are several; and the time of each piece of sound.
"""

import collections
import contextlib
import functools
import math
import struct
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanowan import color
from nanowan.errors import BadInput, Skip
from nanowan.files import atomic

IMAGES = {".jpg", ".jpeg", ".png", ".apng", ".webp", ".gif", ".bmp"}
CLIPS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
# media files that cannot be read; the scan of a folder reports them, so that nobody believes that they were read
OTHER_MEDIA = set(
    ".3gp .arw .avif .cr2 .cr3 .dng .exr .flv .hdr .heic .heif .jfif .jp2 .jxl .m2ts .mpeg .mpg .mts .mxf "
    ".nef .ogv .psd .raw .svg .tga .tif .tiff .ts .vob .wmv .y4m".split()
)
TIMED_CONTAINERS = "mov,mp4", "matroska"  # their packets say when a picture is shown; in others, when it is decoded
DEFAULT_BONUS = 5_000_000  # px or channels that a track's default flag is worth in FFmpeg's choice of a track
INTERLACED_ORDERS = range(2, 6)  # the values of a codec context's field_order that mean interlaced
LOOKED_AT = 8  # pictures checked if a clip is tagged interlaced: some encoders make the first picture progressive
MAX_SHIFT = 2.5  # frames; unordered times within this of a constant rate are evened: AVI gives times of decoding
GAP = 4  # px between the frames of a contact sheet
SHORTEST_DURATION = 0.011  # seconds; an animation's picture with a shorter time is shown for 0.1 s, as in browsers


class Shown(NamedTuple):
    """How a media file is shown. width, height: in px, upright and with square pixels. times: the seconds from the
    first picture to each picture, ascending, or None for a still.

    notes: remarks for the data report. changed: the notes that name properties which earlier versions of nanoWan
    ignored. These notes are part of the cache file's name, because earlier versions cached other pixels for files with
    these properties.
    """

    width: int
    height: int
    times: list | None
    notes: list = []
    changed: list = []


class Frame:
    """A picture of a media file. seconds: the time since the file's first picture. size: the (width, height) in px at
    which a player shows the picture, upright and with square pixels.
    """

    def __init__(self, seconds, size, convert):
        """convert: a function that returns the PIL image. It is called when `image` is first read."""
        self.seconds, self.size, self._convert = seconds, size, convert

    @functools.cached_property
    def image(self):
        """The upright PIL image in RGB, with as many pixels as the file stores. Raises Skip if it cannot be decoded."""
        with reading():
            return self._convert()

    def shown(self):
        """Return the picture, resized to `size`, as (H,W,3) uint8."""
        from PIL import Image

        return np.array(self.image if self.image.size == self.size else self.image.resize(self.size, Image.LANCZOS))


def is_image(path):
    return path.suffix.lower() in IMAGES


def why(error):
    """Return the first line of the message of a decoder's exception, or the exception's type if it has no message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextlib.contextmanager
def reading(failure="cannot be decoded"):
    """Return a context manager for code that reads a file. Any exception inside it becomes a Skip that begins with
    `failure`.
    """
    try:
        yield
    except Skip:
        raise
    except FileNotFoundError:
        raise Skip("does not exist any more") from None
    except Exception as e:  # decoders raise errors of every kind on damaged files
        raise Skip(f"{failure} ({why(e)})") from None


# ---- any file --------------------------------------------------------------------------------------------------------
def probe(path):
    """Return the Shown of a media file. Raises Skip if the file cannot be read."""
    return probe_image(path) if is_image(path) else probe_clip(path)


def read_frames(path, shown=None):
    """Yield the Frames of a clip or an animated image in display order, or the single Frame of a still. shown: the
    result of `probe` for the file, if the caller has it. Raises Skip if the file cannot be read.
    """
    yield from image_frames(path) if is_image(path) else clip_frames(path, shown or probe(path))


def read_windows(path, windows, draw, shown=None):
    """For each list of times (seconds) in `windows`, find the Frame shown nearest to each time, and yield the list of
    draw(frame) of these Frames. The times in a list ascend, and the lists are ordered by their first times. The file is
    decoded once, and only up to the last frame that is needed. A frame that is chosen for several times is drawn once.
    shown: as in read_frames. Raises Skip if the file cannot be read.
    """
    chosen, done, before, drawn = [[] for _ in windows], 0, None, None

    def take(until):
        """Append draw(before) to a window's list in `chosen` for each of the window's remaining times that is nearer to
        the frame `before` than to the next frame. until: the seconds at which the next frame is shown.
        """
        nonlocal drawn
        for wanted, taken in zip(windows[done:], chosen[done:]):
            while len(taken) < len(wanted):
                at = wanted[len(taken)]
                if abs(until - at) <= abs(before.seconds - at):
                    break
                drawn = draw(before) if drawn is None else drawn
                taken.append(drawn)
            if not taken:
                break  # later windows start later, so they need no frame so far either

    for frame in read_frames(path, shown):
        if before is not None:
            take(frame.seconds)
            while done < len(windows) and len(chosen[done]) == len(windows[done]):
                yield chosen[done]
                chosen[done], done = None, done + 1
            if done == len(windows):
                return
        before, drawn = frame, None
    if before is None:
        raise Skip("has no frames")
    take(math.inf)
    yield from chosen[done:]


# ---- clips -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def open_clip(path):
    """Return a context manager that opens a clip and gives (container, video stream, a function from a packet to its
    frames). Each slice of a picture is decoded in its own thread. With one thread per picture, FFmpeg would not report
    errors in the last pictures.
    """
    import av

    with reading(), av.open(str(path)) as container:
        stream = main_track(container.streams.video, lambda s: s.codec_context.width * s.codec_context.height)
        if stream is None:
            raise Skip("has no video stream")
        decoder = stream.codec_context
        if decoder is None:
            raise Skip("holds video for which there is no decoder here")
        if stream.metadata.get("alpha_mode") == "1":  # FFmpeg's own decoders of VP8 and VP9 ignore alpha
            name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
            decoder = av.CodecContext.create(name, "r") if name else decoder
        decoder.options = {"err_detect": "explode"}  # damaged frames raise an error instead of turning grey
        yield container, stream, functools.partial(decode_packet, decoder, color.tags(stream.codec_context))


def decode_packet(decoder, tags, packet):
    """Return the frames of a packet. Colour tags that a frame lacks are taken from `tags`, those of the container."""
    frames = decoder.decode(packet)
    for frame in frames:
        color.complete(frame, tags)
    return frames


def main_track(streams, size):
    """Return the one of `streams` that FFmpeg would choose, or None if there is none. This is the stream with the
    largest size(stream), after DEFAULT_BONUS is added for a stream marked as the default. Cover pictures are not
    considered.
    """
    from av.stream import Disposition

    def score(stream):
        marked = bool(stream.disposition & Disposition.default)
        return 1 + size(stream) + DEFAULT_BONUS * marked if stream.codec_context else 0

    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    return max((s for s in streams if not s.disposition & covers), key=score, default=None)


def decode(container, stream, decode_packet):
    """Yield the frames of a clip as VideoFrames of PyAV."""
    for packet in container.demux(stream):
        yield from decode_packet(packet)


def probe_clip(path):
    """Return the Shown of a clip. Only the clip's first pictures are decoded. If the container does not reliably say
    when each picture is shown, all pictures are decoded.
    """
    stamps, looked_at, intact = [], [], True
    with open_clip(path) as (container, stream, decode_packet):
        context = stream.codec_context
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
                intact = intact and not packet.is_corrupt  # the last packet of a truncated file is corrupt
            if len(looked_at) < (LOOKED_AT if context.field_order in INTERLACED_ORDERS else 1):
                looked_at += decode_packet(packet)
        if not looked_at:
            raise Skip("has no frames")
        (width, height), notes, changed = describe(looked_at, stream)
        began = looked_at[0].time
        told = container.format.name.startswith(TIMED_CONTAINERS) and intact and began is not None
        told = told and None not in stamps and len(set(stamps)) == len(stamps)
        # Packets come in decoding order. If their times ascend although pictures are reordered, these are the times of
        # decoding, not of display. A packet of MPEG-4 may hold two pictures, as XviD writes them.
        doubtful = context.name == "mpeg4" or context.has_b_frames and stamps == sorted(stamps)
        if told and not doubtful:
            unit, reordered = stream.time_base, False
            times = [float(t) * unit.numerator / unit.denominator - began for t in sorted(stamps)]
            times = [t for t in times if t >= 0]  # pictures before the first cannot be decoded
        else:
            times, reordered = decoded_times(path, stamps)
    changed += ["reordered"] * reordered
    notes += ["variable rate"] * varies(times)
    return Shown(width, height, times, notes + changed, changed)


def decoded_times(path, stamps):
    """Decode all of a clip and return ([seconds of each picture], whether these differ from the decoded frames' own
    times). Seconds are counted from the first picture.

    If the frames' own times ascend, they are returned. If not, the frames' times are sorted or, if some of them are
    missing or equal, the times of the packets, `stamps`; picture k gets the k-th of the sorted times. If some of the
    packets' times are missing or equal too, picture k gets k / rate, where rate is the clip's frame rate. Sorted times
    are also replaced by k / rate if each of them is within MAX_SHIFT / rate of it and the container is not in
    TIMED_CONTAINERS. Raises Skip if no times are found and the rate is unknown.
    """
    with open_clip(path) as (container, stream, decode_packet):
        frame_times = [frame.time for frame in decode(container, stream, decode_packet)]
        rate, timed = float(stream.average_rate or 0), container.format.name.startswith(TIMED_CONTAINERS)
        packets = [None if t is None else float(t * stream.time_base) for t in stamps]
    if None not in frame_times and all(a < b for a, b in zip(frame_times, frame_times[1:])):
        return [t - frame_times[0] for t in frame_times], False
    even = [k / rate for k in range(len(frame_times))] if rate else None
    for times in (frame_times, packets):
        if None not in times and len(set(times)) == len(times) >= len(frame_times):
            times = [t - min(times) for t in sorted(times)[: len(frame_times)]]
            near = even and max(abs(a - b) for a, b in zip(times, even)) < MAX_SHIFT / rate
            return even if near and not timed else times, True
    if not even:
        raise Skip("says neither when its frames are shown nor at what rate")
    return even, True


def varies(times):
    """Return whether the steps between these `times` (seconds) vary: whether one of them differs from the median step
    by more than a tenth of the median and by more than 2.5 ms. In Matroska, which rounds times to milliseconds, the
    steps of a constant rate differ by about 1 ms.
    """
    steps = np.diff(times)
    return bool(len(steps)) and bool(abs(steps - np.median(steps)).max() > max(0.0025, 0.1 * np.median(steps)))


def describe(frames, stream):
    """Return ((width, height), notes, changed) of a clip, as in Shown, from the clip's first frames. Raises Skip if the
    clip's colours or its orientation are not supported.
    """
    frame = frames[0]
    color.check_colors(frame)
    a, b, c, d = orientation(frame)
    notes, changed = [], []
    if color.is_untagged(frame):
        (changed if color.matrix(frame) else notes).append("untagged")
    if (a, b, c, d) != (1, 0, 0, 1):
        (changed if a * d < b * c else notes).append("mirrored" if a * d < b * c else "rotated")
    flags = {
        "tagged outside": color.is_completed(frame, stream.codec_context),
        "HDR": color.is_hdr(frame),
        "wide gamut": color.is_wide(frame),
        "alpha": color.has_alpha(frame),
        "interlaced": any(f.interlaced_frame for f in frames),
        "other track": stream is not stream.container.streams.video[0],
    }
    return (
        shown_size(frame, stream.sample_aspect_ratio),
        notes,
        changed + [name for name, present in flags.items() if present],
    )


def orientation(frame):
    """Return (a, b, c, d), each -1, 0 or 1: a stored pixel at (x, y) is shown at (a x + c y, b x + d y), up to a shift
    of the whole picture. Raises Skip for rotations other than quarter turns.
    """
    data = color.side_data(frame, "DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(data))
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > 0.02 * max(straight, turned):  # more than about a degree
        raise Skip("is shown rotated by an angle that is not a multiple of 90 degrees, or skewed")
    signs = [1 if v >= 0 else -1 for v in (a, b, c, d)]
    return (0, signs[1], signs[2], 0) if turned > straight else (signs[0], 0, 0, signs[3])


def orient(image, matrix):
    """Return an image (H,W,...) turned or mirrored by the matrix that `orientation` returned."""
    a, b, c, d = matrix
    if not a:
        image = image.swapaxes(0, 1)
    image = image[:, ::-1] if a + c < 0 else image
    return np.ascontiguousarray(image[::-1] if b + d < 0 else image)


def shown_size(frame, pixel_aspect=None):
    width = max(1, round(frame.width * float(pixel_aspect or 1)))
    return (width, frame.height) if orientation(frame)[0] else (frame.height, width)


def clip_frames(path, shown):
    """Yield the Frames of a clip. shown: the result of `probe` for the clip."""
    with open_clip(path) as (container, stream, decode_packet):
        for seconds, frame in deinterlaced(timed_frames(decode(container, stream, decode_packet), shown)):
            size = shown_size(frame, stream.sample_aspect_ratio)
            yield Frame(seconds, size, functools.partial(upright_image, frame))


def upright_image(frame):
    """Return a frame of PyAV as an upright PIL image in RGB."""
    from PIL import Image

    return Image.fromarray(orient(color.to_rgb(frame), orientation(frame)))


def timed_frames(frames, shown):
    """Yield (seconds since the first frame, frame) for each of a clip's decoded `frames`. The times are the frames'
    own, or those of `shown` if it has the note "reordered". Raises Skip if a frame has no time or is earlier than the
    frame before it.
    """
    first, last = None, -math.inf
    for k, frame in enumerate(frames):
        if "reordered" in shown.changed:
            seconds = shown.times[min(k, len(shown.times) - 1)]
        elif frame.time is None:
            raise Skip("has frames without a time")
        else:
            first = frame.time if first is None else first
            seconds = frame.time - first
        if seconds < last:
            raise Skip(f"has frames whose times step back, at {last:.2f} s")
        last = seconds
        yield seconds, frame


def deinterlaced(timed):
    """Yield each (seconds, frame) of `timed`, with interlaced frames deinterlaced by FFmpeg's bwdif. Other frames are
    unchanged.
    """
    graph, kind, waiting = None, None, collections.deque()

    def pull():
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                frame = graph.pull()
                yield waiting.popleft(), frame

    for seconds, frame in timed:
        if graph is not None and kind != (frame.width, frame.height, frame.format.name):
            graph.push(None)
            yield from pull()
            graph = None
        if graph is None:
            if not frame.interlaced_frame:
                yield seconds, frame
                continue
            graph, kind = bwdif(frame), (frame.width, frame.height, frame.format.name)
        waiting.append(seconds)
        frame.pts = round(seconds * 1e6)
        graph.push(frame)
        yield from pull()
    if graph is not None:
        graph.push(None)
        yield from pull()


def bwdif(frame):
    """Return a filter graph for frames with the size and format of `frame`. It deinterlaces interlaced frames and
    passes other frames on unchanged.
    """
    import av

    graph = av.filter.Graph()
    like = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000000"
    like += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    graph.link_nodes(
        graph.add("buffer", like), graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    ).configure()
    return graph


# ---- images ----------------------------------------------------------------------------------------------------------
def open_animated(path):
    """Return (PIL image, range of picture numbers). The range holds one number for a still, or one for each picture of
    an animated WebP, PNG or GIF. The caller handles PIL's exceptions.
    """
    from PIL import Image

    image = Image.open(path)
    count = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG", "GIF") else 1
    first = int(count > 1 and bool(image.info.get("default_image")))  # 1 if picture 0 is for viewers without animation
    return image, range(first, count)


def durations(image, numbers):
    """Yield the seconds for which each picture of an animated PIL image is shown. numbers: the numbers of the pictures.
    Before each yield, `image` is moved to the picture whose seconds are yielded.
    """
    for k in numbers:
        image.seek(k)
        image.load()
        seconds = image.info.get("duration", 0) / 1000
        yield seconds if seconds >= SHORTEST_DURATION else 0.1


def probe_image(path):
    """Return the Shown of an image. For most stills, only the header is read."""
    with reading("cannot be read"):
        image, numbers = open_animated(path)
        with image:
            if frame := coded_picture(path, len(numbers)):
                changed = ["HDR"] * color.is_hdr(frame) + ["wide gamut"] * color.is_wide(frame)
                return Shown(*shown_size(frame), None, ["alpha"] * color.has_alpha(frame) + changed, changed)
            width, height = image.size
            if image.getexif().get(0x0112) in (5, 6, 7, 8):  # EXIF's orientation says that it lies on its side
                width, height = height, width
            if image.mode == "F":
                raise Skip("holds floating-point pixels, whose range is unknown")
            notes, changed = ["alpha"] * has_alpha(image), color.profile_notes(image)
            if len(numbers) < 2:
                return Shown(width, height, None, notes + changed, changed)
            ends = np.cumsum(list(durations(image, numbers)))
            times = [0.0, *ends[:-1].tolist()]
            return Shown(
                width, height, times, [*notes, "animated", *["variable rate"] * varies(times), *changed], changed
            )


def image_frames(path):
    """Yield the Frames of an image: one for a still, several for an animation."""
    with reading("cannot be read"):
        image, numbers = open_animated(path)
        if len(numbers) < 2:
            image.close()
            still = open_photo(path)
            yield Frame(0.0, still.size, lambda: still)
            return
        from PIL import ImageOps

        seconds = 0.0
        with image:
            for duration in durations(image, numbers):
                picture = to_rgb(ImageOps.exif_transpose(image))
                yield Frame(seconds, picture.size, lambda picture=picture: picture)
                seconds += duration


def open_photo(path):
    """Open an image file as an upright PIL image in RGB and sRGB: 16-bit values are scaled to 8 bits, colours are
    converted, and transparent pictures are laid over white. Of an animated image, the first picture is returned. Raises
    Skip if the file cannot be read.
    """
    from PIL import Image, ImageOps

    with reading("cannot be read"), Image.open(path) as image:
        if frame := coded_picture(path):
            return upright_image(frame)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return to_rgb(image)


def coded_picture(path, pictures=1):
    """If a file is a PNG that names its colours in a cICP chunk, return its picture as a frame of PyAV, since PIL does
    not read this chunk. Return None for other files. pictures: how many pictures the file holds. Raises Skip for a PNG
    with this chunk that is animated or whose colours are not supported.
    """
    import av

    if not color.has_codes(path):
        return None
    if pictures > 1:
        raise Skip("is an animation with a cICP chunk, which is not supported")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    color.check_colors(frame)
    return frame


def has_alpha(image):
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def to_rgb(image):
    """Convert a PIL image of any mode to RGB in sRGB, and lay transparent pictures over white. Raises Skip for an image
    with floating-point pixels.
    """
    from PIL import Image

    source, hidden = image, image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.array(image.convert("I"))
        image = Image.fromarray((values / 257).clip(0, 255).astype(np.uint8))
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    elif image.mode == "RGB" and hidden and max(hidden) > 255:  # 16 bits, of which PIL reads the upper eight
        image.info["transparency"] = tuple(v >> 8 for v in hidden)
    if image.mode == "F":
        raise Skip("holds floating-point pixels, whose range is unknown")
    if not has_alpha(image):
        return color.to_srgb(image, source)
    image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(color.to_srgb(image.convert(image.mode[:-1]), source), mask=image.getchannel("A"))
    return page


def open_image(image, flag="--image"):
    """Convert a PIL image, or open an image file, in the same way as training data: upright, in RGB and sRGB, with
    transparent pictures laid over white. flag: the flag that an error names. Raises BadInput if the image cannot be
    read.
    """
    from PIL import Image, ImageOps

    try:
        return to_rgb(ImageOps.exif_transpose(image)) if isinstance(image, Image.Image) else open_photo(image)
    except Skip as e:
        raise BadInput(f"{flag} {image}: {e}") from None


def to_tensor(image):
    """Convert a PIL image to a tensor (3,H,W) in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def cover(image, width, height, size=None):
    """Resize a PIL image by Lanczos so that it covers width x height px, then centre-crop it to that size. size: the
    (width, height) at which the image is shown, if its pixels are not square.
    """
    from PIL import Image

    shown_width, shown_height = size or image.size
    scale = max(width / shown_width, height / shown_height)
    w, h = max(width, round(shown_width * scale)), max(height, round(shown_height * scale))
    x, y = (w - width) // 2, (h - height) // 2
    image = image if image.size == (w, h) else image.resize((w, h), Image.LANCZOS)
    return image.crop((x, y, x + width, y + height))


def to_uint8(video):
    """Convert a video (3,T,H,W) in [-1,1] to frames (T,H,W,3) uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path, video, fps, comment="", crf=10):
    """Write a video (3,T,H,W) in [-1,1] as H.264, yuv420p. The file has a temporary name until it is complete.

    comment: text stored in the file's metadata. crf: x264's constant rate factor, from 0 (the best quality) to 51; a
    video written with 10 looks the same as the source.
    """
    write_frames(path, [to_uint8(video)], fps, comment, crf)


def write_frames(path, chunks, fps, comment="", crf=10, sound=None, sound_offset=0.0, lossless=False):
    """Write an mp4 as write_mp4 does, from `chunks`: several arrays of frames (T,H,W,3) uint8, one after another.
    The frames are stored in YUV with BT.709's matrix, and tagged as BT.709.

    sound: a file whose sound is added, as AAC at 192 kbit/s. The sound begins sound_offset seconds into the video, and
    is cut off at the video's end. lossless: store the frames in RGB instead of YUV, without loss, so that
    `read_frames` restores every bit; browsers and some players do not show such a file.
    """
    import av

    codec, pixels, options = ("libx264", "yuv420p", {"crf": str(crf)})
    if lossless:
        codec, pixels, options = ("libx264rgb", "rgb24", {"qp": "0"})
    # with x264's macroblock tree, small frames do not become the same bits each time
    options["x264-params"] = "mbtree=0"
    rate, stream, count = Fraction(fps).limit_denominator(1001), None, 0
    # faststart puts the index first, so that a browser can begin to play before it has the whole file
    with atomic(path) as tmp, av.open(str(tmp), "w", format="mp4", options={"movflags": "faststart"}) as file:
        if comment:
            file.metadata["comment"] = comment
        for frames in chunks:
            if stream is None:
                stream = file.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
                color.tag(stream.codec_context, matrix=not lossless)
                audio = file.add_stream("aac", rate=48000, layout="stereo") if sound else None
            for frame in frames:
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
                file.mux(stream.encode(frame if lossless else color.to_yuv(frame)))
            count += len(frames)
        file.mux(stream.encode())
        if sound:
            audio.bit_rate = 192_000
            write_sound(file, audio, sound, sound_offset, float(count / rate))


def frame_rate(path):
    """Return the frames per second that a video file states, or 0 if it states none."""
    with open_clip(path) as (_, stream, _):
        return float(stream.average_rate or 0)


# ---- sound -----------------------------------------------------------------------------------------------------------
MAX_JITTER = 0.015  # seconds: a shorter pause, or overlap, between two pieces of sound does not count as a gap
MAX_SILENCE = 60  # seconds between two pieces of sound; more means damaged times


def sound_track(container):
    """Return the audio stream that FFmpeg would choose, or None if there is none."""
    return main_track(container.streams.audio, lambda s: s.codec_context.channels)


def has_sound(path):
    import av

    with av.open(str(path)) as container:
        return sound_track(container) is not None


def sound_pieces(path):
    """Yield (AudioFrame, begin) for each piece of a file's sound. begin: the seconds on the file's clock at which the
    frame begins, or None if the frame directly continues the one before. Raises Skip if no sound can be decoded.
    """
    import av

    with reading("its sound cannot be decoded"), av.open(str(path)) as container:
        stream, end, kind = sound_track(container), None, None
        if stream is None:
            raise Skip("has no sound track")
        if stream.codec_context is None:
            raise Skip("holds sound for which there is no decoder here")
        for frame in container.decode(stream):
            begin = frame.time if frame.time is not None else end or 0.0
            if end is not None and abs(begin - end) > MAX_SILENCE:
                raise Skip(f"has a sound whose times jump from {end:.1f} to {begin:.1f} s; {MAX_SILENCE} s at most")
            before, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
            follows = end is not None and abs(begin - end) <= MAX_JITTER and kind == before
            end = (end if follows else begin) + frame.samples / frame.sample_rate
            yield frame, None if follows else begin


def is_sound_broken(path):
    """Return whether a file's sound has gaps, pieces that overlap, or a change of format."""
    return sum(begin is not None for _, begin in sound_pieces(path)) > 1


def read_sound(path, rate, layout=None, until=math.inf):
    """Return (the seconds on the file's clock at which the sound begins, samples (C,N) float32 at `rate` Hz). Gaps in
    the file's times become silence; where pieces overlap, the earlier piece is kept. layout: FFmpeg's name of the
    channel layout, or None for the mean of all channels. until: decoding stops this many seconds after the sound's
    beginning. Raises Skip if no sound can be decoded.
    """
    import av

    runs, resampler = [], None  # [(begin, [samples])]

    def resample(frame):
        for piece in resampler.resample(frame) if resampler else ():
            samples = piece.to_ndarray()
            runs[-1][1].append(samples if layout else samples.mean(0, keepdims=True))

    for frame, begin in sound_pieces(path):
        if begin is not None:
            resample(None)
            runs.append((begin, []))
            # The mean is taken after resampling, which gives the same result; FFmpeg's own downmix is not the mean.
            resampler = av.AudioResampler("fltp", layout, rate)
        resample(frame)
        if frame.time is not None and frame.time - runs[0][0] > until:
            break
    resample(None)
    runs = [(begin, np.concatenate(pieces, 1)) for begin, pieces in runs if pieces]
    if not runs:
        return 0.0, np.zeros((2 if layout else 1, 0), np.float32)
    starts = [round((begin - runs[0][0]) * rate) for begin, _ in runs]
    sound = np.zeros((len(runs[0][1]), max(at + s.shape[1] for at, (_, s) in zip(starts, runs))), np.float32)
    end = 0
    for at, (_, samples) in zip(starts, runs):
        late = max(at, end)
        sound[:, late : at + samples.shape[1]] = samples[:, late - at :]
        end = max(end, at + samples.shape[1])
    return runs[0][0], sound


def sound_delay(path):
    """Return the seconds from a clip's first frame to the beginning of its sound. The value is negative if the sound
    begins first. Raises Skip if the video or the sound cannot be decoded.
    """
    try:
        with open_clip(path) as clip:
            frame = next(decode(*clip), None)
    except Skip as e:
        raise Skip(f"its video {e}") from None
    shown = frame.time if frame is not None and frame.time is not None else 0.0
    return next((begin for _, begin in sound_pieces(path)), 0.0) - shown


def write_sound(file, stream, source, offset, seconds):
    """Encode the sound of the file `source` into `stream`, an audio stream of the PyAV container `file`, which is open
    for writing. The sound begins `offset` seconds into the video. Sound before the video's start, or after `seconds`
    seconds of the video, is left out.
    """
    import av

    begin, last = round(48000 * offset), round(48000 * seconds)
    samples = read_sound(source, 48000, "stereo", seconds - offset)[1][:, max(0, -begin) : last - begin]
    for at in range(0, samples.shape[1], 1024):
        piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at : at + 1024]), "fltp", "stereo")
        piece.sample_rate, piece.pts, piece.time_base = 48000, max(0, begin) + at, Fraction(1, 48000)
        file.mux(stream.encode(piece))
    file.mux(stream.encode())


# ---- sheets and previews ---------------------------------------------------------------------------------------------
def write_grid(path, videos, labels, columns=1, shown=3, scale=None):
    """Write a contact sheet as PNG. Each video (3,T,H,W) in [-1,1] becomes a strip of `shown` evenly spaced frames,
    the first and last included, with its label above. `columns` strips lie side by side. scale: the factor by which
    pixels are enlarged (default: chosen so that a strip is about 384 px wide).
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = []
    for video in videos:
        frames = to_uint8(video)[np.linspace(0, video.shape[1] - 1, shown).round().astype(int)]
        factor = scale or max(1, round(384 / (frames.shape[2] * shown)))
        width, height = frames.shape[2] * factor, frames.shape[1] * factor
        strip = Image.new("RGB", ((width + GAP) * shown - GAP, height), "white")
        for i, frame in enumerate(frames):
            strip.paste(Image.fromarray(frame).resize((width, height), Image.NEAREST), (i * (width + GAP), 0))
        strips.append(strip)
    w, h, font = strips[0].width + 12, strips[0].height + 26, ImageFont.load_default(13)
    sheet = Image.new("RGB", (w * columns, h * math.ceil(len(strips) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (strip, label) in enumerate(zip(strips, labels)):
        x, y = i % columns * w + 6, i // columns * h
        sheet.paste(strip, (x, y + 20))
        while pen.textlength(label, font) > strip.width:
            label = label.removesuffix("...")[:-1] + "..."
        pen.text((x, y + 2), label, fill="black", font=font)
    with atomic(path) as tmp:
        sheet.save(tmp, format="PNG")


@torch.no_grad()
def latent_to_rgb(vae):
    """Return a matrix (z+1,3) that maps the z channels of a latent pixel, followed by a 1, to the mean colour of the
    image pixels that the latent pixel stands for. The matrix is fitted by least squares on a still clip of smooth
    noise. With it, latents can be previewed without being decoded.
    """
    device = next(vae.parameters()).device
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = F.interpolate(noise, scale_factor=2 * vae.stride[1], mode="bicubic").clamp(-1, 1)
    z = vae.encode(image[:, :, None].expand(-1, -1, 9, -1, -1).to(device))[0].flatten(1).t().cpu()
    colors = F.avg_pool2d(image, vae.stride[1])[0, :, None].expand(-1, 3, -1, -1).flatten(1).t()
    return torch.linalg.lstsq(torch.cat([z, torch.ones_like(z[:, :1])], 1), colors).solution


def latent_preview(latents, colors):
    """Convert latents (z,T',h,w) to a small video (3,T',8h,8w). colors: the matrix that latent_to_rgb returned."""
    z = torch.cat([latents, torch.ones_like(latents[:1])])
    return F.interpolate(torch.einsum("cthw,cd->dthw", z, colors), scale_factor=8)


def to_video(frames, device="cpu"):
    """Convert a list of frames (H,W,3) uint8 to a video (3,T,H,W) in [-1,1] on a device."""
    return torch.from_numpy(np.stack(frames)).to(device).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def preview_writer(colors, path, every, label):
    """Return a function that sampling calls after each step with (step, the clean latents (B,C,T',h,w) that the model
    predicts at this step). Every `every` steps, the function writes a contact sheet of the first clip to `path`.
    colors: the matrix that latent_to_rgb returned. label: text written above the frames, after the step's number.
    """

    def write(step, x0):
        if (step + 1) % every == 0:
            video = latent_preview(x0[0].cpu(), colors)
            write_grid(path, [video], [f"step {step + 1}: {label}"], shown=min(5, video.shape[1]))

    return write


def read_comment(path):
    """Return the comment that write_frames stored in an mp4's metadata, or "" if there is no comment or it cannot be
    read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except (OSError, av.error.FFmpegError):
        return ""
