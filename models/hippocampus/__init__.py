"""Anterior and posterior hippocampus in MR at 1 mm: a narrow STU-Net, trained here."""
