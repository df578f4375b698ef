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
# The driver's libraries are the host's, mounted in; not every base image looks for them.
driver=/usr/local/Ascend/driver/lib64
if [[ -d $driver && :${LD_LIBRARY_PATH:-}: != *:$driver/driver:* ]]; then
    export LD_LIBRARY_PATH=$driver/common:$driver/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
exec "$@"
