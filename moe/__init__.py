"""moe-stack: upcycle dense checkpoints into mixtures, prove the conversion, train, evaluate, tune."""

__version__ = "0.1.0"
