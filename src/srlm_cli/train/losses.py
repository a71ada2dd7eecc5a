"""The preference losses, and the settings of TRL for each; docs/training.md has formulas and sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from srlm_cli.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

Loss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "apo-zero", "apo-down", "length-normalised", "r-dpo", "simpo", "dpo-positive"
]

UnpairedLoss = Literal["kto", "apo-zero-unpaired"]

# Those that TRL has, by its name; the others, and sigmoid with smoothing, are `own_loss`.
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
STARTS_AT_LN2 = ("sigmoid", "length-normalised", "dpo-positive")


@dataclass(frozen=True)
class DPOLossConfig:
    """The loss and its constants; a field that a loss does not use is ignored."""

    beta: float = 0.1
    loss: Loss = "sigmoid"
    label_smoothing: float = 0.0
    nll_alpha: float = 0.0
    ld_alpha: float | None = None
    rdpo_alpha: float = 0.01
    gamma: float = 1.0
    positive_lambda: float = 50.0
    use_weighting: bool = False

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss not in (*SMOOTHED, "robust"):
            raise OptionError(f"--loss {self.loss} has no label smoothing", f"one of {', '.join(SMOOTHED)}, robust has")
        if self.ld_alpha is not None and (self.loss not in TRL_NAMES or self.label_smoothing):
            raise OptionError("--ld-alpha goes with a loss of TRL's own, and without --label-smoothing")
        if self.use_weighting and (self.loss not in TRL_NAMES or (self.label_smoothing and self.loss != "robust")):
            raise OptionError("--use-weighting goes with a loss of TRL's own, and without --label-smoothing")
        if self.use_weighting and self.loss == "hinge":  # TRL multiplies in place what relu keeps for its gradient
            raise OptionError("TRL has no gradient for --loss hinge with --use-weighting", "another --loss")
        if self.label_smoothing >= 0.5:
            raise OptionError("--label-smoothing is the share of wrong labels, below 0.5")

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference at all."""
        return self.loss != "simpo"

    @property
    def takes_smoothing(self) -> bool:
        """Whether rows can have a `label_smoothing`."""
        return self.loss in SMOOTHED and self.ld_alpha is None and not self.use_weighting

    @property
    def starts_at_ln2(self) -> bool:
        """Whether the loss is ln 2 where policy and reference are equal."""
        return self.loss in STARTS_AT_LN2 and not self.nll_alpha and not self.use_weighting

    def trl(self) -> dict[str, Any]:
        """Return the settings of `trl.DPOConfig`; where the loss is our own, only its NLL term is TRL's."""
        names = {TRL_NAMES.get(self.loss, "sigmoid"): 1.0}
        if self.nll_alpha:
            names["sft"] = self.nll_alpha
        return {
            "beta": self.beta,
            "loss_type": list(names),
            "loss_weights": list(names.values()),
            "label_smoothing": self.label_smoothing if self.loss == "robust" else 0.0,
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
        }

    def is_own(self, smoothing: Tensor) -> bool:
        """Return whether TRL lacks the loss, for a batch with these smoothings."""
        return self.loss not in TRL_NAMES or (self.loss in SMOOTHED and bool(smoothing.any()))


@dataclass(frozen=True)
class KTOLossConfig:
    """The loss of unpaired rows and its constants; the weights are λ_D and λ_U of the paper (arXiv 2402.01306)."""

    beta: float = 0.1
    loss: UnpairedLoss = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

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
    loss_config: DPOLossConfig,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    smoothing: Tensor,
) -> Tensor:
    """Return the loss of each pair, of shape (pairs,).

    `policy`, `reference` and `lengths` are (chosen, rejected): summed log-probabilities and tokens of
    each completion. `smoothing` is the probability, per pair, that the sides are swapped:
    with h the logit of a loss, (1 - e) log sigmoid(h) + e log sigmoid(-h) is maximised.
    """
    from torch.nn.functional import logsigmoid

    h = logits(loss_config, policy, reference, lengths)
    return -(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h)


def logits(
    loss_config: DPOLossConfig,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the logit of "chosen is better" by pair, as each loss has it."""
    chosen, rejected = (mine - theirs for mine, theirs in zip(policy, reference, strict=True))
    if loss_config.loss == "length-normalised":
        return loss_config.beta * (chosen / lengths[0] - rejected / lengths[1])
    if loss_config.loss == "r-dpo":
        return loss_config.beta * (chosen - rejected) + loss_config.rdpo_alpha * (lengths[0] - lengths[1])
    if loss_config.loss == "simpo":
        return loss_config.beta * (policy[0] / lengths[0] - policy[1] / lengths[1]) - loss_config.gamma
    if loss_config.loss == "dpo-positive":
        return loss_config.beta * (chosen - rejected - loss_config.positive_lambda * (-chosen).clamp(min=0))
    return loss_config.beta * (chosen - rejected)
