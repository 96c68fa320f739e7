"""Command line of the training."""

from __future__ import annotations

import argparse
from pathlib import Path

from wsitk.models.cellvit.training.fit import Config, fit


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wsitk.models.cellvit.training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared .npz files")
    parser.add_argument("--out", type=Path, required=True, help="weights to write, .safetensors")
    parser.add_argument("--encoder", type=Path, help="MobileSAM checkpoint to start the encoder from")
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--minutes", type=float, default=Config.minutes)
    parser.add_argument("--batch", type=int, default=Config.batch, help="crops per process and step")
    options = parser.parse_args()
    config = Config(steps=options.steps, minutes=options.minutes, batch=options.batch)
    fit(options.data, options.out, options.encoder, config)


if __name__ == "__main__":
    main()
