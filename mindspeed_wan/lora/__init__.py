"""Low-rank adapters: which modules they sit on, every file format in the wild, layers, merging, verification.

=========== ====================================================================================================
spec        targets and their names in every dialect, ranks and scales (no torch)
formats     one reader into ``LoraFile``, one writer per format
layers      adapters at run time on our linear layers, tensor parallel included
apply       attach, load, weigh, unload and export the adapters of a model
merge       fp32 merging and what a bf16 result loses of the adapter; ``merge_model`` in memory, ``merge_files`` on disk
svd         adapters from a fine-tuned model, and adapters of another rank
verify      is this file whole, which model and expert is it for, does it do what it should
=========== ====================================================================================================
"""
