# SPDX-License-Identifier: Apache-2.0
"""Starts runs on a Slurm cluster: sbatch files, launcher, checks of the nodes, chains of stages."""
