"""The preference losses: each by hand on numbers, and as the trainer takes its steps with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_by_hand import by_hand, by_logits, first_losses, trl_trainer
from helpers import Srlm, as_lines, read_json, slow, write_rows
from srlm_cli.errors import DataError, OptionError, SrlmError
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig, own_loss, weighted
from srlm_cli.train.options import RunOptions, TrainSpec
from tiny import pairs

torch.set_num_threads(1)

# Two pairs: log-probabilities by policy and reference, and tokens, of chosen and rejected.
POLICY = ([-10.0, -30.0], [-14.0, -20.0])
REFERENCE = ([-12.0, -28.0], [-13.0, -25.0])
LENGTHS = ([4.0, 10.0], [8.0, 5.0])

# log-ratios of chosen: 2, -2; of rejected: -1, 5; so DPO's h is beta x (3, -7)
LOGITS = {
    "sigmoid": [0.1 * 3, 0.1 * -7],
    "length-normalised": [0.1 * (2 / 4 + 1 / 8), 0.1 * (-2 / 10 - 5 / 5)],
    "r-dpo": [0.1 * 3 + 0.05 * (4 - 8), 0.1 * -7 + 0.05 * (10 - 5)],
    "simpo": [0.1 * (-10 / 4 + 14 / 8) - 0.3, 0.1 * (-30 / 10 + 20 / 5) - 0.3],
    "dpo-positive": [0.1 * 3, 0.1 * (-7 - 6.0 * 2)],
}


def tensors(both: tuple[list[float], list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(both[0]), torch.tensor(both[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("loss", list(LOGITS))
def test_a_loss_by_hand(loss: str, smoothing: float) -> None:
    about = DPOLossConfig(beta=0.1, loss=loss, rdpo_alpha=0.05, gamma=0.3, positive_lambda=6.0)
    made = own_loss(
        about.loss, about, tensors(POLICY), tensors(REFERENCE), tensors(LENGTHS), torch.full((2,), smoothing)
    )
    assert made.tolist() == pytest.approx(by_hand(LOGITS[loss], smoothing), rel=1e-5)


def test_each_pair_has_its_own_smoothing() -> None:
    """CREAM's C x DPO(w, l) + (1 - C) x DPO(l, w), with 1 - C as the smoothing of a pair."""
    made = own_loss(
        "sigmoid", DPOLossConfig(), tensors(POLICY), tensors(REFERENCE), tensors(LENGTHS), torch.tensor([0.0, 0.75])
    ).tolist()
    dpo_wl, dpo_lw = by_hand(LOGITS["sigmoid"]), by_hand([-h for h in LOGITS["sigmoid"]])
    assert made == pytest.approx([dpo_wl[0], 0.25 * dpo_wl[1] + 0.75 * dpo_lw[1]], rel=1e-5)


# --- as the trainer has them -----------------------------------------------------------------


@pytest.mark.parametrize(
    "about",
    [
        DPOLossConfig(),
        slow(DPOLossConfig(nll_alpha=0.7)),
        slow(DPOLossConfig(label_smoothing=0.2)),
        DPOLossConfig(label_smoothing=0.2, nll_alpha=0.7),
        slow(DPOLossConfig(loss="robust", label_smoothing=0.2)),
        slow(DPOLossConfig(loss="hinge")),
        DPOLossConfig(loss="ipo"),
        slow(DPOLossConfig(loss="apo-zero", beta=0.5)),
        DPOLossConfig(loss="apo-down", beta=0.5),
        DPOLossConfig(loss="length-normalised", beta=5.0),
        slow(DPOLossConfig(ld_alpha=0.3)),
        slow(DPOLossConfig(loss="r-dpo", rdpo_alpha=0.05)),
        DPOLossConfig(loss="simpo", beta=2.0, gamma=0.5),
        DPOLossConfig(loss="dpo-positive", positive_lambda=5.0, nll_alpha=0.1),
        slow(DPOLossConfig(loss={"ipo": 0.5})),
        slow(DPOLossConfig(loss={"sigmoid": 0.8, "apo-zero": 0.2}, nll_alpha=0.7)),
        slow(DPOLossConfig(loss={"sigmoid": 0.8, "hinge": 0.2}, ld_alpha=0.3)),
        DPOLossConfig(loss={"ipo": 0.5, "r-dpo": 2.0, "simpo": 0.1}, rdpo_alpha=0.05, nll_alpha=0.7),
        slow(DPOLossConfig(loss={"robust": 0.5, "dpo-positive": 2.0}, positive_lambda=5.0, label_smoothing=0.2)),
        slow(DPOLossConfig(loss={"simpo": 0.5, "r-dpo": 0.7}, label_smoothing=0.2)),
    ],
    ids=lambda about: (
        f"{'+'.join(about.weights)}{'+nll' * bool(about.nll_alpha)}{'+e' * bool(about.label_smoothing)}"
        + "+ld" * (about.ld_alpha is not None)
    ),
)
def test_the_first_step_has_the_published_loss(about: DPOLossConfig, base: Path, other: Path, tmp_path: Path) -> None:
    """With another model as the reference, so that no log-ratio is 0; pairs of unlike lengths."""
    rows = pairs(5)
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-3, batch=5, max_steps=1, dtype="float32")
    result = dpo(rows, spec, about, ref=str(other), run=RunOptions(quiet=True))
    wanted = first_losses(about, by_logits(base, rows), by_logits(other, rows))
    assert result["first_loss"] == pytest.approx(sum(wanted) / 5, rel=1e-4)


@pytest.mark.parametrize("more", [{}, *map(slow, ({"loss": "ipo"}, {"loss": "apo-zero"}, {"loss": "apo-down"},
    {"loss": "length-normalised"}, {"loss": "robust", "label_smoothing": 0.2}, {"nll_alpha": 0.5}, {"ld_alpha": 0.3},
    {"loss": {"sigmoid": 0.6, "apo-zero": 0.4}, "nll_alpha": 0.5}))],
    ids=str)  # fmt: skip
def test_a_pair_has_the_weight_of_wpo(more: dict, base: Path, other: Path, tmp_path: Path) -> None:
    """Equation 2 of arXiv 2406.11827: how probable the tokens are, beside a token that the policy draws itself."""
    rows, about = pairs(5), DPOLossConfig(use_weighting=True, **more)
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-3, batch=5, max_steps=1, dtype="float32")
    result = dpo(rows, spec, about, ref=str(other), run=RunOptions(quiet=True))
    ours, theirs = by_logits(base, rows), by_logits(other, rows)
    expected = by_logits(base, rows, lambda scores: (2 * scores).exp().sum(-1).log())
    total = 0.0
    for loss, replies, drawn in zip(first_losses(about, ours, theirs), ours, expected, strict=True):
        for tokens, own in zip(replies, drawn, strict=True):
            loss *= math.exp(sum(t - o for t, o in zip(tokens, own, strict=True)) / len(tokens))
        total += loss
    assert result["first_loss"] == pytest.approx(total / 5, rel=1e-4)
    assert result["first_loss"] != pytest.approx(sum(first_losses(about, ours, theirs)) / 5, rel=0.01)
    assert result["reference"]["model"] == str(other)


@pytest.mark.parametrize("loss", ["sigmoid", {"sigmoid": 0.5, "length-normalised": 2.0}], ids=str)
def test_rows_bring_their_own_smoothing(loss, base: Path, other: Path, tmp_path: Path) -> None:
    rows = [{**row, "label_smoothing": n / 4} for n, row in enumerate(pairs(5))]
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-3, batch=5, max_steps=1, dtype="float32")
    plain = DPOLossConfig(loss=loss)
    result = dpo(rows, spec, plain, ref=str(other), run=RunOptions(quiet=True))
    ours, theirs = by_logits(base, rows), by_logits(other, rows)
    wanted = [
        first_losses(plain, [a], [b])[0] * (1 - e) + first_losses(plain, [a[::-1]], [b[::-1]])[0] * e
        for a, b, e in zip(ours, theirs, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True)
    ]
    assert result["first_loss"] == pytest.approx(sum(wanted) / 5, rel=1e-4)
    for without in ("ipo", {"sigmoid": 1.0, "robust": 1.0}):
        with pytest.raises(DataError, match="label_smoothing"):
            dpo(rows, spec, DPOLossConfig(loss=without), run=RunOptions(quiet=True))


LISTS = {  # of losses as in TRL, each pair of which does not depend on the others
    "two": ({"sigmoid": 0.8, "apo-zero": 0.2}, {}),
    "four": ({"ipo": 0.5, "length-normalised": 2.0, "hinge": 0.3, "apo-down": 1.0}, {}),
    "robust": ({"robust": 0.5, "apo-zero": 1.0}, {}),
    "ld": ({"sigmoid": 0.8, "apo-zero": 0.2}, {"ld_alpha": 0.3}),
    "wpo": ({"sigmoid": 0.8, "apo-zero": 0.2}, {"use_weighting": True}),
}


@pytest.mark.parametrize("name", ["two", *map(slow, ("four", "robust", "ld", "wpo"))])
def test_a_step_of_several_losses_is_that_of_trl(name: str, base: Path, other: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from srlm_cli.train.losses import TRL_NAMES

    losses, more = LISTS[name]
    about = DPOLossConfig(loss=losses, beta=0.5, **more)
    trainer = trl_trainer(
        base, other, tmp_path / "trl", beta=0.5, loss_type=[TRL_NAMES[loss] for loss in losses],
        loss_weights=list(losses.values()), **more,
    )  # fmt: skip
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "loss" in entry]
    spec = TrainSpec(str(base), tmp_path / "m", 1.0, 1.0, batch=5, max_steps=1, dtype="float32", optim="sgd")
    result = dpo(pairs(5), spec, about, ref=str(other), run=RunOptions(quiet=True))
    assert result["first_loss"] == pytest.approx(logged["loss"], rel=1e-4)
    assert result["margin"] == pytest.approx(logged["rewards/margins"], rel=1e-3)
    theirs = dict(trainer.model.named_parameters())
    for weight, mine in load_file(tmp_path / "m" / "model.safetensors").items():
        assert float((mine - theirs[weight].detach()).abs().max()) <= 1e-5, weight


def test_several_losses_start_at_their_weighted_sum(base: Path, tmp_path: Path, monkeypatch) -> None:
    """Losses that start at ln 2, and losses that start at 1; another start is refused."""
    losses = {
        "sigmoid": 1.0, "length-normalised": 2.0, "robust": 0.5, "dpo-positive": 0.5, "hinge": 0.1, "apo-zero": 0.2,
        "apo-down": 0.3,
    }  # fmt: skip
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-3, batch=5, max_steps=1, dtype="float32")
    about = DPOLossConfig(loss=losses)
    assert about.start == pytest.approx(4 * math.log(2) + 0.6)
    result = dpo(pairs(5), spec, about, run=RunOptions(quiet=True))
    assert result["start"]["loss"] == pytest.approx(about.start, abs=1e-4)
    for unknown in ({"loss": {"sigmoid": 1.0, "ipo": 1.0}}, {"loss": losses, "nll_alpha": 0.5}):
        assert DPOLossConfig(**unknown).start is None
    monkeypatch.setattr(DPOLossConfig, "start", 4.0)
    with pytest.raises(SrlmError, match=r"loss 3\.37\d+, not 0, 0 and 4\.0000"):
        dpo(pairs(5), replace(spec, out=tmp_path / "n"), about, run=RunOptions(quiet=True))


def test_losses_and_their_weights_as_they_are_given(srlm: Srlm, base: Path) -> None:
    write_rows(srlm.folder / "pairs.jsonl", pairs(4))
    argv = ["dpo", "--in", "pairs.jsonl", "--model", str(base), "--max-steps", "1", "-q"]
    both = ["--loss", "sigmoid", "--loss-weight", "0.8", "--loss", "apo-zero", "--loss-weight", "0.2"]

    def loss_of(out: str) -> object:
        return read_json(srlm.folder / out / "provenance.json")["loss"]

    assert srlm(*argv, *both, "--out", "a").code == 0 and loss_of("a") == {"sigmoid": 0.8, "apo-zero": 0.2}
    assert srlm(*argv, "--out", "b").code == 0 and loss_of("b") == "sigmoid"
    (srlm.folder / "srlm.toml").write_text('[dpo]\nloss = ["sigmoid", "apo-zero"]\nloss-weight = [0.8, 0.2]\n')
    assert srlm(*argv, "--out", "c").code == 0 and loss_of("c") == loss_of("a")
    [printed] = [row for row in srlm("settings").rows if row.get("command") == "dpo"]
    assert printed["loss"] == ["sigmoid", "apo-zero"] and printed["loss-weight"] == [0.8, 0.2]
    (srlm.folder / "srlm.toml").write_text('[dpo]\nloss = ["sigmoid", "ipp"]\n')
    refused = srlm("settings")
    assert refused.code == 2 and "'ipp' is not one of 'sigmoid', 'robust'" in refused.err
    assert weighted(["sigmoid", "ipo"], []) == {"sigmoid": 1.0, "ipo": 1.0} and weighted(["ipo"], []) == "ipo"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--loss sigmoid --loss ipo --loss-weight 0.5", "1 --loss-weight for 2 --loss (give one for each"),
        ("--loss-weight 0.5 --loss-weight 1", "2 --loss-weight for 1 --loss"),
        ("--loss ipo --loss ipo", "--loss ipo is there twice"),
        ("--loss sigmoid --loss ipo --loss-weight 0 --loss-weight 0", "every --loss-weight is 0"),
        ("--loss sigmoid --loss ipo --label-smoothing 0.1", "--loss ipo has no label smoothing"),
        ("--loss sigmoid --loss simpo --ld-alpha 0.5", "--ld-alpha goes with"),
        ("--loss sigmoid --loss hinge --use-weighting", "no gradient for --loss hinge"),
        ("--loss robust --loss sigmoid --label-smoothing 0.1 --use-weighting", "--use-weighting goes with"),
    ],
)
def test_losses_that_do_not_go_together(options: str, words: str, srlm: Srlm) -> None:
    result = srlm("dpo", "--model", "./nowhere", "--out", "m", *options.split(), stdin=as_lines(pairs(2)))
    assert result.code == 2 and words in result.err


def test_constants_that_do_not_go_together() -> None:
    with pytest.raises(OptionError, match="no label smoothing"):
        DPOLossConfig(loss="ipo", label_smoothing=0.1)
    with pytest.raises(OptionError, match="below 0.5"):
        DPOLossConfig(label_smoothing=0.5)
    for wrong in ({"loss": "r-dpo"}, {"label_smoothing": 0.1}, {"loss": "hinge"}):
        with pytest.raises(OptionError, match="--use-weighting"):
            DPOLossConfig(use_weighting=True, **wrong)
    with pytest.raises(OptionError, match="--ld-alpha"):
        DPOLossConfig(loss="simpo", ld_alpha=0.5)


def test_a_smoothing_that_is_no_probability_is_a_bad_row(srlm: Srlm, base: Path) -> None:
    rows = [*pairs(2), {**pairs(3)[2], "label_smoothing": 1.5}]
    result = srlm("dpo", "--model", str(base), "--out", "m", stdin=as_lines(rows))
    assert result.code == 3 and "<stdin>:3: expected `label_smoothing`" in result.err


@pytest.mark.parametrize("more", [{}, {"lora_r": 2}], ids=["full", "adapter"])
def test_reference_check_and_steps_score_without_padding(base: Path, tmp_path: Path, monkeypatch, more) -> None:
    from srlm_cli.train import scoring

    without_padding, calls = scoring.scores, []
    monkeypatch.setattr(scoring, "scores", lambda *args: calls.append(len(args[2])) or without_padding(*args))
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-3, batch=5, **more)
    dpo(pairs(10), spec, DPOLossConfig(), run=RunOptions(quiet=True))
    assert calls == [10, 10, 8, 8, 10, 10]  # the reference, four pairs of it and of the policy in float32, two steps


SIZES = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_without_padding_are_those_of_trl(kind: str, rows: int, chunk: int, monkeypatch) -> None:
    """Against TRL's own fused head, with its gradients, on a padded batch; also where logits are scaled, in chunks."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from srlm_cli.train import chunked_logits
    from srlm_cli.train.packing import Packing
    from srlm_cli.train.scoring import score_without_padding

    monkeypatch.setattr(chunked_logits, "CHUNK", chunk * SIZES["vocab_size"])
    torch.manual_seed(0)
    lengths = [12, 7, 9][:rows]
    ids = torch.randint(0, 200, (rows, 12))
    mask = torch.tensor([[1] * n + [0] * (12 - n) for n in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    found, fields = [], ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    for own in (False, True):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS[kind])).eval()
        add_fused_lm_head(model, outputs=fields)
        if own:
            score_without_padding(Packing(model), weighted=True)
        scores = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        scores.log_probs.sum().backward()
        found.append((scores, {name: weight.grad for name, weight in model.named_parameters()}))
    (theirs, wanted), (ours, grads) = found
    for name in fields:
        assert torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-4), name
    for name, grad in grads.items():
        assert torch.allclose(grad, wanted[name], atol=1e-4), name
