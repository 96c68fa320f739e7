"""The models that come with wsitk: a name and where its builder lives; nothing is imported here."""

from __future__ import annotations

__all__ = ["BUILTIN", "CHECKPOINT_READER", "FOLDER_READER"]

BUILTIN: dict[str, str] = {
    "artifusion": "wsitk.models.artifusion.model:default_model",
    "cellvit": "wsitk.models.cellvit.model:default_model",
    "cellvit-256": "wsitk.models.cellvit.model:cellvit_256",
    "cellvit-sam-h": "wsitk.models.cellvit.model:cellvit_sam_h",
    "cxas": "wsitk.models.cxas.model:cxas",
    "hippocampus": "wsitk.models.hippocampus.model:default_model",
    "liverstage": "wsitk.models.liverstage.model:default_model",
    "liverstage-hsp70": "wsitk.models.liverstage.model:hsp70_only",
    "pet-ct-annotate": "wsitk.models.pet_ct_annotate.model:pet_ct_annotate",
    "pet-ct-annotate-proposals": "wsitk.models.pet_ct_annotate.model:proposals",
    "pet-ct-annotate-refinement": "wsitk.models.pet_ct_annotate.model:refinement",
    "stunet-small": "wsitk.models.stunet.model:stunet_small",
    "stunet-base": "wsitk.models.stunet.model:stunet_base",
    "stunet-large": "wsitk.models.stunet.model:stunet_large",
    "stunet-huge": "wsitk.models.stunet.model:stunet_huge",
    "tyche": "wsitk.models.tyche.model:tyche",
    "universeg": "wsitk.models.universeg.model:universeg",
}

CHECKPOINT_READER = "wsitk.models.readers:checkpoint_reader"
FOLDER_READER = "wsitk.models.readers:folder_reader"
"""Who tells which model a file or a folder is of."""
