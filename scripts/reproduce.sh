#!/usr/bin/env bash
# The papers' comparison of the four cases, with three seeds and the control that they lack, and its report.
#   bash scripts/reproduce.sh small DIR   # 5-layer CNN, Fashion-MNIST in DIR: minutes on two CPU cores
#   bash scripts/reproduce.sh full DIR    # the authors' setting: ResNet-18, CIFAR-100 in DIR, 300 epochs; days on a GPU
# Run again, it repeats no finished run and resumes the others.
set -euo pipefail
case "${1:-}" in
    small) jobs=2 trainer=cpu ;;
    full) jobs=1 trainer=gpu ;;
    *)
        echo "usage: bash scripts/reproduce.sh small|full DIR" >&2
        exit 2
        ;;
esac
root=${2:?"give the folder of the data: bash scripts/reproduce.sh $1 DIR"}
if [ "$jobs" -gt 1 ]; then
    export OMP_NUM_THREADS=1 # a core for each run
    launcher="hydra/launcher=joblib hydra.launcher.n_jobs=$jobs"
fi
# shellcheck disable=SC2086
bsl-train experiment=four_cases scale="$1" trainer="$trainer" data.root="$root" ${launcher:-}
bsl-report "runs/four_cases_$1" --baseline constant_decaying
