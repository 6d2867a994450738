"""Text to training batches: tokenised files, weighted blends of packed documents, exact order.

`moe data prepare` (prepare) writes data; `build_dataset` (dataset) and `Batches` (sampler) read it.
"""
