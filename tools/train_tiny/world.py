"""The world that `tiny` knows: one shape on a plain background for 33 frames, with captions in English and Chinese.

Everything is drawn from a seed, so a clip is never stored. Lengths are pixels, angles radians, time runs 0 .. 1 over
the clip; N clips, F frames, H W height and width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 128
FRAMES = 33

COLOURS = {  # RGB, 0 .. 255
    "red": (222, 38, 38),
    "orange": (245, 138, 25),
    "yellow": (245, 222, 45),
    "green": (45, 165, 70),
    "blue": (40, 85, 222),
    "purple": (150, 55, 190),
}
BACKGROUNDS = {  # RGB at the top and at the bottom of the frame
    "white": ((245, 245, 245), (245, 245, 245)),
    "grey": ((130, 130, 130), (130, 130, 130)),
    "black": ((18, 18, 18), (18, 18, 18)),
    "sky": ((120, 180, 240), (228, 241, 250)),
}
# corners and the radius of the inner corners relative to the outer ones; a polygon's inner corners lie on its edges
POLYGONS = {"square": (4, math.cos(math.pi / 4)), "triangle": (3, 0.5), "star": (5, 0.42)}
SHAPES = ("circle", "square", "triangle", "star", "ring")
MOTIONS = ("left", "right", "up", "down", "bounce", "rotate", "grow")
SIZES = {"small": 20, "large": 30}  # radius
MARGIN = 6  # between the shape and the frame where it starts or ends

WORDS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "white": ("white",),
    "grey": ("grey", "gray"),
    "black": ("black", "dark"),
    "sky": ("sky", "blue sky"),
    "left": ("moves left", "moving left", "slides to the left", "goes from right to left"),
    "right": ("moves right", "moving right", "slides to the right", "goes from left to right"),
    "up": ("moves up", "moving up", "rises to the top", "goes upwards"),
    "down": ("moves down", "moving down", "falls to the bottom", "goes downwards"),
    "bounce": ("bounces", "bouncing", "bounces up and down", "jumps up and down"),
    "rotate": ("rotates", "rotating", "spins", "turns around"),
    "grow": ("grows", "growing", "gets bigger", "becomes larger"),
}
CHINESE = {
    "red": ("红色", "红"), "orange": ("橙色", "橘色"), "yellow": ("黄色", "黄"),
    "green": ("绿色", "绿"), "blue": ("蓝色", "蓝"), "purple": ("紫色", "紫"),
    "circle": ("圆形", "圆球", "球"), "square": ("正方形", "方块"), "triangle": ("三角形",),
    "star": ("星星", "五角星"), "ring": ("圆环", "环"),
    "small": ("小",), "large": ("大",),
    "white": ("白色背景",), "grey": ("灰色背景",), "black": ("黑色背景",), "sky": ("天空背景",),
    "left": ("向左移动", "从右向左移动"), "right": ("向右移动", "从左向右移动"),
    "up": ("向上移动", "上升"), "down": ("向下移动", "下落"),
    "bounce": ("弹跳", "上下弹跳"), "rotate": ("旋转", "转动"), "grow": ("变大", "逐渐变大"),
}  # fmt: skip
TEMPLATES = (
    "a {size} {colour} {shape} {motion} on a {background} background",
    "a {colour} {shape} {motion} on a {background} background",
    "A {colour} {shape} {motion}, {background} background.",
    "The {size} {shape} is {colour} and {motion}.",
    "The {shape} is {colour} and {motion} in front of a {background} background.",
    "On a {background} background, a {size} {colour} {shape} {motion}.",
    "a {colour} {shape} {motion}",
    "{colour} {shape} {motion}",
)
CHINESE_TEMPLATES = (
    "一个{colour}的{size}{shape}在{background}上{motion}",
    "一个{colour}的{shape}{motion}，{background}",
    "{background}上，{colour}{shape}{motion}。",
    "一个{colour}的{shape}{motion}",
)


@dataclass(frozen=True, slots=True)
class Clip:
    """What a clip shows, in words, and where things are.

    `start` and `end`: centre (x, y). `radius`: at the end. `first_radius`: share of it at the start. `hop`: height of
    each of two bounces. `turn`: angle turned in all.
    """

    colour: str
    shape: str
    motion: str
    background: str
    size: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    first_radius: float = 1.0
    hop: float = 0.0
    turn: float = 0.0

    @property
    def held_out(self) -> bool:
        """One in ten triples of colour, shape and motion is kept from the VAE and the DiT: the evaluation asks for these."""
        place = list(COLOURS).index(self.colour) + 2 * SHAPES.index(self.shape) + 3 * MOTIONS.index(self.motion)
        return place % 10 == 7


def draw(rng: random.Random) -> Clip:
    """A clip at random. What turns must show that it does: no circle or ring rotates."""
    shape, motion, size = rng.choice(SHAPES), rng.choice(MOTIONS), rng.choice(list(SIZES))
    while motion == "rotate" and shape not in POLYGONS:
        motion = rng.choice(MOTIONS)
    radius = 36 if motion == "grow" else SIZES[size]
    near, far = radius + MARGIN, SIDE - radius - MARGIN
    across = rng.uniform(near, far)
    middle = (SIDE / 2 + rng.uniform(-12, 12), SIDE / 2 + rng.uniform(-12, 12))
    start, end = {
        "left": ((far, across), (near, across)),
        "right": ((near, across), (far, across)),
        "up": ((across, far), (across, near)),
        "down": ((across, near), (across, far)),
        "bounce": ((across, far), (across, far)),
    }.get(motion, (middle, middle))
    return Clip(
        colour=rng.choice(list(COLOURS)), shape=shape, motion=motion, background=rng.choice(list(BACKGROUNDS)), size=size,
        start=start, end=end, radius=radius, first_radius=0.35 if motion == "grow" else 1.0,
        hop=36.0 if motion == "bounce" else 0.0, turn=math.pi if motion == "rotate" else 0.0,
    )  # fmt: skip


def draw_many(seed: int, count: int, *, held_out: bool) -> list[Clip]:
    """`count` clips of the held-out triples or of the others; the same ones for the same seed."""
    rng = random.Random(seed)
    clips: list[Clip] = []
    while len(clips) < count:
        clip = draw(rng)
        if clip.held_out == held_out:
            clips.append(clip)
    return clips


def caption(clip: Clip, rng: random.Random) -> str:
    """One of the clip's captions; a third of them Chinese."""
    words = {name: getattr(clip, name) for name in ("colour", "shape", "motion", "background", "size")}
    if clip.motion == "grow":
        words["size"] = ""
    table, templates = (CHINESE, CHINESE_TEMPLATES) if rng.random() < 1 / 3 else (WORDS, TEMPLATES)
    said = {name: rng.choice(table.get(word, (word,))) for name, word in words.items()}
    text = " ".join(rng.choice(templates).format(**said).split())
    return text.replace("a orange", "an orange").replace("A orange", "An orange")


def render(
    clips: Sequence[Clip],
    frames: Sequence[int] = range(FRAMES),
    corners: Sequence[tuple[int, int]] | None = None,
    side: int = SIDE,
    device: str | torch.device = "cpu",
) -> Tensor:
    """[N, 3, F, side, side] fp32 in -1 .. 1, with edges one pixel soft. `corners`: (x, y) of each clip's crop."""
    time = torch.tensor(list(frames), device=device) / (FRAMES - 1)  # [F]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    x, y, radius, angle = path(clips, time, column)  # [N, F]
    corner_x, corner_y = (column([corner[axis] for corner in corners or [(0, 0)] * len(clips)]) for axis in (0, 1))
    pixel = torch.arange(side, device=device) + 0.5
    dx = (corner_x + pixel)[:, None, None, :] - x[:, :, None, None]  # [N, F, 1, W]
    dy = (corner_y + pixel)[:, None, :, None] - y[:, :, None, None]  # [N, F, H, 1]
    inside = torch.stack(
        [distance(c.shape, dx[i], dy[i], radius[i, :, None, None], angle[i, :, None, None]) for i, c in enumerate(clips)]
    )
    cover = (0.5 - inside).clamp(0, 1)[:, None]  # [N, 1, F, H, W]

    colour = torch.tensor([COLOURS[c.colour] for c in clips], device=device)
    top, bottom = (torch.tensor([BACKGROUNDS[c.background][i] for c in clips], device=device) for i in (0, 1))
    ramp = ((corner_y + pixel) / SIDE)[:, None, None, :, None]  # [N, 1, 1, H, 1]
    ground = top[:, :, None, None, None] * (1 - ramp) + bottom[:, :, None, None, None] * ramp
    image = ground + (colour[:, :, None, None, None] - ground) * cover
    return image.clamp(0, 255) / 127.5 - 1


def path(
    clips: Sequence[Clip], time: Tensor, column: Callable[[Sequence[float]], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y of the centre, radius and angle, each [N, F], at the times [F]."""
    x, y = (
        column([c.start[axis] for c in clips]) * (1 - time) + column([c.end[axis] for c in clips]) * time for axis in (0, 1)
    )
    y = y - column([c.hop for c in clips]) * (2 * math.pi * time).sin().abs()
    first = column([c.first_radius for c in clips])
    radius = column([c.radius for c in clips]) * (first + (1 - first) * time)
    return x, y, radius, column([c.turn for c in clips]) * time


def distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside. dx, dy: from the centre; a shape's corner points up."""
    length = (dx.square() + dy.square()).sqrt()
    if shape == "circle":
        return length - radius
    if shape == "ring":
        return (length - 0.75 * radius).abs() - 0.25 * radius
    corners, inner = POLYGONS[shape]
    sector = 2 * math.pi / corners
    quarter = math.pi / 4 if shape == "square" else 0.0
    turned = torch.atan2(dx, -dy) - angle - quarter
    folded = ((turned + sector / 2) % sector - sector / 2).abs()
    # the edge runs from the outer corner (1, 0) to the inner one
    edge = (inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2))
    norm = math.hypot(*edge)
    return (edge[1] * (length * folded.cos() - radius) - edge[0] * length * folded.sin()) / norm
