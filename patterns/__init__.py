"""Who may attend to whom on a grid of patches. Imports no torch, except to make tensors."""
