#!/usr/bin/env bash
# First process of a container: runs a launch script, passes the scheduler's signals on, returns its exit code.
#
#   entry.sh SCRIPT [flags...]
#
# RETRY_EXIT_CODE: what to return instead of 75 (stopped after saving) and 6 (a rank was lost), for schedulers that
# decide by the code whether another attempt is worth it.
set -uo pipefail

bash "$@" &
CHILD=$!
trap 'kill -TERM "$CHILD" 2>/dev/null' TERM INT
trap 'kill -USR1 "$CHILD" 2>/dev/null' USR1
while :; do
    wait "$CHILD"
    CODE=$?
    kill -0 "$CHILD" 2>/dev/null || break # a signal ended the wait, not the script
done
if [[ -n ${RETRY_EXIT_CODE:-} && ($CODE == 75 || $CODE == 6) ]]; then
    echo "exit code $CODE: asking for another start with $RETRY_EXIT_CODE" >&2
    CODE=$RETRY_EXIT_CODE
fi
exit "$CODE"
