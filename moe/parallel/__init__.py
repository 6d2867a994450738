"""Ranks, meshes, and what is computed over them. Knows torch.distributed and no engine."""
