"""Where images come from, and what is done to them before `data.py` makes batches."""
