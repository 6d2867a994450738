"""Training runs: `moe train CONFIG`, or `torchrun … -m moe.train CONFIG`."""
