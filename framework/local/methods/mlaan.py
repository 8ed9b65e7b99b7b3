"""MLAAN (Zhang et al. 2024): multilaminar and leap augmented local modules (Eqs. 1, 2, 9-12).

Windows: ``[i..i]`` (weight 0.001) and ``[i-k+1..i]`` (weight 0.999), both for i >= k-1 only. Heads: a classifier; on
the windows behind a LAM, copies of later blocks. The last module has one classifier for both of its units.

Defaults are the paper's: windows of three, and in a LAM one set of weights that is trained (Eq. 9) and then pulled by
the average (Eq. 10). Where the paper is silent they are those of the authors' code, github.com/Wendy231015/MLAAN. What
that does otherwise are overrides: ``lam_weights=two_copies`` everywhere; on CIFAR-10, STL-10 and SVHN
``ema_update=last_only last_loss=cascaded_only`` too, and ``window=2`` for the row "MLAAN".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from framework.config.schema import Fraction, NonNegative
from framework.local import Classifier, LocalUnit, MethodOptions, NetworkInfo, Plan, sliding_windows
from framework.local.lam import LamBuilder
from framework.local.lam_copies import Copies
from framework.local.reconstruction import Reconstruction

if TYPE_CHECKING:
    from framework.local.head import Head


@dataclass
class Options(MethodOptions):
    """The row "MLAAN" as the paper has it.

    MLM alone is ``lam_on: none``; LAM alone ``{window: 1, w_indep: 1, w_casc: 0, lam_on: independent}``.
    "DGL*" is ``{indep_head: {kind: 3c4f}, casc_head: {kind: 3c4f}}``; "InfoPro*" is
    ``{indep_head: {kind: 1c2f}, casc_head: {kind: 1c2f}, reconstruction: {lambdas: mlaan}}``.

    Attributes:
        window: k, modules in a cascaded window (the paper: typically 3; its code: 2 for the row "MLAAN" on CIFAR).
        w_indep: weight of the loss on a single module; 0 leaves these units out.
        w_casc: weight of the loss on a cascaded window; 0 leaves these units out.
        indep_head: head of a single module.
        casc_head: head of a window.
        reconstruction: InfoPro's decoder beside every head but the last module's, or ``None``.
        indep_on_first: units on the single modules 0 .. k-2 too, as Figure 2 draws them.
        last_loss: the last module's two units as weighted, or the window alone with weight 1 (the code on CIFAR).
        lam_on: which units have a LAM: the windows in the code, the single modules (of weight 0.001) in Eq. 10.
        lam_blocks: names of blocks to copy, by segment, in place of the authors' lists.
        lam_form: the first block of a list alone follows a moving average, or every one (Figure 3).
        lam_weights: a single copy, trained and pulled (Eqs. 9 and 10), or a trained and an averaged one (the code).
        ema_m: momentum of the moving averages.
        ema_update: whether all of them move, or only those of the last module but one (the code on CIFAR).
        ema_when: before or after the optimizer step.
        ema_buffers: BatchNorm's running statistics follow too.
    """

    window: int = 3
    w_indep: NonNegative = 0.001
    w_casc: NonNegative = 0.999
    indep_head: Classifier = field(default_factory=Classifier)
    casc_head: Classifier = field(default_factory=Classifier)
    reconstruction: Reconstruction | None = None
    indep_on_first: bool = False
    last_loss: Literal["weighted", "cascaded_only"] = "weighted"
    lam_on: Literal["cascaded", "independent", "both", "none"] = "cascaded"
    lam_blocks: dict[str, list[str]] = field(default_factory=dict)
    lam_form: Literal["sum_first", "ema_chain"] = "sum_first"
    lam_weights: Literal["two_copies", "trained_and_pulled"] = "trained_and_pulled"
    ema_m: Fraction = 0.995
    ema_update: Literal["all", "last_only"] = "all"
    ema_when: Literal["before", "after"] = "before"
    ema_buffers: bool = False


def plan(network: NetworkInfo, options: Options) -> Plan:
    """``[i..i]`` and ``[i-k+1..i]``, both for i >= k-1 only; the last module has one shared head.

    Raises:
        UserError: the window is longer than the network, or a LAM can't be built.
    """
    n, k = len(network), options.window
    windows = sliding_windows(n, k)
    copies = Copies(
        options.lam_form,
        options.lam_weights,
        options.ema_m,
        options.ema_buffers,
        options.ema_when,
    )
    lams = LamBuilder(network, options.lam_blocks, copies)
    extra = range(k - 1) if options.indep_on_first else ()
    units = [_unit(network, options, lams, "single", i, i) for i in extra]
    for first, last in windows[:-1]:
        units.append(_unit(network, options, lams, "single", last, last))
        units.append(_unit(network, options, lams, "window", first, last))
    units += _last_module(network, options)
    return Plan(tuple(u for u in units if u is not None), n)


def _unit(
    network: NetworkInfo,
    options: Options,
    lams: LamBuilder,
    kind: Literal["single", "window"],
    first: int,
    last: int,
) -> LocalUnit | None:
    single = kind == "single"
    weight = options.w_indep if single else options.w_casc
    lam, shape = None, network.shapes[last]
    if options.lam_on in ("both", "independent" if single else "cascaded"):
        lam, shape = lams.build(last)
    classifier = (options.indep_head if single else options.casc_head).build(network, last, shape)
    head: Head | None = classifier
    if options.reconstruction is not None:
        head = options.reconstruction.beside(classifier, network, last, shape)
    if head is None or not weight:
        return None
    if lam is not None:
        head = lam.under(head, updated=options.ema_update == "all" or last == len(network) - 2)
    return LocalUnit(f"{network.names[last]}/{kind}", first, last, head, weight)


def _last_module(network: NetworkInfo, options: Options) -> list[LocalUnit]:
    last, name = len(network) - 1, network.names[-1]
    head = Classifier().build(network, last)
    weighted = options.last_loss == "weighted"
    w_indep, w_casc = (options.w_indep, options.w_casc) if weighted else (0.0, 1.0)
    single = LocalUnit(f"{name}/single", last, last, head, w_indep) if w_indep else None
    window = LocalUnit(f"{name}/window", last - options.window + 1, last, head, w_casc) if w_casc else None
    return [unit for unit in (single, window) if unit is not None]
