"""Config-driven experiments for PyTorch research."""

__version__ = "0.1.0"
