"""The models that come with wsitk: a name and where its builder lives; nothing is imported here."""

from __future__ import annotations

__all__ = ["BUILTIN", "CHECKPOINT_READERS", "FOLDER_READERS"]

BUILTIN: dict[str, str] = {
    "cellvit": "wsitk.models.cellvit.model:default_model",
    "cellvit-256": "wsitk.models.cellvit.model:cellvit_256",
    "cellvit-sam-h": "wsitk.models.cellvit.model:cellvit_sam_h",
}

CHECKPOINT_READERS: tuple[str, ...] = ("wsitk.models.cellvit.model:from_checkpoint",)

FOLDER_READERS: tuple[str, ...] = ("wsitk.models.cellvit.folder:from_folder",)
