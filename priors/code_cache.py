"""A split, encoded once: what a prior over codes learns."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset import OasisDataset
from modules import MOST_DISTANCE, N_PLANES, VQVAE, Condition
from support.console import in_batches
from support.device import move


class CodeCache(Dataset):
    """The codes of a split, the number of each slice's plane, and where its neighbours in the head are.

    Batches are indices, because the neighbours that slices are conditioned on are drawn anew in each step.

    Args:
        vqvae, dataset: on one device.

    Attributes:
        codes: (N, 64, 64) int32, on the CPU.
        plane: (N,) int64, the slice number in the file name; N_PLANES if it has none, or one of N_PLANES or more.
        heads: for each scan of a subject, the index of each of its slices by number. Numbers of N_PLANES or more belong
            to a second scan, as `preparation.oasis` writes them.
    """

    def __init__(self, vqvae: VQVAE, dataset: OasisDataset):
        encoded = (vqvae.encode(x).int().cpu() for x in in_batches(dataset, desc=f"Encoding {dataset.split}"))
        self.codes = torch.cat(list(encoded))
        self.device = vqvae.conv1.weight.device
        numbers = [dataset.case_and_slice(i)[1] for i in range(len(dataset))]
        self.plane = self.planes_of(numbers)
        self.heads: dict[tuple, dict[int, int]] = {}
        # (i, d + MOST_DISTANCE): index of the slice d planes above slice i in the same scan; -1 if there is none
        self._neighbours = torch.full((len(dataset), 2 * MOST_DISTANCE + 1), -1)
        for i, number in enumerate(numbers):
            if number is not None:
                self.heads.setdefault((dataset.subject(i), number // N_PLANES), {})[number] = i
        for slices in self.heads.values():
            for number, i in slices.items():
                near = range(number - MOST_DISTANCE, number + MOST_DISTANCE + 1)
                self._neighbours[i] = torch.tensor([slices.get(other, -1) for other in near])

    @staticmethod
    def planes_of(numbers: Sequence[int | None]) -> Tensor:
        """Slice numbers as planes: N_PLANES for None and for numbers of N_PLANES or more."""
        return torch.tensor([n if n is not None and n < N_PLANES else N_PLANES for n in numbers])

    def __len__(self) -> int:
        return len(self.codes)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return torch.as_tensor(indices)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Codes (B, 64, 64) int64 on the device."""
        return move(self.codes[torch.as_tensor(indices)], self.device).long()

    def condition(self, indices: Tensor, distance: Tensor) -> Condition:
        """The condition of slices (B,): their planes, and the slices `distance` (B, 2) planes below and above.

        Where the distance is 0, or the scan lacks that slice, there is no neighbour.
        """
        distance = distance.clone()
        offset = MOST_DISTANCE + torch.tensor([-1, 1]) * distance
        neighbours = self._neighbours[indices[:, None], offset]
        distance[neighbours < 0] = 0
        parts = self.plane[indices], self.codes[neighbours], distance
        return Condition(*(move(part, self.device).long() for part in parts))
