"""Convert the colours of decoded pictures to what a player shows, and tag the colours of files that are written.

Decoded pictures become 8-bit RGB with BT.709's primaries, whatever matrix, range, primaries, transfer function or ICC
profile is given in their file.
"""

import functools
import io
import struct

import numpy as np

from nanowan.errors import Skip

# codes of ITU-T H.273, which FFmpeg uses too
UNSPECIFIED = 2
UNTOLD = {"color_primaries": UNSPECIFIED, "color_trc": UNSPECIFIED, "colorspace": UNSPECIFIED, "color_range": 0}
MATRICES = {0: "RGB", 1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
SRGB, PQ, HLG = 13, 16, 18
NOT_DISPLAYED = {8: "linear light", 9: "a logarithm", 10: "a logarithm", 17: "SMPTE ST 428"}  # no player converts these
HD_LINES = 720  # untagged pictures with at least this many lines count as BT.709, smaller ones as BT.601
WHITE = 203  # the HDR luminance, in cd/m2, that becomes the white of SDR (ITU-R BT.2408)
GAMMA = 2.4  # the exponent of an SDR display (ITU-R BT.1886)
# primaries: the chromaticities (x, y) of red, green, blue and white
D65 = (0.3127, 0.3290)
BT709 = (0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65
WIDE = {
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),  # Display P3
}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
STRIP = 64  # lines of a picture that are converted at once: few enough to stay in the processor's cache


# ---- video -----------------------------------------------------------------------------------------------------------
def is_yuv(frame):
    return not frame.format.is_rgb and frame.format.name != "pal8" and len(frame.format.components) >= 3


def has_alpha(frame):
    return any(c.is_alpha for c in frame.format.components)


def is_hdr(frame):
    return frame.color_trc in (PQ, HLG)


def gamut(frame):
    """Return the code of a frame's primaries if they are wider than BT.709's, that is, if the code is in WIDE. Return
    None for all other primaries. An HDR frame that names no primaries counts as BT.2020.
    """
    code = 9 if is_hdr(frame) and frame.color_primaries == UNSPECIFIED else frame.color_primaries
    return code if code in WIDE else None


def is_wide(frame):
    """Return whether a frame is SDR and has primaries that go beyond those of BT.709."""
    return gamut(frame) is not None and not is_hdr(frame)


def is_untagged(frame):
    """Return whether a frame is in YUV and does not name the matrix with which its colours were made."""
    return is_yuv(frame) and frame.colorspace == UNSPECIFIED


def tags(context):
    """Return the colour tags of a codec context, {name: code}. Before the first frame is decoded, these are the tags of
    the container.
    """
    codes = {name: getattr(context, name) for name in UNTOLD}
    return {name: code for name, code in codes.items() if code != UNTOLD[name]}


def complete(frame, tags):
    """Set the tags that the decoder left unset on a frame, from the container's `tags`. For example, a decoder leaves
    the tags of a ProRes frame unset if the frame's header names none.
    """
    for name, code in tags.items():
        if getattr(frame, name) == UNTOLD[name]:
            setattr(frame, name, code)


def is_completed(frame, context):
    """Return whether a frame got its matrix from `complete` and not from its decoder."""
    return context.colorspace == UNSPECIFIED != frame.colorspace


@functools.cache
def name_side_data():
    """Make PyAV accept kinds of side data that are newer than PyAV. Otherwise PyAV would refuse all side data of a
    frame that has data of such a kind.
    """
    from av.sidedata.sidedata import Type

    def unnamed(cls, value):
        kind = object.__new__(cls)
        kind._name_, kind._value_ = f"TYPE_{value}", value
        return cls._value2member_map_.setdefault(value, kind)

    Type._missing_ = classmethod(unnamed)


def side_data(frame, name):
    """Return a frame's side data of the kind that FFmpeg calls `name`, or None."""
    name_side_data()
    return frame.side_data.get(name)


def check_colors(frame):
    """Raise Skip if a frame's colours cannot be converted."""
    if is_yuv(frame) and frame.colorspace not in (UNSPECIFIED, *MATRICES):
        raise Skip(f"has colours by matrix {int(frame.colorspace)} of H.273, which is not supported")
    if frame.color_trc in NOT_DISPLAYED:
        raise Skip(f"holds {NOT_DISPLAYED[frame.color_trc]}, not pictures for a display")
    if frame.colorspace == UNSPECIFIED and frame.color_trc == UNSPECIFIED and side_data(frame, "DOVI_METADATA"):
        raise Skip("is Dolby Vision without a base layer in HDR10 or HLG")


def matrix(frame):
    """Return {keyword argument: value} for PyAV's reformat. For an untagged frame, the argument is the matrix:
    BT.2020's if the frame has BT.2020's primaries, else BT.709's if it has at least HD_LINES lines. In all other cases,
    {} is returned, and FFmpeg uses the frame's own matrix, or BT.601's if the frame is untagged.
    """
    from av.video.reformatter import Colorspace

    if not is_untagged(frame):
        return {}
    if gamut(frame) == 9:
        return {"src_colorspace": Colorspace.BT2020}
    return {"src_colorspace": Colorspace.ITU709} if frame.height >= HD_LINES else {}


def to_rgb(frame):
    """Convert a frame of PyAV to (H,W,3) uint8, with transparent pictures laid over white. Raises Skip for colours that
    check_colors refuses.
    """
    check_colors(frame)
    converted = is_hdr(frame) or is_wide(frame)
    if converted:
        kind = frame.color_trc if frame.color_trc in (SRGB, PQ, HLG) else 1
        image = to_bt709(frame.to_ndarray(format="rgb48le", **matrix(frame)), kind, gamut(frame))
    if has_alpha(frame):
        layers = frame.to_ndarray(format="rgba", **matrix(frame))
        return on_white(image if converted else layers[..., :3], layers[..., 3:])
    return image if converted else frame.to_ndarray(format="rgb24", **matrix(frame))


def on_white(image, alpha):
    """Return an image (H,W,3) uint8, with alpha (H,W,1) uint8, laid over white."""
    if alpha.min() == 255:
        return np.ascontiguousarray(image)
    image, alpha = image.astype(np.uint32), alpha.astype(np.uint32)
    return ((image * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_yuv(frame):
    """Convert an RGB frame of PyAV to yuv420p with BT.709's matrix, in limited range."""
    from av.video.reformatter import ColorRange, Colorspace

    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def tag(encoder, matrix):
    """Tag an encoder's output as BT.709. matrix: whether to tag the YUV matrix and the limited range too."""
    encoder.color_primaries = encoder.color_trc = 1
    if matrix:
        encoder.colorspace, encoder.color_range = 1, 1


# ---- primaries and transfer functions --------------------------------------------------------------------------------
def to_xyz(primaries):
    """Return the matrix (3,3) from linear RGB to CIE XYZ. primaries: the chromaticities (x, y) of red, green, blue and
    white.
    """
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


@functools.cache
def primaries_to_bt709(code):
    """Return the matrix (3,3) from linear RGB with the primaries WIDE[code] to linear RGB with BT.709's primaries.
    White stays white (Bradford's adaptation). If code is None, the primaries are BT.709's, and the matrix is the
    identity.
    """
    if code is None:
        return np.eye(3, dtype=np.float32)
    white, source_white = (BRADFORD @ to_xyz(p).sum(1) for p in (BT709, WIDE[code]))
    adapted = np.linalg.solve(BRADFORD, np.diag(white / source_white) @ BRADFORD)
    return (np.linalg.inv(to_xyz(BT709)) @ adapted @ to_xyz(WIDE[code])).astype(np.float32)


def linear_light(transfer, signal):
    """Return the linear light that a display produces for a `signal` in [0,1]. The white of SDR is 1. transfer: SRGB,
    PQ or HLG; any other code means an SDR display. HLG's system gamma is applied to each channel, as FFmpeg's zscale
    filter does by default; ITU-R BT.2100 applies it to the luminance.
    """
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        return (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * 10000 / WHITE
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        return scene**1.2 * 1000 / WHITE
    if transfer == SRGB:
        return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return signal**GAMMA


@functools.cache
def linear_table(transfer):
    return linear_light(transfer, np.arange(65536) / 65535).astype(np.float32)


@functools.cache
def display_table(transfer):
    """Return a table (4096,) of the 8-bit signals for linear light in [0,1]. The index is 4095 times the square root of
    the light. The signals follow sRGB's curve if transfer is SRGB, else the curve of an SDR display.
    """
    light = (np.arange(4096) / 4095) ** 2
    srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return ((srgb if transfer == SRGB else light ** (1 / GAMMA)) * 255).round().astype(np.uint8)


def to_bt709(image, transfer, primaries):
    """Convert an image (H,W,3) uint16 with this transfer function (as in linear_light) and these primaries (a code of
    WIDE, or None for BT.709's) to uint8 for an SDR display with BT.709's primaries. An image with sRGB's curve keeps
    that curve. Colours too bright or too saturated for the display are clipped.
    """
    to_linear, to_signal = linear_table(transfer), display_table(transfer)
    rotate = primaries_to_bt709(primaries).T
    out = np.empty(image.shape, np.uint8)
    for top in range(0, len(image), STRIP):
        light = to_linear[image[top : top + STRIP]] @ rotate
        steps = np.sqrt(light.clip(0, 1)) * 4095 + 0.5
        out[top : top + STRIP] = to_signal[steps.astype(np.uint16)]
    return out


# ---- photographs -----------------------------------------------------------------------------------------------------
SRGB_GAMMA = 1 / 2.2  # the gAMA of a PNG whose curve is sRGB's
D50 = np.array([0.9642, 1, 0.8249])  # XYZ of the white that ICC profiles refer to
PROFILED_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # {an ICC profile's colour space: PIL's mode}


def matrix_profile(primaries, gamma):
    """Return an ICC profile (bytes) with these primaries and with the curve signal = light**gamma. primaries: the
    chromaticities (x, y) of red, green, blue and white. Raises ValueError for numbers that no profile can describe.
    """

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    try:
        white = BRADFORD @ to_xyz(primaries).sum(1)
        colorants = np.linalg.solve(BRADFORD, np.diag(BRADFORD @ D50 / white) @ BRADFORD) @ to_xyz(primaries)
        curve = b"para" + bytes(8) + fixed(1 / gamma)
        tags = {b"wtpt": D50, b"rXYZ": colorants[:, 0], b"gXYZ": colorants[:, 1], b"bXYZ": colorants[:, 2]}
        tags = {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in tags.items()}
    except (ArithmeticError, np.linalg.LinAlgError, struct.error):
        raise ValueError("has colours that no profile describes") from None
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    at, table = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += struct.pack(">4sII", name, at, len(data))
        at += len(data)
    kind = struct.pack(">I4sI4s4s4s12x4s", at, b"", 0x04000000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (kind.ljust(68, b"\0") + fixed(*D50)).ljust(128, b"\0") + table + b"".join(tags.values())


def profile_of(image):
    """Return the ICC profile (bytes) of a PIL image, or None if the image counts as sRGB. For a PNG without a profile,
    a profile is made from the PNG's gAMA and cHRM chunks. If their values are those of sRGB within libpng's tolerances,
    the PNG counts as sRGB. Raises ValueError if no profile can hold their values.
    """
    gamma, points = image.info.get("gamma"), image.info.get("chromaticity")
    if image.info.get("icc_profile") or gamma is None or "srgb" in image.info:
        return image.info.get("icc_profile")
    white, *primaries = zip(points[::2], points[1::2]) if points else (D65, *BT709[:3])
    primaries = (*primaries, white)
    if abs(gamma / SRGB_GAMMA - 1) < 0.05 and abs(np.subtract(primaries, BT709)).max() < 0.01:
        return None
    return matrix_profile(primaries, gamma)


def has_codes(path):
    """Return whether a file is a PNG with a cICP chunk. This chunk names the colours by codes of H.273, and overrides
    all other colour chunks.
    """
    with open(path, "rb") as file:
        is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
        while is_png and len(head := file.read(8)) == 8 and head[4:] not in (b"cICP", b"IDAT"):
            file.seek(int.from_bytes(head[:4]) + 4, 1)
    return is_png and head[4:] == b"cICP"


@functools.lru_cache(8)
def profile_transform(profile):
    """Return (mode, transform) for an ICC profile (bytes): PIL's mode for the images that the profile describes, "L",
    "RGB" or "CMYK", and the transform of such images to sRGB. The transform is None if it would change no colour
    visibly, as with sRGB's own profile. Raises ValueError for a profile that cannot be used.
    """
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILED_MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError, AttributeError):
        raise ValueError("has a colour profile that cannot be used") from None
    if mode == "CMYK":
        return mode, transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
    sample = Image.fromarray(colors if mode == "RGB" else colors[..., 0])
    moved = np.array(ImageCms.applyTransform(sample, transform)).astype(int) - np.array(sample.convert("RGB"))
    return mode, transform if abs(moved).max() > 2 else None


def transform_for(image, profile):
    """Return profile_transform(profile) for a PIL image and its profile, or ("RGB", None) if it has no profile. Raises
    ValueError if the profile cannot be used or does not fit the image's mode.
    """
    if not profile:
        return "RGB", None
    mode, transform = profile_transform(profile)
    source = image.mode if image.mode in ("L", "CMYK") else "RGB"
    if mode not in (source, "RGB") or (source, mode) == ("CMYK", "RGB"):
        raise ValueError("has a colour profile for pictures of another kind")
    return mode, transform


def to_srgb(image, source):
    """Convert a PIL image in mode L, RGB or CMYK to RGB in sRGB. source: the PIL image from which `image` was made; its
    profile is used. A profile that cannot be used, or is for another mode, is ignored, as in browsers.
    """
    from PIL import ImageCms

    try:
        mode, transform = transform_for(image, profile_of(source))
    except ValueError:
        mode, transform = "RGB", None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)


def profile_notes(image):
    """Return a list of remarks on a PIL image's profile. The list becomes part of video.Shown.notes."""
    try:
        return ["colour profile"] if transform_for(image, profile_of(image))[1] else []
    except ValueError:
        return ["unusable profile"]
