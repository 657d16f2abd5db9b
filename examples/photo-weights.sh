#!/bin/sh
# How the bundled weights for photographs came about: AnchorNet on the ten classes of Imagenette, 400
# photographs of each for training and 100 for validation, stretched to 224 x 224 px, with a pretrained
# EfficientNet-Lite0 as the teacher. DATA has train/ and val/. The first run was on one NVIDIA H200 and was
# stopped in epoch 23 of 45, after 2.5 minutes beside other work; the second goes on from its best
# weights, on one CPU core, for 33 minutes beside other work. photo-weights.jsonl is the log of both.
set -eu

teacher="--teacher timm:tf_efficientnet_lite0 --distill-weight 0.5 --temperature 1"

anchorpatch train --data DATA --runs runs/first --recipe small --epochs 45 --batch-size 64 $teacher \
    --image-cache cache --workers 3 --device cuda --seed 0

OMP_NUM_THREADS=1 anchorpatch train --data DATA --runs runs/photos --recipe small --epochs 12 \
    --batch-size 64 --lr 0.15 --init runs/first/anchornet/best.safetensors $teacher \
    --image-cache cache --workers 0 --device cpu --seed 1
