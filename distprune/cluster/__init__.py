"""Jobs on a SLURM cluster: the scripts, tables of tasks, and what is fetched ahead."""
