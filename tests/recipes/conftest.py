"""Miniatures of the papers' data in their published layouts, and tiny networks in place of the public ones."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

WORDS = ("a red cube", "a small blue sphere on a plane", "two green cones", "a cube left of a large yellow cylinder")
DRIVE = "2011_09_26/2011_09_26_drive_0002_sync"


def write_picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    """A picture of noise over a ramp; PNG or JPEG by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 190, width)[None, :, None]
    Image.fromarray((noise + ramp).astype(np.uint8)).save(path)
    return path


def write_depth(path: Path, height: int, width: int, units_per_metre: float, far: float = 9.0) -> Path:
    """16-bit depth that grows from 1 m on the left to `far` on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metres = np.broadcast_to(np.linspace(1, far, width), (height, width))
    Image.fromarray((metres * units_per_metre).astype(np.uint16)).save(path)
    return path


def write_text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_journeydb(root: Path) -> None:
    lines = []
    for number in range(12):
        write_picture(root / f"imgs/000/{number}.jpg", 40, 36, number)
        lines.append(json.dumps({"img_path": f"./000/{number}.jpg", "prompt": WORDS[number % 4], "split": "train"}))
    write_text(root / "train.jsonl", *lines)


def make_coco(root: Path) -> None:
    """captions_val2014.json for text-to-image, dataset_coco.json (Karpathy) for captioning."""
    images, annotations, entries = [], [], []
    parts = [("train", "train2014", range(10)), ("val", "val2014", range(10, 14)), ("test", "val2014", range(14, 18))]
    for split, folder, numbers in parts:
        for number in numbers:
            name = f"COCO_{folder}_{number:012d}.jpg"
            write_picture(root / folder / name, 36, 48, number)
            texts = [WORDS[(number + k) % 4] for k in range(5)]
            sentences = [{"raw": text, "sentid": 5 * number + k, "imgid": number} for k, text in enumerate(texts)]
            entries.append(
                {"filepath": folder, "filename": name, "split": split, "cocoid": number, "imgid": number}
                | {"sentids": [5 * number + k for k in range(5)], "sentences": sentences}
            )
            if folder == "val2014":
                images.append({"id": number, "file_name": name})
                annotations += [
                    {"id": 5 * number + k, "image_id": number, "caption": text} for k, text in enumerate(texts)
                ]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_val2014.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))


def make_nyu(root: Path) -> None:
    for split, numbers in (("train", range(1, 6)), ("test", (45, 46))):
        for number in numbers:
            folder = root / f"official_splits/{split}/kitchen"
            write_picture(folder / f"rgb_{number:05d}.jpg", 480, 640, number)
            write_depth(folder / f"sync_depth_{number:05d}.png", 480, 640, 1000)


def make_kitti(root: Path) -> None:
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split, frames in (("train", range(4)), ("test", (69, 70))):
        for frame in frames:
            name = f"{DRIVE}/image_02/data/{frame:010d}.png"
            drive = f"{DRIVE.split('/')[1]}/proj_depth/groundtruth/image_02/{frame:010d}.png"
            write_picture(root / name, 375, 1242, frame)
            write_depth(
                root / "data_depth_annotated" / ("val" if split == "test" else "train") / drive, 375, 1242, 256, 60
            )
            lines[split].append(f"{name} {drive} 721.5377")
    for split, text in lines.items():
        write_text(root / f"eigen_{split}_files_with_gt.txt", *text)


def make_hypersim(root: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rows = []
    for number, split in enumerate(("train", "train", "val", "test")):
        scene = f"ai_001_{number + 1:03d}"
        for frame in range(3):
            images = root / scene / "images"
            write_picture(images / f"scene_cam_00_final_preview/frame.{frame:04d}.tonemap.jpg", 48, 64, frame)
            file = images / f"scene_cam_00_geometry_hdf5/frame.{frame:04d}.depth_meters.hdf5"
            file.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(file, "w") as content:
                content["dataset"] = np.broadcast_to(np.linspace(1, 9, 64), (48, 64)).astype(np.float16)
            rows.append([scene, "cam_00", frame, "True", split])
    with (root / "metadata_images_split_scene_v1.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name"])
        writer.writerows(rows)


def make_vkitti(root: Path) -> None:
    for scene in ("Scene01", "Scene02", "Scene06", "Scene18", "Scene20"):
        for frame in range(2):
            frames = root / scene / "clone/frames"
            write_picture(frames / f"rgb/Camera_0/rgb_{frame:05d}.jpg", 94, 310, frame)
            write_depth(frames / f"depth/Camera_0/depth_{frame:05d}.png", 94, 310, 100, 60)


def make_imagenet(root: Path) -> None:
    for split, name, count in (("train", "n01440764_{}", 8), ("val", "ILSVRC2012_val_00000{}", 3)):
        for number in range(293, 293 + count):
            write_picture(root / split / f"n01440764/{name.format(number)}.JPEG", 256, 260, number)


@pytest.fixture(scope="session")
def paper_data(tmp_path_factory) -> Path:
    """A folder with the data of docs/paper_recipes.md, under the names used there. Not to be written to."""
    root = tmp_path_factory.mktemp("paper")
    make_journeydb(root / "JourneyDB")
    make_coco(root / "coco2014")
    make_nyu(root / "nyu")
    make_kitti(root / "kitti")
    make_hypersim(root / "hypersim")
    make_vkitti(root / "vkitti")
    make_imagenet(root / "imagenet")
    make_networks(root)
    return root


def make_networks(root: Path) -> None:
    """networks/{clip,t5,siglip,vae,clip_score} in the libraries' own layouts, and flowtitok/."""
    import diffusers
    import transformers

    from crossflow.networks.codecs.flowtitok_network import FlowTiTok, FlowTiTokConfig
    from crossflow.networks.text.tokenizer import build_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 77}
    networks = root / "networks"
    tokenizer = build_tokenizer(WORDS, vocab_size=400, max_length=77)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **text)).save_pretrained(networks / "clip")
    tokenizer.save_pretrained(networks / "clip")
    t5 = transformers.T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(t5).save_pretrained(networks / "t5")
    tokenizer.save_pretrained(networks / "t5")
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8))
    for parameter in tower.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # as if trained: random towers are refused
    tower.save_pretrained(networks / "siglip")
    diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    ).save_pretrained(networks / "vae")
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    clip = transformers.CLIPConfig(text_config={**sizes, **text}, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(clip).save_pretrained(networks / "clip_score")
    tokenizer.save_pretrained(networks / "clip_score")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(networks / "clip_score")
    tiny = FlowTiTokConfig(image_size=32, encoder="tiny", decoder="tiny", text_width=32)
    FlowTiTok(tiny).save_pretrained(root / "flowtitok")
