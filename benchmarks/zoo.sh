#!/usr/bin/env bash
# The models in the box, from training to model card: trains their recipes, stores the averaged weights small, scores what
# is stored, and writes zoo/NAME. Takes about three hours on two CPU cores; continues where it was stopped.
#
#   benchmarks/zoo.sh [RUNS]           RUNS: folder of the trainings, by default runs/zoo; finished ones are used as they are
#   MODELS="sr depth" benchmarks/zoo.sh  these models alone
#
# PYTHON names the interpreter (default: python) of an environment in which crossflow is installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=$(realpath -m "${1:-runs/zoo}")
crossflow=("${PYTHON:-python}" -m crossflow)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wanted() { [[ -z "${MODELS:-}" || " $MODELS " == *" $1 "* ]]; }

# trained RECIPE: trains it into RUNS/RECIPE, or continues.
trained() {
  [ -f "$runs/$1/scores.json" ] || "${crossflow[@]}" train --config "$1" --output "$runs/$1" --resume auto
}

# publish NAME RUN STORAGE TEXT OPTION...: stores the model, scores what is stored, makes an example by `crossflow sample`
# with the options, and writes zoo/NAME.
publish() {
  local name=$1 run=$2 storage=$3 text=$4
  shift 4
  cd "$work" # names in manifests are relative
  "${crossflow[@]}" push "$run" "zoo:$name" --storage "$storage" --dry-run --output "$name" "${replaced[@]}"
  "${crossflow[@]}" evaluate --checkpoint "$name" --num 960
  rm -rf "$name/samples"
  "${crossflow[@]}" sample --checkpoint "$name" --output "$name/samples" --seed 0 "$@"
  rm -rf "$root/zoo/$name"
  "${crossflow[@]}" push "$name" "zoo:$name" --storage "$storage" --license mit --text "$text" --dry-run --output "$root/zoo/$name"
  mkdir -p "$root/zoo/$name/samples"
  cp "$name/samples"/* "$root/zoo/$name/samples/"
  rm "$root/zoo/$name"/{metrics.jsonl,.crossflow.json}
}

# The picture that the examples of captions, depth and super-resolution begin with.
"${PYTHON:-python}" - "$root/zoo/scene.png" <<'PICTURE'
import sys
from PIL import Image
from crossflow.data.scenes import make_scene, render, scene_seed
Image.fromarray(render([make_scene(scene_seed("test", 3))], 32)[0][0]).save(sys.argv[1])
PICTURE

# The judge of scenes, by which text to image is scored; its name changes with the world and its training.
"${PYTHON:-python}" - "$root/zoo" <<'JUDGE'
import sys
from pathlib import Path
from crossflow.tasks.t2i.recogniser import load_recogniser
load_recogniser(cache=Path(sys.argv[1]))
JUDGE

replaced=() # settings that name folders of this machine
prompt="a red cube left of a blue sphere"
scene=$root/zoo/scene.png
if wanted t2i || wanted t2i_few; then trained t2i_small; fi
if wanted t2i; then
  publish t2i "$runs/t2i_small" int8 "Pictures of solids from prompts, 50 guided steps." --prompt "$prompt"
fi
if wanted t2i_few; then
  [ -f "$runs/t2i_few/scores.json" ] || "${crossflow[@]}" distill "$runs/t2i_small" --output "$runs/t2i_few" train.steps=1300
  replaced=(--set interval.teacher=zoo:t2i --set train.start_from=zoo:t2i)
  publish t2i_few "$runs/t2i_few" int8 "The model t2i in 4 evaluations, guidance built in." --prompt "$prompt"
  replaced=()
fi
if wanted caption; then
  trained caption_small
  publish caption "$runs/caption_small" int8 "Captions of drawn scenes." --input "$scene"
fi
if wanted depth; then
  trained depth_small
  publish depth "$runs/depth_small" half "Depth in metres of drawn scenes." --input "$scene"
fi
if wanted sr; then
  trained sr_small
  publish sr "$runs/sr_small" half "Drawn scenes four times as large." --input "$scene"
fi
