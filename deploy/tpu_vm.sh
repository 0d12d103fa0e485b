#!/bin/bash
# A Cloud TPU slice, and the run on every host of it: docs/pods.md says what to set up before.
#
#   export PROJECT=my-project ZONE=us-west4-a SHARE=10.0.0.2:/pod REPOSITORY=https://my.git/forgejax
#   deploy/tpu_vm.sh create
#   deploy/tpu_vm.sh run --mesh=v5e-64 --config configs/qwen3_8b_v5e64.toml
#   deploy/tpu_vm.sh delete
#
# SLICE (forgejax), TYPE (v5litepod-64), VERSION (v2-alpha-tpuv5-lite) and COMMIT (main) have these defaults.
set -euo pipefail

SLICE=${SLICE:-forgejax} TYPE=${TYPE:-v5litepod-64} VERSION=${VERSION:-v2-alpha-tpuv5-lite} COMMIT=${COMMIT:-main}
: "${PROJECT:?set PROJECT, the Google Cloud project}" "${ZONE:?set ZONE, as us-west4-a}"

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$SLICE" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
create)
    : "${SHARE:?set SHARE, a Filestore share in the region of ZONE}" "${REPOSITORY:?set REPOSITORY, to clone from}"
    gcloud compute tpus tpu-vm create "$SLICE" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$TYPE" --version="$VERSION"
    # Every host has the same code and packages, and one folder of models and runs: all hosts write to a checkpoint.
    on_every_host "set -eu; sudo apt-get install -yq nfs-common; sudo mkdir -p /pod
        mountpoint -q /pod || sudo mount -t nfs $SHARE /pod; sudo mkdir -p -m 777 /pod/models /pod/runs
        [ -d forgejax ] || git clone -q $REPOSITORY forgejax; cd forgejax; git fetch -q; git checkout -q $COMMIT
        make env; .venv/bin/python -m pip install -q -r requirements-tpu.txt
        ln -sfn /pod/models models; ln -sfn /pod/runs runs"
    ;;
run)
    shift
    # --resume=auto: the same command begins a run, and goes on with it after a preemption.
    on_every_host "cd forgejax && . .venv/bin/activate && python scripts/train.py --run.name=$SLICE --resume=auto $*"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$SLICE" --project="$PROJECT" --zone="$ZONE" --quiet
    ;;
*)
    sed -n '2,9p' "$0" >&2
    exit 2
    ;;
esac
