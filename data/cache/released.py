"""Features computed by the released CrossFlow scripts, imported instead of computed again.

They are arrays of an item (`readers/npy.py`): `image_latent_256` holds mean and log-variance (2C, h, w),
`token_embedding_clip` the features (N, D) of the caption with its padding, `token_mask_clip` (N,) is 1 for tokens.
In validation files the last two are called `token_embedding` and `token_mask`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from crossflow.core.errors import UserError
from crossflow.core.source import Posterior
from crossflow.data.cache.extract import Extractor, Features, finite_or_bad
from crossflow.data.item import BadItem, Item

LATENT = "image_latent_"
TOKENS = "token_embedding"
MASK = "token_mask"
LOG_VAR_RANGE = (-30.0, 20.0)  # to which the released autoencoder clips before it samples
MIN_COSINE = 0.98
"""Smallest cosine between imported features and those of the recipe's encoder if both come from the same network;
half-precision computation stays above 0.999.
"""


def features_of(extractor: Extractor, items: Sequence[Item]) -> list[Features | BadItem]:
    """The features of items: imported where an item has released ones, computed by `extractor` otherwise."""
    imports = [import_features(extractor, item) for item in items]
    others = [item for item, features in zip(items, imports, strict=True) if features is None]
    computed = iter(extractor(others) if others else [])
    return [features if features is not None else next(computed) for features in imports]


def import_features(extractor: Extractor, item: Item) -> Features | BadItem | None:
    """The released features of `item` in the form of `extractor`; None when it has none."""
    if item.features is None:
        return None
    try:
        fixed = extractor.image_features([item], with_moments=False)[0] if _needs_picture(extractor, item) else {}
        for size in extractor.options.sizes if extractor.codec is not None else ():
            fixed |= {name: rows[0] for name, rows in extractor.moments(_moments(extractor, item, size), size).items()}
        if extractor.text is None:
            return finite_or_bad(item, Features(fixed))
        tokens, length = token_features(item.features, extractor.text.width, extractor.text.max_length)
    except ValueError as error:
        return BadItem(item.id, str(error))
    text = extractor.stored(torch.from_numpy(tokens))
    pooled = list(extractor.stored(extractor.text.pooled(item.captions))) if extractor.pooled else []
    return finite_or_bad(item, Features(fixed, [text if extractor.keep_padding else text[:length]], [length], pooled))


def _needs_picture(extractor: Extractor, item: Item) -> bool:
    if not extractor.pixels and extractor.tower is None:
        return False
    if item.image is None:
        raise UserError(
            "The recipe's encoder loss needs pictures (loss.encoder_target = image), but the data have features only. "
            "Give the folder that contains imgs/ and features/, or set loss.encoder_target=text."
        )
    return True


def _moments(extractor: Extractor, item: Item, size: int) -> Posterior:
    assert extractor.codec is not None
    name = f"{LATENT}{size}"
    if name not in item.features:
        available = sorted(key for key in item.features if key.startswith(LATENT))
        raise UserError(
            f"The recipe's pictures of {size} pixels need {name}, but {item.id} has "
            f"{', '.join(available) or 'no moments'}. Set data.image_size, or --resolution, to an available size."
        )
    moments, shape = item.features[name], extractor.codec.latent_shape(size)
    if moments.shape != (2 * shape[0], *shape[1:]):
        raise ValueError(f"{name} has shape {moments.shape}, not {(2 * shape[0], *shape[1:])}")
    values = torch.from_numpy(moments.astype(np.float32))[None]
    mean, log_var = values.chunk(2, dim=1)
    return Posterior(mean, log_var.clamp(*LOG_VAR_RANGE))


def token_features(arrays: Mapping[str, np.ndarray], width: int, max_length: int) -> tuple[np.ndarray, int]:
    """(features (N, D) float32 including padding, number of tokens) of the encoder of width D = `width`.

    Raises ValueError unless exactly one array has that width and its padding is at the end.
    """
    embeddings = {name: array for name, array in arrays.items() if name.startswith(TOKENS)}
    matching = [name for name, array in embeddings.items() if array.ndim == 2 and array.shape[1] == width]
    if len(matching) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in embeddings.items()) or "none"
        raise ValueError(f"the recipe's text encoder has width {width}, but the token features are: {shapes}")
    tokens = arrays[matching[0]].astype(np.float32)
    mask = arrays.get(matching[0].replace(TOKENS, MASK))
    if mask is None or mask.shape != tokens.shape[:1] or len(tokens) != max_length:
        raise ValueError(
            f"{matching[0]} {tokens.shape} needs a mask of {max_length} values, the recipe's text.max_length"
        )
    length = int(np.count_nonzero(mask))
    if not mask[:length].all():
        raise ValueError(f"the mask of {matching[0]} has tokens after padding")
    return tokens, length


def expect_same_encoder(extractor: Extractor, items: list[Item]) -> None:
    """Raises UserError when the released token features of items differ from those of the recipe's text encoder."""
    if extractor.text is None:
        return
    for item in items:
        try:
            tokens, length = token_features(item.features, extractor.text.width, extractor.text.max_length)
        except ValueError:
            continue  # reported as a bad item
        computed, mask = extractor.text(item.captions[:1])
        number = int(mask.sum())
        a, b = computed[0, :length].cpu(), torch.from_numpy(tokens)[:length]
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
        factor = (b.norm() / a.norm().clamp(min=1e-12)).item()
        if number != length or cosine < MIN_COSINE or not MIN_COSINE < factor < 1 / MIN_COSINE:
            raise UserError(
                f"The token features of {item.id} come from another text encoder than the recipe's: {length} tokens in "
                f"the file and {number} by the recipe for {item.captions[0]!r}, cosine {cosine:.3f}, ratio of norms "
                f"{factor:.3g}. Set text.encoder (and text.scale, 10 for the released T5 features) accordingly."
            )
