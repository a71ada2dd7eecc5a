"""The losses of `dpo` by their formulas, and TRL's own trainer, for tests."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.render import Renderer
from tiny import pairs


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(h: list[float], e: float = 0.0) -> list[float]:
    """Return -(1 - e) log sigmoid(h) - e log sigmoid(-h)."""
    return [-(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x)) for x in h]


def by_logits(folder: Path, rows: list[dict], value=None) -> list[list[list[float]]]:
    """Return token log-probabilities of chosen and rejected, from a model's plain logits; or a `value` of all."""
    from srlm_cli.models.load import load_model, load_tokenizer
    from srlm_cli.train.data import dpo_rows

    model, tokenizer = load_model(str(folder), "float32"), load_tokenizer(str(folder))
    found = []
    for row in dpo_rows(rows, Renderer(tokenizer), 512)[0]:
        start, both = len(row["prompt_ids"]), []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.inference_mode():
                scores = model(ids).logits[0].log_softmax(-1)
            at = range(start, ids.shape[1])
            both.append([float(value(scores[n - 1]) if value else scores[n - 1, ids[0, n]]) for n in at])
        found.append(both)
    return found


def first_losses(about: DPOLossConfig, ours: list, theirs: list) -> list[float]:
    """Return what the loss of each pair is by its published formula, the weighted sum for several losses."""
    if isinstance(about.loss, dict):
        parts = {loss: first_losses(replace(about, loss=loss, nll_alpha=0.0), ours, theirs) for loss in about.loss}
        sums = [sum(weight * parts[loss][at] for loss, weight in about.loss.items()) for at in range(len(ours))]
        return [
            total - about.nll_alpha * sum(chosen) / len(chosen) for total, (chosen, _) in zip(sums, ours, strict=True)
        ]
    found = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(ours, theirs, strict=True):
        w, r, b = sum(chosen) - sum(ref_chosen), sum(rejected) - sum(ref_rejected), about.beta
        lw, lr, e = len(chosen), len(rejected), about.label_smoothing
        short = min(lw, lr)
        tails = [sum(side[short:]) for side in (chosen, ref_chosen, rejected, ref_rejected)]
        h = {
            "sigmoid": b * (w - r),
            "robust": b * (w - r),
            "length-normalised": b * (w / lw - r / lr),
            "r-dpo": b * (w - r) + about.rdpo_alpha * (lw - lr),
            "simpo": b * (sum(chosen) / lw - sum(rejected) / lr) - about.gamma,
            "dpo-positive": b * (w - r - about.positive_lambda * max(0.0, -w)),
        }.get(about.loss, b * (w - r))
        if about.ld_alpha is not None:
            cut = 1 - about.ld_alpha
            h = b * ((w - cut * (tails[0] - tails[1])) - (r - cut * (tails[2] - tails[3])))
        loss = by_hand([h], e)[0]
        if about.loss == "robust":
            loss = (-(1 - e) * math.log(sigmoid(h)) + e * math.log(sigmoid(-h))) / (1 - 2 * e)
        if about.loss == "hinge":
            loss = max(0.0, 1 - h)
        if about.loss == "ipo":
            loss = (w / lw - r / lr - 1 / (2 * b)) ** 2
        if about.loss == "apo-zero":  # 1 more than equation 7 of arXiv 2408.06266, whose losses begin at 0
            loss = 1 - sigmoid(b * w) + sigmoid(b * r)
        if about.loss == "apo-down":  # 1 more than equation 8
            loss = 1 + sigmoid(b * w) - sigmoid(b * (w - r))
        found.append(loss - about.nll_alpha * sum(chosen) / lw)
    return found


def trl_trainer(base: Path, other: Path, folder: Path, **settings: object):
    """Return TRL's own DPOTrainer, which tokenizes the same texts, and takes steps of plain gradient descent."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from srlm_cli.models.load import load_model, load_tokenizer
    from srlm_cli.train.data import dpo_rows

    tokenizer = load_tokenizer(str(base))
    rows = dpo_rows(pairs(5), Renderer(tokenizer), 512)[0]
    texts = [{side: tokenizer.decode(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")} for row in rows]
    common = {
        "output_dir": str(folder), "learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd",
        "max_steps": 1, "per_device_train_batch_size": 5, "logging_steps": 1, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return DPOTrainer(
        model=load_model(str(base), "float32"),
        ref_model=load_model(str(other), "float32"),
        args=DPOConfig(**{**common, **settings}),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
