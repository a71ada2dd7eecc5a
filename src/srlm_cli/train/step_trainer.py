"""A trainer whose steps are those of an uninterrupted training in one process: order of rows, loss, checkpoints.

This module imports torch and transformers and is itself imported late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from srlm_cli import distributed
from srlm_cli.models.load import restore
from srlm_cli.records import Record
from srlm_cli.seeds import derive
from srlm_cli.train import router
from srlm_cli.train.data import as_dataset
from srlm_cli.train.embedding_gradient import add_by_row
from srlm_cli.train.float32_logits import make_few_in_float32
from srlm_cli.train.packing import Packing, groups
from srlm_cli.train.workdir import Workdir


class StepSampler:
    """The order of the rows: shuffled in each epoch; within an optimizer step sorted by length, longest first.

    The order depends only on seed and epoch. So a resumed training has the same order as an uninterrupted one, and
    several processes have the same steps as one: they take turns with the rows of a step. Sorting within a step saves
    padding and does not change the rows of a step. The last step of an epoch is filled up to a multiple of `whole` with
    the index after the last row, a row without a target, so that all processes have the same number of rows.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int, whole: int = 1) -> None:
        self.lengths, self.batch, self.seed, self.whole = lengths, batch, seed, whole
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + -len(self.lengths) % self.whole

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "epoch", self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for at in range(0, len(order), self.batch):
            yield from sorted(order[at : at + self.batch], key=lambda row: -self.lengths[row])
        yield from [len(self.lengths)] * (len(self) - len(self.lengths))


class StepTrainer:
    """A mixin for a trainer: the sampler above, a loss that is a mean over the whole step, whole checkpoints.

    The result of a step depends only on its rows, not on the device batch size or the number of processes. `items`
    returns the number of target tokens (or pairs) of a batch, over which its loss is a mean; `filler` returns a row
    without any.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        rows: list[Record],
        eval_rows: list[Record],
        length: Callable[[Record], int],
        batch: int,
        seed: int,
        workdir: Workdir,
        **more: Any,
    ) -> None:
        self.workdir = workdir
        self.router_settings = router.disable_balancing_loss(more["model"])
        if more.get("ref_model") is not None:
            router.disable_balancing_loss(more["ref_model"])
        count = distributed.count()
        whole = more["args"].per_device_train_batch_size * count if count > 1 else 1
        self.sampler = StepSampler(list(map(length, rows)), batch, seed, whole)
        self.eval_items = sum(map(self.row_items, eval_rows))
        filler = self.filler(rows[0])
        padded = eval_rows + [filler] * (-len(eval_rows) % whole)
        super().__init__(
            *args,
            train_dataset=as_dataset([*rows, filler]),
            eval_dataset=as_dataset(padded) if eval_rows else None,
            **more,
        )
        _ = self.packing  # tries the model out before accelerate, with bfloat16, changes its forward pass
        if self.splits:
            add_by_row(self.model)
            make_few_in_float32(self.model)

    def forward_passes(self, epochs: float) -> float:
        """Return how many forward passes over all rows a training needs, beside those of its steps."""
        return 0.0

    @property
    def splits(self) -> bool:
        """Whether the rows of a step are split into passes of the fastest number of rows."""
        return distributed.count() == 1 and self.args.device.type == "cpu"

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the model takes the position of each token as input."""
        return "position_ids" in signature(self.packing.bare.forward).parameters

    @cached_property
    def packing(self) -> Packing:
        """The passes over rows of the model to train."""
        return Packing(self.model)

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.sampler

    def _run_epoch(self, *args: Any, epoch: int, **more: Any) -> None:
        self.sampler.set_epoch(epoch)  # accelerate does not reach it in several processes when batches are skipped
        super()._run_epoch(*args, epoch=epoch, **more)

    def _get_num_items_in_batch(self, batch_samples: list[Record], device: Any) -> Any:
        """Return how many items the loss of these batches is a mean over, in all processes."""
        items = torch.tensor(sum(float(self.items(batch)) for batch in batch_samples), device=device)
        return self.accelerator.gather(items).sum()

    def training_step(self, model: Any, inputs: Record, num_items_in_batch: Any = None) -> Any:
        """Compute the gradient of a batch; on a CPU, in passes of the fastest number of rows."""
        if not self.splits:
            return super().training_step(model, inputs, num_items_in_batch)
        most = self.batch_rows(inputs) if self.packing.now() else 1
        total = 0.0
        for some in groups(self.lengths(inputs), most):
            total = total + super().training_step(model, self.rows_of(inputs, some), num_items_in_batch)
        return total

    def as_mean(self, total: Any, batch: Record, items: Any) -> Any:
        """Return a sum over the items of a batch as its part of the mean over `items`, those of a step.

        The parts of several processes are averaged, so each is that much larger. Without `items` it is,
        on held-out rows, its part of the mean over all of them, as Trainer averages the parts by rows; else
        its own mean.
        """
        if items is not None:
            return total / items * self.accelerator.num_processes
        if not self.model.training:
            return total / self.eval_items * len(self.eval_dataset) / self.batch_rows(batch)
        return total / max(1, self.items(batch))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        with self.workdir.writing(f"the checkpoint of step {step}"):
            router.set_router_settings(self.model, self.router_settings)
            Trainer._save_checkpoint(self, model, trial)  # TRL's own would write a model card first
            router.disable_balancing_loss(self.model)
            self.save_beside(self.workdir.step(step))
            distributed.barrier()
            self.workdir.keep(step)

    def save_beside(self, folder: Path) -> None:
        """Add to a checkpoint what a training needs beside the model, before it counts as whole."""

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        if distributed.sharded():
            super()._load_from_checkpoint(folder, model)
        else:
            restore(self.model, Path(folder))
