"""The models that come with wsitk: a name and where its builder lives; nothing is imported here."""

from __future__ import annotations

__all__ = ["BUILTIN"]

BUILTIN: dict[str, str] = {
    "cellvit": "wsitk.models.cellvit.model:default_model",
}
