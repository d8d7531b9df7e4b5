"""What the bench measures, one file a part; :mod:`bench.part` says what a part is."""
