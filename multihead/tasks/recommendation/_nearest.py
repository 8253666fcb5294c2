"""The nearest items of a large catalogue by an index of faiss, which looks at a part of them only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multihead.errors import UserError, tr

FINE = 20_000
"""Items from which on the index parts them into cells; below, it compares all."""


class Index:
    """Vectors of items in cells around centres; a search looks into the cells nearest to the query (inverted file,
    Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search", section IV, without the quantization).

    Args:
        vectors_ID: (I, D) of length 1.
        probe: share of the cells that a search looks into.
    """

    def __init__(self, vectors_ID: Tensor, probe: float = 0.1, seed: int = 0) -> None:
        faiss = _faiss()
        held = np.ascontiguousarray(vectors_ID.detach().float().cpu().numpy())
        items, width = held.shape
        if items < FINE:
            self.index: Any = faiss.IndexFlatIP(width)
        else:
            cells = int(4 * math.sqrt(items))
            self.index = faiss.index_factory(width, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
            self.index.cp.seed = seed
            self.index.cp.max_points_per_centroid = 64
            self.index.train(held)
            self.index.nprobe = max(1, round(cells * probe))
        self.index.add(held)

    def search(self, queries_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The best k of each query: scores (B, k), and numbers (B, k), −1 where fewer were found."""
        best, numbers = self.index.search(np.ascontiguousarray(queries_BD.detach().float().cpu().numpy()), k)
        return torch.from_numpy(best), torch.from_numpy(numbers)


def recall(index: Index, exact_BI: Tensor, queries_BD: Tensor, k: int) -> Tensor:
    """(B,) which share of each query's k nearest items, by exact cosines (B, I), the index finds."""
    k = min(k, exact_BI.shape[1])
    true_BK = exact_BI.topk(k).indices.cpu()
    _, found_BK = index.search(queries_BD, k)
    return (true_BK[:, :, None] == found_BK[:, None]).any(-1).float().mean(1)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError(tr("options.index: faiss needs the library faiss: pip install 'multihead[recommend]'; or set "
                           "options.index=exact", "options.index: faiss 需要安装 faiss：pip install "
                           "'multihead[recommend]'；或设置 options.index=exact")) from None
    return faiss
