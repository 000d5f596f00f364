#!/usr/bin/env bash
# The one gate, the same on a laptop, before a commit and in CI: ./check.sh runs every part below, ./check.sh types lint only
# those named, ./check.sh fix formats and mends what ruff can mend. Run it in the environment of pip install -e ".[test,dev,docs]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

format() { python -m ruff format --check .; }
lint() { python -m ruff check --output-format concise .; }
types() {
    # The root is the package `crossflow` without being called so; through this link mypy finds it under its name.
    mkdir -p .typing && ln -sfn .. .typing/crossflow
    python -m mypy
}
package() { python -m pytest -q tests/test_packaging.py tests/test_layering.py; }
docs() {
    mkdir -p .typing && ln -sfn .. .typing/crossflow # by which the reference finds the package
    NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
}
fix() { python -m ruff check --fix . && python -m ruff format .; }

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(format lint types package docs)
failed=()
for part in "${parts[@]}"; do
    case "$part" in
        format | lint | types | package | docs | fix) ;;
        *) echo "check: no part called '$part'; there are: format lint types package docs fix" >&2; exit 2 ;;
    esac
    echo "check: $part"
    "$part" || failed+=("$part")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "check: failed: ${failed[*]}" >&2
    exit 1
fi
echo "check: all passed (${parts[*]})"
