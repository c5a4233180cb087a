#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes; run it again to continue. See tests/gpu/report.py --help.
#
#   tests/gpu/run_all.sh --output_dir runs/gpu
#   tests/gpu/run_all.sh --output_dir runs/gpu_dry --dry_run      no GPU: tiny networks, no measurement
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec python tests/gpu/report.py "$@"
