"""The standing battery with each backend of the kernels forced.

All but grouped_mm, which takes no float64: the battery holds bounds that only float64 can.
"""

import inspect

import pytest
import test_battery as battery

BACKENDS = ("naive", "cpu", "triton")
CASES = [
    ("moe", "alike", "9/3"),
    ("uoe+moh+moe", "listed", "8/8"),
    ("bam-both-kv", "listed", "9/3"),
]
MORE = [("moh", "alike", "9/3"), ("moh-kv_group", "alike", "9/3"), ("two_stage", "alike", "8/8"),
        ("moe-sigmoid-shared-bias", "alike", "9/3"), ("moe-raw", "alternating", "8/8"),
        ("uoe-mlp-threshold", "alike", "9/3"), ("budgets", "listed", "9/3"),
        ("calibrated", "alike", "8/8"), ("bam-parallel", "alike", "9/3"),
        ("uoe-mlp-soft-shared", "alternating", "9/3")]  # fmt: skip
TESTS = [
    battery.test_prefix_logits_do_not_change_when_tokens_follow,
    battery.test_rows_do_not_depend_on_their_batch,
    battery.test_padding_changes_no_logits_and_is_not_counted,
    battery.test_cached_decoding_equals_prefill,
    battery.test_save_and_reload_are_equal,
    battery.test_checkpointed_gradients_and_loads_are_the_same,
    battery.test_router_gradient_equals_finite_differences,
    battery.test_every_router_gets_a_gradient_from_the_language_loss,
]


def case(values, *marks):
    return pytest.param(values, id="-".join(values), marks=marks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", [
    *(case(c, pytest.mark.slow) for c in CASES), *(case(c, pytest.mark.full) for c in MORE),
])  # fmt: skip
@pytest.mark.parametrize("test", TESTS, ids=lambda t: t.__name__.removeprefix("test_"))
def test_battery(test, values, backend, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_KERNELS", backend)
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    wanted = inspect.signature(test).parameters
    test(values, **{name: value for name, value in fixtures.items() if name in wanted})
