"""Deblurring: a photograph recovered from a blurred and noisy one, on NumPy or CuPy arrays.

The camera moved along a slanted line, 22 pixels long, while its shutter was open, and every value
it recorded carries noise with a standard deviation of 0.01 (full brightness is 1): what was seen is
`blur(scene) + noise`. The scene is taken to be what minimises

    sum((blur(scene) - seen)**2) / 2 + WEIGHT * (total variation of the scene)

where the total variation is the sum, over all pixels, of the length of the scene's gradient: among
scenes that explain what was seen alike, natural ones are the smoother ones, apart from their edges.
The blur is taken to be known. The pixels around the frame, from which light was smeared into it,
were not seen: they are unknowns like the others.

The scene is the parameter of `fusedstep.GD`, with the learning rate 1 / L that theory gives for a
gradient that changes by at most L times the change of the scene, and the growing momentum of
Nesterov's accelerated gradient, through the callable `momentum`.

Sources: Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D
60, 1992. Blomgren, Chan, "Color TV: total variation methods for restoration of vector-valued
images", IEEE Transactions on Image Processing 7, 1998. Beck, Teboulle, "A fast iterative
shrinkage-thresholding algorithm for linear inverse problems", SIAM Journal on Imaging Sciences 2,
2009. The photograph is scikit-learn's flower.jpg, by danielbuechele, some rights reserved,
CC BY 2.0.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import fusedstep as fs

DOWN, RIGHT = 10, 20  # the movement of the camera, in pixels
LENS = 0.6  # the blur of its lens: standard deviation, in pixels
MARGIN = 16  # pixels around the frame that reach into it
NOISE = 0.01
WEIGHT = 6e-4
SMOOTH = 0.01  # added to the length of gradients, in the square, so that it has a derivative at 0
STEPS = 120


class Blur:
    """What the camera does to a scene of `size` by `size` pixels, less the noise."""

    def __init__(self, size: int, xp: Any) -> None:
        self.xp = xp
        self.shape = size, size
        # The Fourier transform of a line is a sinc, that of a Gaussian is a Gaussian.
        down, right = xp.fft.fftfreq(size)[:, None], xp.fft.rfftfreq(size)
        line = xp.sinc(DOWN * down + RIGHT * right)
        lens = xp.exp(-2 * (np.pi * LENS) ** 2 * (down**2 + right**2))
        self.transform = (line * lens).astype(xp.float32)[..., None]

    def __call__(self, scene: Any) -> Any:
        """Return the frame, of MARGIN fewer pixels on every side."""
        # The convolution wraps around the scene, but not as far as the frame.
        return self._convolve(scene)[MARGIN:-MARGIN, MARGIN:-MARGIN]

    def transposed(self, frame: Any) -> Any:
        """Return what the transposed matrix makes of a frame: an array like a scene."""
        padding = (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)
        return self._convolve(self.xp.pad(frame, padding))  # the convolution itself is symmetric

    def _convolve(self, scene: Any) -> Any:
        fft = self.xp.fft
        product = fft.rfft2(scene, axes=(0, 1)) * self.transform
        return fft.irfft2(product, self.shape, axes=(0, 1)).astype(scene.dtype, copy=False)


def variation_and_grad(scene: Any, xp: Any) -> tuple[Any, Any]:
    """Return the total variation, with edges that the colours share, and its gradient."""
    down = xp.diff(scene, axis=0, append=scene[-1:])
    right = xp.diff(scene, axis=1, append=scene[:, -1:])
    length = xp.sqrt((down**2 + right**2).sum(axis=2, keepdims=True) + SMOOTH**2)
    down /= length
    right /= length
    zero = scene.dtype.type(0)
    grad = -xp.diff(down, axis=0, prepend=zero) - xp.diff(right, axis=1, prepend=zero)
    return length.sum(), grad


def loss_and_grad(scene: Any, seen: Any, blur: Blur, xp: Any) -> tuple[Any, Any]:
    error = blur(scene) - seen
    variation, variation_grad = variation_and_grad(scene, xp)
    loss = (error**2).sum() / 2 + WEIGHT * variation
    return loss, blur.transposed(error) + WEIGHT * variation_grad


def deblur(seen: Any, blur: Blur, steps: int, xp: Any) -> tuple[Any, list[float]]:
    """Return the scene, and the loss before every step and after the last."""
    scene = xp.pad(seen, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
    # No blur makes a change larger; the variation's second derivative is at most 8 / SMOOTH.
    largest_curvature = 1 + 8 * WEIGHT / SMOOTH
    optimizer = fs.GD(
        scene, lr=1 / largest_curvature, momentum=lambda t: t / (t + 3), nesterov=True
    )
    losses = []
    for _ in range(steps):
        loss, grad = loss_and_grad(scene, seen, blur, xp)
        optimizer.step(grad)
        losses.append(loss)
    losses.append(loss_and_grad(scene, seen, blur, xp)[0])
    return scene, [float(loss) for loss in losses]


def psnr(image: Any, original: Any) -> float:
    """Return the peak signal-to-noise ratio in dB, of values in [0, 1]."""
    return -10 * float(np.log10(((image - original) ** 2).mean()))


def draw(pictures: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.3), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        axes.imshow(picture.clip(0, 1))
        axes.set_title(title)
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fusedstep-demo/deblur.png"))
    parser.add_argument("--cupy", action="store_true", help="on the GPU (needs CuPy)")
    parser.add_argument("--json", action="store_true", help="print the results for machines")
    args = parser.parse_args()
    try:
        xp = importlib.import_module("cupy" if args.cupy else "numpy")
    except ImportError:
        parser.error("--cupy: CuPy is not installed (pip install cupy-cuda12x or cupy-cuda13x)")

    from sklearn.datasets import load_sample_image

    flower = load_sample_image("flower.jpg")[69:373, 156:460]
    scene = xp.asarray(flower, xp.float32) / 255
    frame = scene[MARGIN:-MARGIN, MARGIN:-MARGIN]
    blur = Blur(len(scene), xp)
    noise = np.random.default_rng(0).standard_normal(frame.shape, np.float32)
    seen = blur(scene) + NOISE * xp.asarray(noise)

    deblurred, losses = deblur(seen, blur, STEPS, xp)
    restored = deblurred[MARGIN:-MARGIN, MARGIN:-MARGIN]
    before, after = psnr(seen, frame), psnr(restored, frame)
    pictures = {
        "photograph": frame,
        f"blurred, noisy: {before:.1f} dB": seen,
        f"restored: {after:.1f} dB": restored,
    }
    if args.cupy:
        pictures = {title: xp.asnumpy(picture) for title, picture in pictures.items()}
    draw(pictures, args.output)
    if args.json:
        print(json.dumps({"psnr_before": before, "psnr_after": after, "losses": losses}))
    else:
        print(f"{scene.size:,} unknowns, {STEPS} steps: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        print(f"PSNR {before:.2f} dB before, {after:.2f} dB after ({after - before:+.2f} dB)")
        print(f"Picture: {args.output}")


if __name__ == "__main__":
    main()
