"""Job files for clusters, all from one description.

- ``spec``        the description: a YAML file, checked with its lines
- ``environment`` the variables every node gets
- ``slurm``       an sbatch script
- ``kubernetes``  Kubeflow PyTorchJob, Volcano Job, MindCluster AscendJob
- ``modelarts``   the body of ModelArts' create-training-job request
- ``render``      target name -> files
"""
