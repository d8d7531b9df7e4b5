"""What every trainer shares: configuration, privacy of a run, loop, run folder, report, display."""
