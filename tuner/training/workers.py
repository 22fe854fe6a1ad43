"""The trainer that deals out the rows of a step to several workers, so that they train the same steps as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch.utils.data import BatchSampler, Sampler
from trl import SFTTrainer

from tuner.training.evaluation import IGNORED


class WorkersTrainer(SFTTrainer):
    """An `SFTTrainer` whose workers together train the rows of each step that a single worker would.

    Left to itself, accelerate fills up the last step of an epoch with rows of its first, and the steps of several
    workers drift from those of one. Here it is filled with a row that has no labels and so no weight in the loss.
    """

    def __init__(self, *, train_dataset: Dataset, batch_of_one: int, **arguments: Any):
        """`batch_of_one` is what `per_device_train_batch_size` would be for one worker."""
        self.own_rows = train_dataset
        self.batch_of_one = batch_of_one
        super().__init__(
            train_dataset=concatenate_datasets([train_dataset, _without_labels(train_dataset)]), **arguments
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return super()._get_train_sampler(self.own_rows)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        share: Any = loader.batch_sampler  # accelerate's: deals whole batches to the workers in turn
        workers, cut = share.num_processes, self.batch_of_one if self.args.dataloader_drop_last else 1
        share.batch_sampler = _WholeTurns(share.batch_sampler, workers, len(self.own_rows), cut)
        return loader


def _without_labels(rows: Dataset) -> Dataset:
    """The first row, cut to two tokens, none of which is to be learned."""
    row = {**rows[0], "input_ids": rows[0]["input_ids"][:2], "labels": [IGNORED, IGNORED]}
    if "seq_lengths" in row:
        row["seq_lengths"] = [2]
    return Dataset.from_list([row], features=rows.features)


class _WholeTurns(BatchSampler):
    """Full batches, as many for every worker: what is missing at the end is a `filler`."""

    def __init__(self, batches: Any, workers: int, filler: int, cut: int):
        """Of the rows, those beyond a multiple of `cut` are left out."""
        super().__init__(batches.sampler, batches.batch_size, drop_last=False)
        self._turn = workers * self.batch_size
        self._filler = filler
        self._cut = cut

    def _rows(self) -> int:
        rows = len(self.sampler)  # type: ignore[arg-type]
        return rows - rows % self._cut

    def __len__(self) -> int:
        return -(-self._rows() // self._turn) * self._turn // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.sampler)[: self._rows()]
        rows += [self._filler] * (len(self) * self.batch_size - len(rows))
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]
