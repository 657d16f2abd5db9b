"""Localize multi-scale semantic patches with AnchorNet and train classifiers on them.

An implementation of "Localizing Multi-scale Semantic Patches for Image Classification"
(Yang et al.) as a command-line toolkit for dataset preprocessing. Importing this package
imports nothing heavy: torch is loaded by the module that needs it.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
