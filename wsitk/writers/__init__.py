"""Results on disk: written under another name, renamed when whole, the same bytes for the same results."""
