"""The folder that Animate's preprocessing writes, and the inputs that the model gets from it, clip by clip.

n frames of the driving video    H W height and width (px) of the pose video    c frames of a clip (4k+1)
S side of the face crops (px)    r frames of a clip that are known from the previous clip (1 or 5)
T' = 1 + (c-1)/4 latent frames, z channels of latents (16), h w latent pixels

src_pose.mp4 and src_face.mp4 supply the motion; src_ref.png shows the character. To replace a person in the driving
video, the folder also holds src_bg.mp4, the video without that person, and src_mask.mp4, white where the person was.
prepare.py makes such a folder.
Source: official wan/animate.py and wan/modules/animate/preprocess.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanowan.errors import BadInput, Skip
from nanowan.variants.image import encode_still
from nanowan.video import open_image, read_frames

OVERLAPS = 1, 5  # the numbers of frames that a clip can take over from the previous one
SIZE_MULTIPLE = 16  # H and W are multiples of this: a token is a patch of 2x2 latent pixels
FACE_SIDE = 512  # side in px of the face crops that the released model takes
FACE_AREA = 1.3  # the area of a crop, divided by that of the box around the landmarks


@dataclass
class Source:
    """The contents of a folder written by preprocessing. pose (H,W,3), face (S,S,3), background (H,W,3) and mask (H,W):
    lists of n uint8 arrays; background and mask are None unless a person is replaced. reference: the character's
    picture, letterboxed (H,W,3). fps: frames per second of the pose video.
    """

    pose: list
    face: list
    reference: np.ndarray
    background: list | None
    mask: list | None
    fps: float


class ClipInputs(NamedTuple):
    """The DiT's inputs for one clip. y (1,4+z,1+T',h,w): a mask (4 channels), then latents (z channels); y is
    concatenated after the channels of the noise. pose (1,z,T',h,w): latents of the pose video. face (1,3,c,S,S): face
    crops in [-1,1].
    """

    y: torch.Tensor
    pose: torch.Tensor
    face: torch.Tensor


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_source(folder, replace, face_side):
    """Return the Source that a folder holds. replace: whether to read the background and the mask too. face_side: the
    side, in px, of the face crops that the model takes (512). Raises BadInput if a file is missing or cannot be read,
    or if sizes or lengths do not fit each other or the model.
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
    """Return (all frames as uint8 arrays (H,W,3), frames per second) of a video file. Raises BadInput if it cannot be
    read.
    """
    images, last = [], 0.0
    try:
        for frame in read_frames(Path(file)):
            images.append(frame.shown())
            last = frame.seconds
    except Skip as e:
        raise BadInput(f"{file}: {e}") from None
    if not images:
        raise BadInput(f"{file}: has no frames")
    return images, (len(images) - 1) / last if last else 0.0


# ---- the rules by which the folder is made ---------------------------------------------------------------------------
def frame_indices(times, video_fps, fps):
    """Return the indices of the frames that are used when a video is resampled to `fps` frames per second: for each
    multiple of 1/fps, the frame nearest in time. times: when the video shows each frame, in seconds. video_fps: the
    video's own number of frames per second.
    """
    wanted = np.arange(int(len(times) / video_fps * fps)) / fps
    between = np.interp(wanted, times, range(len(times)))
    return between.round(6).round().astype(int).tolist()  # halves are rounded to even


def area_size(width, height, area):
    """Return the (width, height) px of a video with about `area` px and about the aspect ratio of width x height. Sides
    are rounded down to multiples of 16. Raises BadInput if a side would be 0.
    """
    h = math.sqrt(area / (width / height))
    w, h = (int(side // SIZE_MULTIPLE * SIZE_MULTIPLE) for side in (area / h, h))
    if not w or not h:
        raise BadInput(f"--size of {area} px is too small for {width}x{height}: a side would be under {SIZE_MULTIPLE}")
    return w, h


def resize(image, width, height, area=False):
    """Resize an image (h,w,...), uint8 or float32, to width x height px without antialiasing, as OpenCV's INTER_LINEAR
    does. With `area`, which works only for making an image smaller, each new pixel is the mean of the area that it
    covers, as with INTER_AREA. uint8 values may differ from OpenCV's by 1.
    """
    x = torch.from_numpy(np.ascontiguousarray(image)).reshape(*image.shape[:2], -1).permute(2, 0, 1).float()
    if area:
        x = shrink(shrink(x, width).transpose(1, 2), height).transpose(1, 2)
    else:
        x = F.interpolate(x[None], (height, width), mode="bilinear", align_corners=False)[0]
    x = x.permute(1, 2, 0).reshape(height, width, *image.shape[2:])
    return (x if image.dtype == np.float32 else x.round().byte()).numpy()


def shrink(x, pixels):
    """Shrink x (...,n) to (...,pixels). Each new pixel is the mean of x between the pixel's edges, computed from a
    running sum.
    """
    n = x.shape[-1]
    sums = F.pad(x.double().cumsum(-1), (1, 0))
    edges = torch.arange(pixels + 1).double() * n / pixels
    i = edges.long().clamp(max=n - 1)
    at = torch.lerp(sums[..., i], sums[..., i + 1], edges - i)
    return (at.diff() * pixels / n).float()


def letterbox_place(w, h, width, height):
    """Return the (left, top, width, height) px of an image of w x h px after it is letterboxed into width x height px.
    Raises BadInput if a side of the resized image would be 0.
    """
    if h / w > height / width:
        new_w, new_h = int(height / h * w), height
    else:
        new_w, new_h = width, int(width / w * h)
    if not new_h or not new_w:
        raise BadInput(f"a picture of {w}x{h} px is too narrow for a video of {width}x{height}")
    return (width - new_w) // 2, (height - new_h) // 2, new_w, new_h


def letterbox(image, width, height, area=False):
    """Resize an image (h,w,...), uint8, to fit into width x height px, and fill the remaining area with black bars.
    area: as in `resize`.
    """
    left, top, w, h = letterbox_place(image.shape[1], image.shape[0], width, height)
    framed = np.zeros((height, width, *image.shape[2:]), np.uint8)
    framed[top : top + h, left : left + w] = resize(image, w, h, area)
    return framed


def fit_frame(image, width, height):
    """Letterbox a frame (h,w,...) into the size of the resulting video, width x height px. prepare.py does this if a
    person is replaced.
    """
    return letterbox(image, width, height, area=width * height < image.shape[0] * image.shape[1])


def face_crop(image, box):
    """Crop an image (h,w,3) around a face, and resize the crop to FACE_SIDE x FACE_SIDE px.

    box: (x1,y1,x2,y2) px, the bounding box of the face's landmarks, from the brows to the chin. The crop's sides are
    sqrt(1.3) times those of the box. A quarter of the added height is below the box and the rest above it. The crop
    ends at the edges of the image. Raises BadInput if the crop is empty.
    """
    x1, y1, x2, y2 = box
    dx, dy = ((math.sqrt(FACE_AREA) - 1) * side for side in (x2 - x1, y2 - y1))
    left, right = int(max(x1 - dx / 2, 0)), int(min(x2 + dx / 2, image.shape[1]))
    top, bottom = int(max(y1 - dy * 3 / 4, 0)), int(min(y2 + dy / 4, image.shape[0]))
    if left >= right or top >= bottom:
        raise BadInput(f"the face at {x1:.0f},{y1:.0f} to {x2:.0f},{y2:.0f} px is not in the picture")
    return resize(image[top:bottom, left:right], FACE_SIDE, FACE_SIDE)


def grow_mask(mask, iterations=3, k=7, w_len=1, h_len=1):
    """Return a mask (H,W) of 0 and 1, enlarged so that it hides more of a person. The mask is dilated `iterations`
    times with a kernel of k x k px (k odd). Then its bounding box is divided into w_len x h_len cells, and every cell
    that contains a 1 is filled. The last row and column of the box belong to no cell. With 0 iterations, the mask is
    returned unchanged.
    """
    if not iterations or not mask.any():
        return mask
    reach = iterations * (k // 2)
    x = torch.from_numpy(mask)[None].float()
    for across in (0, 1):  # first along the columns, then along the rows
        kernel, padding = [1, 1], [0, 0]
        kernel[across], padding[across] = 2 * reach + 1, reach
        x = F.max_pool2d(x, kernel, 1, padding)
    mask = x[0].byte().numpy()
    (rows,), (columns,) = mask.any(1).nonzero(), mask.any(0).nonzero()
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    height, width = (max(1, int(side)) for side in ((bottom - top) / h_len, (right - left) / w_len))
    for y in range(top, bottom, height):
        for x in range(left, right, width):
            cell = mask[y : min(y + height, bottom), x : min(x + width, right)]
            cell[:] = cell.any()
    return mask


# ---- clips -----------------------------------------------------------------------------------------------------------
def clip_ranges(n, length, overlap):
    """Return [(start, end)] of the clips of `length` frames that together cover a driving video of n frames. Each clip
    begins with the last `overlap` frames of the previous one. The last clip may end after frame n; `ping_pong` supplies
    the frames after n. Raises BadInput unless overlap is 1 or 5, length is 4k+1 and at least 2 * overlap, and n is
    above overlap.
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
    """Return frames start..end-1, span = (start, end), of a video that plays forwards, then backwards, and so on. Where
    the direction changes, the first or last frame of the video is shown only once.
    """
    last = len(video) - 1
    return [video[last - abs(last - i % (2 * last))] for i in range(*span)]


# ---- conditions ------------------------------------------------------------------------------------------------------
def fold_mask(mask):
    """Fold a mask of frames (c,h,w) into a mask of latent frames (4,T',h,w). The four channels hold the four frames of
    each latent frame; those of latent frame 0 all hold frame 0.
    """
    mask = torch.cat([mask[:1].expand(4, -1, -1), mask[1:]])
    return mask.unflatten(0, (-1, 4)).transpose(0, 1)


def pixels(images, device):
    """Return a list of uint8 arrays (H,W,3) as one tensor (1,3,len(images),H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(images)).to(device).permute(3, 0, 1, 2)[None] / 127.5 - 1


def encode_reference(vae, clip, source, device):
    """Return the two inputs that are made from the reference picture and that all clips share: latent frame 0 of
    ClipInputs.y, (1,4+z,1,h,w), and the picture's CLIP tokens, as VisionEncoder.encode returns them.
    """
    image = pixels([source.reference], device)  # (1,3,1,H,W)
    return mark_given(vae.encode(image)), clip.encode(image[:, :, 0])


def mark_given(z):
    """Return latents (1,z,T,h,w) with 4 channels of ones in front, (1,4+z,T,h,w). The ones tell the DiT that these
    latents are given.
    """
    return torch.cat([torch.ones_like(z[:, :4]), z], 1)


def encode_clip(vae, source, span, reference, known=None):
    """Return the ClipInputs of one clip. span: its (start, end), from clip_ranges. reference: latent frame 0 of y, as
    encode_reference returned it. known (1,3,r,H,W): the last frames of the previous clip, as the VAE decoded them; None
    for the first clip.
    """
    pose, face = (pixels(ping_pong(video, span), reference.device) for video in (source.pose, source.face))
    scene = None if source.background is None else [ping_pong(v, span) for v in (source.background, source.mask)]
    return ClipInputs(encode_scene(vae, pose.shape, reference, scene, known), vae.encode(pose), face)


def encode_scene(vae, shape, reference, scene=None, known=None):
    """Return the y of ClipInputs for one clip. shape: (1,3,c,H,W), the shape of the clip in pixels. scene: the clip's
    background and mask, two lists of arrays as in Source, or None if nobody is replaced. reference, known: as in
    encode_clip.

    After the reference, y holds the latents of a video that begins with the known frames and goes on with the
    background or, if there is no scene, with grey frames. The mask in y is 1 where the DiT is to keep what it gets: in
    the reference, in the known frames and, if there is a scene, where the scene's mask shows no person.
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
    z = encode_still(vae, video) if scene is None else vae.encode(video)
    return torch.cat([reference, torch.cat([fold_mask(mask)[None], z], 1)], 2)
