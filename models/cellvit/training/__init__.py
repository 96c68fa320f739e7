"""Training CellViT: data, losses, and the task for `wsitk.training`; `run` is what `wsitk train cellvit` calls."""
