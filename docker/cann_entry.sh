#!/usr/bin/env bash
# Loads CANN, then becomes the command.
set -eo pipefail # not -u: the vendor's script reads unset variables
for cann in /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit; do
    if [[ -f $cann/set_env.sh ]]; then
        # shellcheck disable=SC1091
        source "$cann/set_env.sh"
        break
    fi
done
exec "$@"
