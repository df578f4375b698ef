"""The command line: ``mindspeed-wan`` and its sub-commands, and the launcher that starts the ranks of a job."""
