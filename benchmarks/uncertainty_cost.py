"""What the uncertainty of a model costs on a real slide, and what its heatmap looks like.

    OMP_NUM_THREADS=1 python benchmarks/uncertainty_cost.py SLIDE [--roi x,y,w,h] [--samples 20] [--tile 1536]
        [--picture mi.png]

The model is `cellvit`, in this process, on one thread. Seconds are this process's CPU time, which other users of the
machine change less than the clock. Timed are the parts of one answer (the encoder; the prefix, which is the encoder
and what comes before the first dropout layer; the suffix, the rest) and two whole runs, with one sample and with
several. How often encoder and decoder run is counted by hooks. The bound is the encoder once, and `samples` times all
that comes after it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import wsitk
from wsitk.result import Result
from wsitk.uncertainty import MonteCarlo, SampledModel

SETTINGS: dict[str, Any] = {"threads": 1, "workers": 1, "device": "cpu", "preview": False}


def best(action: Callable[[], Any], times: int = 3) -> float:
    """Return the shortest of some timings, in seconds."""
    seconds = []
    for _ in range(times):
        began = time.process_time()
        action()
        seconds.append(time.process_time() - began)
    return min(seconds)


def parts(model: SampledModel, samples: int, side: int) -> dict[str, float]:
    """Return the seconds of an answer's parts, of one answer, and of several, for one tile of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, side, side), np.uint8)
    batch = torch.from_numpy(pixels)
    sampled = MonteCarlo(model, samples)
    model.network.eval()
    with torch.inference_mode():
        features = model.prefix(batch)
        network: Any = model.network
        return {
            "encoder": best(
                lambda: network.encoder(batch.float().contiguous(memory_format=torch.channels_last))
            ),
            "prefix": best(lambda: model.prefix(batch)),
            "suffix": best(lambda: model.suffix(features)),
            "one answer": best(lambda: model.predict(batch)),
            "all samples": best(lambda: sampled.predict(batch), 1),
        }


def counted(model: SampledModel) -> Counter[str]:
    """Return a count of the runs of encoder and branches that grows as the model runs."""
    runs: Counter[str] = Counter()
    network: Any = model.network

    def hook_of(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    network.encoder.register_forward_hook(hook_of("encoder"))
    network.hv_map_decoder.register_forward_hook(hook_of("branch"))
    return runs


def whole(
    slide: Path, out: Path, samples: int, roi: tuple[int, ...] | None, tile: int
) -> tuple[float, Result]:
    """Run over the slide; return the seconds, and the result."""
    model: Any = wsitk.load_model("cellvit")
    runs = counted(model)
    began = time.process_time()
    result = wsitk.run(model, slide, out=out, samples=samples, roi=roi, tile=tile, **SETTINGS)
    seconds = time.process_time() - began
    tiles = result.provenance["tiles"]["ok"]
    print(
        f"--samples {samples:<3} {seconds:7.1f} s, {tiles} tiles, encoder {runs['encoder']} x, "
        f"branch {runs['branch']} x, objects {result.provenance['objects']}"
    )
    return seconds, result


def picture(slide: Path, result: Result, path: Path, roi: tuple[int, ...] | None) -> None:
    """Draw tissue, probability, expected entropy and mutual information side by side, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    maps = {name: result.maps[k].compute() for k, name in enumerate(result.map_channels)}
    shape = next(iter(maps.values())).shape
    with wsitk.open_source(slide) as source:
        x, y, w, h = roi or (0, 0, source.shape[1], source.shape[0])
        image = source.read(wsitk.Region((y, x), (h, w)), level=0)
    figure, axes = pyplot.subplots(2, 2, figsize=(14, 14 * shape[0] / shape[1] + 1), layout="constrained")
    shown: list[tuple[str, NDArray[Any], str | None]] = [
        ("tissue", image, None),
        ("probability", maps["Nuclei"], "gray"),
        ("expected entropy", maps["expected_entropy"], "magma"),
        ("mutual information", maps["mutual_information"], "magma"),
    ]
    for place, (name, values, colours) in zip(axes.ravel(), shown, strict=True):
        top = None if colours is None else float(np.quantile(values, 0.998)) or 1.0
        place.imshow(values, cmap=colours, vmin=None if top is None else 0, vmax=top)
        place.set_title(name if top is None else f"{name}, white at {top / 65535:.3f}")
        place.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]  # it is above
    parser.add_argument("slide", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--roi", default="")
    parser.add_argument("--tile", type=int, default=1536)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x_y_w_h = tuple(int(n) for n in given.roi.split(",")) if given.roi else None
    model: Any = wsitk.load_model("cellvit")
    seconds = parts(model, given.samples, given.tile)
    for name, value in seconds.items():
        print(f"{name:12} {value:7.2f} s for a tile of {given.tile} px")
    decoder = seconds["one answer"] - seconds["encoder"]
    bound = seconds["encoder"] + given.samples * decoder
    print(
        f"{given.samples} x one answer {given.samples * seconds['one answer']:.1f} s; encoder + {given.samples} x "
        f"decoder {bound:.1f} s; measured {seconds['all samples']:.1f} s, {seconds['all samples'] / bound:.2f} of that"
    )
    with tempfile.TemporaryDirectory() as folder:
        once, _ = whole(given.slide, Path(folder) / "1", 1, x_y_w_h, given.tile)
        several, result = whole(given.slide, Path(folder) / "n", given.samples, x_y_w_h, given.tile)
        print(f"the whole run takes {several / once:.1f} times as long")
        if given.picture:
            picture(given.slide, result, given.picture, x_y_w_h)


if __name__ == "__main__":
    main()
