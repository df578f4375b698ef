"""What a job needs and how long it takes, before it starts; and the job files for a cluster. No torch anywhere here.

- ``devices``   accelerators and their links: presets and overrides
- ``job``       one job: model, clip, layout, what is trained and what is recomputed
- ``stages``    what each pipeline stage holds and has under way, and the bubble
- ``activations``  bytes kept for the backward pass
- ``memory``    bytes per rank, by part and by moment of a step
- ``traffic``   bytes per collective, and which links they cross
- ``duration``  seconds per step: compute, exposed communication, MFU
- ``layouts``   every layout of a device count, ranked, with the reason for each refused one
- ``joint``     both experts side by side: how the devices are divided; ``joint_report`` says so
- ``scaling``   weak and strong scaling to thousands of devices
- ``report``    all of it as text, JSON and plots
- ``cluster``   from one description to Slurm, Kubeflow, Volcano, AscendJob and ModelArts files
"""
