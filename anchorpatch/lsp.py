"""The LSP core (section 3.3): decide on class and branch, then select patches.

Algorithm 1 stands here twice: `localize_one` as the paper prints it, and `localize` for a batch,
which is what the package runs. Tensors in, tensors out; no model and no file. Everything gives
the same result on CPU and GPU, bit for bit, for the same input: torch's arg max takes the first of
equal values on both, sorts leave no ties, and IoU is compared through whole pixels.

Shapes use N images, C classes, and an H x W heatmap per branch. Branches come in the order
of `SCALES` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import NonFiniteError, SettingsError
from anchorpatch.settings import SCALES, STRIDE, LspSettings

__all__ = [
    "Decision",
    "Patches",
    "candidate_count",
    "crop",
    "decide",
    "grid_size",
    "iou",
    "localize",
    "localize_one",
    "select",
]


# torch 2.6 does not tell exporting from compiling, for which what exporters take is right too.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def grid_size(height: int, width: int, theta: int) -> tuple[int, int]:
    """Return (H, W), the locations that a patch of side ``theta`` has in an image (section 3.1).

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        theta: side of the patch, in pixels.

    Raises:
        SettingsError: the image is smaller than the patch.

    Example:
        >>> [grid_size(224, 224, theta) for theta in SCALES]
        [(21, 21), (17, 17), (15, 15)]
    """
    if min(height, width) < theta:
        raise SettingsError(
            f"an image of {height} x {width} px is smaller than a patch of {theta} x {theta} px"
        )
    return (height - theta) // STRIDE + 1, (width - theta) // STRIDE + 1


def iou(a: tuple[int, int], b: tuple[int, int], theta: int) -> float:
    """Return the IoU (Eq. 9) of two patches of side ``theta`` with corners (y, x), in pixels.

    Example:
        >>> iou((0, 0), (0, 0), 63), iou((0, 0), (0, 63), 63)
        (1.0, 0.0)
        >>> round(iou((0, 0), (0, 8), 63), 3)  # neighbors on the grid
        0.775
    """
    overlap = max(0, theta - abs(a[0] - b[0])) * max(0, theta - abs(a[1] - b[1]))
    return overlap / (2 * theta * theta - overlap)


def candidate_count(height: int, width: int, coverage: float) -> int:
    """Return how many locations Algorithm 1 visits: floor(H * W * P), at least one.

    Example:
        >>> candidate_count(21, 21, 0.3), candidate_count(15, 15, 0.001)
        (132, 1)
    """
    return max(1, int(height * width * coverage))


class Decision(NamedTuple):
    """Which class and which branch, for N images.

    Attributes:
        branch_class: Y, the class that each branch predicts (N, 3), int64.
        branch_prob: P, its probability (N, 3).
        predicted: gamma, the class of the image (N,), int64.
        branch: index into `SCALES` of the chosen branch (N,), int64.
    """

    branch_class: Tensor
    branch_prob: Tensor
    predicted: Tensor
    branch: Tensor


def decide(probabilities: Tensor | NDArray[Any]) -> Decision:
    """Decide on the class and the branch of each image (Eq. 6-8); ties go to the smaller scale.

    Args:
        probabilities: softmax outputs B of the branches (N, 3, C), a tensor or an array.

    Raises:
        SettingsError: they have another shape.

    Example:
        Two branches agree on class 0; of them the second is the more confident one.

        >>> p = torch.tensor([[[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]])
        >>> decision = decide(p)
        >>> decision.predicted.item(), SCALES[decision.branch.item()]
        (0, 95)
    """
    probabilities = torch.as_tensor(probabilities)
    if probabilities.ndim != 3 or probabilities.shape[1] != len(SCALES):
        raise SettingsError(
            f"probabilities: expected (N, {len(SCALES)}, C), got {tuple(probabilities.shape)}"
        )
    branch_class = probabilities.argmax(-1)
    branch_prob = probabilities.amax(-1)
    # (7): the class of two or three branches, else that of the most confident branch.
    votes = (branch_class[:, :, None] == branch_class[:, None, :]).sum(-1)
    majority = branch_class.gather(1, votes.argmax(-1)[:, None])[:, 0]
    surest = branch_class.gather(1, branch_prob.argmax(-1)[:, None])[:, 0]
    predicted = torch.where(votes.amax(-1) >= 2, majority, surest)
    # (8): of the branches whose own maximum is at gamma, the most confident. A tie may have given
    # such a branch another class; and a compiler may compute the softmax twice, with another last
    # bit.
    at_gamma = probabilities.gather(2, predicted[:, None, None].expand(-1, len(SCALES), 1))[..., 0]
    agrees = (branch_prob == at_gamma) | (branch_class == predicted[:, None])
    branch = (agrees * branch_prob).argmax(-1)
    return Decision(branch_class, branch_prob, predicted, branch)


class Patches(NamedTuple):
    """Selected patches of N images, strongest first; rows from ``counts`` on are zero.

    Attributes:
        counts: patches of each image (N,), int64, at least 1.
        corners: top-left (y, x) of each patch in pixels (N, K, 2), int64.
        scores: activation of each patch (N, K), float32.
    """

    counts: Tensor
    corners: Tensor
    scores: Tensor


def localize_one(
    heatmap: Sequence[Sequence[float]],
    theta: int,
    max_patches: int,
    iou_threshold: float,
    coverage: float,
) -> list[tuple[int, int]]:
    """Run Algorithm 1 on one heatmap, line by line as the paper prints it.

    For reading and for comparison: `localize` finds the same patches of a whole batch, with one
    step for all images where this has a loop.

    Args:
        heatmap: M, H rows of W finite activations.
        theta: side of the patches in pixels.
        max_patches: K.
        iou_threshold: T.
        coverage: P.

    Returns:
        Top-left (y, x) of each patch in pixels, strongest first.

    Example:
        >>> heatmap = torch.arange(441.0).view(21, 21).tolist()
        >>> localize_one(heatmap, 63, max_patches=2, iou_threshold=0.3, coverage=0.3)
        [(160, 160), (160, 120)]
    """
    height, width = len(heatmap), len(heatmap[0])
    grid = [(h, w) for h in range(height) for w in range(width)]
    # Line 1. The sort is stable: of equal activations the first in reading order is stronger.
    coordinates = sorted(grid, key=lambda at: heatmap[at[0]][at[1]], reverse=True)
    patches: list[tuple[int, int]] = []
    for h, w in coordinates[: candidate_count(height, width, coverage)]:  # lines 2, 3
        patch = h * STRIDE, w * STRIDE  # Map, of section 3.1
        if all(iou(patch, other, theta) < iou_threshold for other in patches):  # line 4
            patches.append(patch)  # line 5
        if len(patches) == max_patches:  # lines 7, 8
            break
    return patches


def localize(
    heatmaps: Sequence[Tensor | NDArray[Any]],
    branch: Tensor | NDArray[Any],
    settings: LspSettings,
    *,
    scales: Sequence[int] = SCALES,
    check: bool = True,
) -> Patches:
    """Run Algorithm 1 on a batch whose images have chosen different branches.

    Images are worked on side by side: round k of the loop takes the k-th patch of every
    image, so there are at most max(K) rounds whatever N is, and no wait for the GPU.

    Args:
        heatmaps: M of each branch, (N, H_j, W_j) each, of the class that was decided on. Arrays
            of numpy are taken too, also for ``branch``.
        branch: index into ``scales`` of each image's branch (N,), int64.
        settings: K, T and P.
        scales: side of the patches of each branch, in pixels.
        check: look at the values of ``branch`` and for NaN and infinity first. That waits for the
            GPU; a caller that switches it off answers for them.

    Raises:
        SettingsError: the heatmaps are not N grids of one size of image, or ``branch`` does not
            choose among them.
        NonFiniteError: a heatmap of a chosen branch holds NaN or infinity.
    """
    maps = [torch.as_tensor(heatmap) for heatmap in heatmaps]
    branch = torch.as_tensor(branch)
    if not torch.compiler.is_compiling():
        _check_shapes(maps, branch, scales)
    branch = branch.long()
    shapes = tuple((m.shape[1], m.shape[2]) for m in maps)
    n = max(candidate_count(h, w, p) for (h, w), p in zip(shapes, settings.coverage, strict=True))
    if check and len(branch):
        low, high = int(branch.min()), int(branch.max())
        if low < 0 or high >= len(scales):
            raise SettingsError(
                f"branch: expected indices from 0 to {len(scales) - 1}, got {low} to {high}"
            )
        _check_finite(maps, branch)
    # torch.compile looks behind a cache anyway, and warns of it.
    parameters = _parameters.__wrapped__ if torch.compiler.is_compiling() else _parameters
    table, rounds = parameters(shapes, tuple(scales), settings, branch.device)
    width, limit, theta, k, conflict = torch.split(table[branch], 1, dim=1)
    candidate, score = _strongest(_chosen(maps, branch), n)
    row = torch.div(candidate, width, rounding_mode="trunc")
    corner = torch.stack((row, candidate - row * width)).mul_(STRIDE)  # (2, N, n)

    # The candidates lie from the weakest to the strongest, and `left` numbers them 1 ... n, or 0
    # for one that is out or beyond the limit. The largest number left is the next patch; column
    # 0 is its place when there is none, far from everything.
    corner = torch.nn.functional.pad(corner, (1, 0), value=-(1 << 20))
    number = torch.arange(n + 1, dtype=torch.int32, device=branch.device)
    left = number * (number > n - limit)
    order = torch.arange(max(settings.max_patches), dtype=torch.int32, device=branch.device)
    rows: list[Tensor] = []  # of each round, (N, 1)
    gap, overlap = torch.empty_like(corner), torch.empty_like(left)  # fresh memory costs time
    for _ in range(min(rounds, n)):
        strongest = left.amax(1, keepdim=True)
        # An exported graph has all rounds, as it cannot look at values between them.
        if left.device.type == "cpu" and not _exporting() and not strongest.any():
            break
        rows.append(strongest)
        here = corner.gather(2, strongest.long().expand(2, -1, -1))
        if _exporting():
            gap = (theta - (corner - here).abs()).clamp(min=0)
            left = left * (gap[0] * gap[1] < conflict)
            continue
        torch.sub(corner, here, out=gap).abs_().neg_().add_(theta).clamp_(min=0)
        torch.mul(gap[0], gap[1], out=overlap)
        # Negative, so all ones when shifted, where the overlap is below the first conflicting one.
        left &= overlap.sub_(conflict).bitwise_right_shift_(31)
    nothing = [torch.zeros_like(left[:, :1])] * (len(order) - len(rows))
    picked = torch.cat((*rows, *nothing), 1)
    # Where no two patches conflict, Algorithm 1 takes the strongest candidates one by one.
    alone = (n - order) * (order < limit)
    picked = torch.where(conflict == theta * theta, alone, picked)
    taken = (picked > 0) & (order < k)
    column = (picked - 1).clamp_(min=0).long()
    corners = corner[..., 1:].gather(2, column.expand(2, -1, -1)).permute(1, 2, 0).long()
    scores = torch.where(taken, score.gather(1, column), 0.0)  # -inf, behind a small map
    return Patches(taken.sum(1), corners * taken[..., None], scores)


def select(
    heatmap: Tensor | NDArray[Any],
    theta: int,
    max_patches: int,
    iou_threshold: float,
    coverage: float,
) -> Patches:
    """Run Algorithm 1 on heatmaps of one scale, (N, H, W).

    Example:
        >>> m = torch.arange(441.0).view(1, 21, 21)
        >>> select(m, 63, max_patches=2, iou_threshold=0.3, coverage=0.3).corners.tolist()
        [[[160, 160], [160, 120]]]
    """
    settings = LspSettings((max_patches,) * 3, iou_threshold, (coverage,) * 3)
    heatmap = torch.as_tensor(heatmap)
    branch = torch.zeros(len(heatmap), dtype=torch.long, device=heatmap.device)
    return localize((heatmap,) * 3, branch, settings, scales=(theta,) * 3)


def _check_shapes(heatmaps: Sequence[Tensor], branch: Tensor, scales: Sequence[int]) -> None:
    """Raise SettingsError unless the heatmaps can be those of N images of one size."""
    shapes = [tuple(heatmap.shape) for heatmap in heatmaps]
    n = tuple(branch.shape)
    if len(n) != 1 or branch.is_floating_point() or branch.dtype == torch.bool:
        raise SettingsError(f"branch: expected whole numbers (N,), got {branch.dtype} {n}")
    if len(shapes) != len(scales) or any(len(s) != 3 or (s[0],) != n or 0 in s[1:] for s in shapes):
        raise SettingsError(
            f"heatmaps: expected (N, H, W) for each of the scales {', '.join(map(str, scales))} px "
            f"with N = {n[0]} as in branch, got {', '.join(map(str, shapes))}"
        )
    # The smallest image that has each grid; up to STRIDE - 1 pixels more change nothing.
    images = [
        [theta + STRIDE * (side - 1) for side in shape[1:]]
        for theta, shape in zip(scales, shapes, strict=True)
    ]
    if any(max(sides) - min(sides) >= STRIDE for sides in zip(*images, strict=True)):
        found = ", ".join(
            f"{h} x {w} for {theta} px (an image of {height} x {width} px)"
            for theta, (_, h, w), (height, width) in zip(scales, shapes, images, strict=True)
        )
        raise SettingsError(f"heatmaps: expected the grids of one size of image, got {found}")


def _check_finite(heatmaps: Sequence[Tensor], branch: Tensor) -> None:
    # 0 * x is 0 for every finite x and NaN for any other; far quicker than looking for extremes.
    zero = torch.stack([(m.flatten(1) * 0).sum(1) == 0 for m in heatmaps], 1)
    finite = zero.gather(1, branch[:, None])
    if not bool(finite.all()):
        bad = int((~finite[:, 0]).nonzero()[0])
        raise NonFiniteError(f"the heatmap of image {bad} of the batch holds NaN or infinity")


def _chosen(heatmaps: Sequence[Tensor], branch: Tensor) -> Tensor:
    """Gather each image's heatmap as float32 (N, L); behind the end of a shorter one is -inf."""
    longest = max(m.shape[1:].numel() for m in heatmaps)
    rows = torch.full((branch.shape[0], len(heatmaps), longest), -torch.inf, device=branch.device)
    for j, heatmap in enumerate(heatmaps):
        rows[:, j, : heatmap.shape[1:].numel()] = heatmap.flatten(1)
    return rows[torch.arange(branch.shape[0], device=branch.device), branch]


def _strongest(activation: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return position int32 (N, n) and value (N, n) of the n strongest activations of each row.

    They come from the weakest to the strongest; of equal ones the smaller position is stronger.
    Sorted are int64 keys, no two of them equal: the high word is the activation's bits in an
    order that integers share, and the low word counts positions down.
    """
    if _exporting():
        # ONNX has no keys in two parts, and its sorts leave equal values in an order of their own:
        # so first by value, then by position among equal ones.
        value, found = activation.sort(dim=1, descending=True)
        rank = torch.nn.functional.pad((value[:, 1:] != value[:, :-1]).cumsum(1), (1, 0))
        rank = rank * activation.shape[1]
        found = (rank + found).sort(dim=1).values - rank
        return found[:, :n].flip(1).int(), value[:, :n].flip(1)
    bits = (activation + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one value
    last = activation.shape[1] - 1
    position = torch.arange(last, -1, -1, dtype=torch.int32, device=activation.device)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = ordered.long().bitwise_left_shift_(32).bitwise_or_(position)
    if key.device.type == "cpu" and not torch.compiler.is_compiling():
        # numpy sorts integers with vector instructions, 2 to 4 times as fast as torch.
        best = torch.from_numpy(np.sort(key.numpy())[:, -n:])
    else:
        best = key.topk(n, dim=1).values.flip(1)
    found = last - best.int()  # int() keeps the low word
    return found, activation.gather(1, found.long())


@lru_cache(maxsize=64)
def _parameters(
    shapes: tuple[tuple[int, int], ...],
    scales: tuple[int, ...],
    settings: LspSettings,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Return the numbers of each branch, and how many patches need a look at conflicts.

    The numbers are int32 (branches, 5): grid width, candidates, theta, K, least conflicting
    overlap.
    """
    rows = [
        (w, candidate_count(h, w, p), theta, k, _conflicting(h, w, theta, settings.iou_threshold))
        for (h, w), theta, k, p in zip(
            shapes, scales, settings.max_patches, settings.coverage, strict=True
        )
    ]
    rounds = max(k if conflict < theta * theta else 0 for _, _, theta, k, conflict in rows)
    return torch.tensor(rows, dtype=torch.int32, device=device), rounds


def _conflicting(height: int, width: int, theta: int, threshold: float) -> int:
    """Return the smallest overlap in pixels, of all that occur, whose IoU is not below T.

    IoU rises with the overlap, so this one number divides the two. A patch conflicts with itself.
    """
    sides = [max(0, theta - STRIDE * i) for i in range(max(height, width))]
    overlaps = {a * b for a in sides[:height] for b in sides[:width]}
    return min(o for o in overlaps if o / (2 * theta * theta - o) >= threshold)


def crop(images: Tensor, image: Tensor, corner: Tensor, theta: int) -> Tensor:
    """Cut patches out of images.

    Args:
        images: pixels (N, H, W, 3), any dtype.
        image: row of ``images`` for each patch (m,), int64.
        corner: top-left (y, x) of each patch in pixels (m, 2), int64.
        theta: side of the patches in pixels.

    Returns:
        Pixels (m, theta, theta, 3), contiguous.
    """
    windows = images.unfold(1, theta, 1).unfold(2, theta, 1)
    cut = windows[image, corner[:, 0], corner[:, 1]]  # (m, 3, theta, theta)
    return cut.permute(0, 2, 3, 1).contiguous()
