"""How many sequences fit: by the memory there is, whatever the model is made of."""

from unittest import mock

import pytest
import tiny
import torch

from moe.evals import fitting
from moe.hf.families import routed_config

CPU = torch.device("cpu")


def most(config, length: int, gigabytes: float) -> int:
    with mock.patch.object(fitting, "free_bytes", lambda _: gigabytes * 2**30):
        return fitting.fitting(config, length, CPU)


def test_half_of_what_is_free_is_used() -> None:
    config = tiny.dense_config(vocab_size=50_000)
    one = 1024 * fitting.bytes_per_token(config)
    assert one > 2 * 1024 * 50_000 * 4  # logits and their log-softmax, and more
    for sequences in (1, 2, 8, 32):
        gigabytes = 2 * sequences * one / 2**30
        assert most(config, 1024, gigabytes) == sequences
        assert most(config, 1024, gigabytes * 0.99) == max(1, sequences // 2)
    assert most(config, 1024, 1e6) == fitting.MOST and most(config, 10**6, 1e-6) == 1


def test_chosen_experts_count() -> None:
    dense = routed_config(tiny.dense_config())
    fields = {**dense.to_dict(), "mlp": [{**tiny.MOE, "top_k": 3}, {"kind": "dense"}, tiny.MOE]}
    mixture = type(dense).from_dict(fields)
    more = fitting.bytes_per_token(mixture) - fitting.bytes_per_token(dense)
    assert more == 4 * 3 * 2 * dense.intermediate_size


@pytest.mark.parametrize("processes", [1, 4])
def test_processes_share_a_machine(processes, tmp_path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:  4096 kB\n")
    monkeypatch.setattr(fitting, "MACHINE", str(tmp_path / "meminfo"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert fitting.free_bytes(CPU) == 4096 * 1024 // processes
    monkeypatch.setattr(fitting, "MACHINE", str(tmp_path / "none"))
    assert fitting.free_bytes(CPU) > 2**20
