"""Routers, shared parts, clusters and output projections fitted to text, before any training.

    fits = Fits([heads_part])                  # what a recipe wants to know
    record = calibrate(source, layers, fits, windows, text, key, folder, ranks)
    fits.tensors["model.layers.0.self_attn.router.weight"]

The source is walked layer by layer over all windows at once (`stream`). In each layer, what every
unit (a head, a KV group, a slice of neurons) adds to the residual stream is predicted from the
layer's input by ridge regression (`ridge`); a budget (`budget`) turns predictions into routers.

Routers between several sources (`branches`) are fitted in a walk through their mixture, to labels
of the text (`labels`) or to what each source loses on its tokens.
"""
