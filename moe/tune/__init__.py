"""MoTE, mixtures of tunable experts: which go with a behaviour, and what happens without them."""
