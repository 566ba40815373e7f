"""Many runs: what to run, on which slots, on this machine or under Slurm."""
