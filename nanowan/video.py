"""Pictures and clips: read, turned into tensors, written as mp4 and contact sheets."""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanowan.errors import BadInput
from nanowan.files import atomic


class Skip(Exception):
    """Why a file cannot be used."""


class Frame(NamedTuple):
    """A frame of a clip: seconds since the first one, (width, height) in px at which a player shows it, upright and
    with square pixels, and its image, upright but as stored (None where it was not asked for).
    """

    seconds: float
    size: tuple
    image: object


def why(error):
    """An exception of a decoder as a few words."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_frames(path, images=True):
    """Yield the Frames of a clip. Raises Skip where it cannot be decoded."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Skip("has no video stream")
            stream, first = container.streams.video[0], None
            if stream.codec_context is None:
                raise Skip("holds video for which there is no decoder here")
            stream.codec_context.options = {"err_detect": "explode"}  # damaged frames are an error, not grey
            for frame in container.decode(stream):
                if frame.time is None:
                    raise Skip("has frames without a time")
                first = frame.time if first is None else first
                turns = round(frame.rotation / 90) % 4
                size = max(1, round(frame.width * float(stream.sample_aspect_ratio or 1))), frame.height
                image = frame.to_image().rotate(90 * turns, expand=True) if images else None
                yield Frame(frame.time - first, size[::-1] if turns % 2 else size, image)
    except Skip:
        raise
    except FileNotFoundError:
        raise Skip("does not exist any more") from None
    except Exception as e:  # decoders meet damaged files with errors of every kind
        raise Skip(f"cannot be decoded ({why(e)})") from None


def open_photo(path):
    """A photograph as upright RGB, 16-bit scaled to 8, transparency on white. Raises Skip."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                image = image.convert("I").point(lambda v: v / 257).convert("L")
            if image.mode == "F":
                raise Skip("holds floating-point pixels, whose range is unknown")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image if image.mode == "RGBA" else image.convert("RGBA")
                page = Image.new("RGB", image.size, "white")
                page.paste(image, mask=image.getchannel("A"))
                return page
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Skip:
        raise
    except FileNotFoundError:
        raise Skip("does not exist any more") from None
    except Exception as e:  # decoders meet damaged files with errors of every kind
        raise Skip(f"cannot be read ({why(e)})") from None


def open_image(image, flag="--image"):
    """A PIL image, or a file as training data are opened (upright, transparency on white), as RGB. Raises BadInput."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return open_photo(image)
    except Skip as e:
        raise BadInput(f"{flag} {image}: {e}") from None


def to_tensor(image):
    """PIL image -> (3,H,W) in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def cover(image, width, height, size=None):
    """A PIL image resized by Lanczos until it covers width x height px, then centre-cropped to that. size: (width,
    height) at which it is shown, where its pixels are not square.
    """
    from PIL import Image

    shown_width, shown_height = size or image.size
    scale = max(width / shown_width, height / shown_height)
    w, h = max(width, round(shown_width * scale)), max(height, round(shown_height * scale))
    x, y = (w - width) // 2, (h - height) // 2
    image = image if image.size == (w, h) else image.resize((w, h), Image.LANCZOS)
    return image.crop((x, y, x + width, y + height))


def to_uint8(video):
    """(3,T,H,W) in [-1,1] -> (T,H,W,3) uint8."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path, video, fps, comment="", crf=10):
    """Write (3,T,H,W) in [-1,1] as H.264, yuv420p, under a temporary name that is then renamed.

    comment: stored in the file's metadata. crf: x264's quality, 0 (lossless) to 51; 10 cannot be told from the source.
    """
    write_frames(path, [to_uint8(video)], fps, comment, crf)


def write_frames(path, chunks, fps, comment="", crf=10, sound=None, sound_offset=0.0, lossless=False):
    """The same of frames (T,H,W,3) uint8 that come in several arrays, and with the sound of a file: AAC at 192 kbit/s,
    beginning at sound_offset seconds, cut to the video's length. lossless: H.264 in RGB, which `read_frames` gives
    back to the bit, and which browsers and some players do not show.
    """
    import av

    codec, pixels, options = (
        ("libx264rgb", "rgb24", {"qp": "0"}) if lossless else ("libx264", "yuv420p", {"crf": str(crf)})
    )
    # x264's macroblock tree does not give the same bits each time on small frames
    options["x264-params"] = "mbtree=0"
    rate, stream, count = Fraction(fps).limit_denominator(1001), None, 0
    with atomic(path) as tmp, av.open(str(tmp), "w", format="mp4") as file:
        if comment:
            file.metadata["comment"] = comment
        for frames in chunks:
            if stream is None:
                stream = file.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
                audio = file.add_stream("aac", rate=48000, layout="stereo") if sound else None
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            count += len(frames)
        file.mux(stream.encode())
        if sound:
            audio.bit_rate = 192_000
            write_sound(file, audio, sound, sound_offset, float(count / rate))


def frame_rate(path):
    """Frames per second, as a video file says them; 0 where it does not."""
    import av

    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0)


def has_sound(path):
    import av

    with av.open(str(path)) as container:
        return bool(container.streams.audio)


def sound_delay(path):
    """Seconds from a clip's first frame to the beginning of its sound; negative where that begins before. Raises Skip
    where one of them cannot be decoded.
    """
    import av

    begins = []
    for kind in ("video", "audio"):
        try:
            with av.open(str(path)) as container:
                frame = next(container.decode(**{kind: 0}), None)
        except Exception as e:  # decoders meet damaged files with errors of every kind
            raise Skip(f"its {kind} cannot be decoded ({why(e)})") from None
        begins.append(frame.time if frame is not None and frame.time is not None else 0.0)
    return begins[1] - begins[0]


def write_sound(file, stream, source, offset, seconds):
    """Encode the sound of a media file into a stream of an open one, from `offset` to `seconds` on its clock; what
    comes before 0 is left out.
    """
    import av

    resampler = av.AudioResampler(stream.codec_context.format or "fltp", "stereo", 48000)
    fifo, position, last = av.AudioFifo(), round(48000 * offset), round(48000 * seconds)
    with av.open(str(source)) as container:
        for frame in (*container.decode(audio=0), None):
            for piece in resampler.resample(frame):
                piece.pts = None
                fifo.write(piece)
    if position < 0:
        fifo.read(-position, partial=True)
        position = 0
    while position < last and (piece := fifo.read(min(1024, last - position), partial=True)):
        piece.pts, piece.time_base = position, Fraction(1, 48000)
        position += piece.samples
        file.mux(stream.encode(piece))
    file.mux(stream.encode())


def write_grid(path, videos, labels, columns=1, shown=3, scale=None):
    """A contact sheet PNG: each video (3,T,H,W) in [-1,1] as `shown` frames in a row, first to last, under its label;
    `columns` videos side by side. scale: of the pixels (default: strips about 384 px wide).
    """
    from PIL import Image, ImageDraw

    strips = []
    for video in videos:
        frames = to_uint8(video)[np.linspace(0, video.shape[1] - 1, shown).round().astype(int)]
        strip = Image.fromarray(np.concatenate(list(frames), 1))
        factor = scale or max(1, round(384 / strip.width))
        strips.append(strip.resize((strip.width * factor, strip.height * factor), Image.NEAREST))
    w, h = strips[0].width + 8, strips[0].height + 22
    sheet = Image.new("RGB", (w * columns, h * math.ceil(len(strips) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (strip, label) in enumerate(zip(strips, labels)):
        x, y = i % columns * w + 4, i // columns * h
        sheet.paste(strip, (x, y + 18))
        pen.text((x, y + 2), label if len(label) * 6 < w else label[: w // 6 - 3] + "...", fill="black")
    with atomic(path) as tmp:
        sheet.save(tmp, format="PNG")


@torch.no_grad()
def latent_to_rgb(vae):
    """A linear map (z+1,3) from a pixel of the latents, and a one, to the mean colour of what it stands for: fitted by
    least squares on a still clip of smooth noise. For previews of latents without a decode.
    """
    device = next(vae.parameters()).device
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = F.interpolate(noise, scale_factor=2 * vae.stride[1], mode="bicubic").clamp(-1, 1)
    z = vae.encode(image[:, :, None].expand(-1, -1, 9, -1, -1).to(device))[0].flatten(1).t().cpu()
    colors = F.avg_pool2d(image, vae.stride[1])[0, :, None].expand(-1, 3, -1, -1).flatten(1).t()
    return torch.linalg.lstsq(torch.cat([z, torch.ones_like(z[:, :1])], 1), colors).solution


def latent_preview(latents, colors):
    """Latents (z,T',h,w) as a small video (3,T',8h,8w), by the map of latent_to_rgb."""
    z = torch.cat([latents, torch.ones_like(latents[:1])])
    return F.interpolate(torch.einsum("cthw,cd->dthw", z, colors), scale_factor=8)


IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CLIPS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
# what is not read, but named where it lies, so that nobody believes it was
OTHER_MEDIA = set(
    ".3gp .apng .arw .avif .cr2 .cr3 .dng .exr .flv .gif .hdr .heic .heif .jfif .jp2 .jxl .m2ts .mpeg .mpg .mts .mxf "
    ".nef .ogv .psd .raw .svg .tga .tif .tiff .ts .vob .wmv .y4m".split()
)


def is_image(path):
    return path.suffix.lower() in IMAGES


def probe(path):
    """[width, height, times of its frames in seconds, or None for an image] of a media file as it is shown, by decoding
    it once. Raises Skip.
    """
    if is_image(path):
        return [*open_photo(path).size, None]
    frames = [(f.seconds, f.size) for f in read_frames(path, images=False)]
    if not frames:
        raise Skip("has no frames")
    return [*frames[-1][1], [seconds for seconds, _ in frames]]


def nearest_frames(path, wanted, width, height):
    """The frames (height,width,3) uint8 of a clip that are nearest to the times `wanted`, in seconds and ascending."""
    chosen, before = [], None
    for frame in read_frames(path):
        while before and len(chosen) < len(wanted):
            at = wanted[len(chosen)]
            if abs(frame.seconds - at) <= abs(before.seconds - at):
                break
            chosen.append(np.array(cover(before.image, width, height, before.size)))
        if len(chosen) == len(wanted):
            break
        before = frame
    if before is None:
        raise Skip("has no frames")
    last = np.array(cover(before.image, width, height, before.size))
    return chosen + [last] * (len(wanted) - len(chosen))


def to_video(frames):
    """A list of (H,W,3) uint8 -> (3,T,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def preview_writer(colors, path, every, label):
    """A function (step, clean latents (B,C,T',h,w)) that draws a small picture of the clip to `path` every so many
    steps. colors: of latent_to_rgb.
    """

    def write(step, x0):
        if (step + 1) % every == 0:
            video = latent_preview(x0[0].cpu(), colors)
            write_grid(path, [video], [f"step {step + 1}: {label}"], shown=min(5, video.shape[1]))

    return write


def read_comment(path):
    """What an mp4's metadata say of how it was made, as write_frames wrote it; "" if there is nothing."""
    import av

    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except (OSError, av.error.FFmpegError):
        return ""
