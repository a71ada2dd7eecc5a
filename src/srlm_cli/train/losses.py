"""The preference losses, and the settings of TRL for each; docs/training.md has formulas and sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, Literal

from srlm_cli.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

Loss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "apo-zero", "apo-down", "length-normalised", "r-dpo", "simpo", "dpo-positive"
]

UnpairedLoss = Literal["kto", "apo-zero-unpaired"]

# Those that TRL has, by its name; the others, and those of SMOOTHED with smoothing, are `own_loss`.
TRL_NAMES = {
    "sigmoid": "sigmoid",
    "robust": "robust",
    "hinge": "hinge",
    "ipo": "ipo",
    "apo-zero": "apo_zero",
    "apo-down": "apo_down",
    "length-normalised": "sigmoid_norm",
}
SMOOTHED = ("sigmoid", "length-normalised", "r-dpo", "simpo", "dpo-positive")
CONSTANTS = {"rdpo_alpha": "r-dpo", "gamma": "simpo", "positive_lambda": "dpo-positive"}  # of one loss each
LN2 = log(2)
# The loss of a pair where policy and reference are equal, of the losses for which it is the same for all pairs. That
# of ipo is left out: it changes by up to 1 / beta per log-ratio.
STARTS = {
    **dict.fromkeys(("sigmoid", "robust", "length-normalised", "dpo-positive"), LN2),
    **dict.fromkeys(("hinge", "apo-zero", "apo-down"), 1.0),
}


@dataclass(frozen=True)
class DPOLossConfig:
    """The loss, or several by name with their weights, and the constants; a field that no loss uses is ignored."""

    beta: float = 0.1
    loss: Loss | dict[Loss, float] = "sigmoid"
    label_smoothing: float = 0.0
    nll_alpha: float = 0.0
    ld_alpha: float | None = None
    rdpo_alpha: float = 0.01
    gamma: float = 1.0
    positive_lambda: float = 50.0
    use_weighting: bool = False

    def __post_init__(self) -> None:
        unsmoothed = [loss for loss in self.weights if loss not in (*SMOOTHED, "robust")]
        if self.label_smoothing and unsmoothed:
            raise OptionError(
                f"--loss {unsmoothed[0]} has no label smoothing", f"one of {', '.join(SMOOTHED)}, robust has"
            )
        all_trl = set(self.weights) <= set(TRL_NAMES)
        if self.ld_alpha is not None and (not all_trl or self.label_smoothing):
            raise OptionError("--ld-alpha goes with a loss of TRL's own, and without --label-smoothing")
        if self.use_weighting and (not all_trl or (self.label_smoothing and set(self.weights) != {"robust"})):
            raise OptionError("--use-weighting goes with a loss of TRL's own, and without --label-smoothing")
        if self.use_weighting and "hinge" in self.weights:  # TRL multiplies in place what relu keeps for its gradient
            raise OptionError("TRL has no gradient for --loss hinge with --use-weighting", "another --loss")
        if self.label_smoothing >= 0.5:
            raise OptionError("--label-smoothing is the share of wrong labels, below 0.5")

    @property
    def weights(self) -> dict[Loss, float]:
        """The weight of each loss by its name."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @property
    def has_reference(self) -> bool:
        """Whether a loss compares the policy with a reference at all."""
        return set(self.weights) != {"simpo"}

    @property
    def takes_smoothing(self) -> bool:
        """Whether rows can have a `label_smoothing`."""
        return set(self.weights) <= set(SMOOTHED) and self.ld_alpha is None and not self.use_weighting

    @property
    def start(self) -> float | None:
        """The loss where policy and reference are equal; None where it is not the same for all pairs."""
        if self.nll_alpha or self.use_weighting or not set(self.weights) <= set(STARTS):
            return None
        return sum(weight * STARTS[loss] for loss, weight in self.weights.items())

    def of_trl(self, smoothed: bool = False) -> dict[str, float]:
        """Return the weights of the losses that TRL computes, by its names, for a pair with or without smoothing."""
        own = self.own(smoothed)
        found = {TRL_NAMES[loss]: weight for loss, weight in self.weights.items() if loss not in own}
        return {**found, "sft": self.nll_alpha} if self.nll_alpha else found

    def own(self, smoothed: bool) -> dict[Loss, float]:
        """Return the weights of the losses that TRL lacks, for a pair with or without smoothing."""
        named = TRL_NAMES.keys() - set(SMOOTHED) if smoothed else TRL_NAMES
        return {loss: weight for loss, weight in self.weights.items() if loss not in named}

    def trl(self) -> dict[str, Any]:
        """Return the settings of `trl.DPOConfig`."""
        names = self.of_trl()
        return {
            "beta": self.beta,
            "loss_type": list(names),
            "loss_weights": list(names.values()),
            "label_smoothing": self.label_smoothing if "robust" in self.weights else 0.0,
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
        }


def weighted(losses: Sequence[Loss], weights: Sequence[float]) -> Loss | dict[Loss, float]:
    """Return the losses of `--loss` as `DPOLossConfig` takes them; each weight is 1 if there are none, as in TRL.

    Raises OptionError for a loss that is there twice, and for weights that are not one for each loss.
    """
    if twice := [loss for at, loss in enumerate(losses) if loss in losses[:at]]:
        raise OptionError(f"--loss {twice[0]} is there twice", "--loss-weight gives a loss its weight")
    if weights and len(weights) != len(losses):
        raise OptionError(f"{len(weights)} --loss-weight for {len(losses)} --loss", "give one for each, in their order")
    if weights and not any(weights):
        raise OptionError("every --loss-weight is 0: there is nothing to train")
    if len(losses) == 1 and not weights:
        return losses[0]
    return dict(zip(losses, weights or [1.0] * len(losses), strict=True))


@dataclass(frozen=True)
class KTOLossConfig:
    """The loss of unpaired rows and its constants; the weights are λ_D and λ_U of the paper (arXiv 2402.01306)."""

    beta: float = 0.1
    loss: UnpairedLoss = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.desirable_weight and not self.undesirable_weight:
            raise OptionError("--desirable-weight and --undesirable-weight are both 0: there is nothing to train")

    has_reference = True

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss has a KL estimate."""
        return self.loss == "kto"

    @property
    def trl_name(self) -> str:
        """Return the name of the loss in TRL."""
        return self.loss.replace("-", "_")

    def trl(self) -> dict[str, Any]:
        """Return the settings of `trl.KTOConfig`; the trainer sets the loss and its KL estimate.

        TRL estimates the KL over a device batch, and refuses a device batch of one row for a loss that has it.
        """
        return {
            "beta": self.beta,
            "loss_type": "apo_zero_unpaired",
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }


def own_loss(
    loss: Loss,
    loss_config: DPOLossConfig,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    smoothing: Tensor,
) -> Tensor:
    """Return one loss of each pair, of shape (pairs,).

    `policy`, `reference` and `lengths` are (chosen, rejected): summed log-probabilities and tokens of
    each completion. `smoothing` is the probability, per pair, that the sides are swapped:
    with h the logit of a loss, (1 - e) log sigmoid(h) + e log sigmoid(-h) is maximised.
    """
    from torch.nn.functional import logsigmoid

    h = logits(loss, loss_config, policy, reference, lengths)
    return -(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h)


def logits(
    loss: Loss,
    loss_config: DPOLossConfig,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the logit of "chosen is better" by pair, as each loss has it."""
    chosen, rejected = (mine - theirs for mine, theirs in zip(policy, reference, strict=True))
    if loss == "length-normalised":
        return loss_config.beta * (chosen / lengths[0] - rejected / lengths[1])
    if loss == "r-dpo":
        return loss_config.beta * (chosen - rejected) + loss_config.rdpo_alpha * (lengths[0] - lengths[1])
    if loss == "simpo":
        return loss_config.beta * (policy[0] / lengths[0] - policy[1] / lengths[1]) - loss_config.gamma
    if loss == "dpo-positive":
        return loss_config.beta * (chosen - rejected - loss_config.positive_lambda * (-chosen).clamp(min=0))
    return loss_config.beta * (chosen - rejected)
