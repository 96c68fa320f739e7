"""Maps that tell a network where a person has clicked or drawn."""

from __future__ import annotations

from wsitk.volumes.guidance.maps import AUTOPET_STEPS, SPLEEN_STEPS, Guidance, guidance_map

__all__ = ["AUTOPET_STEPS", "Guidance", "SPLEEN_STEPS", "guidance_map"]
