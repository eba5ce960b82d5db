"""The training methods: what tells them apart, for configurations, tables, figures and the app."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to train.

    name: as in `--method`. label: as tables and figures print it. color: of its marks, Okabe and Ito's palette.
    cost: of a step per sample (or pair), in forward passes of the model over one sequence; a backward pass is two.
    learning_rate: default peak for an adapter. beta: default of `--beta`, read by the pairwise methods.
    continues_sft: starts from an SFT adapter by default. pairwise: trained by TRL on pairs of responses.
    """

    name: str
    label: str
    color: str
    cost: int
    learning_rate: float
    beta: float = 0.1
    continues_sft: bool = False
    pairwise: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("sft", "SFT", "#56B4E9", 3, 2e-4),
        Method("tkpo", "TKPO", "#0072B2", 3 + 1, 2e-4),
        Method("contrast", "Prompt contrast", "#D55E00", 2 * 3, 2e-4),
        Method("dpo", "DPO", "#E69F00", 2 * 3 + 2 * 1, 1e-5, continues_sft=True, pairwise=True),
        Method("simpo", "SimPO", "#CC79A7", 2 * 3, 1e-5, 2.0, continues_sft=True, pairwise=True),
        Method("orpo", "ORPO", "#009E73", 2 * 3, 2e-4, pairwise=True),
    )
}
PAIRWISE = tuple(method.name for method in METHODS.values() if method.pairwise)
CONTINUED = tuple(method.name for method in METHODS.values() if method.continues_sft)
