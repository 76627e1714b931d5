#!/usr/bin/env bash
# Everything that a GPU has to show, in one report: bash benchmarks/gpu.sh [report.md]. DEVICE=cpu goes the same way.
set -euo pipefail
cd "$(dirname "$0")/.."
device="${DEVICE:-cuda}"
report="${1:-gpu-report.md}"

run() {
    printf '\n## %s\n\n' "$*"
    "$@"
}

{
    printf '# %s\n' "$(uv run python -c "import sys; sys.path.insert(0, 'benchmarks'); import measure; print(measure.machine('$device'))")"
    run uv run python benchmarks/loss.py --device "$device" ${QUICK:+--quick --seconds 0.2 --no-compile --cases kl}
    run uv run python benchmarks/step.py --device "$device" ${QUICK:+--rounds 1 --seconds 1 --no-compile}
    run uv run python benchmarks/cache.py --device "$device" ${QUICK:+--rounds 1 --steps 6 --calls 5}
    run uv run python benchmarks/scaling.py --device "$device" --processes 1 ${QUICK:+--steps 5}
    run uv run pytest -q tests/integration/test_accelerator.py
} | tee "$report"
