"""What the user wrote, read once and checked before anything starts.

``schema``      the resolved configuration (``RunConfig``) that every other room reads
``flags``       the Megatron-style command line; ``flags.parse(argv)`` is the way in
``mm_files``    MindSpeed-MM's model.json and data.json as their users spell them
``documents``   JSON with comments and YAML, with the file and line of every key
``load``        files and flags -> ``RunConfig``; every spelling is translated exactly once, here
``rules``       checks that need more than one key; ``describe``: the dry run's summary
``json_schema`` schemas for editors; ``docs`` writes docs/reference/flags.md

Nothing here imports torch: a bad key is reported before the slow imports begin.
"""
