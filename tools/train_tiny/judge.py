"""Tells colour, shape and motion of a clip by measuring it: no network, so nothing here was trained with `tiny`.

What is not near enough to anything drawn is nothing: half of a drawn shape's moment, of a drawn motion's way, height and
turn are the bounds.

The background is a ramp between the medians of the first and of the last rows, over all columns and frames; a pixel belongs
to the shape as far as it differs from that. Centre and area follow from the sums, the shape from moments of the angle around
the centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_tiny.world import COLOURS, POLYGONS

CORNERS = (2, 3, 4, 5)  # nothing drawn has two, but what is long does
POLYGON_OF = {corners: shape for shape, (corners, _) in POLYGONS.items()}
DRAWN = torch.tensor([math.inf, 0.55, 0.29, 0.62])  # moments of drawn triangles, squares and stars
LONG = 0.15
ROUND = 0.08  # no moment of a drawn disc or ring is above 0.01
COLOUR_NEAR = 0.5  # mean over the pixels, RGB from -1 to 1; the nearest two colours are 0.68 apart
SHIFT, HOP, GROWTH, TURN = 28.0, 18.0, 1.7, math.pi / 2  # half of what is drawn; of growth, the square root
HOLLOW = 0.21  # compactness of a drawn disc is 0.16, of a ring 0.26
NOTHING = "nothing"
BAND = 16  # rows at the top and at the bottom that tell the background


@dataclass(frozen=True, slots=True)
class Seen:
    """`colour`, `shape`, `motion`: words of the world, or "nothing".

    `shift`: pixels right and down. `hop`: pixels above the way from first to last place, less those half-way through.
    `growth`: of the radius, as a ratio. `turn`: radians.
    """

    colour: str
    shape: str
    motion: str
    shift: tuple[float, float] = (0.0, 0.0)
    hop: float = 0.0
    growth: float = 1.0
    turn: float = 0.0


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in -1 .. 1, in dB."""
    return float(-10 * torch.log10((a - b).square().mean() / 4))


def pixels(frames: Tensor) -> Tensor:
    """[F, H, W, 3] uint8 -> [3, F, H, W] in -1 .. 1."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def cover(frames: Tensor) -> Tensor:
    """How far each pixel belongs to the shape: [3, F, H, W] in -1 .. 1 -> [F, H, W] in 0 .. 1."""
    height = frames.shape[2]
    top, bottom = (rows.flatten(1).median(dim=1).values for rows in (frames[:, :, :BAND], frames[:, :, -BAND:]))  # [3]
    share = ((torch.arange(height) - BAND / 2 + 0.5) / (height - BAND))[:, None]
    ground = top[:, None, None, None] * (1 - share) + bottom[:, None, None, None] * share  # [3, 1, H, 1]
    difference = (frames - ground).norm(dim=0)
    return ((difference - 0.25) / 0.35).clamp(0, 1)


def moments(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each frame: area [F], centre [F, 2] as (x, y), compactness [F], and the angular moments [F, corners].

    Compactness is the mean squared distance from the centre over the area: 1 / 2 pi for a disc, more with a hole or spikes.
    The moment of k corners is the mean of exp(i k angle), weighted by the squared distance: its size is near 0 but for
    shapes of k corners, its angle turns k times as fast as the shape.
    """
    area = weight.sum((1, 2)).clamp_min(1e-6)
    x = torch.arange(weight.shape[2], dtype=weight.dtype)
    y = torch.arange(weight.shape[1], dtype=weight.dtype)
    centre = torch.stack([(weight.sum(1) * x).sum(1) / area, (weight.sum(2) * y).sum(1) / area], 1)
    dx = (x - centre[:, :1])[:, None, :]  # [F, 1, W]
    dy = (y - centre[:, 1:])[:, :, None]  # [F, H, 1]
    squared = weight * (dx.square() + dy.square())
    angle = torch.atan2(dy, dx)
    total = squared.sum((1, 2)).clamp_min(1e-6)
    angular = torch.stack([(squared * torch.exp(1j * k * angle)).sum((1, 2)) / total for k in CORNERS], 1)
    return area, centre, total / area.square(), angular


def shape_of(area: Tensor, compactness: Tensor, angular: Tensor) -> str:
    """By the angular moments, or where there are none by compactness; medians over the frames that show something."""
    shown = area > 40
    sizes = angular[shown].abs().median(dim=0).values
    if sizes[0] > LONG:
        return NOTHING
    likeness = sizes / DRAWN
    if likeness.max() > 0.5:
        return POLYGON_OF[CORNERS[int(likeness.argmax())]]
    if sizes.max() > ROUND:
        return NOTHING
    return "ring" if compactness[shown].median() > HOLLOW else "circle"


def see(frames: Tensor) -> Seen:
    """What a clip [3, F, H, W] in -1 .. 1 shows."""
    weight = cover(frames)
    area, centre, compactness, angular = moments(weight)
    if int((area > 40).sum()) < len(area) // 2:
        return Seen(NOTHING, NOTHING, NOTHING)
    solid = (weight > 0.95).float()
    table = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    # of each pixel: half red and half blue is not purple
    far = torch.stack([((c[:, None, None, None] - frames).norm(dim=0) * solid).sum() for c in table]) / solid.sum().clamp_min(1)
    colour = list(COLOURS)[int(far.argmin())] if far.min() < COLOUR_NEAR else NOTHING

    last = len(area) - 1
    shift = ((centre[last] - centre[0])[0].item(), (centre[last] - centre[0])[1].item())
    # how high it rises above the line from its first to its last place, in both halves of the clip
    time = torch.linspace(0, 1, len(area))
    rise = centre[0, 1] + shift[1] * time - centre[:, 1]
    hop = min(rise[: last // 2].max().item(), rise[last // 2 :].max().item()) - max(0.0, rise[last // 2].item())
    growth = float((area[-3:].mean() / area[:3].mean()).sqrt())
    sizes = angular.abs().mean(0)
    strongest = int((sizes / DRAWN).argmax())
    steps = (angular[1:, strongest] * angular[:-1, strongest].conj()).angle()
    turn = float(steps.sum()) / CORNERS[strongest] if sizes.max() > ROUND else 0.0  # what is round does not show it
    return Seen(colour, shape_of(area, compactness, angular), _motion(shift, hop, growth, turn), shift, hop, growth, turn)


def _motion(shift: tuple[float, float], hop: float, growth: float, turn: float) -> str:
    if growth > GROWTH:
        return "grow"
    if hop > HOP:
        return "bounce"
    if max(abs(shift[0]), abs(shift[1])) > SHIFT:
        if abs(shift[0]) > abs(shift[1]):
            return "right" if shift[0] > 0 else "left"
        return "down" if shift[1] > 0 else "up"
    return "rotate" if abs(turn) > TURN else NOTHING
