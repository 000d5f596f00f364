"""Features that the released CrossFlow scripts computed, taken over instead of being computed again.

They come as arrays beside an item (`readers/npy.py`): `image_latent_256` holds mean and log-variance (2C, h, w),
`token_embedding_clip` the features (N, D) of the caption with its padding, `token_mask_clip` (N,) 1 where a token is.
The validation files of the release call the last two `token_embedding` and `token_mask`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from crossflow.core.errors import UserError
from crossflow.core.source import Posterior
from crossflow.data.cache.extract import Extractor, Features, checked
from crossflow.data.item import BadItem, Item

LATENT = "image_latent_"
TOKENS = "token_embedding"
MASK = "token_mask"
LOG_VAR_RANGE = (-30.0, 20.0)  # to which the released autoencoder clips before it samples
ALIKE = 0.98
"""Least cosine between features that were taken over and those of the recipe's encoder, to be those of one network;
half-precision computation stays above 0.999.
"""


def features_of(extractor: Extractor, items: Sequence[Item]) -> list[Features | BadItem]:
    """The features of items: those that came with them, and for the other items those that `extractor` computes."""
    imports = [imported(extractor, item) for item in items]  # None: the item has only a picture and captions
    others = [item for item, features in zip(items, imports, strict=True) if features is None]
    computed = iter(extractor(others) if others else [])
    return [features if features is not None else next(computed) for features in imports]


def imported(extractor: Extractor, item: Item) -> Features | BadItem | None:
    """The features that came with `item`; None when none did."""
    if item.features is None:
        return None
    try:
        seen = extractor.seen([item], with_moments=False)[0] if _needs_picture(extractor, item) else {}
        for size in extractor.options.sizes if extractor.codec is not None else ():
            seen |= {name: rows[0] for name, rows in extractor.moments(_moments(extractor, item, size), size).items()}
        if extractor.text is None:
            return checked(item, Features(seen))
        tokens, length = token_features(item.features, extractor.text.width, extractor.text.max_length)
    except ValueError as error:
        return BadItem(item.id, str(error))
    kept = extractor.stored(torch.from_numpy(tokens))
    pooled = list(extractor.stored(extractor.text.pooled(item.captions))) if extractor.pooled else []
    return checked(item, Features(seen, [kept if extractor.keep_padding else kept[:length]], [length], pooled))


def _needs_picture(extractor: Extractor, item: Item) -> bool:
    if not extractor.pixels and extractor.tower is None:
        return False
    if item.image is None:
        raise UserError(
            "The recipe's encoder loss looks at pictures (loss.encoder_target = image), and these features have none "
            "beside them. Give the folder that holds imgs/ and features/, or set loss.encoder_target=text."
        )
    return True


def _moments(extractor: Extractor, item: Item, size: int) -> Posterior:
    assert extractor.codec is not None
    name = f"{LATENT}{size}"
    if name not in item.features:
        there = sorted(key for key in item.features if key.startswith(LATENT))
        raise UserError(
            f"{item.id} holds no {name}, which the recipe's pictures of {size} pixels need; it holds "
            f"{', '.join(there) or 'no moments'}. Set data.image_size, or --resolution, to one of those."
        )
    moments, shape = item.features[name], extractor.codec.latent_shape(size)
    if moments.shape != (2 * shape[0], *shape[1:]):
        raise ValueError(f"{name} has shape {moments.shape}, not {(2 * shape[0], *shape[1:])}")
    values = torch.from_numpy(moments.astype(np.float32))[None]
    mean, log_var = values.chunk(2, dim=1)
    return Posterior(mean, log_var.clamp(*LOG_VAR_RANGE))


def token_features(arrays: Mapping[str, np.ndarray], width: int, max_length: int) -> tuple[np.ndarray, int]:
    """(features (N, D) float32 with their padding, number of tokens) of the encoder that is `width` wide.

    Raises ValueError when there are none of that width, or when they are not padded at the end.
    """
    found = {name: array for name, array in arrays.items() if name.startswith(TOKENS)}
    fitting = [name for name, array in found.items() if array.ndim == 2 and array.shape[1] == width]
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in found.items()) or "none"
        raise ValueError(f"the recipe's text encoder is {width} wide, and the token features are: {shapes}")
    tokens = arrays[fitting[0]].astype(np.float32)
    mask = arrays.get(fitting[0].replace(TOKENS, MASK))
    if mask is None or mask.shape != tokens.shape[:1] or len(tokens) != max_length:
        raise ValueError(
            f"{fitting[0]} {tokens.shape} needs a mask of {max_length} values, the recipe's text.max_length"
        )
    length = int(np.count_nonzero(mask))
    if not mask[:length].all():
        raise ValueError(f"the mask of {fitting[0]} has tokens after padding")
    return tokens, length


def expect_same_encoder(extractor: Extractor, items: list[Item]) -> None:
    """Compares features that came with items with those of the recipe's encoder. UserError when they differ."""
    if extractor.text is None:
        return
    for item in items:
        try:
            tokens, length = token_features(item.features, extractor.text.width, extractor.text.max_length)
        except ValueError:
            continue  # a bad item, and reported as such
        ours, mask = extractor.text(item.captions[:1])
        theirs = torch.from_numpy(tokens)
        number = int(mask.sum())
        a, b = ours[0, :length].cpu(), theirs[:length]
        alike = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
        factor = (b.norm() / a.norm().clamp(min=1e-12)).item()
        if number != length or alike < ALIKE or not ALIKE < factor < 1 / ALIKE:
            raise UserError(
                f"The token features of {item.id} were not made by the recipe's text encoder: it gives {number} tokens "
                f"for {item.captions[0]!r} where the file has {length}; their cosine is {alike:.3f} and those of the "
                f"file are {factor:.3g} times as large. Set text.encoder (and text.scale, 10 for the released T5 "
                "features) to what the features were made with."
            )
