"""Detectors and a colour namer for GenEval, by transformers alone, tested on known pictures before they judge any.

A detector whose weights did not load answers with nothing, and every score would be zero without a complaint: so it
must find a cat, a person and a cup in three photographs that scikit-image brings along.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from crossflow.core.errors import UserError
from crossflow.networks.frozen import load_frozen, load_public, weights_checksum
from crossflow.tasks.t2i.geneval import COLOURS, MIN_SCORE, Detect, DetectedObject, NameColours
from crossflow.tasks.t2i.metric import ClipScorer

FILES = "config.json, model.safetensors and preprocessor_config.json of a Mask2Former or DETR model trained on COCO"
GREY = 153  # what GenEval paints over the surroundings of an object before its colour is named
KNOWN = {"chelsea": "cat", "astronaut": "person", "coffee": "cup"}
AS_GENEVAL = {  # what models call the classes of COCO -> what GenEval's prompts call them
    **{"mouse": "computer mouse", "keyboard": "computer keyboard", "remote": "tv remote"},
    **{"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"},
    **{"pottedplant": "potted plant", "diningtable": "dining table", "hair dryer": "hair drier"},
}
LOWEST = 0.05  # objects with lower scores are of no use to any rule


class Detector:
    """Objects in a picture by an instance segmentation (Mask2Former) or detection (DETR) model of transformers.

    Raises:
        UserError: the model is unavailable, is of another kind, or fails its test on known pictures.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
        from transformers import AutoModelForUniversalSegmentation as Segmentation

        config = load_public(AutoConfig.from_pretrained, source, files=FILES)
        kind = (config.architectures or [""])[0]
        self.has_masks = kind.endswith("ForUniversalSegmentation")
        if not self.has_masks and not kind.endswith("ForObjectDetection"):
            raise UserError(f"{source!r} is a {kind or config.model_type}; GenEval needs {FILES}.")
        loader = Segmentation if self.has_masks else AutoModelForObjectDetection
        self.model = load_frozen(loader.from_pretrained, source, files=FILES)
        self.processor = load_public(AutoImageProcessor.from_pretrained, source, files=FILES)
        self.checksum = weights_checksum(self.model)
        self.device = torch.device(device)
        self.model.to(self.device)
        self.source = source
        self.labels = {number: AS_GENEVAL.get(name, name) for number, name in self.model.config.id2label.items()}
        expect_sight(source, self)

    def expect(self, classes: Iterable[str]) -> None:
        """Raises UserError when it could never find some of these, whose prompts would all count as wrong."""
        unknown = sorted(set(classes) - set(self.labels.values()))
        if unknown:
            raise UserError(
                f"The detector {self.source!r} has no class for {', '.join(unknown)}, which the prompts ask for. Its "
                f"classes: {', '.join(sorted(set(self.labels.values()))[:100])}."
            )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[list[DetectedObject]]:
        """The objects in each picture; neighbours of one shape pass through the network together."""
        objects: list[list[DetectedObject]] = []
        for _, group in itertools.groupby(pictures, key=np.shape):
            objects += self._objects(list(group))
        return objects

    def _objects(self, pictures: list[np.ndarray]) -> list[list[DetectedObject]]:
        inputs = self.processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        outputs = self.model(**inputs.to(self.device))
        names, sizes = self.labels, [picture.shape[:2] for picture in pictures]
        if self.has_masks:
            segmentations = self.processor.post_process_instance_segmentation(
                outputs, threshold=LOWEST, target_sizes=sizes, return_binary_maps=True
            )
            return [_with_masks(segmentation, names) for segmentation in segmentations]
        detections = self.processor.post_process_object_detection(outputs, threshold=LOWEST, target_sizes=sizes)
        return [_with_boxes(detection, names) for detection in detections]


def _with_boxes(detection: Mapping[str, Any], names: dict[int, str]) -> list[DetectedObject]:
    """Objects of a post-processed detection."""
    columns = (detection[name].tolist() for name in ("labels", "scores", "boxes"))
    return [DetectedObject(names[label], score, tuple(box)) for label, score, box in zip(*columns, strict=True)]


def _with_masks(segmentation: Mapping[str, Any], names: dict[int, str]) -> list[DetectedObject]:
    """Objects of a post-processed segmentation; a mask without a pixel is no object."""
    maps = segmentation["segmentation"]
    objects = []
    for mask, segment in zip([] if maps is None else maps, segmentation["segments_info"], strict=False):
        inside = mask.cpu().numpy() > 0
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if len(rows):
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            objects.append(DetectedObject(names[segment["label_id"]], float(segment["score"]), box, inside))
    return objects


def expect_sight(source: str, detect: Detect) -> None:
    """Raises UserError unless the detector finds what is in at least two of three known photographs."""
    from skimage import data

    answers, right = [], 0
    for picture, name in KNOWN.items():
        (objects,) = detect([np.ascontiguousarray(getattr(data, picture)())])
        names = {item.name for item in objects if item.score > MIN_SCORE}
        right += name in names
        answers.append(f"{name}: {', '.join(sorted(names)) or 'nothing'}")
    if right < 2:
        raise UserError(
            f"The detector {source!r} does not see: in photographs of a cat, a person and a cup it found ("
            f"{'; '.join(answers)}). Its weights are not the trained ones, or its labels are not COCO's."
        )


class ColourNamer:
    """The colour of each object by a CLIP model: the box with grey around the object, against three phrases a colour.

    Raises:
        UserError: the model does not name plain colours.
    """

    def __init__(self, clip: ClipScorer) -> None:
        self.clip = clip
        expect_colours(self)

    def __call__(self, picture: np.ndarray, objects: Sequence[DetectedObject]) -> list[str]:
        """The colours of objects; neighbours of one name pass through the network together."""
        colours: list[str] = []
        for name, group in itertools.groupby(objects, key=lambda item: item.name):
            colours += self._colours([cut_out(picture, item) for item in group], name)
        return colours

    def _colours(self, patches: Sequence[np.ndarray], name: str) -> list[str]:
        phrases = [
            phrase
            for colour in COLOURS
            for phrase in (
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            )
        ]
        return [COLOURS[int(row.argmax())] for row in self.clip.similarities(patches, phrases, per=3)]


def cut_out(picture: np.ndarray, item: DetectedObject) -> np.ndarray:
    """The object's box, grey where its mask says that it is not; at least a pixel wide and high."""
    height, width = picture.shape[:2]
    left, top = (max(0, min(int(side), limit - 1)) for side, limit in zip(item.box[:2], (width, height), strict=True))
    right, bottom = (
        min(limit, max(int(np.ceil(side)), low + 1))
        for side, low, limit in zip(item.box[2:], (left, top), (width, height), strict=True)
    )
    visible = picture if item.mask is None else np.where(item.mask[..., None], picture, np.uint8(GREY))
    return np.ascontiguousarray(visible[top:bottom, left:right])


PLAIN = {"red": (220, 20, 20), "green": (20, 160, 30), "blue": (20, 40, 220), "yellow": (250, 230, 20)}


def expect_colours(name_colours: NameColours) -> None:
    """Raises UserError unless at least three of four plain discs are named rightly."""
    rows, columns = np.mgrid[:224, :224]
    disc = (rows - 112) ** 2 + (columns - 112) ** 2 < 90**2
    named = {}
    for colour, rgb in PLAIN.items():
        picture = np.where(disc[..., None], np.array(rgb, np.uint8), np.uint8(255))
        (named[colour],) = name_colours(picture, [DetectedObject("ball", 1.0, (22.0, 22.0, 202.0, 202.0), disc)])
    if sum(colour == answer for colour, answer in named.items()) < 3:
        confusions = ", ".join(f"{colour} as {answer}" for colour, answer in named.items())
        raise UserError(
            f"The CLIP model does not name plain colours: it took {confusions}. Its weights are not trained."
        )
