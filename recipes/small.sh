#!/usr/bin/env bash
# Train the shipped model: small, phase 2, on clips and scenes under permissive licences (small_sources.csv), in 6 minutes of one
# H200. CLIPS is a folder with the clips that small_sources.csv lists, PHOTOGRAPHS one with its photographs.
#
#     CLIPS=clips PHOTOGRAPHS=photographs VAL=val recipes/small.sh OUT
#
# Seen: NVIDIA H200, 16 cores, torch 2.11.0+cu130, triton 3.6.0, PyAV 18.1.0, OpenCV 5.0.0; 4,597 steps in 340 s, 475 samples/s.
# On 738 triplets of six other clips (PSNR, 8 bits): 27.41 dB; frame average 22.34, RIFE HDv3 27.49, 3.9 27.34, 4.25 27.84.
set -euo pipefail
out=${1:?give a folder for shards and runs}

python -m shards.video --src "$CLIPS" --out "$out/clips9" --frames 9 --step 2 --codec jpeg --max_height 540 --workers 8
python -m shards.video --src "$CLIPS" --out "$out/clips5" --frames 5 --step 2 --codec jpeg --max_height 540 --workers 8
python -m shards.video --src "$VAL" --out "$out/val" --split val --codec qoi --workers 8

# three stills of each clip serve as photographs, too
python recipes/stills.py "$out/clips5" "$PHOTOGRAPHS/stills"
python -m shards.synthetic --out "$out/scenes" --style rich --photographs "$PHOTOGRAPHS" --size 256x320 --frames 5 --codec jpeg \
    --quality 96 --no-flow --samples 6000 --samples_per_shard 64 --workers 16

accelerate launch --config_file accelerate_configs/single_gpu.yaml -m vfi.train \
    --data_path "$out/clips9" "$out/clips5" "$out/scenes" --mixed_ratio 3:2:5 --sequence random_gap random_time random_time \
    --val_path "$out/val" --val_samples 62 --phase 2 --preset small --steps 4597 --optimizer muon --lr 1e-3 --lr_min 1e-5 \
    --warmup_steps 300 --ema 0.999 --cuda_graphs --batch_size 32 --crop 224 --num_workers 14 --log_every 100 --val_every 1500 \
    --output_dir "$out/runs" --exp_name small

vfi export "$out/runs/small" --out "$out/small" --dtype fp16 --licence apache-2.0 --sources recipes/small_sources.csv \
    --trained-on "clips under permissive licences" "generated scenes" --recipe "$(cat recipes/small.sh)" --hours 0.1
