"""Knowledge distillation for PyTorch Lightning with temperature as a first-class object."""

__version__ = "0.1.0"
