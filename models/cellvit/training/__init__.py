"""How the default weights were made; run as `python -m wsitk.models.cellvit.training`."""
