"""The parts of megatron-core that data needs, imported in one place (four seconds, many warnings).

from moe.data.indexed import IndexedDataset   # inside functions only
"""

import logging
import warnings

from moe.errors import UserError

with warnings.catch_warnings():  # about Transformer Engine and Apex, which data does not use
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    try:
        from megatron.core.datasets import helpers_cpp
    except ImportError as error:
        raise UserError(
            f"megatron-core has no compiled index builder for this Python ({error}). Install its "
            "wheel (`pip install --only-binary :all: megatron-core`; Linux, Python 3.10 to 3.13), "
            "or a C++ compiler and pybind11, then `pip install --no-binary megatron-core "
            "--no-build-isolation megatron-core`."
        ) from error

# it warns that a blend's index is not cached; ours is kept in memory on purpose
logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)

__all__ = [
    "BlendedDataset",
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "helpers_cpp",
]
