"""What `benchmark.py` measures: attention, whole models, the data pipeline, training."""
