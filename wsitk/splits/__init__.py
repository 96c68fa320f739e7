"""Train, validation and test sets that share nothing: made by whole slides or patients, and checked.

A tile in training and its neighbour in testing make a test of memory. In MedFMC's published split of ColonPath
50 of 169 slides of the test set also lie in the training set, with 1,012 of 3,296 tiles; nothing in the file
lists shows it but the names.
"""

from __future__ import annotations

from wsitk.splits.leaks import Leak, SplitReport, check_split, examine_split, shared_groups
from wsitk.splits.lists import Listing, read_listing, read_parts, write_split
from wsitk.splits.make import Split, make_split, parse_parts
from wsitk.splits.names import Origin, group_names, origin_of

__all__ = [
    "Leak",
    "Listing",
    "Origin",
    "Split",
    "SplitReport",
    "check_split",
    "examine_split",
    "group_names",
    "make_split",
    "origin_of",
    "parse_parts",
    "read_listing",
    "read_parts",
    "shared_groups",
    "write_split",
]
