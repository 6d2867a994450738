"""A tuning at work in generation, batches, compiled models, bfloat16 and over expert ranks."""

from itertools import pairwise

import mixtures
import pytest
import tiny
import torch
from harness import run_ranks
from test_semantics import everywhere, logits_of, relative
from torch import distributed, nn

from moe.model.experts import RoutedMLP
from moe.parallel.exchange import AllToAll
from moe.tune.families import sites
from moe.tune.intervene import tuned
from moe.tune.tuning import Edit, Tuning

GENERATING = {
    "moe biased groups": "pre_select", "moh": "post_renorm", "bam shared": "post_zero",
    "uoe attention": "pre_topk", "uoe sequence": "post_zero", "mixtral": "pre_topk",
    "deepseek_v3": "pre_select", "gpt_oss": "post_zero",
}  # fmt: skip


@pytest.mark.parametrize(("name", "semantics"), GENERATING.items())
def test_generation_with_a_cache_is_that_of_whole_passes(name, semantics):
    model = mixtures.build(name)
    tuning = everywhere(model, semantics, ("off", "off"), (2, 3) if name == "moh" else (1, 2))
    ids = tiny.tokens(1, 12)

    with torch.no_grad(), tuned(model, tuning):
        made = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        again = ids
        for _ in range(10 if name != "uoe sequence" else 0):  # whose set is the prompt's
            again = torch.cat([again, model(again).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(made[:, : again.shape[1]], again)
        assert made.shape == (1, 22)
        inside = model(made, use_cache=False).logits
    with torch.no_grad():
        assert relative(inside, model(made, use_cache=False).logits) > 1e-3


@pytest.mark.parametrize("name", ["moe", "moh", "mixtral", "deepseek_v3"])
def test_prompts_of_a_batch_with_padding_on_the_left_are_as_alone(name):
    model = mixtures.build(name)
    long, short = tiny.tokens(1, 14), tiny.tokens(1, 9, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    semantics = "post_renorm" if name == "moh" else "pre_topk"
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), tuned(model, everywhere(model, semantics, ("off",))):
        together = model.generate(batch, attention_mask=mask, **settings)
        for row, ids in enumerate((long, short)):
            alone = model.generate(ids, **settings)
            assert torch.equal(together[row, -6:], alone[0, -6:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "semantics"),
    [
        pytest.param("moe", "pre_topk", marks=pytest.mark.full),
        pytest.param("moh", "post_renorm", marks=pytest.mark.full),
        ("mixtral", "pre_topk"),
    ],
)
def test_what_was_compiled_before_feels_it_and_its_end(name, semantics):
    model = mixtures.build(name)
    tuning = everywhere(model, semantics, ("off", "off") if name != "moh" else ("off",))
    ids = tiny.tokens(2, 24)
    wanted = [logits_of(model), logits_of(model, tuning, 0.5), logits_of(model, tuning, 1.0)]
    assert min(relative(a, b) for a, b in pairwise(wanted)) > 1e-3
    compiled = torch.compile(model)
    with torch.no_grad():
        assert relative(compiled(ids, use_cache=False).logits, wanted[0]) < 1e-5
        for scale in (1.0, 0.5):
            place = {0.5: 1, 1.0: 2}[scale]
            with tuned(model, tuning, scale):
                assert relative(compiled(ids, use_cache=False).logits, wanted[place]) < 1e-5
            assert relative(compiled(ids, use_cache=False).logits, wanted[0]) < 1e-5


@pytest.mark.parametrize(
    "name", ["moe biased groups", "moh", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"]
)
def test_bfloat16_stays_near_and_is_tuned(name):
    wide, narrow = mixtures.build(name), mixtures.build(name).to(torch.bfloat16)
    semantics = "post_renorm" if name == "moh" else "pre_topk"
    tuning = everywhere(wide, semantics, ("off",))
    before, after = logits_of(narrow), logits_of(narrow, tuning)
    assert after.dtype == torch.bfloat16
    assert relative(after.float(), before.float()) > 1e-2
    # its own distance from float32, for near-ties fall otherwise; a tuning adds none
    own = relative(before.float(), logits_of(wide))
    assert relative(after.float(), logits_of(wide, tuning)) < 3 * own + 0.02
    assert torch.equal(logits_of(narrow), before)


def spread(name: str, semantics: str, lopsided: bool = False) -> torch.Tensor:
    """Logits of this rank's own sequences, its experts being a half."""
    model = mixtures.build(name)
    tuning = everywhere(model, semantics, ("off", "force"))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if lopsided and rank:
        tuning.experts = tuning.experts[:1]
    for module in model.modules():
        if isinstance(module, RoutedMLP):
            experts = module.experts
            module.dispatcher = AllToAll(distributed.group.WORLD, experts.num_experts)
            for key, parameter in list(experts.named_parameters()):
                setattr(experts, key, nn.Parameter(parameter.detach().chunk(size)[rank].clone()))
    with torch.no_grad(), tuned(model, tuning):
        return model(tiny.tokens(2, 16, seed=rank)).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "moe biased groups"])
def test_over_two_ranks_of_experts_it_is_that_of_one_process(name):
    model = mixtures.build(name)
    tuning = everywhere(model, "pre_topk", ("off", "force"))
    for rank, found in enumerate(run_ranks(spread, 2, name, "pre_topk")):
        with torch.no_grad(), tuned(model, tuning):
            wanted = model(tiny.tokens(2, 16, seed=rank)).logits
        assert relative(found, wanted) < 1e-6
    # negative control: a rank that has another tuning computes something else
    _, other = run_ranks(spread, 2, name, "pre_topk", True)
    assert relative(other, wanted) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("semantics", ["pre_topk", "pre_select"])
def test_equal_scores_in_bfloat16_are_no_reason_to_choose_otherwise(name, semantics):
    """A token that had chosen nothing of what is off keeps its choice, however its scores tie."""
    count = "num_experts" if name == "qwen3_moe" else "num_local_experts"
    model = mixtures.build(name, torch.bfloat16, **{count: 64, "num_experts_per_tok": 6})
    site = sites(model)[0]
    router, x = model.get_submodule(site.module), torch.randn(2048, 32).bfloat16()
    edits = [Edit(layer=site.layer, expert=expert) for expert in (1, 2, 3)]
    with torch.no_grad():
        logits, _, before = router(x)
        with tuned(model, Tuning(semantics=semantics, experts=edits)):
            _, _, after = router(x)
    hit = torch.isin(before, torch.tensor([1, 2, 3])).any(1)
    last = logits.gather(1, before).min(1, keepdim=True).values
    tied = (logits == last).sum(1) > 1
    assert (tied & ~hit).sum() > 20, "nothing ties"
    same = (before.sort(1).values == after.sort(1).values).all(1)
    assert same[~hit].all() and not same[hit].any()
