"""What the local tasks make of their data, by hand."""

import math
import sys

from moe.evals.tasks.loaders import perplexities, perplexity


def test_perplexity_is_of_all_the_text_together():
    assert math.isclose(perplexity([(-6.0, 2), (-2.0, 2)]), math.exp(2))


def test_text_without_spaces_has_a_perplexity_too():
    """One word of 3,000 letters is too unlikely for a float; its bytes are not."""
    found = perplexities({"page": "abc" * 1000}, [(-9000.0, 1500)])
    assert perplexity([found["word_perplexity"]]) == sys.float_info.max
    assert math.isclose(perplexity([found["byte_perplexity"]]), math.exp(3))
    assert math.isclose(perplexity([found["token_perplexity"]]), math.exp(6))
