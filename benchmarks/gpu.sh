#!/usr/bin/env bash
# A GPU in nine minutes: does it compute what the CPU does, and how fast are training and sampling of the papers' models.
#
#   benchmarks/gpu.sh OUT          everything is written into the folder OUT
#   SMALL=1 benchmarks/gpu.sh OUT  every part with tiny networks, to try the script without a GPU
#   PARTS="agreement released_dimr" benchmarks/gpu.sh OUT  these parts alone
#
# Works from a source tree without installing, and downloads nothing: frozen networks have random weights. Each part has
# a time limit, and one that fails does not end the others; the exit status is the number of failed parts.
# PYTHON names the interpreter (default: python3), which needs the packages of requirements.txt.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

# The root of the source tree is the package `crossflow`.
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$root" "$link/crossflow"
export PYTHONPATH="$link${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1

failed=0
: > "$out/log.txt" && : > "$out/summary.txt"

# part NAME SECONDS COMMAND...: runs the command for at most so many seconds.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  [[ -z "${PARTS:-}" || " $PARTS " == *" $name "* ]] || return 0
  echo "== $name: $*" >> "$out/log.txt"
  timeout -k 5 "$limit" "$@" >> "$out/log.txt" 2>&1 || status=$?
  local outcome=done
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then outcome="stopped after $limit s"
  elif [ "$status" -ne 0 ]; then outcome="failed with status $status"; fi
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  echo "$name: $outcome ($((SECONDS - start)) s)" | tee -a "$out/summary.txt"
}

# speed NAME SECONDS OPTION...: a part of `crossflow benchmark speed`, into NAME.json and NAME.md.
speed() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m crossflow benchmark speed --output "$out/$name.json" --overwrite "$@"
}

runs=("$root"/tests/golden/runs/*/)
if [ -n "${SMALL:-}" ]; then
  tiny=(--small text.feature_width=64 source.width=64 source.hidden=64 source.heads=2 source.depth=1
        backbone.size=tiny data.image_size=64 train.batch_size=4 train.checkpointing=false)
  part agreement 80 "$python" -m crossflow benchmark agreement "${runs[@]:0:1}" --recipe depth_tiny \
    --output "$out/agreement.json" --overwrite
  speed training_dimr 90 --part training --recipe t2i_256_clip_dimr "${tiny[@]}" tower.width=64
  speed sampling_flowtok 90 --part sampling --recipe flowtok_xl --batch 2 "${tiny[@]}" sample.steps=2
  speed released_dimr 90 --part released --recipe t2i_256_clip_dimr --precision bf16 "${tiny[@]}"
else
  dit=(backbone.name=dit backbone.size=XL backbone.patch=2)
  part machine 10 nvidia-smi
  part agreement 60 "$python" -m crossflow benchmark agreement "${runs[@]}" --recipe depth_tiny --recipe t2i_tiny \
    --output "$out/agreement.json" --overwrite
  speed training_dimr 85 --part training --recipe t2i_256_clip_dimr --compile yes \
    train.batch_size=24 train.checkpointing=false train.num_workers=8
  speed training_dit 65 --part training --recipe t2i_256_clip_dimr --compile yes \
    train.batch_size=64 train.checkpointing=false train.num_workers=8 "${dit[@]}"
  speed sampling_flowtok 75 --part sampling --compile yes --recipe flowtok_xl --batch 64 data.image_size=256
  speed sampling_dimr 105 --part sampling --compile yes --recipe t2i_256_clip_dimr --batch 16
  speed released_dimr 75 --part released --recipe t2i_256_clip_dimr --precision bf16 \
    train.batch_size=16 train.checkpointing=false train.compile=true train.num_workers=8
  speed released_dit 60 --part released --recipe t2i_256_clip_dimr --precision bf16 \
    train.batch_size=32 train.checkpointing=false train.compile=true train.num_workers=8 "${dit[@]}"
fi

echo "$failed parts failed; results: $out" | tee -a "$out/summary.txt"
exit "$failed"
