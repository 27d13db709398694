"""Whole pipelines on a cluster: tokenise, cache, train every point of a sweep, evaluate, collect.

`python -m launch.submit +experiment=... +sweep=... slurm=<cluster>` checks everything, submits and returns;
`launch.status`, `launch.logs`, `launch.cancel` and `launch.collect` take the sweep's folder.
"""
