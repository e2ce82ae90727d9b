"""Make Animate-14B's input folder (sample.py --src_root_path) from a driving video and a character's picture.

python -m nanowan.variants.animate.prepare --video V.mp4 --image I.png --out DIR \\
    --process_checkpoint Wan2.2-Animate-14B/process_checkpoint
python -m nanowan.variants.animate.prepare --video V.mp4 --image I.png --out DIR \\
    --pose_video POSE.mp4 --faces FACES.json
python -m nanowan.variants.animate.prepare ... --mask_video MASK.mp4    # the character in the person's place

The files are lossless: src_pose.mp4 (with the sound of V), src_face.mp4, src_ref.png, and with --mask_video also
src_bg.mp4 and src_mask.mp4. Poses come from a video, from keypoints, or from the official networks, which need
onnxruntime. Unlike the official code, this script does not make masks with SAM2, and does not fit poses to the
character's proportions (--retarget_flag, --use_flux). docs/variants.md describes the JSON files.
Source: official wan/modules/animate/preprocess.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanowan.errors import BadInput, Skip, cli
from nanowan.settings import parse_size
from nanowan.variants.animate.inputs import (
    area_size,
    face_crop,
    fit_frame,
    frame_indices,
    grow_mask,
    letterbox,
    letterbox_place,
)
from nanowan.variants.animate.pose import FACE, KEYPOINTS, Networks, draw_pose
from nanowan.variants.sidecars import MAX_DIFFERENCE
from nanowan.video import Frame, frame_rate, has_sound, open_image, probe, read_windows, sound_delay, write_frames


# ---- the inputs ------------------------------------------------------------------------------------------------------
class Clip(NamedTuple):
    """A video file, and the flag by which it was given. times: when its frames are shown, in seconds. width, height:
    its size in px when it is shown with square pixels. fps: frames per second.
    """

    file: str
    flag: str
    times: list
    width: int
    height: int
    fps: float

    @property
    def count(self):
        return len(self.times)

    def frames(self, seconds, desc=None):
        """Yield a frame (H,W,3) uint8 for each time in `seconds`: the frame that is shown nearest to this time.
        seconds: in ascending order. desc: the title of a progress bar, or None for no bar.
        """
        with (
            tqdm(total=len(seconds), desc=desc, unit="frame", disable=None if desc else True) as bar,
            decoding(self.file, self.flag),
        ):
            for (frame,) in read_windows(Path(self.file), [[t] for t in seconds], Frame.shown):
                yield frame
                bar.update()


@contextlib.contextmanager
def decoding(file, flag):
    """Return a context manager in which a Skip, raised for a video that cannot be read, becomes a BadInput."""
    try:
        yield
    except Skip as e:
        raise BadInput(f"{flag} {file}: {e}") from None


def open_video(file, flag, like=None):
    """Open a video file and return its Clip. like: a Clip whose size and length the video must have, or None. Raises
    BadInput if the file cannot be read or differs from `like`.
    """
    with decoding(file, flag):
        shown = probe(Path(file))
        if not shown.times:
            raise Skip("is no video")
        fps = rate(shown, file)
    clip = Clip(file, flag, shown.times, shown.width, shown.height, fps)
    if like and (clip.width, clip.height) != (like.width, like.height):
        raise BadInput(
            f"{flag} {file}: {clip.width}x{clip.height} px, should be {like.width}x{like.height} as in {like.file}"
        )
    if (
        like
        and clip.count != like.count
        and (math.isclose(fps, like.fps, rel_tol=0.01) or abs(clip.times[-1] - like.times[-1]) > MAX_DIFFERENCE)
    ):
        raise BadInput(f"{flag} {file}: {clip.count} frames, should be {like.count} as in {like.file}")
    return clip


def rate(shown, file):
    """Return the frames per second of a video: the rate that the file states or, if it states none or the rate varies,
    the mean rate. shown: the video's video.Shown. Raises Skip if the file states none and has only one frame.
    """
    if "variable rate" not in shown.notes and (fps := frame_rate(file)):
        return fps
    if len(shown.times) < 2:
        raise Skip("says no frame rate")
    return (len(shown.times) - 1) / shown.times[-1]


def read_json(file, flag):
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"{flag} {file}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def to_array(value, file, flag):
    """Convert nested lists to an array of finite numbers. Raises BadInput if this is impossible."""
    try:
        array = np.array(value, float)
    except (ValueError, TypeError):
        array = np.array(np.nan)
    if not np.isfinite(array).all():
        raise BadInput(f"{flag} {file}: should hold lists of equal lengths of numbers; docs/variants.md shows them")
    return array


def read_keypoints(file, video):
    """Return the whole-body keypoints (count,133,3), x and y in px and a score, of the `count` frames of a Clip, read
    from a file. Raises BadInput if the file holds something else.
    """
    points = to_array(read_json(file, "--keypoints"), file, "--keypoints")
    if points.shape != (video.count, KEYPOINTS, 3):
        raise BadInput(
            f"--keypoints {file}: {'x'.join(map(str, points.shape)) or 'one'} numbers, should be {video.count} frames "
            f"of {KEYPOINTS} points of x, y and score, as {video.file} has {video.count} frames"
        )
    return points


def read_faces(file, video):
    """Return the boxes (count,4), x1 y1 x2 y2 px, around a face's landmarks, one for each frame of a Clip.

    The JSON file may hold one box, or one set of landmarks, for all frames; a list of boxes or of sets of landmarks,
    one for each frame; or {frame number: box}. In the last case, the boxes of other frames are interpolated linearly.
    Raises BadInput if the file holds something else.
    """
    value = read_json(file, "--faces")
    if isinstance(value, dict):
        boxes = between_frames(value, file, video.count)
    else:
        boxes = to_array(value, file, "--faces")
        if boxes.ndim == 1 or (boxes.ndim == 2 and boxes.shape[1] in (2, 3)):
            boxes = np.broadcast_to(boxes, (video.count, *boxes.shape))
    points = boxes.ndim == 3 and boxes.shape[1] > 1 and boxes.shape[2] in (2, 3)
    if not points and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise BadInput(f"--faces {file}: should hold boxes [x1,y1,x2,y2] or points [[x,y],...]; see docs/variants.md")
    if len(boxes) != video.count:
        raise BadInput(f"--faces {file}: {len(boxes)} entries, should be {video.count}, one per frame of {video.file}")
    if points:
        return landmark_boxes(boxes)
    x1, y1, x2, y2 = boxes.T
    inside = (x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= video.width) & (y2 <= video.height)
    if not inside.all():
        i = inside.argmin()
        raise BadInput(
            f"--faces {file}: box {boxes[i].tolist()} of frame {i}, should have x1 < x2 and y1 < y2 within "
            f"{video.width}x{video.height} px"
        )
    return boxes


def between_frames(boxes, file, count):
    """Return the boxes (count,4) of all frames, interpolated linearly from {frame number: box}. Before the first and
    after the last given box, boxes are constant.
    """
    wrong = [key for key in boxes if not (key.isdecimal() and int(key) < count)]
    if wrong or not boxes:
        raise BadInput(f"--faces {file}: frame {wrong[0] if wrong else 'none'}, should be 0 to {count - 1}")
    boxes = {int(key): box for key, box in boxes.items()}
    known = sorted(boxes)
    sides = to_array([boxes[i] for i in known], file, "--faces")
    if sides.shape != (len(known), 4):
        raise BadInput(f"--faces {file}: by frame number there should be boxes [x1,y1,x2,y2]")
    return np.stack([np.interp(range(count), known, side) for side in sides.T], 1)


def landmark_boxes(points):
    """Return the bounding boxes (n,4) of n sets of points (n,p,2 or 3)."""
    return np.concatenate([points[..., :2].min(1), points[..., :2].max(1)], 1)


# ---- the folder ------------------------------------------------------------------------------------------------------
def check_out(path):
    """Raise BadInput if the path exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput(f"--out {path}: is there already, should be a new or an empty folder")


@contextlib.contextmanager
def new_folder(path):
    """Return a context manager that gives a new folder under a temporary name. The folder gets its real name if the
    block succeeds, and is removed otherwise. A temporary folder that a killed run left behind is removed first.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Work(NamedTuple):
    """The inputs from which main makes the files of the folder.

    indices: the frames of `video` that are used, in order of time. size: (width, height) px of the result. mask_video:
    a Clip if a person is replaced, else None. pose_video: a Clip, or None. keypoints (n,133,3), faces (n,4): the
    keypoints and the face boxes in the n used frames, in px of the frames that the method `frames` yields; None if
    neither a file nor a network gave them.
    """

    video: Clip
    indices: list
    fps: float
    size: tuple
    pose_video: Clip | None
    mask_video: Clip | None
    keypoints: np.ndarray | None
    faces: np.ndarray | None

    @property
    def seconds(self):
        """The times, in seconds, at which the used frames are shown. From the pose and mask videos, the frames nearest
        to these times are taken.
        """
        return [self.video.times[i] for i in self.indices]

    @property
    def frame_size(self):
        """The (width, height) px of the frames in which poses and faces are found: the size of the result if a person
        is replaced, else the size of `video`.
        """
        return self.size if self.mask_video else (self.video.width, self.video.height)

    def frames(self, desc):
        """Yield the used frames (H,W,3), letterboxed into `size` if a person is replaced."""
        for image in self.video.frames(self.seconds, desc):
            yield fit_frame(image, *self.size) if self.mask_video else image

    def find_keypoints(self, networks):
        return np.stack([networks.keypoints(image) for image in self.frames("keypoints")])

    def face_images(self):
        """Yield the face crop (1,S,S,3) of each used frame."""
        for i, (image, box) in enumerate(zip(self.frames("src_face"), self.faces)):
            try:
                yield face_crop(image, box)[None]
            except BadInput as e:
                raise BadInput(
                    f"{self.video.file}, frame {self.indices[i]}: {e}; --faces FILE says where it is"
                ) from None

    def pose_images(self):
        """Yield the skeleton (1,H,W,3) of each used frame."""
        if self.pose_video:
            images = self.pose_video.frames(self.seconds, "src_pose")
        else:
            images = (
                draw_pose(points, *self.frame_size)
                for points in tqdm(self.keypoints, "src_pose", unit="frame", disable=None)
            )
        for image in images:
            yield letterbox(image, *self.size)[None]

    def masks(self, desc=None, **growth):
        """Yield the mask (H,W) of 0 and 1 of each used frame. growth: the keyword arguments of grow_mask. desc: the
        title of a progress bar, or None for no bar.
        """
        for image in self.mask_video.frames(self.seconds, desc):
            yield grow_mask((fit_frame(image[..., 0], *self.size) > 127).astype(np.uint8), **growth)

    def background_images(self, **growth):
        """Yield each used frame (1,H,W,3), with the masked person filled in black. growth: as in `masks`."""
        for image, mask in zip(self.frames("src_bg"), self.masks(**growth)):
            yield (image * (1 - mask)[..., None])[None]

    def mask_images(self, **growth):
        """Yield the mask of each used frame as an image (1,H,W,3) of 0 and 255. growth: as in `masks`."""
        for mask in self.masks("src_mask", **growth):
            yield np.repeat(mask[None, ..., None] * np.uint8(255), 3, -1)


def gather(args, reference):
    """Return the Work that the flags describe. reference: (width, height) px of the character's picture. Raises
    BadInput for files and sizes that cannot be used.
    """
    video = open_video(args.video, "--video")
    pose_video, mask_video = (
        open_video(file, f"--{flag}", video) if (file := getattr(args, flag)) else None
        for flag in ("pose_video", "mask_video")
    )
    fps = video.fps if args.fps == -1 else args.fps
    indices = frame_indices(video.times, video.fps, fps)
    if len(indices) < 2:
        raise BadInput(f"--video {video.file}: {len(indices)} frames at {fps:g} per second, should be at least 2")
    w, h = parse_size(args.size)
    if w < 1 or h < 1:
        raise BadInput(f"--size {args.size}: should be above 0")
    size = area_size(*((video.width, video.height) if mask_video else reference), w * h)
    keypoints = read_keypoints(args.keypoints, video) if args.keypoints else None
    faces = read_faces(args.faces, video) if args.faces else None
    if faces is None and keypoints is not None:
        faces = landmark_boxes(keypoints[:, FACE])
    scale, shift = np.ones(2), np.zeros(2)
    if mask_video:
        *shift, w, h = letterbox_place(video.width, video.height, *size)
        scale = np.array([w / video.width, h / video.height])
    if keypoints is not None:
        keypoints = keypoints[indices] * [*scale, 1] + [*shift, 0]
    if faces is not None:
        faces = faces[indices] * [*scale, *scale] + [*shift, *shift]
    work = Work(video, indices, fps, size, pose_video, mask_video, keypoints, faces)
    if args.process_checkpoint:
        keypoints = work.find_keypoints(Networks(args.process_checkpoint))
        work = work._replace(keypoints=keypoints, faces=landmark_boxes(keypoints[:, FACE]) if faces is None else faces)
    return work


# ---- the script ------------------------------------------------------------------------------------------------------
def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--video", help="the driving video; its sound is kept")
    add("--image", help="a picture of the character; it is copied unchanged")
    add("--out", help="the folder to create; it must be new or empty")
    add(
        "--size",
        default="1280x720",
        help="WxH in px, which sets only the area; the picture sets the aspect ratio or, with --mask_video, the video "
        "does (default: %(default)s)",
    )
    add("--fps", type=float, default=30, help="frames per second; -1 keeps the video's own rate (default: 30)")
    add = p.add_argument_group("poses and faces").add_argument
    add(
        "--process_checkpoint",
        help="the folder process_checkpoint of the official checkpoint; its yolov10m and vitpose find poses and faces",
    )
    add("--keypoints", help="a JSON file with 133 whole-body keypoints per frame, from which poses and faces are made")
    add("--pose_video", help="a video of poses drawn already, with the size and length of --video")
    add("--faces", help="a JSON file with a box around the face, or points of the face, for each frame or for all")
    add = p.add_argument_group("replacing a person").add_argument
    add("--mask_video", help="a video that is white where the person is, with the size and length of --video")
    add(
        "--iterations",
        type=int,
        default=3,
        help="number of passes that dilate the mask; 0 leaves it unchanged (default: 3)",
    )
    add(
        "--k",
        type=int,
        default=7,
        help="odd width in px of the dilation kernel; a pass adds k//2 px on each side (default: 7)",
    )
    add(
        "--w_len",
        type=int,
        default=1,
        help="number of columns in a grid over the mask's box; cells that touch the mask are filled (default: 1)",
    )
    add("--h_len", type=int, default=1, help="number of rows in the grid over the mask's box (default: 1)")
    return p.parse_args(argv)


def check_flags(args):
    """Raise BadInput for flags that are missing, out of range, or mutually exclusive."""
    for flag in ("video", "image", "out"):
        if not getattr(args, flag):
            raise BadInput(f"--{flag} is needed")
    if not (args.fps == -1 or 0 < args.fps < math.inf):
        raise BadInput(f"--fps {args.fps}: should be above 0, or -1 for the video's own")
    if args.keypoints and args.process_checkpoint:
        raise BadInput("--keypoints and --process_checkpoint both give keypoints; give one of them")
    keypoints = args.keypoints or args.process_checkpoint
    if keypoints and args.pose_video and args.faces:
        flag = "keypoints" if args.keypoints else "process_checkpoint"
        raise BadInput(f"--{flag} is not used beside --pose_video and --faces; leave one of the three out")
    for flag, what in (("pose_video", "poses"), ("faces", "faces")):
        if not (keypoints or getattr(args, flag)):
            raise BadInput(f"the {what} are missing: give --{flag}, --keypoints or --process_checkpoint")
    for flag, least in (("iterations", 0), ("k", 1), ("w_len", 1), ("h_len", 1)):
        if getattr(args, flag) < least:
            raise BadInput(f"--{flag} {getattr(args, flag)}: at least {least}")
    if args.k % 2 == 0:
        raise BadInput(f"--k {args.k}: should be odd")


def main():
    args = arguments()
    check_flags(args)
    out = Path(args.out).absolute()
    check_out(out)
    work = gather(args, open_image(args.image).size)
    print(f"{len(work.indices)} frames of {work.size[0]}x{work.size[1]} px at {work.fps:g} per second")
    with new_folder(out) as folder:
        growth = dict(iterations=args.iterations, k=args.k, w_len=args.w_len, h_len=args.h_len)
        sound = {"sound": args.video, "sound_offset": sound_delay(args.video)} if has_sound(args.video) else {}
        settings = json.dumps(vars(args), ensure_ascii=False)
        write_frames(folder / "src_pose.mp4", work.pose_images(), work.fps, settings, lossless=True, **sound)
        write_frames(folder / "src_face.mp4", work.face_images(), work.fps, lossless=True)
        if work.mask_video:
            write_frames(folder / "src_bg.mp4", work.background_images(**growth), work.fps, lossless=True)
            write_frames(folder / "src_mask.mp4", work.mask_images(**growth), work.fps, lossless=True)
        shutil.copyfile(args.image, folder / "src_ref.png")
    print(f"{args.out}: for sample.py --src_root_path{' and --replace_flag' * bool(args.mask_video)}")


if __name__ == "__main__":
    cli(main)
