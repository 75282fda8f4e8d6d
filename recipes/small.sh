#!/usr/bin/env bash
# Train the shipped model: small, phase 2, on clips and scenes under permissive licences (small_sources.csv), in 16 minutes of one
# H200. CLIPS is a folder with the clips that small_sources.csv lists, PHOTOGRAPHS one with its photographs.
#
#     CLIPS=clips PHOTOGRAPHS=photographs VAL=val recipes/small.sh OUT
#
# Seen: NVIDIA H200, 16 cores, torch 2.11.0+cu130, triton 3.6.0, PyAV 18.1.0, OpenCV 5.0.0. PSNR on 62 of 738 triplets of six other
# clips (frame average 22.30 dB): 27.24 dB after the first run (340 s), 27.65 after the second (405 s), 27.79 after the third (224 s).
set -euo pipefail
out=${1:?give a folder for shards and runs}

video() { python -m shards.video --codec jpeg --max_height 540 --workers 14 "$@"; }
scenes() {
    python -m shards.synthetic --style rich --photographs "$PHOTOGRAPHS" --frames 5 --codec jpeg --quality 96 --no-flow \
        --samples_per_shard 64 --workers 16 "$@"
}
train() {
    accelerate launch --config_file accelerate_configs/single_gpu.yaml -m vfi.train --val_path "$out/val" --val_samples 62 \
        --phase 2 --preset small --optimizer muon --ema 0.999 --cuda_graphs --batch_size 32 --num_workers 16 --log_every 100 \
        --val_every 4000 --save_every 4000 --output_dir "$out/runs" "$@"
}

video --src "$CLIPS" --out "$out/clips5" --frames 5 --step 2
video --src "$CLIPS" --out "$out/clips9" --frames 9 --step 2
video --src "$CLIPS" --out "$out/clips17" --frames 17 --step 4
python -m shards.video --src "$VAL" --out "$out/val" --split val --codec qoi --workers 8

# three stills of each clip serve as photographs, too
python recipes/stills.py "$out/clips5" "$PHOTOGRAPHS/stills"
scenes --out "$out/scenes0" --size 256x320 --samples 6000 --seed 0
scenes --out "$out/scenes1" --size 256x320 --samples 4000 --seed 1
scenes --out "$out/scenes2" --size 320x448 --samples 2400 --seed 2 --max_motion 160

train --exp_name small_1 --data_path "$out/clips9" "$out/clips5" "$out/scenes0" --mixed_ratio 3:2:5 \
    --sequence random_gap random_time random_time --steps 4597 --lr 1e-3 --lr_min 1e-5 --warmup_steps 300 --crop 224

# from here on with larger motion: gaps of up to eight frames, scenes that move by half their height
more=(--data_path "$out/clips9" "$out/clips17" "$out/scenes1" "$out/scenes2" --mixed_ratio 3:2:3:3
    --sequence random_gap random_gap random_time random_time)
train --exp_name small_2 --start_from small_1 "${more[@]}" --steps 8000 --lr 1e-3 --lr_min 5e-4 --warmup_steps 300 --crop 224
train --exp_name small --start_from small_2 "${more[@]}" --steps 4320 --lr 5e-4 --lr_min 5e-6 --warmup_steps 100 --crop 256

vfi export "$out/runs/small" --out "$out/small" --dtype fp16 --licence apache-2.0 --sources recipes/small_sources.csv \
    --trained-on "clips under permissive licences" "generated scenes" --recipe "$(cat recipes/small.sh)" --hours 0.27
