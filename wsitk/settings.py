"""Settings of a run: those that change results, and those that only change how fast they come.

The command line takes its defaults from here, so the two can't drift apart.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Settings", "available_cpus", "available_memory", "home"]


@dataclass(frozen=True)
class Settings:
    """How to run a model over inputs. Everything in `result_key` enters the run key."""

    tile: int | None = None
    """Read window in working pixels; None takes the model's own."""

    halo: int | None = None
    """Margin around the owned region in working pixels; None takes the model's own."""

    roi: tuple[int, int, int, int] | str | None = None
    """Region to work on: (x, y, width, height) in level-0 pixels, or a GeoJSON file; None is everything."""

    tissue: str = "auto"
    """``auto`` finds tissue and skips glass, ``none`` runs every tile, else a GeoJSON file of regions."""

    channels: tuple[str | int, ...] | None = None
    """Channels that the model sees, by name or position, in this order; the input's identity says which."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the network; lower precision is faster and differs in about the second digit."""

    threads: int | None = None
    """Intra-op threads of the network on a CPU; None takes the cores that are available."""

    block: int = 3
    """Tiles along each axis of a block, the unit of work that is committed and resumed."""

    samples: int = 1
    """How often the model is asked; from 2 on, its uncertainty is measured. Said in the version of the model."""

    uncertainty: Literal["dropout", "spatial", "element", "tta", "ensemble"] = "dropout"
    """What differs between samples: dropout as trained, of whole maps, of elements; turned views; `members`."""

    dropout: float | None = None
    """Rate of dropout when sampling; None takes what each layer was trained with."""

    seed: int = 0
    """Of the samples' dropout masks."""

    members: tuple[str, ...] = ()
    """Further models of an ensemble, by name or path."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; its kind enters the run key."""

    batch: int = 1
    """Groups of `spec.compute_batch` tiles in flight on the device; the shape of a group is fixed."""

    workers: int | None = None
    """Threads that decode and post-process; None takes the cores that are available."""

    max_unreadable: float = 0.01
    """Share of tiles that may be unreadable before an input counts as failed."""

    supervise: bool = True
    """Run a model given by name in a process of its own, which may die without taking the run with it."""

    deadline: float = 600.0
    """Seconds without a finished tile after which the model's process is taken for hung, and restarted."""

    read_deadline: float = 60.0
    """Seconds that one read may take before the reading process is taken for hung, and restarted."""

    max_ram: float | None = None
    """GiB of memory that the model's process may hold; None takes nine tenths of the machine's."""

    part: tuple[int, int] | None = None
    """(i, n): do every n-th block from the i-th on, beside n - 1 other processes; None does all."""

    scheduler: str = ""
    """Dask workers that do the blocks: ``local``, ``local:N`` or the address of a scheduler; empty: this machine."""

    overwrite: bool = False
    """Replace results of another model or other settings (only files that wsitk wrote)."""

    maps: bool = True
    """Write `maps.ome.zarr`."""

    geojson: bool = True
    """Write `objects.geojson.gz`, the QuPath view of the objects."""

    preview: bool = True
    """Write `preview.png`."""

    mask: str = "auto"
    """For models that paint: ``auto`` finds artifacts, else a GeoJSON file in which they are drawn."""

    restore_samples: int = 1
    """How often each artifact is painted: the first is kept, and how much the others differ is told."""

    restored_image: bool = True
    """Write `restored.ome.zarr`, the whole image with what was painted in it."""

    ome_tiff: bool = False
    """Write `restored.ome.tiff`, too, which OpenSlide and QuPath open."""

    count_restored: bool = False
    """Count objects in restored pixels with the others."""

    anonymize: bool = False
    """Call inputs by pseudonyms, in everything that is written."""

    anonymize_key: str = ""
    """A file with a secret: without it, a pseudonym can be checked by whoever guesses the name."""

    anonymize_table: str = ""
    """A file, outside of the output, that will say which pseudonym is which input; empty writes none."""

    def result_key(self) -> dict[str, Any]:
        """Return the settings that may change a byte of the results."""
        names = ("tile", "halo", "roi", "tissue", "precision", "block", "maps", "geojson", "preview")
        every = asdict(self)
        return {name: every[name] for name in names}


def available_cpus() -> int:
    """Return the cores this process may use: SLURM's grant, the affinity mask and the cgroup quota."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm):
        limits.append(int(slurm))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        share, _, period = quota.read_text().partition(" ")
        if share.isdigit():
            limits.append(max(1, round(int(share) / int(period))))
    return min(limits)


def available_memory() -> int:
    """Return the bytes of memory this process may use: the machine's, or less if its cgroup says so."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    quota = Path("/sys/fs/cgroup/memory.max")
    if quota.is_file() and quota.read_text().strip().isdigit():
        limits.append(int(quota.read_text()))
    return min(limits)


def home() -> Path:
    """Return the folder for weights and downloads: `WSITK_HOME`, else the user's cache folder."""
    if "WSITK_HOME" in os.environ:
        return Path(os.environ["WSITK_HOME"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsitk"
