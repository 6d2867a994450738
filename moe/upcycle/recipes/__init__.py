"""Recipes: what `moe upcycle` can make of a dense model, or of several."""

from moe.upcycle.recipes.branches import BAM, BTX
from moe.upcycle.recipes.conversion import Conversion, Recipe, convert, parse_layers, unchanged
from moe.upcycle.recipes.experts import Copy, Granular, Split
from moe.upcycle.recipes.heads import MoH
from moe.upcycle.recipes.slices import UoE

__all__ = [
    "BAM",
    "BTX",
    "Conversion",
    "Copy",
    "Granular",
    "MoH",
    "Recipe",
    "Split",
    "UoE",
    "convert",
    "parse_layers",
    "unchanged",
]
