"""What a pass launches: one file a kernel family, and what they share (`common`, `weights`, `copies`, `sums`).

The kernels are imported at the first launch, so that tconv imports where Triton is not installed.
"""
