#!/usr/bin/env bash
# The papers' comparison of the four cases, with three seeds and the control that they lack, and its report.
#   bash scripts/reproduce.sh small DIR   # 5-layer CNN, Fashion-MNIST in DIR: minutes on two CPU cores
#   bash scripts/reproduce.sh full DIR    # the authors' setting: ResNet-18, CIFAR-100 in DIR, 300 epochs; days on a GPU
# Run again, it repeats no finished run and resumes the others.
set -euo pipefail
case "${1:-}" in
    small) experiment=p1_cases_small jobs=2 trainer=cpu ;;
    full) experiment=p1_cases jobs=1 trainer=gpu ;;
    *)
        echo "usage: bash scripts/reproduce.sh small|full DIR" >&2
        exit 2
        ;;
esac
root=${2:?"give the folder of the data: bash scripts/reproduce.sh $1 DIR"}
here=$(dirname "$0")
if [ "$jobs" -gt 1 ]; then
    export OMP_NUM_THREADS=1 # a core for each run
    launcher="hydra/launcher=joblib hydra.launcher.n_jobs=$jobs"
fi
# shellcheck disable=SC2086
python "$here/train.py" experiment="$experiment" trainer="$trainer" data.root="$root" ${launcher:-}
python "$here/report.py" "runs/$experiment" --baseline constant_decaying
