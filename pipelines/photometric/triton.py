"""The Triton kernels of the photometric pass. ``launch.py`` launches them, and ``draws.Draws`` defines the symbols.

If hue is jittered, ``turn_kernel`` runs first, because contrast needs the mean grey of its result. A program makes
some pixels of one image. Without blur, one launch does all the rest. With blur there are two launches. The first one
colours each pixel, and its neighbours above and below again, and blurs down the columns into 8 bits. The second one
blurs along the rows and finishes. The number of neighbours is the image's own window, so an image without blur has one.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
RGB, YCBCR, LAB = 0, 1, 2


@triton.jit
def finish_kernel(
    p_pixels,  # uint8 [B, H, W, C]
    p_draws,  # fp32 [B, 5 + C C], see launch.packed
    p_out,  # uint8, or with FINISH floating point, [B, H, W, C]
    height, width, scale0, scale1, scale2, shift0, shift1, shift2,
    C: tl.constexpr, COLOR: tl.constexpr, BLUR: tl.constexpr, DOWN: tl.constexpr, FINISH: tl.constexpr,
    SPACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Change colours, blur in one direction, and finish. Each step runs only if its switch is on."""
    image = tl.program_id(1).to(tl.int64)
    first = image * height * width * C
    own = p_draws + image * (5 + C * C)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < height * width
    y, x = places // width, places % width
    if BLUR:
        sigma = tl.load(own + 2)
        reach = tl.ceil(3 * sigma).to(tl.int32)
        steep = 0.5 * _LOG2E / (tl.maximum(sigma, 1e-6) * tl.maximum(sigma, 1e-6))
        r = tl.zeros([BLOCK], tl.float32)
        g = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        total = 0.0
        for k in range(-reach, reach + 1):
            if DOWN:
                at = _mirrored(y + k, height) * width + x
            else:
                at = y * width + _mirrored(x + k, width)
            weight = tl.exp2(-steep * (k * k))
            r1, g1, b1 = _pixel(p_pixels + first, own, at, inside, C, COLOR)
            r += weight * r1
            g += weight * g1
            b += weight * b1
            total += weight
        r, g, b = _bits(r / total), _bits(g / total), _bits(b / total)
    else:
        r, g, b = _pixel(p_pixels + first, own, places, inside, C, COLOR)
    if FINISH:
        if tl.load(own) > 0:
            r, g, b = tl.minimum(r, 255 - r), tl.minimum(g, 255 - g), tl.minimum(b, 255 - b)
        r, g, b = _convert(r, g, b, SPACE)
        r, g, b = r * scale0 + shift0, g * scale1 + shift1, b * scale2 + shift2
        places = y * width + tl.where(tl.load(own + 1) > 0, width - 1 - x, x)
    to = p_out + first + places * C
    kind = p_out.dtype.element_ty
    tl.store(to, r.to(kind), mask=inside)
    if C == 3:
        tl.store(to + 1, g.to(kind), mask=inside)
        tl.store(to + 2, b.to(kind), mask=inside)


@triton.jit
def turn_kernel(p_pixels, p_draws, p_out, height, width, BLOCK: tl.constexpr):
    """Turn the hue of uint8 [B, H, W, 3] as ``reference.turn`` does, by the hue in p_draws, fp32 [B, 14]."""
    image = tl.program_id(1).to(tl.int64)
    first, own = image * height * width * 3, p_draws + image * 14
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < height * width
    r, g, b = _pixel(p_pixels + first, own, places, inside, 3, False)
    high = tl.maximum(tl.maximum(r, g), b)
    chroma = high - tl.minimum(tl.minimum(r, g), b)
    apart, below = g - b, high - r
    distance = below + tl.abs(apart) + 2 * tl.minimum(below, chroma - tl.abs(apart))
    hue = tl.where(apart < 0, -distance, distance) + 6 * tl.load(own + 4) * chroma
    for color in tl.static_range(3):
        way = tl.abs(hue - 2 * color * chroma)
        way = tl.minimum(way, tl.abs(6 * chroma - way))
        value = high - tl.minimum(tl.maximum(way - chroma, 0.0), chroma)
        tl.store(p_out + first + places * 3 + color, _bits(value).to(tl.uint8), mask=inside)


@triton.jit
def _pixel(p_image, own, at, inside, C: tl.constexpr, COLOR: tl.constexpr):
    """Load the channels of pixels in fp32. A single channel is returned three times."""
    r = tl.load(p_image + at * C, mask=inside, other=0).to(tl.float32)
    g, b = r, r
    if C == 3:
        g = tl.load(p_image + at * C + 1, mask=inside, other=0).to(tl.float32)
        b = tl.load(p_image + at * C + 2, mask=inside, other=0).to(tl.float32)
    if COLOR:
        m, offset = own + 5, tl.load(own + 3)
        if C == 3:
            r1 = tl.load(m) * r + tl.load(m + 1) * g + tl.load(m + 2) * b + offset
            g1 = tl.load(m + 3) * r + tl.load(m + 4) * g + tl.load(m + 5) * b + offset
            b1 = tl.load(m + 6) * r + tl.load(m + 7) * g + tl.load(m + 8) * b + offset
            r, g, b = _bits(r1), _bits(g1), _bits(b1)
        else:
            r = _bits(tl.load(m) * r + offset)
            g, b = r, r
    return r, g, b


@triton.jit
def _bits(v):
    """Round to the nearest of 0..255."""
    return tl.minimum(tl.maximum(tl.floor(v + 0.5), 0.0), 255.0)


@triton.jit
def _mirrored(at, size):
    """Reflect a position at both ends of a line, without repeating the ends."""
    at = tl.abs(at) % tl.maximum(1, 2 * size - 2)
    return tl.minimum(at, tl.abs(2 * size - 2 - at))


@triton.jit
def _convert(r, g, b, SPACE: tl.constexpr):
    """Convert to the colour space, with the numbers of ../views/color.py."""
    if SPACE == 1:
        y = _cut(0.299 * r + 0.587 * g + 0.114 * b + 0.015625)
        cb = _cut(-0.168736 * r - 0.331264 * g + 0.5 * b + 128.015625)
        cr = _cut(0.5 * r - 0.418688 * g - 0.081312 * b + 128.015625)
        r, g, b = y, cb, cr
    if SPACE == 2:
        r, g, b = _linear(r), _linear(g), _linear(b)
        x = _f((0.412453 * r + 0.357580 * g + 0.180423 * b) * (1 / 0.95047))
        y = _f(0.212671 * r + 0.715160 * g + 0.072169 * b)
        z = _f((0.019334 * r + 0.119193 * g + 0.950227 * b) * (1 / 1.08883))
        r, g, b = 116 * y - 16, 500 * (x - y), 200 * (y - z)
    return r, g, b


@triton.jit
def _cut(v):
    return tl.minimum(tl.maximum(tl.floor(v), 0.0), 255.0)


@triton.jit
def _linear(v):
    """Return the light of an 8-bit sRGB value."""
    v = v * (1 / 255)
    curve = tl.exp2(2.4 * tl.log2((v + 0.055) * (1 / 1.055)))
    return tl.where(v > 0.04045, curve, v * (1 / 12.92))


@triton.jit
def _f(t):
    """Return Lab's f(t): the cube root, and a straight line near 0."""
    root = tl.exp2(tl.log2(tl.maximum(t, 0.008856)) * (1 / 3))
    return tl.where(t > 0.008856, root, 7.787 * t + 16 / 116)
