"""Offline competition submission kit: build, train, infer and rehearse code-competition submissions without internet.

`import kit` is instant: it imports nothing heavy. The public names are loaded when first used.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "kit.config",
    "KitError": "kit.errors",
    "Budget": "kit.budget",
    "build_index": "kit.assemble",
    "train": "kit.training.crossval",
    "pack": "kit.vendor.bundle",
    "infer": "kit.inference.pipeline",
    "score": "kit.inference.submission",
    "doctor": "kit.rehearsal.doctor",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    """Load a public name from its home module on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kit' has no attribute {name!r}; it offers {', '.join(__all__)}")
    importlib.import_module("kit.runtime").go_offline()  # before anything imports a library that reads the switches
    return getattr(importlib.import_module(_PUBLIC[name]), name)
