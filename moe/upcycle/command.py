"""`moe upcycle RECIPE`: options to a recipe and a request."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from moe.errors import UserError
from moe.upcycle.recipes import BAM, BTX, Copy, Granular, MoH, Split, UoE
from moe.upcycle.run import Dtype, Request, run

app = typer.Typer(
    help="Turn a dense checkpoint into a mixture and prove what was kept.", no_args_is_help=True
)

Purpose = Annotated[
    Literal["train", "serve"],
    typer.Option(help="train: balance loss 0.01 in the config. serve: none. Routers are drawn "
                 "small in both: renormalised weights are exact at any draw, so it is chosen for "
                 "even loads."),
]  # fmt: skip
RouterInit = Annotated[str | None, typer.Option(help="normal:STD or zero; default normal:0.02.")]
Groups = Annotated[
    int, typer.Option(help="Groups of consecutive experts, one for each node or rank.")
]
TopGroups = Annotated[
    int | None,
    typer.Option(help="Groups whose experts a token may use, so that it travels no further; "
                 "default all."),
]  # fmt: skip
Partition = Annotated[
    Literal["contiguous", "random", "kmeans", "activation", "shared-coactivation"] | None,
    typer.Option(help="Which neurons belong together: as they lie, at random, by their gate rows, "
                 "by when they are active on --calibrate text, or by that with those always on "
                 "that add most. Default contiguous, the last with --router calibrated."),
]  # fmt: skip
Shared = Annotated[
    int | None,
    typer.Option(help="Neurons of each MLP that are always on; default none, a quarter with "
                 "shared-coactivation."),
]  # fmt: skip
SliceRouter = Annotated[
    Literal["random", "calibrated"] | None,
    typer.Option(help="random: drawn, for training to begin from; calibrated: fitted to "
                 "--calibrate text, the default where there is one, but for --partition activation "
                 "and --output-scale calibrated, which have the text for themselves."),
]  # fmt: skip
Target = Annotated[
    Literal["norm", "loss"] | None,
    typer.Option(help="What a calibrated choice goes by: the norm of what a part adds, or what the "
                 "loss makes of it. Default loss."),
]  # fmt: skip
Refit = Annotated[
    bool,
    typer.Option("--refit", help="Fit the output projection to the parts that are on, too: no "
                 "longer the dense model where all are."),
]  # fmt: skip
FFNWeights = Annotated[
    Literal["raw", "renorm"],
    typer.Option(help="renorm: weights of the chosen FFNs sum to 1. raw: their probabilities, as "
                 "in BAM's paper."),
]  # fmt: skip
BranchTarget = Annotated[
    Literal["label", "loss"] | None,
    typer.Option(help="What a calibrated router goes by: the source that each line of the text is "
                 "labelled with, or what the sources lose on each token. Default label where the "
                 "lines have labels."),
]  # fmt: skip


def _common(
    source: Annotated[
        list[Path],
        typer.Option(help="Model folder: Llama, Mistral, Qwen2, Qwen3, or a RoutedLlama."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers to convert, like 0-3,7; default all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the result; default the source's.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text to fit to, where something is fitted.")
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of that text, for what is calibrated; default 16384."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text to verify on.")] = None,
    verify: Annotated[
        bool, typer.Option(help="Reload the result and compare it with the source.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for machines.")
    ] = False,
) -> None:
    """The options of every recipe."""


def recipe(several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a command of a function from a recipe's own options to the recipe."""

    def command(build: Callable[..., Any]) -> Callable[..., None]:
        common = inspect.signature(_common).parameters

        def call(**given: Any) -> None:
            request = Request(**{name: given.pop(name) for name in common})
            if len(request.source) > 1 and not several:
                raise UserError(
                    f"{len(request.source)} sources given: this recipe takes one --source."
                )
            run(build(**given), request)

        own = inspect.signature(build).parameters
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for p in (*own.values(), *common.values())
            ]
        )
        hints = {f: get_type_hints(f, include_extras=True) for f in (build, _common)}
        call.__annotations__ = {**hints[build], **hints[_common], "return": None}
        call.__name__, call.__doc__ = build.__name__, build.__doc__
        return app.command()(call)

    return command


@recipe()
def moh(
    router: Annotated[
        Literal["qnorm", "two_stage", "calibrated"] | None,
        typer.Option(help="qnorm: no parameters, heads on or off; two_stage: learned, soft; "
                     "calibrated: fitted to --calibrate text, on or off. Default calibrated where "
                     "there is such a text, else qnorm."),
    ] = None,
    shared_heads: Annotated[
        int | None,
        typer.Option(help="Heads that are always on; default half, a quarter if calibrated."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Routed heads per token; default so that 75 % are active.")
    ] = None,
    shared: Annotated[
        Literal["first", "calibrated"] | None,
        typer.Option(help="Which heads those are: the first, or those that add most to --calibrate "
                     "text. Default as the router is."),
    ] = None,
    budget: Annotated[
        Literal["topk", "layer", "threshold"] | None,
        typer.Option(help="Of a calibrated router: the same number of heads for each token; one "
                     "for each layer; or all above one threshold. Default threshold."),
    ] = None,
    mean_heads: Annotated[
        float | None,
        typer.Option(help="Heads on per token on average, for budgets layer and threshold; default "
                     "75 %."),
    ] = None,
    target: Target = None,
    refit: Refit = False,
    granularity: Annotated[
        Literal["head", "kv_group"], typer.Option(help="What competes: heads, or whole KV groups.")
    ] = "head",
    purpose: Purpose = "train",
) -> MoH:  # fmt: skip
    """Mixture of attention heads (MoH): some heads always on, the others compete per token."""
    return MoH(**locals())


@recipe()
def copy(
    num_experts: Annotated[int, typer.Option(help="Experts per layer.")],
    top_k: Annotated[int, typer.Option(help="Experts per token.")],
    groups: Groups = 1,
    top_groups: TopGroups = None,
    router_init: RouterInit = None,
    diversify: Annotated[
        str,
        typer.Option(help="none, perm (neurons in another order), noise:S (deviation) or drop:R "
                     "(share of neurons redrawn)."),
    ] = "none",
    purpose: Purpose = "train",
) -> Copy:  # fmt: skip
    """Mixture of experts by copying each MLP (sparse upcycling)."""
    return Copy(**locals())


@recipe()
def granular(
    num_experts: Annotated[int, typer.Option(help="Copies of each MLP.")],
    granularity: Annotated[int, typer.Option(help="Experts that each copy is cut into.")],
    top_k: Annotated[
        int, typer.Option(help="Fine experts per token, a multiple of the granularity.")
    ],
    groups: Annotated[
        int, typer.Option(help="Groups of whole copies, one for each node or rank.")
    ] = 1,
    top_groups: TopGroups = None,
    router_init: RouterInit = None,
    purpose: Purpose = "train",
) -> Granular:
    """Fine-grained copies: each copy cut into experts that begin as one (virtual groups)."""
    return Granular(**locals())


@recipe()
def split(
    num_experts: Annotated[int, typer.Option(help="Slices of each MLP.")],
    top_k: Annotated[int, typer.Option(help="Slices per token.")],
    partition: Partition = None,
    shared_neurons: Shared = None,
    router: SliceRouter = None,
    target: Target = None,
    refit: Refit = False,
    router_init: RouterInit = None,
    purpose: Purpose = "train",
) -> Split:
    """Slices of each MLP as experts, softly weighed: as many parameters as before."""
    return Split(**locals())


@recipe(several=True)
def btx(
    top_k: Annotated[int, typer.Option(help="FFN experts per token.")] = 2,
    groups: Groups = 1,
    top_groups: TopGroups = None,
    ffn_weights: FFNWeights = "renorm",
    router: SliceRouter = None,
    target: BranchTarget = None,
    purpose: Purpose = "train",
) -> BTX:
    """Several models' FFNs as experts, everything else averaged (Branch-Train-Mix)."""
    return BTX(**locals())


@recipe(several=True)
def bam(
    top_k: Annotated[int, typer.Option(help="FFN experts per token.")] = 2,
    kv: Annotated[
        Literal["expert", "shared"],
        typer.Option(help="Keys and values of each attention expert (the cache grows with them), "
                     "or averaged ones for all."),
    ] = "expert",
    block: Annotated[
        Literal["sequential", "parallel"] | None,
        typer.Option(help="Default the sources' own; BAM's paper has parallel ones."),
    ] = None,
    convert_block: Annotated[
        bool,
        typer.Option("--convert-block", help="Make sequential sources parallel all the same."),
    ] = False,
    ffn_weights: FFNWeights = "renorm",
    router: SliceRouter = None,
    target: BranchTarget = None,
    purpose: Purpose = "train",
) -> BAM:  # fmt: skip
    """Several models' FFNs and attentions as experts (Branch-Attend-Mix)."""
    return BAM(**locals())


@recipe()
def uoe(
    mlp_experts: Annotated[
        int | None, typer.Option(help="Slices of each MLP; without it the MLP stays dense.")
    ] = None,
    mlp_top_k: Annotated[
        int | None,
        typer.Option(help="Slices per token; default half, or so that 75 % of the neurons are on "
                     "with --router calibrated."),
    ] = None,
    attention_experts: Annotated[
        int | None,
        typer.Option(help="Parts of attention, of whole KV groups; without it attention stays "
                     "dense."),
    ] = None,
    attention_top_k: Annotated[
        int | None, typer.Option(help="Parts of attention per token; default half.")
    ] = None,
    mode: Annotated[
        Literal["token_choice", "threshold", "expert_choice", "sequence", "budget"],
        typer.Option(help="How the MLP's slices are chosen. expert_choice looks ahead: not for "
                     "generation. budget: all above a fitted threshold, --mean-experts of them on "
                     "average."),
    ] = "token_choice",
    mean_experts: Annotated[
        float | None,
        typer.Option(help="Slices per token on average in mode budget; default so that 75 % of the "
                     "neurons are on."),
    ] = None,
    weights: Annotated[
        Literal["hard", "soft"], typer.Option(help="A chosen part counts once, or by its score.")
    ] = "hard",
    output_scale: Annotated[
        str,
        typer.Option(help="Of the MLP's slices: 1, ratio (experts over top-k), calibrated (layer "
                     "by layer, to --calibrate text), or a number."),
    ] = "1",
    partition: Partition = None,
    shared_neurons: Shared = None,
    router: SliceRouter = None,
    target: Target = None,
    refit: Refit = False,
    sink_tokens: Annotated[
        int, typer.Option(help="First tokens of a sequence, kept by every part of attention.")
    ] = 1,
    purpose: Purpose = "train",
) -> UoE:  # fmt: skip
    """Union of experts (UoE): KV groups and FFN slices, of which each token gets some."""
    return UoE(**locals())
