#!/usr/bin/env bash
# First process of a container: runs a launch script, passes the scheduler's signals on, returns its exit code.
#
#   entry.sh SCRIPT [flags...]
#
# RETRY_EXIT_CODE: what to return instead of 75 (stopped after saving) and 6 (a rank was lost), for schedulers that
# decide by the code whether another attempt is worth it.
set -uo pipefail

# The traps are there before the script is, so that no signal ends this shell alone; $! is the script.
trap 'kill -TERM "${!-}" 2>/dev/null' TERM INT
trap 'kill -USR1 "${!-}" 2>/dev/null' USR1
bash "$@" &
CHILD=$!
while :; do
    wait "$CHILD"
    kill -0 "$CHILD" 2>/dev/null || break # a signal ended the wait, not the script
done
wait "$CHILD" # its code, also where it ended while a signal was handled
CODE=$?
if [[ -n ${RETRY_EXIT_CODE:-} && ($CODE == 75 || $CODE == 6) ]]; then
    echo "exit code $CODE: asking for another start with $RETRY_EXIT_CODE" >&2
    CODE=$RETRY_EXIT_CODE
fi
exit "$CODE"
