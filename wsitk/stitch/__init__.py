"""Joining what overlapping tiles said: dense fields, and objects at seams, block by block.

    tile results ──> FieldStitcher ──> FieldPart ──┐ storage ┌──> FieldMerger.read(region) ──> Writer
                 └─> select ─────────> ObjectTable ─┘         └──> merge_objects() ───────────> Writer

A block is joined on its own, wherever it was computed; one process merges the stored parts at the end.
"""

from __future__ import annotations

from wsitk.stitch.fields import FieldMerger, FieldPart, FieldStitcher
from wsitk.stitch.objects import merge_objects, select
from wsitk.stitch.windows import window

__all__ = ["FieldMerger", "FieldPart", "FieldStitcher", "merge_objects", "select", "window"]
