#!/usr/bin/env bash
# Debian packages that some tests need, as root: apt_install.sh PACKAGE …
# One call at a time, since test files run side by side and apt-get refuses to; each step has a time-out.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
exec flock --close --wait 200 /tmp/vfi-tests-apt.lock bash -c \
  'set -e; timeout 60 apt-get update -q; timeout 180 apt-get install -y -q --no-install-recommends "$@"' _ "$@" </dev/null >/dev/null
