#!/usr/bin/env bash
# The whole chain on a laptop's CPU: a diffusion model learns real images, invents outliers, a detector
# learns from them, and a report shows what it brought. Further arguments go to jaxood.main, e.g.
#   launch/quickstart.sh --config.seeds='(0,1,2)' --workdir=/tmp/quickstart
set -euo pipefail
# shellcheck source=launch/shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
prepare core
exec "$python" -m jaxood.main --config="$here/configs/quickstart.py" \
  --workdir="$here/runs/quickstart" "$@"
