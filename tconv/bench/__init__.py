"""The benchmark: `python -m tconv.bench`.  docs/benchmarks.md says how it measures and what each figure means.

Imports run one way here too: cases (what is measured) and check (when a result is right) stand alone; providers
(who is measured) and measure (how) rest on torch; worker runs cases in a process of its own, run starts such
processes and keeps what they report; report, plots and compare read results and need no GPU.
"""
