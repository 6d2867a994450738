"""The key-value cache as a keyword: transformers calls it `past_key_values` to 5.23, then `cache`.

Our forward passes take both; what they hand on and return bears the installed version's name, since
`generate` passes and reads back no other.
"""

import inspect

from transformers.masking_utils import create_causal_mask

_KNOWN = inspect.signature(create_causal_mask).parameters
CACHE = "cache" if "cache" in _KNOWN else "past_key_values"
