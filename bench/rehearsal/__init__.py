"""Rehearses on a machine without a GPU what runs on one: see :mod:`bench.rehearsal.driver`."""
