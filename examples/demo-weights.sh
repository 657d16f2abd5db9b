#!/bin/sh
# How the bundled demo weights came about: AnchorNet on 8,000 scenes, one process on one CPU core,
# 82 minutes beside other work. demo-weights.jsonl is its log; the best weights, of epoch 8, are in
# the package.
set -eu

anchorpatch scenes data/scenes --train 8000 --val 600 --seed 0

OMP_NUM_THREADS=1 anchorpatch train --data data/scenes --runs runs/scenes --recipe small \
    --epochs 10 --crop-size 224 --min-area 0.8 --image-cache data/scenes-cache --workers 0 --seed 0

# The figures on fresh scenes, and the table of object size by chosen scale.
anchorpatch demo data/fresh --images 1000 --seed 5 --weights runs/scenes/anchornet/best.safetensors
