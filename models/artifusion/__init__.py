"""ArtiFusion: what lies under an artifact, painted in by a diffusion model from the tissue around it."""
