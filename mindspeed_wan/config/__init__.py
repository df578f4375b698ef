"""What the user wrote, read once and checked before anything starts.

``schema``        the resolved configuration (``RunConfig``) that every other room reads; its parts in ``sections_*``
``flags``         the Megatron-style command line; ``flags.parse(argv)`` is the way in; rows in ``flag_table*``
``load``          files, then flags, to one ``RunConfig``; ``load_files`` without a command line
``mm_files``      MindSpeed-MM's model.json and data.json as users spell them; ``fsdp2_file`` the YAML
``translate``     those spellings to sections, each exactly once; ``expert_range`` which sigmas an expert owns
``documents``     JSON with comments (``jsonc``) and YAML, with the line of every key; ``validate`` their mistakes
``rules``         checks that need more than one value (``rules_run``, ``rules_model``), notes on likely mistakes
``describe``      the summary of a dry run; ``help`` the text of --help
``json_schema``   schemas for editors; ``docs`` makes docs/reference/flags.md

Nothing here imports torch: a bad key is reported before the slow imports begin.
"""
