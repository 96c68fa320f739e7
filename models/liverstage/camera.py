"""What a wide-field microscope and its camera do to a scene, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.models.liverstage.shapes import Floats, smooth_noise

__all__ = ["Camera", "photograph"]

Image = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Camera:
    """How instruments may differ; pairs are the ends of a range.

    Attributes
    ----------
    aperture, wavelength_um
        Numerical aperture; emission of both stains, between DAPI and a green or red dye.
    defocus_um, resized_px
        Further blur (sigma): of the whole field, and of figures that were made smaller or compressed.
    vignette, haze
        Loss of light in the corners; uneven background, as a multiple of the host cytoplasm's light.
    electrons
        Photoelectrons of a pixel of host cytoplasm: exposure and brightness of the stain.
    read_noise, offset
        Of the camera: electrons, and grey values.
    stretched
        Share of images that were made to 8 bits by stretching, with a share `clipped` of the pixels saturated.
    lines
        Share of channels with a bright straight line one or two pixels wide: a defective column of the sensor, a seam
        of a stitched scan, the frame of a figure.
    """

    aperture: tuple[float, float] = (0.3, 0.75)
    wavelength_um: tuple[float, float] = (0.46, 0.62)
    defocus_um: tuple[float, float] = (0.0, 0.9)
    resized_px: tuple[float, float] = (0.0, 0.9)
    vignette: tuple[float, float] = (0.0, 0.45)
    haze: tuple[float, float] = (0.1, 3.0)
    electrons: tuple[float, float] = (8.0, 1500.0)
    read_noise: tuple[float, float] = (1.5, 8.0)
    offset: tuple[float, float] = (20.0, 500.0)
    stretched: float = 0.5
    clipped: tuple[float, float] = (1e-5, 1e-2)
    lines: float = 0.3


def photograph(scene: Floats, um: float, rng: np.random.Generator, camera: Camera) -> Image:
    """Return the image (C, H, W) of a scene, uint8 or uint16, all channels of one type.

    In the order of the light: uneven illumination, optics, photons, electronics, grey values.
    """
    light = np.stack([_lit(channel, um, rng, camera) for channel in scene])
    byte = rng.random() < camera.stretched
    planes: Image = np.stack([_developed(channel, rng, camera, byte) for channel in light])  # type: ignore[assignment]  # all are of one type
    return planes


def _lit(scene: Floats, um: float, rng: np.random.Generator, camera: Camera) -> Floats:
    """Return the light that arrives at the camera, in the scene's units."""
    shape = scene.shape
    middle = [n * rng.uniform(0.35, 0.65) for n in shape]
    y, x = (np.arange(n, dtype=np.float32) - m for n, m in zip(shape, middle, strict=True))
    far = (y[:, None] ** 2 + x[None] ** 2) / (shape[0] ** 2 + shape[1] ** 2) * 4
    haze = np.exp(rng.uniform(*np.log(camera.haze)))
    uneven = 1 + rng.uniform(0, 0.4) * smooth_noise(rng, (shape[0], shape[1]), rng.uniform(20, 80) / um)
    lit = (scene + haze * np.maximum(uneven, 0.1)) * (1 - rng.uniform(*camera.vignette) * np.minimum(far, 1))
    psf = 0.21 * rng.uniform(*camera.wavelength_um) / rng.uniform(*camera.aperture)
    sigma = np.hypot(np.hypot(psf, rng.uniform(*camera.defocus_um)) / um, rng.uniform(*camera.resized_px))
    found: Floats = ndimage.gaussian_filter(lit, sigma)
    return found


def _developed(light: Floats, rng: np.random.Generator, camera: Camera, byte: bool) -> Image:
    """Return the grey values of one channel: shot noise, read noise, gain, offset, saturation."""
    electrons = rng.poisson(light * np.exp(rng.uniform(*np.log(camera.electrons)))).astype(np.float32)
    electrons += rng.normal(0, rng.uniform(*camera.read_noise), light.shape).astype(np.float32)
    if rng.random() < camera.lines:
        across = electrons if rng.random() < 0.5 else electrons.T
        anywhere = int(rng.integers(len(across)))
        row, wide = int(rng.choice([0, len(across) - 1, anywhere])), int(rng.integers(1, 3))
        across[max(row - wide + 1, 0) : row + 1] = electrons.max() * rng.uniform(0.2, 1)
    if byte:
        low = np.percentile(electrons, rng.uniform(0, 1)) - rng.uniform(0, 0.1) * electrons.std()
        high = np.quantile(electrons, 1 - np.exp(rng.uniform(*np.log(camera.clipped))))
        grey = np.clip((electrons - low) / max(high - low, 1.0), 0, 1) ** rng.uniform(0.85, 1.15)
        byte_image: Image = np.round(grey * 255).astype(np.uint8)
        return byte_image
    top = float(rng.choice([4095, 65535]))
    # the gain is set so that little is saturated
    gain = min(top / max(float(np.quantile(electrons, 0.9995)) * rng.uniform(0.7, 3), 1.0), 8.0)
    word: Image = np.round(np.clip(electrons * gain + rng.uniform(*camera.offset), 0, top)).astype(np.uint16)
    return word
