"""Batches of tokenized rows: padding to the longest row, and rows of like length together."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from . import AlpacaError
from .checkpoints import processes
from .data import IGNORED


class PadToLongest:
    """A data collator: pads the rows of a batch on the right, to the longest of them, with labels that are ignored.

    No attention mask is needed there, since no real token comes after; transformers' own collators pad on the
    tokenizer's side, which is the left for Llama's and Gemma's.
    """

    def __init__(self, pad_token_id: int):
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED}

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels`, each (rows, longest row)."""
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=pad)
            for name, pad in self.padding.items()
        }


def add_learned(collate: Callable, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the batch of `rows`, and as `learned` the positions of the labels to learn in the flattened batch, (n,).

    They are looked for here, in main memory: on a GPU the search forces a synchronization.
    """
    batch = dict(collate(rows))
    predicted = F.pad(batch["labels"][:, 1:] != IGNORED, (1, 0))  # nothing stands before a row's first token
    return batch | {"learned": predicted.flatten().nonzero().squeeze(1)}


class LengthGroups(Sampler[int]):
    """Row numbers in an order that puts rows of like length into the same batch; another order each epoch.

    Rows are shuffled, sorted by length within every `STEPS` batches, and these batches shuffled; the last batch is
    filled up with the first rows. Seed and epoch alone decide (transformers' own `group_by_length` draws from the
    global random state), so a resumed training goes on in the same order, on any number of devices.
    """

    STEPS = 16

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())  # no two share one
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        rows = [rows[i % len(rows)] for i in range(len(self))]
        group = self.STEPS * self.batch_size
        groups = [sorted(rows[i : i + group], key=self.lengths.__getitem__) for i in range(0, len(rows), group)]
        rows = [row for group in groups for row in group]
        for batch in torch.randperm(len(rows) // self.batch_size, generator=generator).tolist():
            yield from rows[batch * self.batch_size : (batch + 1) * self.batch_size]


def split_batch(batch_size: int, micro_batch_size: int) -> tuple[int, int]:
    """Return how many rows a device holds at once, and how often they make up its share; AlpacaError if uneven."""
    devices = processes()
    if batch_size % devices:
        what = f"A batch of {batch_size} rows cannot be shared by {devices} processes"
        raise AlpacaError(f"{what}: choose a `batch_size` that {devices} divides.")
    share = batch_size // devices
    rows = max(size for size in range(1, share + 1) if share % size == 0 and size <= micro_batch_size)
    return rows, share // rows
