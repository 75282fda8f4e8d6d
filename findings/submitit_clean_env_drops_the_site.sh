#!/usr/bin/env bash
# submitit 1.5.4: clean_env, for submitting from inside a job, also hides how the site is reached and what the user has set.
# Behaviour:  Inside of helpers.clean_env every variable that begins with SLURM_, SLURMD_, SRUN_, SBATCH_ or SUBMITIT_ is gone: those of the
#             outer job, which it is for, and SLURM_CONF, which names the cluster, SLURM_CLUSTERS and the user's SBATCH_ACCOUNT.
# Output seen: all four are None inside; SLURM_JOB_ID should be.
# Expected:   what belongs to the outer job is hidden; what says where and for whom to submit stays, since sbatch reads
#             SLURM_CONF, SLURM_CLUSTERS and SBATCH_ACCOUNT itself (man sbatch, input environment variables).
# Exit code 1 if the behaviour changes.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet submitit==1.5.4
"$venv/bin/python" - <<'P'
import os

from submitit.helpers import clean_env

OUTER = {"SLURM_JOB_ID": "17"}
SITE = {"SLURM_CONF": "/etc/site/slurm.conf", "SLURM_CLUSTERS": "north", "SBATCH_ACCOUNT": "lab"}
os.environ |= OUTER | SITE
with clean_env():
    inside = {name: os.environ.get(name) for name in (*OUTER, *SITE)}
print(inside)
assert inside["SLURM_JOB_ID"] is None
if any(inside[name] for name in SITE):
    raise SystemExit("changed: some of the site's variables stay")
print("as described")
P
