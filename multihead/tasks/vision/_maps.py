"""What a classifier looked at, as pictures beside a picture: attention rollout and integrated gradients.

Legend: B pictures, C channels, S side, G patches a side, T positions, R vectors in front of the patches.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.codec.image import pillow
from multihead.data.images import to_uri
from multihead.data.store import Store
from multihead.transformer.attribution import attention_weights, integrated_gradients, rollout

SHOWN_SIDE = 128
STEPS = 32
LOOKED = (40, 200)  # examples among which right and wrong answers are looked for, the fewer the larger they are
HOT, COLD = (214, 40, 40), (38, 84, 196)


def looked_at(model: Any, x_BCSS: Tensor) -> Tensor:
    """Attention rollout of pictures: (B, G, G), each from 0 to 1. Of the vectors that answer, as the head reads them:
    the class token, or the patches on average."""
    with attention_weights(model.trunk) as weights:
        model(x_BCSS)
    answering, skip, grid = model.answering, model.skip, model.input.grid
    flow_BTT = rollout(weights)
    flow_BT = (flow_BTT[:, :answering] if answering else flow_BTT[:, skip:]).mean(1)[:, skip:]
    low, high = flow_BT.amin(1, keepdim=True), flow_BT.amax(1, keepdim=True)
    return ((flow_BT - low) / (high - low).clamp(min=1e-12)).view(-1, grid, grid)


def added(
    model: Any, x_BCSS: Tensor, label_B: Tensor, mean_CSS: Tensor, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Integrated gradients of the logit of `label_B` from the picture `mean_CSS`: (B, S, S), summed over channels, and
    the error of their sum, as a share of the difference of logits, (B,).

    From an even grey they would say little: norms stretch the faintest difference from it to full size, so that all
    is added on the first step.
    """
    def score(x: Tensor) -> Tensor:
        return model(x).gather(1, label_B[:, None])[:, 0]

    mean_BCSS = mean_CSS.expand_as(x_BCSS)
    part_BCSS = integrated_gradients(score, x_BCSS, mean_BCSS, steps)
    with torch.no_grad():
        gap_B = score(x_BCSS) - score(mean_BCSS)
    error_B = (part_BCSS.sum((1, 2, 3)) - gap_B).abs() / gap_B.abs().clamp(min=1e-6)
    return part_BCSS.sum(1), error_B


def galleries(
    model: nn.Module, seen: Callable[[Tensor], Tensor], names: Sequence[str], store: Any, count: int
) -> list[dict[str, Any]]:
    """For the report: `count` right and `count` wrong answers, each picture with its two maps.

    Args:
        seen: pictures (B, C, S, S) uint8 → what the model sees.
        store: examples with ``image`` and ``label``.
    """
    if count == 0 or not isinstance(store, Store) or not len(store):
        return []
    looked = min(LOOKED[1], max(LOOKED[0], LOOKED[1] * 64**2 // store[0]["image"][0].size))
    some = [store[int(i)] for i in np.unique(np.linspace(0, len(store) - 1, looked).astype(int))]
    place = next(model.parameters()).device
    with torch.inference_mode(False), torch.enable_grad():
        still = Still(model)
        image_BCSS = torch.tensor(np.stack([example["image"] for example in some]), device=place)
        label_B = torch.tensor([int(example["label"]) for example in some], device=place)
        with torch.no_grad():
            likely_BC = torch.cat([still(seen(part)).softmax(-1) for part in image_BCSS.split(32)])
        sure_B, guess_B = likely_BC.max(1)
        mean_CSS = seen(image_BCSS).mean(0)
        found = []
        for key, title, right in (("right", ("What it looked at: right answers", "它看了哪里：答对的"), True),
                                  ("wrong", ("What it looked at: wrong answers", "它看了哪里：答错的"), False)):
            at = torch.nonzero((guess_B == label_B) == right)[:, 0]
            at = at[sure_B[at].argsort(descending=True)] if not right else at
            at = at[:count]
            if not len(at):
                continue
            x = seen(image_BCSS[at])
            with torch.no_grad():
                flow = looked_at(still, x)
            part, error = added(still, x, guess_B[at], mean_CSS)
            rows = [{"name": _told(names, int(label_B[i]), int(guess_B[i]), float(sure_B[i])),
                     "pictures": drawn(image_BCSS[i], flow[n], part[n])} for n, i in enumerate(at.tolist())]
            found.append({"title": title, "note": _note(float(error.max())), "rows": rows, "folder": f"maps/{key}"})
    return found


class Still:
    """A model in eval mode with copies of its weights; otherwise as the model. Weights that were read in inference mode
    let no gradient through; copies do."""

    def __init__(self, model: nn.Module) -> None:
        values = (*model.named_parameters(), *model.named_buffers())
        self.model, self.own = model, {name: value.detach().clone() for name, value in values}

    def __call__(self, x: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            found: Tensor = torch.func.functional_call(self.model, self.own, (x,))
        finally:
            self.model.train(training)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _told(names: Sequence[str], label: int, guess: int, sure: float) -> str:
    return f"{names[label]}{'' if label == guess else f' → {names[guess]}'} ({100 * sure:.0f} %)"


def _note(error: float) -> tuple[str, str]:
    share = f"{100 * error:.2g}"
    return (
        "Each picture; where attention flows from (rollout, Abnar & Zuidema 2020), the redder the more; and what each "
        "pixel adds to the logit of the answer (red) or takes from it (blue), beside the mean of the pictures "
        f"(integrated gradients, Sundararajan et al. 2017; their sum misses the logit by at most {share} %). Rollout "
        "knows nothing of the answer; neither proves why it was given.",
        "依次为：原图；注意力来自何处（attention rollout，Abnar & Zuidema 2020），越红越多；每个像素对该答案的 logit "
        "的贡献（红为增、蓝为减），以这些图片的平均图为基准（integrated gradients，Sundararajan et al. 2017；"
        f"其总和与 logit 之差至多 {share}%）。rollout 与具体答案无关；两者都不能证明作答的原因。")


def drawn(image_CSS: Tensor, flow_GG: Tensor, part_SS: Tensor) -> list[str]:
    """The picture, and both maps over it in grey, as data URIs of PNG files."""
    Image, _ = pillow()
    side = max(SHOWN_SIDE, image_CSS.shape[-1])
    array = image_CSS.permute(1, 2, 0).cpu().numpy()
    plain = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")
    plain = plain.resize((side, side), Image.Resampling.NEAREST if side > array.shape[0] else Image.Resampling.BICUBIC)
    grey = np.asarray(plain.convert("L"), dtype=np.float32)[..., None].repeat(3, 2)

    def over(map_SS: Tensor, mode: str) -> Any:
        large = F.interpolate(map_SS[None, None].float(), (side, side), mode=mode,
                              **({"align_corners": False} if mode == "bilinear" else {}))[0, 0].cpu().numpy()
        share, colour = 0.8 * np.abs(large)[..., None], np.where(large[..., None] > 0, HOT, COLD)
        # Pale where nothing is: the colours must not drown in a dark picture.
        return Image.fromarray((share * colour + (1 - share) * (128 + grey / 2)).clip(0, 255).astype(np.uint8))

    strongest = part_SS.abs().flatten().quantile(0.99).clamp(min=1e-12)
    maps = [plain, over(flow_GG, "bilinear"), over((part_SS / strongest).clamp(-1, 1), "nearest")]
    return [_png(one) for one in maps]


def _png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return to_uri(file.getvalue())[0]
