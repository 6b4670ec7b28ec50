"""The releases once more, token by token: plain loops over Python floats, written from their description.

Nothing of `llava` is imported and nothing is vectorised, so that a slip in the product cannot be repeated here. A view
is a list of N numbers, a crop grid is `(cols, rows)`, and a sequence is a list of `(view, patch)` pairs and `NL`.
"""

import math
import struct
from collections.abc import Sequence
from fractions import Fraction

NL = "NL"
Entry = tuple[int, int] | str
Map = Sequence[float]


def unpadded_box(image_size: tuple[int, int], crops: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """`(left, top, right, bottom)` of the canvas cells that show the image."""
    width, height = image_size
    canvas_width, canvas_height = crops[0] * side, crops[1] * side
    if width / height > canvas_width / canvas_height:
        pad = (canvas_height - int(height * (canvas_width / width))) // 2
        return 0, pad, canvas_width, canvas_height - pad
    pad = (canvas_width - int(width * (canvas_height / height))) // 2
    return pad, 0, canvas_width - pad, canvas_height


def valid_patches(image_size: tuple[int, int], crops: tuple[int, int], side: int) -> list[list[int]]:
    """Patch ids of every crop that show the image, in reading order."""
    left, top, right, bottom = unpadded_box(image_size, crops, side)
    found = []
    for crop in range(crops[0] * crops[1]):
        x0, y0 = crop % crops[0] * side, crop // crops[0] * side
        mine = []
        for patch in range(side * side):
            x, y = x0 + patch % side, y0 + patch // side
            if left <= x < right and top <= y < bottom:
                mine.append(patch)
        found.append(mine)
    return found


def resize(plane: list[list[float]], width: int, height: int) -> list[list[float]]:
    """Bilinear resize, sample points at pixel centres, coordinates clamped at the edges."""

    def neighbours(i: int, size: int, source: int) -> tuple[int, int, float]:
        at = min(max((i + 0.5) * source / size - 0.5, 0.0), source - 1.0)
        first = int(at)
        return first, min(first + 1, source - 1), at - first

    result = []
    for y in range(height):
        y0, y1, fy = neighbours(y, height, len(plane))
        line = []
        for x in range(width):
            x0, x1, fx = neighbours(x, width, len(plane[0]))
            upper = plane[y0][x0] * (1 - fx) + plane[y0][x1] * fx
            lower = plane[y1][x0] * (1 - fx) + plane[y1][x1] * fx
            line.append(upper * (1 - fy) + lower * fy)
        result.append(line)
    return result


def projected(thumbnail: Map, image_size: tuple[int, int], crops: tuple[int, int], side: int) -> list[dict[int, float]]:
    """The thumbnail's score under every valid patch: one `{patch: score}` per crop."""
    left, top, right, bottom = unpadded_box(image_size, crops, side)
    plane = [[float(thumbnail[y * side + x]) for x in range(side)] for y in range(side)]
    large = resize(plane, right - left, bottom - top)
    found = []
    for crop, patches in enumerate(valid_patches(image_size, crops, side)):
        x0, y0 = crop % crops[0] * side - left, crop // crops[0] * side - top
        found.append({p: large[y0 + p // side][x0 + p % side] for p in patches})
    return found


def region_sums(thumbnail: Map, crops: tuple[int, int], side: int) -> list[float]:
    """Sum of the thumbnail's scores over each crop's region; what does not divide goes to the last."""
    cols, rows = crops
    sums = []
    for row in range(rows):
        for col in range(cols):
            y_end = side if row == rows - 1 else (row + 1) * (side // rows)
            x_end = side if col == cols - 1 else (col + 1) * (side // cols)
            total = 0.0
            for y in range(row * (side // rows), y_end):
                for x in range(col * (side // cols), x_end):
                    total += float(thumbnail[y * side + x])
            sums.append(total)
    return sums


def preliminary_ratios(sums: Sequence[float], ratio: float, temperature: float = 10.0) -> list[float]:
    """Eq. 3-5: ratios of the crops before anything is clipped."""
    weights = [math.exp((s - max(sums)) / temperature) for s in sums]
    shares = [w / (sum(weights) + 1e-8) for w in weights]
    return [ratio * (1 + share - sum(shares) / len(shares)) for share in shares]


def released_ratios(sums: Sequence[float], ratio: float, temperature: float = 10.0) -> list[float]:
    """What exceeds 1 is cut off and lost."""
    return [min(1.0, r) for r in preliminary_ratios(sums, ratio, temperature)]


def paper_ratios(sums: Sequence[float], ratio: float, temperature: float = 10.0) -> list[float]:
    """Eq. 6-7: rescaled to mean R, then cut off."""
    first = preliminary_ratios(sums, ratio, temperature)
    gamma = ratio / (sum(first) / len(first))
    return [min(1.0, r * gamma) for r in first]


def descending(scores: dict[int, float]) -> list[int]:
    """Keys by decreasing value, equal ones in their own order."""
    return sorted(scores, key=lambda patch: (-scores[patch], patch))


def unit_norm(scores: dict[int, float]) -> dict[int, float]:
    """Scaled to L2 norm 1."""
    norm = max(math.sqrt(sum(s * s for s in scores.values())), 1e-12)
    return {patch: s / norm for patch, s in scores.items()}


def normalised_worth(
    scores: Sequence[Map], image_size: tuple[int, int], crops: tuple[int, int], side: int
) -> list[dict[int, float]]:
    """Worth of every valid crop patch as the release has it: both maps at unit norm, added."""
    worth = []
    for crop, above in enumerate(projected(scores[0], image_size, crops, side)):
        overall, local = unit_norm(above), unit_norm({p: float(scores[1 + crop][p]) for p in above})
        worth.append({p: overall[p] + local[p] for p in above})
    return worth


def released_counts(
    thumbnail: Map, image_size: tuple[int, int], crops: tuple[int, int], side: int, ratio: float
) -> list[int]:
    """Kept tokens per crop."""
    ratios = released_ratios(region_sums(thumbnail, crops, side), ratio)
    return [int(len(valid) * r) for valid, r in zip(valid_patches(image_size, crops, side), ratios, strict=True)]


def released_sequence(
    scores: Sequence[Map], image_size: tuple[int, int], crops: tuple[int, int], side: int, ratio: float
) -> list[Entry]:
    """The sequence the released code builds from the [CLS] scores of every view, defects included."""
    thumbnail = descending(dict(enumerate(map(float, scores[0]))))[: int(ratio * side * side)]
    sequence: list[Entry] = [(0, patch) for patch in thumbnail]
    counts = released_counts(scores[0], image_size, crops, side, ratio)
    at: dict[tuple[int, int], Entry] = {}
    for crop, worth in enumerate(normalised_worth(scores, image_size, crops, side)):
        patches = sorted(worth)
        for patch in descending(worth)[: counts[crop]]:
            # The slip: a token's number among the unpadded patches is taken for its place in the whole crop.
            place = patches.index(patch)
            x, y = crop % crops[0] * side + place % side, crop // crops[0] * side + place // side
            at[y, x] = (1 + crop, patch)
    for y in range(crops[1] * side):
        sequence += [at[y, x] for x in range(crops[0] * side) if (y, x) in at]
        sequence.append(NL)
    return sequence


def single_precision(value: float) -> float:
    """The nearest float32; of a quotient or product of small integers or float32s, what float32 arithmetic makes."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return rounded


def hired_counts(
    early: Map, crops: tuple[int, int] | None, side: int, ratio: float, alpha: float, next_: bool
) -> list[int]:
    """Patches that HiRED's release picks of every view, padding among them, from the first layer's [CLS] attention.

    Its LLaVA-1.5 takes the budget of its one view; its LLaVA-NeXT (`next_`) has no budget for a single view. Neither
    has one at ratio 1.
    """
    n, n_crops = side * side, crops[0] * crops[1] if crops else 0
    if ratio == 1 or (next_ and not crops):
        return [n] * (1 + n_crops)
    budget = int((1 + n_crops) * n * ratio)
    if not crops:
        return [max(1, budget)]
    thumbnail = min(int(budget * alpha), n)
    rest = min(budget - thumbnail, n * n_crops)
    found = [0] * n_crops
    for patch in descending(dict(enumerate(map(float, early))))[: int(n * (1 - alpha))]:
        found[patch // (n // n_crops)] += 1  # bands of the map, row by row
    shares = [single_precision(f / max(1, sum(found))) for f in found]
    return [max(1, thumbnail), *(min(n, int(single_precision(share * rest))) for share in shares)]


def released_call(
    images: Sequence[tuple[Sequence[Map], tuple[int, int], tuple[int, int] | None]], side: int, ratio: float
) -> list[list[Entry]]:
    """The sequences of all images `(scores, size, crops)` of one call, where single views have no crops.

    The release has the scores of all views in one list. From that it drops the first one after every image of several
    views, however many these are; a single view is left as it is, with a newline, and nothing is dropped.
    """
    rows = [scores for views, _, _ in images for scores in views]
    sequences: list[list[Entry]] = []
    for _, size, crops in images:
        if crops is None:
            sequences.append([*((0, patch) for patch in range(side * side)), NL])
        else:
            sequences.append(released_sequence(rows[: 1 + crops[0] * crops[1]], size, crops, side, ratio))
            rows = rows[1:]
    return sequences


def raster_sequence(
    thumbnail: Sequence[int],
    kept: Sequence[Sequence[int]],
    image_size: tuple[int, int],
    crops: tuple[int, int],
    side: int,
) -> list[Entry]:
    """The true reading order: sorted thumbnail, then the unpadded canvas rows, each with its newline."""
    _, top, _, bottom = unpadded_box(image_size, crops, side)
    sequence: list[Entry] = [(0, patch) for patch in sorted(thumbnail)]
    for y in range(top, bottom):
        for x in range(crops[0] * side):
            crop, patch = y // side * crops[0] + x // side, y % side * side + x % side
            if patch in kept[crop]:
                sequence.append((1 + crop, patch))
        sequence.append(NL)
    return sequence


def softmax_scores(logits: Sequence[Sequence[Map]]) -> list[list[float]]:
    """Eq. 1: `[V][H][1 + N]` logits to `[V][N]` scores, softmax over the patches, mean over heads."""
    scores = []
    for heads in logits:
        mean = [0.0] * (len(heads[0]) - 1)
        for row in heads:
            patches = [float(value) for value in row][1:]
            powers = [math.exp(p - max(patches)) for p in patches]
            total = sum(powers)
            for i, power in enumerate(powers):
                mean[i] += power / total / len(heads)
        scores.append(mean)
    return scores


def paper_sequence(
    logits: Sequence[Sequence[Map]],
    image_size: tuple[int, int],
    crops: tuple[int, int],
    side: int,
    ratio: float,
    temperature: float = 10.0,
    alpha: float = 0.5,
) -> list[Entry]:
    """Eq. 1-8 to the letter, laid out in reading order."""
    scores = softmax_scores(logits)
    ratios = paper_ratios(region_sums(scores[0], crops, side), ratio, temperature)
    kept = []
    for crop, above in enumerate(projected(scores[0], image_size, crops, side)):
        worth = {p: alpha * above[p] + (1 - alpha) * scores[1 + crop][p] for p in above}
        kept.append(descending(worth)[: int(ratios[crop] * len(worth))])
    thumbnail = descending(dict(enumerate(scores[0])))[: int(ratio * side * side)]
    return raster_sequence(thumbnail, kept, image_size, crops, side)


def water_level_shares(weights: Sequence[float], capacity: Sequence[int], total: int) -> list[Fraction]:
    """Shares min(1, λ·w)·c that sum to `total`: λ is found exactly, between the points where a crop fills up."""
    w = [Fraction(value) for value in weights]
    if total >= sum(capacity):
        return [Fraction(c) for c in capacity]
    low = Fraction(0)
    for corner in sorted({1 / value for value in w}):
        if sum(min(Fraction(1), corner * v) * c for v, c in zip(w, capacity, strict=True)) >= total:
            break
        low = corner
    full = [v * low >= 1 for v in w]  # full at every level above `low`
    rest = total - sum(c for c, f in zip(capacity, full, strict=True) if f)
    slope = sum((v * c for v, c, f in zip(w, capacity, full, strict=True) if not f), Fraction(0))
    level = rest / slope if slope else Fraction(0)
    return [Fraction(c) if f else level * v * c for v, c, f in zip(w, capacity, full, strict=True)]


def largest_remainder(shares: Sequence[Fraction | float], capacity: Sequence[int], total: int) -> list[int]:
    """Integers that sum to `total`: floors, then one each to the largest remainders, lower index first."""
    counts = [math.floor(share) for share in shares]
    for _ in range(total - sum(counts)):
        open_ = [i for i in range(len(counts)) if counts[i] == math.floor(shares[i]) and counts[i] < capacity[i]]
        best = max(open_, key=lambda i: (shares[i] - math.floor(shares[i]), -i))
        counts[best] += 1
    return counts


def corrected_counts(
    thumbnail: Map, image_size: tuple[int, int], crops: tuple[int, int], side: int, ratio: float
) -> list[int]:
    """Kept tokens per crop when the budget int(R·Σn) is met exactly."""
    sizes = [len(valid) for valid in valid_patches(image_size, crops, side)]
    total = int(ratio * sum(sizes))
    weights = preliminary_ratios(region_sums(thumbnail, crops, side), ratio)
    return largest_remainder(water_level_shares(weights, sizes, total), sizes, total)


def corrected_sequence(
    scores: Sequence[Map], image_size: tuple[int, int], crops: tuple[int, int], side: int, ratio: float
) -> list[Entry]:
    """The default profile: the release's ranking, exact counts, reading order."""
    counts = corrected_counts(scores[0], image_size, crops, side, ratio)
    worths = normalised_worth(scores, image_size, crops, side)
    kept = [descending(worth)[:count] for worth, count in zip(worths, counts, strict=True)]
    thumbnail = descending(dict(enumerate(map(float, scores[0]))))[: int(ratio * side * side)]
    return raster_sequence(thumbnail, kept, image_size, crops, side)
