"""The folder that Animate's preprocessing writes, and what the model is given of it, clip by clip.

n real frames, H W px (the pose video's)    c frames of a clip (4k+1), r of them known from the clip before (1 or 5)
T' = 1 + (c-1)/4 latent frames, h w latent pixels    S side of the face crops

src_pose.mp4 and src_face.mp4 drive; src_ref.png is the character. To replace a person in the driving video there are
src_bg.mp4, the video without that person, and src_mask.mp4, white where the person was.
Source: official wan/animate.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import BadInput
from media import Skip, open_image, read_frames

OVERLAPS = 1, 5  # how many frames a clip can take over from the one before
SIZE_MULTIPLE = 16  # of H and W: a token is a patch of 2x2 latent pixels


@dataclass
class Source:
    """Frames as lists of uint8 arrays, all of length n: pose (H,W,3), face (S,S,3), and to replace a person background
    (H,W,3) and mask (H,W), else None. reference: the character, letterboxed (H,W,3). fps: of the pose video.
    """

    pose: list
    face: list
    reference: np.ndarray
    background: list | None
    mask: list | None
    fps: float


class ClipInputs(NamedTuple):
    """What the DiT is given of one clip: y (1,4+z,1+T',h,w) behind the noise, pose latents (1,z,T',h,w), and the face
    crops (1,3,c,S,S) in [-1,1].
    """

    y: torch.Tensor
    pose: torch.Tensor
    face: torch.Tensor


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_source(folder, replace, face_side):
    """The Source in a folder; replace: with background and mask; face_side: what the model takes (512). Raises BadInput
    where a file is missing or cannot be read, or sizes and lengths do not fit each other or the model.
    """
    folder, names = Path(folder), ["pose", "face", *(["bg", "mask"] if replace else [])]
    files = {name: folder / f"src_{name}.mp4" for name in names} | {"ref": folder / "src_ref.png"}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise BadInput(
            f"--src_root_path {folder}: has no {', '.join(missing)}; it should be the folder that Wan2.2-Animate's "
            f"preprocessing wrote{', with its --replace_flag' * replace}"
        )
    videos, fps = {}, 0.0
    for name in names:
        videos[name], rate = read_video(files[name])
        fps = rate if name == "pose" else fps
    height, width = videos["pose"][0].shape[:2]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise BadInput(f"{files['pose']}: {width}x{height} px; both sides should be multiples of {SIZE_MULTIPLE}")
    for name, video in videos.items():
        h, w = (face_side, face_side) if name == "face" else (height, width)
        if video[0].shape[:2] != (h, w):
            raise BadInput(
                f"{files[name]}: {video[0].shape[1]}x{video[0].shape[0]} px, should be {w}x{h} "
                f"(ffmpeg -vf scale={w}:{h} makes it so)"
            )
        if len(video) != len(videos["pose"]):
            raise BadInput(f"{files[name]}: {len(video)} frames, should be {len(videos['pose'])} as in src_pose.mp4")
    reference = letterbox(np.array(open_image(files["ref"], "--src_root_path")), width, height)
    mask = [frame[..., 0] for frame in videos["mask"]] if replace else None
    return Source(videos["pose"], videos["face"], reference, videos.get("bg"), mask, fps)


def read_video(file):
    """(all frames of a video as uint8 arrays (H,W,3), frames per second). Raises BadInput."""
    images, last = [], 0.0
    try:
        for frame in read_frames(file):
            images.append(np.array(frame.image.convert("RGB")))
            last = frame.seconds
    except Skip as e:
        raise BadInput(f"{file}: {e}") from None
    if not images:
        raise BadInput(f"{file}: has no frames")
    return images, (len(images) - 1) / last if last else 0.0


def letterbox(image, width, height):
    """An image (h,w,3) uint8 resized into width x height px, with black bars where its aspect differs. Bilinear without
    antialiasing, as OpenCV does it; the bytes may differ from OpenCV's by 1.
    """
    h, w = image.shape[:2]
    if h / w > height / width:
        new_h, new_w = height, int(height / h * w)
    else:
        new_h, new_w = int(width / w * h), width
    if not new_h or not new_w:
        raise BadInput(f"a reference image of {w}x{h} px is too narrow for a video of {width}x{height}")
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (new_h, new_w), mode="bilinear", align_corners=False).round().byte()[0].permute(1, 2, 0)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    framed = np.zeros((height, width, 3), np.uint8)
    framed[top : top + new_h, left : left + new_w] = x.numpy()
    return framed


# ---- clips -----------------------------------------------------------------------------------------------------------
def clip_ranges(n, length, overlap):
    """[(start, end)] of the clips of `length` frames in which n real frames are made; each begins with the last
    `overlap` frames of the one before. The last one may end behind frame n: see `ping_pong`. Raises BadInput.
    """
    if overlap not in OVERLAPS:
        raise BadInput(f"--refert_num {overlap}: should be 1 or 5")
    if length % 4 != 1 or length < 2 * overlap:
        raise BadInput(
            f"--frames {length}: should be 4k+1, and at least {2 * overlap} with --refert_num {overlap}, which is how "
            "many of them the clip before has made already"
        )
    if n <= overlap:
        raise BadInput(f"src_pose.mp4: {n} frames, should be more than --refert_num {overlap}")
    return [(start, start + length) for start in range(0, n - overlap, length - overlap)]


def ping_pong(video, span):
    """The frames start..end-1 of a video that is played forwards, then backwards, and so on, its ends never twice."""
    last = len(video) - 1
    return [video[last - abs(last - i % (2 * last))] for i in range(*span)]


# ---- conditions ------------------------------------------------------------------------------------------------------
def fold_mask(mask):
    """A mask (c,h,w) per frame -> (4,T',h,w) per latent frame, whose channels are its four frames; latent frame 0 has
    frame 0 four times.
    """
    mask = torch.cat([mask[:1].expand(4, -1, -1), mask[1:]])
    return mask.unflatten(0, (-1, 4)).transpose(0, 1)


def pixels(images, device):
    """uint8 arrays (H,W,3) -> (1,3,len(images),H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(images)).to(device).permute(3, 0, 1, 2)[None] / 127.5 - 1


def encode_reference(vae, clip, source, device):
    """What all clips share: y of the reference's latent frame (1,4+z,1,h,w), and CLIP's tokens of it (1,n,C)."""
    image = pixels([source.reference], device)  # (1,3,1,H,W)
    return mark_given(vae.encode(image)), clip.encode(image[:, :, 0])


def mark_given(z):
    """Latents (1,z,T,h,w) behind a mask that says that all of them are given: (1,4+z,T,h,w)."""
    return torch.cat([torch.ones_like(z[:, :4]), z], 1)


def encode_clip(vae, source, span, reference, known=None):
    """ClipInputs of one of clip_ranges. reference: the y of encode_reference, on the device to use. known (1,3,r,H,W):
    the last frames of the clip before as the VAE decoded them.
    """
    pose, face = (pixels(ping_pong(video, span), reference.device) for video in (source.pose, source.face))
    scene = None if source.background is None else [ping_pong(v, span) for v in (source.background, source.mask)]
    return ClipInputs(encode_scene(vae, pose.shape, reference, scene, known), vae.encode(pose), face)


def encode_scene(vae, shape, reference, scene=None, known=None):
    """The y of ClipInputs, of a clip of pixels `shape` (1,3,c,H,W). scene: its background and its mask, two lists of
    arrays as in Source, or None where nobody is replaced. reference, known: as in encode_clip.

    What y encodes is the known frames and then the background, or grey where there is none; its mask is 1 where that
    is to stay.
    """
    device, latent_size = reference.device, reference.shape[3:]
    if scene is None:
        video, mask = torch.zeros(shape, device=device), torch.zeros(shape[2], *latent_size, device=device)
    else:
        video, stride = pixels(scene[0], device), shape[3] // latent_size[0]
        persons = np.stack([frame[::stride, ::stride] for frame in scene[1]])
        mask = 1 - torch.from_numpy(persons).to(device) / 255  # (c,h,w)
    if known is not None:
        video[:, :, : known.shape[2]] = known.to(video)
        mask[: known.shape[2]] = 1
    z = vae.encode(video, still=scene is None)  # grey frames need not be computed again and again
    return torch.cat([reference, torch.cat([fold_mask(mask)[None], z], 1)], 2)
