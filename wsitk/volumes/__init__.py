"""What volumes need beyond slides: rules, resampling, statistics; no I/O of its own."""
