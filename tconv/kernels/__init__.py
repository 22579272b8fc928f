"""Device code only: these files import Triton and never torch."""
