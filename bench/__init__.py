"""What privacy costs: measurements, the rows that they leave, and the tables made from the rows.

* What is measured: :mod:`bench.parts`, a file each. What all of them share: :mod:`bench.part`
  (items, options, rows), :mod:`bench.work` (an interrupted run goes on), :mod:`bench.timing`,
  :mod:`bench.profiling`, :mod:`bench.memory`.
* A step: :mod:`bench.cases` of :mod:`bench.models`, taken by :mod:`bench.rivals` (who get a network
  adapted to them, :mod:`bench.adapt`), let through by :mod:`bench.gate`, timed by
  :mod:`bench.harness`.
* A single op: :mod:`bench.calls` on :mod:`bench.layers`.
* Rows: :mod:`bench.table` and, of steps, :mod:`bench.results`; :mod:`bench.report`,
  :mod:`bench.targets` and :mod:`bench.pictures` make README and notes from them.
* A GPU: ``gpu.sh`` there; without one ``gpu-pack.sh``, :mod:`bench.meta`, :mod:`bench.rehearsal`.
"""
