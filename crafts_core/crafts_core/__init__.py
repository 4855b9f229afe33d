"""The generator: what a tile becomes. No network, no database, no Flower."""

__version__ = "0.1.0"
