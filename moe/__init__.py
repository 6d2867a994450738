"""moe-stack: dense checkpoints upcycled into mixtures, proved, trained and evaluated."""

__version__ = "0.1.0"
