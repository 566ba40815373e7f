"""The machine under a run: hardware, processes, requests to stop."""
