"""prefopt: train, sweep and compare preference-optimisation methods."""

__version__ = "0.1.0"
