"""Write media files for tests, and read media files with PyAV alone."""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np


def read_sound(path):
    """Return (the time of the first sample in seconds, samples (N,)) of a file's sound, mono at 48 kHz."""
    resampler, pieces, start = av.AudioResampler("fltp", "mono", 48000), [], None
    with av.open(str(path)) as file:
        for frame in (*file.decode(audio=0), None):
            start = frame.time if start is None else start
            pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    return start, np.concatenate(pieces)


def write_clip(path, frames, codec="libx264", rate=8, pixels="yuv420p", tags=None, **how):
    """Write a clip of `frames`, images (H,W,3 or 4) uint8 or PyAV's frames, and return its path. rate: frames per
    second. pixels: the pixel format. tags: the stream's (primaries, transfer function, matrix, range) in the numbers of
    H.273. how: matrix (display matrix), b_frames, and options of the encoder.
    """
    matrix, b_frames = how.pop("matrix", None), how.pop("b_frames", 0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options={k: str(v) for k, v in how.items()})
        stream.pix_fmt = pixels
        stream.codec_context.max_b_frames = b_frames
        if tags:
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace, context.color_range = tags
        if matrix:
            a, b, c, d = (65536 * v for v in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for k, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = k, 1 / Fraction(rate)
            if not stream.codec_context.is_open:
                stream.width, stream.height = frame.width, frame.height
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_timed(path, images, times, aspect=1):
    """Write a lossless clip of images (H,W,3) uint8 that are shown at these times, in seconds, and return its path.
    aspect: aspect ratio of a pixel.
    """
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264rgb", rate=30, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "rgb24"
        stream.codec_context.time_base = Fraction(1, 90000)
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for t, image in zip(times, images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(90000 * t), Fraction(1, 90000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbered(k, height=64, width=64):
    """Return an image that encodes k, 0 to 255, in eight vertical bars, the lowest bit on the left."""
    bits = [255 * (k >> b & 1) for b in range(8)]
    return np.repeat(np.array(bits, np.uint8), width // 8)[None, :, None].repeat(height, 0).repeat(3, 2)


def number(image):
    """Return the number that an image of `numbered` encodes."""
    height, width = image.shape[:2]
    return sum((image[height // 2, int((b + 0.5) * width / 8)].mean() > 127) << b for b in range(8))


def yuv(color, matrix, full=False, bits=8):
    """Return [Y, Cb, Cr], integers of so many bits, for an R'G'B' colour in 0..255. matrix: the luma weights of red and
    blue. full: full range, else limited range.
    """
    red, blue = matrix
    r, g, b = (v / 255 for v in color)
    y = red * r + (1 - red - blue) * g + blue * b
    values = y, (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    if full:
        scaled = [v * (2**bits - 1) + (i > 0) * 2 ** (bits - 1) for i, v in enumerate(values)]
    else:
        scaled = [2 ** (bits - 8) * (16 + 219 * v if i == 0 else 128 + 224 * v) for i, v in enumerate(values)]
    return [round(v) for v in scaled]


def yuv_frame(colors, matrix, height=64, full=False, bits=8):
    """Return a PyAV frame in 4:4:4 with these colours side by side, each 32 px wide. Arguments: as in yuv."""
    planes = np.array([yuv(c, matrix, full, bits) for c in colors]).T  # (3,n)
    planes = planes.repeat(32, 1)[:, None].repeat(height, 1)
    pixels = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    frame = av.VideoFrame(planes.shape[2], height, pixels)
    for plane, values in zip(frame.planes, planes.astype("u1" if bits == 8 else "<u2")):
        rows = np.zeros((height, plane.line_size // values.itemsize), values.dtype)
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    return frame


def patches(image, n):
    """Return the n colours that stand side by side in an image or in a frame of PyAV."""
    image = np.asarray(image)
    return [image[len(image) // 2, int((i + 0.5) * image.shape[1] / n)].tolist() for i in range(n)]


def write_png(path, rows, chunks):
    """Write a PNG file. rows: the bytes of all rows, each row after its filter's byte. chunks: {name: bytes} to write
    before the rows, IHDR first.
    """
    raw = b"\x89PNG\r\n\x1a\n"
    for name, body in (*chunks.items(), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        raw += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(raw)


def profile(space, tags):
    """Return an ICC profile: for a printer if `space` is b"CMYK", else for a display. tags: {signature: bytes}."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind, connection = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4xI4s4s4s6H4s", size, 0x02400000, kind, space, connection, 2026, 1, 1, 0, 0, 0, b"acsp")
    d50 = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return (head.ljust(68, b"\0") + d50).ljust(128, b"\0") + table + body


def matrix_profile(primaries, gamma):
    """Return an RGB profile with one gamma for all channels. primaries: (x, y) of red, green and blue. White is D65."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*primaries, (0.3127, 0.329))]).T
    to_xyz = xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.96422, 1, 0.82491])
    adapt = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ xyz[:, 3])) @ bradford

    def fixed(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    tags = {name: fixed(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), (adapt @ to_xyz).T)}
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256))
    return profile(b"RGB ", {b"wtpt": fixed(d50)} | tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def cmyk_profile(to_lab):
    """Return a CMYK profile that interpolates to_lab, a function of ink (4,) in 0..1 -> (L, a, b), between the corners
    of the cube of inks.
    """
    corners = [to_lab([i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1]) for i in range(16)]
    lab = bytes(min(max(round(v), 0), 255) for L, a, b in corners for v in (L * 2.55, a + 128, b + 128))
    lut = struct.pack(">4sI4B", b"mft1", 0, 4, 3, 2, 0)
    lut += struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut += bytes(range(256)) * 4 + lab + bytes(range(256)) * 3
    return profile(b"CMYK", {b"A2B0": lut})
