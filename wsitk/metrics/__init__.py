"""How good a result is, measured on whole tables of overlaps rather than pair by pair."""
