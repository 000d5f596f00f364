"""The papers' numbers: they are those of the papers, and what the file says fits together."""

import pytest

from crossflow.benchmarks.evaluation.protocol import load_protocol, protocols
from crossflow.benchmarks.report.paper import FILE, Paper, paper
from crossflow.core.errors import UserError
from crossflow.core.settings import build, read_yaml
from crossflow.tasks import task_names

# As printed, each copied here by hand from the papers' tables and not from the file.
KNOWN = {
    ("t2i-flow", "CrossFlow"): {"FID": 10.13, "CLIP": 0.29},
    ("t2i-coco", "CrossFlow (sin-cos path)"): {"FID": 8.95, "GenEval": 0.57},
    ("t2i-coco", "LDM v3 (512 px)"): {"GenEval": 0.68},
    ("t2i-flowtok", "FlowTok-H"): {"COCO FID": 9.67, "MJHQ FID": 7.15, "images_per_second": 18.2},
    ("ablation-encoder", "encoder + noise"): {"FID-10K": 59.91, "CLIP": 0.21},
    ("ablation-loss", "text-text contrastive"): {"FID-10K": 34.67, "CLIP": 0.24},
    ("ablation-guidance", "autoguidance"): {"FID-10K": 26.36, "CLIP": 0.25},
    ("ablation-text", "Llama3-7B"): {"FID-10K": 21.20, "CLIP": 0.27},
    ("ablation-training", "two-stage then joint"): {"FID-10K": 23.79, "CLIP": 0.26},
    ("flowtok-loss", "cosine"): {"FID": 31.80},
    ("caption-karpathy", "CrossFlow"): {"BLEU-4": 36.4, "METEOR": 27.8, "ROUGE-L": 57.1, "CIDEr": 116.2, "SPICE": 20.4},
    ("depth-kitti", "BinsFormer"): {"AbsRel": 0.052, "delta1": 0.974},
    ("depth-nyu", "CrossFlow"): {"AbsRel": 0.094, "delta1": 0.928},
    ("zero-shot-nyu", "Marigold"): {"AbsRel": 0.060, "delta1": 0.959},
    ("zero-shot-nyu", "CrossFlow"): {"AbsRel": 0.062, "delta1": 0.956},
    ("zero-shot-nyu", "DPT"): {"AbsRel": 0.098, "delta1": 0.903},
    ("zero-shot-kitti", "Marigold"): {"AbsRel": 0.105, "delta1": 0.904},
    ("zero-shot-kitti", "CrossFlow"): {"AbsRel": 0.103, "delta1": 0.908},
    ("zero-shot-kitti", "DPT"): {"AbsRel": 0.100, "delta1": 0.901},
    ("zero-shot-diode", "DPT"): {"AbsRel": 0.182, "delta1": 0.758},
    ("sr-imagenet", "SR3"): {"FID": 5.2, "IS": 180.1, "PSNR": 26.4, "SSIM": 0.762},
    ("sr-set5", "Bicubic"): {"PSNR-Y": 28.42, "SSIM-Y": 0.8104},
    ("sr-b100", "Bicubic"): {"PSNR-Y": 25.96, "SSIM-Y": 0.6675},
    ("tokens", "variational"): {"token_accuracy": 94.53},
}


@pytest.mark.parametrize(("table", "row"), KNOWN)
def test_numbers_equal_the_papers(table: str, row: str) -> None:
    assert paper().table(table).scores(row) == KNOWN[table, row]


def test_the_geneval_row_has_the_mean_of_its_six_parts() -> None:
    overall, *parts = paper().table("t2i-geneval").row("CrossFlow").scores
    assert sum(parts) / 6 == pytest.approx(overall, abs=0.005)


def test_each_ablation_group_starts_from_the_best_row_of_the_previous_one() -> None:
    """The best row of each group is the start of the next, as they were measured one after another."""
    tables = [paper().table(f"ablation-{name}") for name in ("encoder", "loss", "guidance", "text")]
    last = [next(row for row in table.rows if row.kind == "method") for table in tables]
    assert last[0].scores == tables[1].rows[0].scores
    assert last[1].scores == tables[2].rows[0].scores
    assert last[2].scores == tables[3].rows[0].scores == paper().table("ablation-training").row("joint").scores


def test_repeated_numbers_agree_between_tables() -> None:
    assert paper().table("ablation-path").scores("sin-cos") == paper().table("t2i-coco").scores(
        "CrossFlow (sin-cos path)"
    )
    assert paper().table("ablation-size").scores("CrossFlow") == paper().table("t2i-flow").scores("CrossFlow")


@pytest.mark.slow
def test_every_task_has_one_main_table_and_every_protocol_a_task() -> None:
    numbers = paper()
    assert {protocol.task for protocol in numbers.protocols.values()} == set(task_names())
    main = [numbers.protocols[table.protocol].task for table in numbers.tables.values() if table.main]
    assert sorted(main) == sorted(task_names())
    assert {table.protocol for table in numbers.tables.values()} == set(numbers.protocols)
    assert {metric for table in numbers.tables.values() for metric in table.metrics} == set(numbers.metrics)
    assert {table.source for table in numbers.tables.values()} == set(numbers.sources)


def test_scores_lie_within_the_bounds_of_their_metric() -> None:
    bounds = {"CLIP": (0, 1), "GenEval": (0, 1), "AbsRel": (0, 1), "delta1": (0, 1), "SSIM": (0, 1), "FID": (0, 100)}
    for table in paper().tables.values():
        for row in table.rows:
            for metric, score in table.scores(row.name).items():
                low, high = bounds.get(metric, (0, 1000))
                assert low < score < high, (table.title, row.name, metric)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("protocol", "unknown", "unknown protocol unknown"),
        ("metrics", ["FID"], "expected 1 scores, got 2"),
        ("source", "nobody", "unknown source nobody"),
    ],
)
def test_an_inconsistent_file_is_refused(place: str, value: object, message: str) -> None:
    content = read_yaml(FILE)
    content["tables"]["t2i-flow"][place] = value
    with pytest.raises(UserError, match=message):
        build(Paper, content)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="ablation-loss"):
        paper().table("ablation-los")
    with pytest.raises(UserError, match="autoguidance"):
        paper().table("ablation-guidance").row("auto")


@pytest.mark.slow
def test_a_paper_and_a_protocol_of_the_same_name_agree_on_task_and_items() -> None:
    """configs/protocols against paper.yaml."""
    shipped = {name: load_protocol(name) for name in protocols()}
    both = set(shipped) & set(paper().protocols)
    assert {"coco-fid30k", "geneval", "karpathy", "kitti-eigen", "nyu", "imagenet-64-256", "set5-x4"} <= both
    for name in both:
        published = paper().protocols[name]
        assert shipped[name].task == published.task
        # The improved measurements of KITTI are there for 652 of the 697 pictures that the papers count.
        items = 697 if name == "kitti-eigen" else shipped[name].num_items
        assert published.items in (None, items), name
