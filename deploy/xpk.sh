#!/bin/bash
# The same by xpk, on a cluster that xpk has made, with a Filestore share attached to it at /pod (xpk storage attach):
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-west4-a IMAGE=... deploy/xpk.sh
set -euo pipefail
: "${CLUSTER:?set CLUSTER}" "${PROJECT:?set PROJECT}" "${ZONE:?set ZONE}" "${IMAGE:?set IMAGE, built by deploy/Dockerfile}"

xpk workload create \
    --workload=forgejax \
    --cluster="$CLUSTER" \
    --project="$PROJECT" \
    --zone="$ZONE" \
    --tpu-type=v5litepod-64 \
    --num-slices=1 \
    --docker-image="$IMAGE" \
    --max-restarts=50 \
    --command="cd /forgejax && python scripts/train.py --mesh=v5e-64 --config configs/qwen3_8b_v5e64.toml --policy.path=/pod/models/qwen3-8b --run.root=/pod/runs --run.name=forgejax --resume=auto"
